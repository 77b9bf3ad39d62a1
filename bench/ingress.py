"""``ingress``: the product's doors against other people's servers, on one machine, in one run.

The same model with the same parameters behind each, the same rows, answers compared before
anything is timed. Each peer is measured beside the product alone, which has its direct port open
and no Ray Serve; the Ray Serve door is measured beside an application that does nothing. A peer
that cannot be installed or started is told as absent, with its reason, and the ratios to it are
not told.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from bench import ingress_result
from bench.elsewhere import await_calm
from bench.errors import BenchError, ToolMissing
from bench.ingress_doors import our_doors
from bench.ingress_minilm import measure_minilm
from bench.ingress_model import MODELS, Model, draw
from bench.ingress_overload import measure_overload
from bench.ingress_peers import JsonPeer, TritonPeer, installed
from bench.ingress_ray import RayServePeer
from bench.ingress_result import Outcomes, Part
from bench.load import Outcome, tool
from bench.peers import Draw, Peer, Scenario, compare_answers, measure
from bench.registry import Bench, Options
from bench.report import Figure, Result, machine

__all__ = ["BENCH"]

PEERS: Final = ("mosec", "litserve", "triton", "ray-serve", "ray-serve-haproxy")
#: Model to connections that are kept busy.
_SCENES: Final[Mapping[str, tuple[int, ...]]] = {"mlp": (1, 32), "mlp512": (32,), "megabyte": (4,)}
_PARTS: Final = (*_SCENES, "serve", "minilm", "overload")
_SERVE_SCENE: Final = "mlp"
_PATHS: Final = {"mosec": "/inference", "litserve": "/predict"}

_TOOLS: Final[Mapping[str, str]] = {
    "wrk": "Load by wrk -t1, on the same processors as the servers; nothing is pinned.",
    "own": "wrk is not installed (apt-get install wrk): load by our own, slower generator.",
}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peers",
        default="",
        help=f"of {','.join(PEERS)}, or all; with --quick mosec alone, else all by default",
    )
    parser.add_argument(
        "--parts",
        default="",
        help=f"of {','.join(_PARTS)}; with --quick mlp alone, else all",
    )
    parser.add_argument(
        "--peers-folder",
        type=Path,
        default=Path("~/.cache/shardserve/bench-peers"),
        help="where the peers' environments are, or will be made (2.2 GB for all)",
    )


def _run(options: Options) -> Result:
    # Before the load, so that the load average is what others do.
    conditions = machine()
    wanted = options.own.peers or ("mosec" if options.quick else "all")
    names = PEERS if wanted == "all" else tuple(wanted.split(","))
    wanted = options.own.parts or ("mlp" if options.quick else ",".join(_PARTS))
    parts = tuple(wanted.split(","))
    unknown = {*names} - {*PEERS} | {*parts} - {*_PARTS}
    if unknown:
        raise BenchError(f"neither a peer nor a part: {', '.join(sorted(unknown))}")
    casts: list[Outcomes] = []
    absent: dict[str, str] = {}
    equal = True
    for model in (part for part in parts if part in _SCENES):
        # Closed here whatever happens, so that nobody's servers stay.
        with contextlib.closing(_casts(MODELS[model], names, options, absent)) as made:
            for peers, urls in made:
                equal &= compare_answers(
                    peers, urls, seed=options.seed, draw=_draw(model), counts=_counts(model)
                )
                casts.append(_measure(model, peers, urls, options))
    if "serve" in parts:
        with _serve_doors(options) as (peers, urls):
            casts.append(_measure(_SERVE_SCENE, peers, urls, options))
    alone: list[Part] = []
    if "minilm" in parts:
        try:
            alone.append(measure_minilm(options))
        except ToolMissing as error:
            absent["minilm"] = str(error)
    if "overload" in parts:
        alone.append(measure_overload(options))
    conditions["answers_bit_equal"] = equal
    return _result(casts, alone, absent, conditions, options)


def _draw(model: str) -> Draw:
    return lambda count, seed: draw(MODELS[model], count, seed)


def _counts(model: str) -> tuple[int, ...]:
    """Rows of the requests that are compared; Triton takes no more than its largest batch."""
    most = MODELS[model].buckets[-1]
    return tuple(count for count in (1, 3, 8, 33) if count <= most)


def _measure(
    model: str, peers: Sequence[Peer], urls: Mapping[str, str], options: Options
) -> dict[tuple[str, str], list[Outcome]]:
    duration_s, warm_up_s = (1.0, 0.3) if options.quick else (2.0, 0.5)
    scenarios = [
        Scenario(
            key=f"c{connections}",
            connections=connections,
            duration_s=duration_s,
            warm_up_s=warm_up_s,
        )
        for connections in _SCENES[model]
    ]
    rounds = options.rounds_or(quick=2, full=5)
    if not await_calm():
        print("others are still at work beside what is measured", file=sys.stderr)
    found = measure(peers, urls, scenarios, rounds=rounds, seed=options.seed, draw=_draw(model))
    return {(name, f"{model}_{scene}"): each for (name, scene), each in found.items()}


def _casts(
    model: Model, names: Sequence[str], options: Options, absent: dict[str, str]
) -> Generator[tuple[list[Peer], dict[str, str]]]:
    """Those who run at the same time, one cast after the other: each peer beside the product.

    Whoever only waits for its turn takes part of the processors, too: all five peers with their
    clusters a quarter of two.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shardserve-")))
        (folder / "product").mkdir()
        own = our_doors(model, options.seed, folder / "product", with_serve=False)
        with own as doors:
            ours = {door.name: door for door in doors}
            beside = ours["product-binary" if model.name == "megabyte" else "product"]
            for name in names:
                # A tensor without JSON only Triton takes.
                if name in absent or (model.name == "megabyte" and name != "triton"):
                    continue
                with contextlib.ExitStack() as running:
                    (folder / name).mkdir()
                    try:
                        peer = _peer(name, model, options)
                        url = running.enter_context(peer.running(folder / name))
                    except BenchError as error:
                        print(f"{name} is absent: {error}", file=sys.stderr)
                        absent[name] = str(error)
                        continue
                    yield [peer, beside], {peer.name: url, beside.name: beside.url}
            if model.name == "mlp":
                yield list(doors), {door.name: door.url for door in doors}


