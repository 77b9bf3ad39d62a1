"""The MiniLM part of ``ingress``: a model that computes, behind the direct port, and by itself.

The sentence encoder as one unit: token ids ``[b, 16]`` in, embeddings out, eight sentences a batch.
A device actor's process serves it on one processor; router, door and load generator have another.
Asked by more connections than a batch has rows, it always has a batch to form; the same process
then runs the same executable, on the same processor, with nothing around it: rows laid out, the
program, its outputs looked at. Both alternate within a run, and the ratio is of neighbours.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson
import uvloop

from bench.device_actor import Bare, BareLoop
from bench.device_scene import Control, device_under_router
from bench.errors import AnswersDiffer, ToolMissing
from bench.ingress_result import Part
from bench.load import Outcome, Request, closed_loop
from bench.peers import ask
from bench.registry import Options
from bench.report import Figure, Table
from bench.stats import Histogram, bootstrap, paired_ratio

__all__ = ["measure_minilm"]

_NAME: Final = "minilm"
_TOKENS: Final = 16
_BATCH: Final = 8
#: Four batches' worth: one runs, and the next is whole before it ends.
_CONNECTIONS: Final = 4 * _BATCH
#: Asked for in turn; wrk's script cannot name many more.
_SENTENCES: Final = _BATCH
#: Of embeddings, whose length is one: another program of the same mathematics rounds otherwise.
_TOLERANCE: Final = 1e-4

Ids = npt.NDArray[np.int32]


def measure_minilm(options: Options) -> Part:
    """Measure on a device actor of its own.

    Raises:
        ToolMissing: the model is not installed; says how it would be.
        AnswersDiffer: the door answers something else than the model says.
        ContenderFailed: the actor did not start.
    """
    with tempfile.TemporaryDirectory(prefix="shardserve-") as name:
        ids = _ids(options.seed)
        expected = _save(Path(name) / "store", ids)
        return uvloop.run(_measure(Path(name), ids, expected, options))


def _ids(seed: int) -> Ids:
    """Sentences ``[_SENTENCES, _TOKENS]`` of words at random, all of them full."""
    generator = np.random.default_rng((seed, 2))
    return generator.integers(1000, 30_000, (_SENTENCES, _TOKENS), np.int32)


def _save(store: Path, ids: Ids) -> npt.NDArray[np.float32]:
    """Save the encoder as one unit; returns what it says of a batch, computed by itself."""
    # Here, since they import JAX.
    import jax

    import shards
    from cluster.demo import minilm, minilm_files
    from cluster.demo.errors import FilesMissing

    try:
        files = minilm_files.find()
    except FilesMissing as error:
        raise ToolMissing(str(error)) from error
    params = {
        "words": minilm_files.read_words(files.weights),
        "encoder": minilm_files.read_params(files.weights),
    }

    def embed(params: Mapping[str, Any], ids: jax.Array) -> jax.Array:
        mask = jax.numpy.ones_like(ids)
        return minilm.encode(params["encoder"], params["words"][ids], mask)["embedding"]

    shards.save(
        embed,
        params,
        store,
        _NAME,
        version=1,
        inputs={"ids": shards.Spec(("b", _TOKENS), "int32")},
        batch_buckets=(1, _BATCH),
    )
    said: npt.NDArray[np.float32] = np.asarray(jax.jit(embed)(params, ids[:_BATCH]))
    return said


async def _measure(
    folder: Path, ids: Ids, expected: npt.NDArray[np.float32], options: Options
) -> Part:
    # Here, as they belong to the product.
    from cluster.doors.rest import RestDoor
    from cluster.doors.service import Service
    from cluster.metrics import Metrics

    async with device_under_router(folder, [_NAME]) as (control, router, _):
        service = Service(router, Metrics())
        door = RestDoor(service)
        url = f"http://127.0.0.1:{await door.open('127.0.0.1', 0)}"
        try:
            await asyncio.to_thread(_check, url, ids, expected)
            return await asyncio.to_thread(_rounds, url, control, ids, options)
        finally:
            await door.close()
            service.close()


def _request(rows: Ids) -> Request:
    body = orjson.dumps({"instances": rows.tolist()})
    return Request(path=f"/v1/models/{_NAME}:predict", body=body)


def _check(url: str, ids: Ids, expected: npt.NDArray[np.float32]) -> None:
    for count in (1, 3, _BATCH):
        answer = orjson.loads(ask(url, _request(ids[:count])))["predictions"]
        gap = float(np.max(np.abs(np.asarray(answer, np.float32) - expected[:count])))
        if not gap <= _TOLERANCE:
            raise AnswersDiffer(f"the door and the model differ by {gap:g} on {count} rows")


def _rounds(url: str, control: Control, ids: Ids, options: Options) -> Part:
    seconds = 4.0 if options.quick else 10.0
    requests = [_request(ids[number : number + 1]) for number in range(_SENTENCES)]
    bare: list[float] = []
    served: list[Outcome] = []

    def load(duration_s: float) -> Outcome:
        return closed_loop(url, requests, connections=_CONNECTIONS, duration_s=duration_s)

    def run_bare() -> None:
        found = control.tell(Bare(_NAME, seconds / 2), BareLoop)
        bare.append(found.bucket * found.runs / found.seconds)

    load(1.0)
    run_bare()
    for number in range(options.rounds_or(quick=2, full=5)):
        print(f"minilm: round {number + 1}", file=sys.stderr)
        outcome = load(seconds)
        outcome.must_be_clean("minilm")
        served.append(outcome)
        run_bare()
    return _part(bare, served, options)


def _part(bare: Sequence[float], served: Sequence[Outcome], options: Options) -> Part:
    """What was found: every load between two runs of the bare loop."""
    beside = [(before + after) / 2 for before, after in pairwise(bare)]
    rates = [outcome.rate for outcome in served]
    ratio = paired_ratio(rates, beside, seed=options.seed)
    latency = Histogram.pooled([outcome.latency_us for outcome in served])
    figures: dict[str, Figure] = {
        "minilm_rows_per_s": bootstrap(rates, seed=options.seed).value,
        "minilm_bare_rows_per_s": bootstrap(beside, seed=options.seed).value,
        "minilm_p50_ms": latency.percentile(50) / 1e3,
        "minilm_p99_ms": latency.percentile(99) / 1e3,
        "minilm_interval": [ratio.low, ratio.high],
    }
    rows = [(name, value) for name, value in figures.items() if isinstance(value, float)]
    title = f"MiniLM, {_TOKENS} tokens, {_CONNECTIONS} connections, direct port"
    return Part(
        ratios={"minilm_vs_bare_loop": ratio.value},
        figures=figures,
        table=Table(title=title, columns=("what", "value"), rows=(*rows, ("ratio", ratio))),
    )
