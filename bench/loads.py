"""``load``: what a load takes, against reading and hashing the same bytes with nothing around it.

A table bundle in a directory, larger than any cache of a processor, warm in the page cache. A
process made of what a shard actor is made of (`bench.loads_actor`) loads it by the controller's
orders; the floors run in the same process, in turns. A second version with one row in a hundred
replaced is loaded beside the first; dense parameters go to a device; eight models start.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

import shards
from bench.cycles import Cycles, run_cycles
from bench.loads_actor import READY, Done, Job
from bench.processes import child, python
from bench.registry import Bench, Options
from bench.report import Figure, Plot, Result, Samples, Series, Table, machine
from bench.stats import Estimate, bootstrap, paired_ratio
from shards.specs import Spec

__all__ = ["BENCH", "Sizes"]

_DIM: Final = 64
_ROW_BYTES: Final = 4 * _DIM
_PARTITIONS: Final = 8
_MODELS: Final = 8
_WIDTH: Final = 512
_START_S: Final = 90.0
_CYCLES: Final = 50
_CYCLES_QUICK: Final = 10
_CYCLES_S: Final = 240.0
_TABLE, _DENSE = "table", "dense"

#: What is done in every round, in this order or the reverse: name to job, of the table bundle.
_JOBS: Final[Mapping[str, Job]] = {
    "read": Job(do="read", servables=(_TABLE,)),
    "load": Job(do="load", servables=(_TABLE,), touched=True),
    "digest": Job(do="digest", servables=(_TABLE,)),
    "ingest": Job(do="load", servables=(_TABLE,), verified=False),
    "delta": Job(do="delta", servables=(_TABLE,), verified=False, touched=True),
    "copy": Job(do="copy", servables=(_TABLE,)),
    "bring": Job(do="bring", servables=(_TABLE,)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large everything is.

    Attributes:
        table_bytes: of the table, and of the dense parameters.
        bucket_bytes: of the blobs that come from a bucket.
        model_bytes: of each of the models that start together.
    """

    table_bytes: int
    bucket_bytes: int
    model_bytes: int

    @classmethod
    def of(cls, options: Options) -> Sizes:
        """Those of a full or a quick run."""
        if options.quick:
            return cls(table_bytes=512 << 20, bucket_bytes=256 << 20, model_bytes=4 << 20)
        return cls(table_bytes=2 << 30, bucket_bytes=1 << 30, model_bytes=16 << 20)


#: Name of a job to what became of it, round by round.
Outcomes = Mapping[str, Sequence[Done]]


class _Worker:
    """The other process."""

    def __init__(self, link: socket.socket) -> None:
        self._lines = link.makefile("rwb")

    def do(self, job: Job) -> Done:
        """Have a job done."""
        self._lines.write(msgspec.json.encode(job) + b"\n")
        self._lines.flush()
        return msgspec.json.decode(self._lines.readline(), type=Done)


@contextlib.contextmanager
def _worker(folder: Path, kind: str) -> Iterator[_Worker]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = python(
            "bench.loads_actor", "--socket", str(theirs.fileno()), "--kind", kind,
            "--store", str(folder / "store"), "--scratch", str(folder / "scratch"),
        )  # fmt: skip
        with child(
            command,
            log=folder / f"{kind}.log",
            ready=READY,
            timeout_s=_START_S,
            environment={"JAX_PLATFORMS": "cpu"},
            pass_fds=(theirs.fileno(),),
        ):
            # Ours is then the only end on this side: when the process dies, reading ends.
            theirs.close()
            yield _Worker(ours)


def _save(store: Path, sizes: Sizes) -> None:
    _save_table(store, sizes)
    columns = sizes.table_bytes // 4 // _MODELS // _WIDTH
    _save_dense(store, _DENSE, columns, count=_MODELS, buckets=(1,))
    for number in range(_MODELS):
        columns = sizes.model_bytes // 4 // _WIDTH
        _save_dense(store, f"model{number}", columns, count=1, buckets=(1, 8), seed=number + 100)