@contextlib.contextmanager
def _serve_doors(options: Options) -> Iterator[tuple[list[Peer], dict[str, str]]]:
    """The Ray Serve door, and on the same Serve what does nothing."""
    with tempfile.TemporaryDirectory(prefix="shardserve-") as folder:
        model = MODELS[_SERVE_SCENE]
        with our_doors(model, options.seed, Path(folder), with_serve=True) as doors:
            serve: list[Peer] = [door for door in doors if door.name.endswith("-serve")]
            yield serve, {door.name: door.url for door in doors}


def _peer(name: str, model: Model, options: Options) -> Peer:
    if name.startswith("ray-serve"):
        return RayServePeer(model=model, seed=options.seed, fast=name.endswith("haproxy"))
    python = installed(name, options.own.peers_folder)
    if name == "triton":
        binary = model.name == "megabyte"
        return TritonPeer(python=python, model=model, seed=options.seed, binary=binary)
    return JsonPeer(name=name, path=_PATHS[name], python=python, model=model, seed=options.seed)


def _result(
    casts: Sequence[Outcomes],
    alone: Sequence[Part],
    absent: Mapping[str, str],
    conditions: Mapping[str, Figure],
    options: Options,
) -> Result:
    seed = options.seed
    compared = ingress_result.ratios(casts, seed=seed)
    outcomes = ingress_result.pooled(casts)
    estimates = ingress_result.estimates(outcomes, seed=seed)
    ratios = {key: estimate.value for key, estimate in compared.items()}
    tables = ingress_result.tables(casts, compared, seed=seed)
    figures: dict[str, Figure] = {key: estimate.value for key, estimate in estimates.items()}
    notes = [_TOOLS[tool()]]
    for part in alone:
        ratios |= part.ratios
        figures |= part.figures
        tables.append(part.table)
        notes += part.notes
    notes += [f"{name} is absent: {why.splitlines()[0]}" for name, why in absent.items()]
    return Result(
        bench=BENCH.name,
        ratios=ratios,
        figures={
            **figures,
            "intervals": {key: [each.low, each.high] for key, each in compared.items()},
            "absent": dict(absent),
            "generator": tool(),
            "quick": options.quick,
            "seed": seed,
            "machine": dict(conditions),
        },
        tables=tuple(tables),
        samples=ingress_result.samples(outcomes),
        plot=ingress_result.plot(outcomes),
        notes=tuple(notes),
    )


BENCH: Final = Bench(
    name="ingress",
    summary="the direct port and the Ray Serve door against mosec, LitServe, Triton, Ray Serve",
    run=_run,
    add_arguments=_add_arguments,
)