def _save_table(store: Path, sizes: Sizes) -> None:
    """The table, and a version with one row in a hundred replaced."""
    rows = sizes.table_bytes // _ROW_BYTES // _PARTITIONS
    with shards.Bundle.create(store, _TABLE, 1) as bundle:
        table = bundle.table(
            "rows",
            lambda partition: [np.random.default_rng(partition).random((rows, _DIM), np.float32)],
            partitions=_PARTITIONS,
        )

        @bundle.signature(inputs={"ids": Spec(("b",), "int64")})
        def answer(ids: Any) -> Any:
            return {"rows": table.rows(ids)}

    some = np.arange(0, rows * _PARTITIONS, 100)
    with shards.Bundle.delta(store, _TABLE, base=1, version=2) as bundle:
        bundle.update_rows("rows", some, np.ones((len(some), _DIM), np.float32))


def _save_dense(
    store: Path, name: str, columns: int, *, count: int, buckets: tuple[int, ...], seed: int = 0
) -> None:
    """Parameters of which a program uses one row each: a step is no part of what is measured."""
    params = {
        f"w{number}": np.random.default_rng(seed + number).random((columns, _WIDTH), np.float32)
        for number in range(count)
    }
    shards.save(
        lambda p, x: {"y": x + sum(w[0] for w in p.values())},
        params,
        store,
        name,
        1,
        inputs={"x": Spec(("b", _WIDTH))},
        batch_buckets=buckets,
        platforms=("cpu",),
    )


def _measure(options: Options, sizes: Sizes) -> Outcomes:
    rounds = options.rounds_or(quick=3, full=7)
    outcomes: dict[str, list[Done]] = {}
    with tempfile.TemporaryDirectory(prefix="shardserve-") as name:
        folder = Path(name)
        print("saving", file=sys.stderr)
        _save(folder / "store", sizes)
        with _worker(folder, "shard") as worker:
            for number in range(-1, rounds):
                print(f"round {number + 1} of {rounds}", file=sys.stderr)
                for key in list(_JOBS)[:: 1 if number % 2 else -1]:
                    job = msgspec.structs.replace(_JOBS[key], bytes_max=sizes.bucket_bytes)
                    done = worker.do(job)
                    if number >= 0:  # the first is the warm-up
                        outcomes.setdefault(key, []).append(done)
            job = Job(do="load", servables=(_TABLE,), touched=True, sampled=True)
            outcomes["sampled"] = [worker.do(job)]
        with _worker(folder, "device") as worker:
            print("dense parameters, and models that start", file=sys.stderr)
            dense = Job(do="load", servables=(_DENSE,), sampled=True)
            outcomes["dense"] = [worker.do(dense) for _ in range(2)]
            models = tuple(f"model{number}" for number in range(_MODELS))
            for number in range(1 if options.quick else 3):
                for together in (True, False)[:: 1 if number % 2 else -1]:
                    job = Job(do="start", servables=models, verified=False, together=together)
                    key = "together" if together else "serial"
                    outcomes.setdefault(key, []).append(worker.do(job))
    return outcomes


def _seconds(outcomes: Outcomes, key: str) -> list[float]:
    return [each.seconds for each in outcomes[key]]


def _rates(outcomes: Outcomes, key: str) -> list[float]:
    """Bytes a second, round by round."""
    return [each.nbytes / each.seconds for each in outcomes[key]]


def _copy_and_digest(outcomes: Outcomes) -> list[float]:
    """Bytes a second of a copy and then the digest, one after the other."""
    pairs = zip(_rates(outcomes, "copy"), _rates(outcomes, "digest"), strict=True)
    return [1 / (1 / copy + 1 / digest) for copy, digest in pairs]


def _ratios(outcomes: Outcomes, *, seed: int) -> dict[str, Estimate]:
    digest, bring = _rates(outcomes, "digest"), _rates(outcomes, "bring")
    pairs = {
        "warm_bandwidth_vs_read": (_rates(outcomes, "load"), _rates(outcomes, "read")),
        "ingest_vs_digest_speed": (_rates(outcomes, "ingest"), digest),
        "delta_1pct_time_vs_full": (_seconds(outcomes, "delta"), _seconds(outcomes, "ingest")),
        "bucket_ingest_vs_digest_speed": (bring, digest),
        "bucket_ingest_vs_copy_and_digest": (bring, _copy_and_digest(outcomes)),
        "start_together_vs_serial": (_seconds(outcomes, "together"), _seconds(outcomes, "serial")),
    }
    return {key: paired_ratio(*pair, seed=seed) for key, pair in pairs.items()}


def _result(
    outcomes: Outcomes, cycles: Cycles, conditions: Mapping[str, Figure], *, seed: int
) -> Result:
    """All that is told of the outcomes."""
    ratios = _ratios(outcomes, seed=seed)
    [table], dense = outcomes["sampled"], outcomes["dense"]
    memory = {
        "peak_pss_vs_bytes": table.peak_bytes / table.nbytes,
        "dense_peak_pss_vs_bytes": max(each.peak_bytes for each in dense) / dense[0].nbytes,
        "dense_copies": max(each.anonymous_bytes for each in dense) / dense[0].nbytes,
        "delta_bytes_vs_full": outcomes["delta"][0].nbytes / outcomes["ingest"][0].nbytes,
        "delta_pss_vs_full": outcomes["delta"][0].pss_bytes / table.pss_bytes,
    }
    keys = ("read", "load", "digest", "ingest", "delta", "copy", "bring")
    rates = {key: bootstrap(_rates(outcomes, key), seed=seed) for key in keys}
    times = {key: bootstrap(_seconds(outcomes, key), seed=seed) for key in outcomes}
    return Result(
        bench=BENCH.name,
        ratios={key: each.value for key, each in ratios.items()}
        | memory
        | {"pss_after_50_cycles_vs_before": 1 + cycles.pss_growth},
        figures={
            **{f"{key}_gb_s": each.value / 1e9 for key, each in rates.items()},
            **{f"{key}_s": each.value for key, each in times.items()},
            "intervals": {key: [each.low, each.high] for key, each in ratios.items()},
            "cycles": len(cycles.footprints) - 1,
            **conditions,
        },
        tables=(_table(outcomes, rates, times), _ratio_table(ratios, memory, cycles)),
        samples={
            "jobs": Samples(
                columns=("job", "round", *Done.__struct_fields__),
                rows=[
                    (key, number, *msgspec.structs.astuple(done))
                    for key, rounds in outcomes.items()
                    for number, done in enumerate(rounds)
                ],
            )
        },
        plot=Plot(
            title="Loads of one store, warm",
            x_label="round",
            y_label="GB a second",
            series=tuple(
                Series(
                    label=key,
                    x=tuple(float(number) for number in range(len(outcomes[key]))),
                    y=tuple(rate / 1e9 for rate in _rates(outcomes, key)),
                )
                for key in keys
            ),
        ),
        notes=(
            "The page cache is warm: the store was just written, and is read in every round.",
            "A load touches one byte of every page; nothing else of the rows is read by it.",
            "An ingest is a load of blobs that the store does not remember: hashed where they lie.",
            "The bucket is a directory behind pyarrow, so without a network.",
            "Its blobs are copied to the node's cache: held against a copy, and then a digest.",
        ),
    )


def _table(
    outcomes: Outcomes, rates: Mapping[str, Estimate], times: Mapping[str, Estimate]
) -> Table:
    return Table(
        title="What was done",
        columns=("job", "MB", "s", "GB/s"),
        rows=tuple(
            (
                key,
                rounds[0].nbytes >> 20,
                times[key],
                Estimate(**{
                    name: getattr(rates[key], name) / 1e9 for name in ("value", "low", "high")
                }, rounds=rates[key].rounds) if key in rates else "",
            )
            for key, rounds in outcomes.items()
        ),
    )  # fmt: skip


def _ratio_table(
    ratios: Mapping[str, Estimate], memory: Mapping[str, float], cycles: Cycles
) -> Table:
    return Table(
        title="Ratios",
        columns=("ratio", "value"),
        rows=(
            *ratios.items(),
            *memory.items(),
            (f"pss_after_{len(cycles.footprints) - 1}_cycles_vs_before", 1 + cycles.pss_growth),
        ),
    )


def _run(options: Options) -> Result:
    # Before the load, so that the load average is what others do.
    conditions: dict[str, Figure] = {
        "quick": options.quick,
        "seed": options.seed,
        "machine": machine(),
    }
    outcomes = _measure(options, Sizes.of(options))
    print("cycles of loads and unloads", file=sys.stderr)
    cycles = run_cycles(
        _CYCLES_QUICK if options.quick else _CYCLES, keep_executables=True, timeout_s=_CYCLES_S
    )
    return _result(outcomes, cycles, conditions, seed=options.seed)


BENCH: Final = Bench(
    name="load",
    summary="loads, ingest and deltas against reading and hashing the same bytes",
    run=_run,
)
