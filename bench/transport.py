"""``transport``: the product's links between two processes, against plain Ray actor calls.

The far end is a process that echoes. Round trips of several sizes go one at a time, small ones also
many at a time, and small ones beside a frame of 256 MB on the very same link. What is measured of
the product is its own `shards.transport.Link`, not a model of it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import secrets
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import uvloop

from bench.errors import ToolMissing
from bench.processes import child, python
from bench.registry import Bench, Options
from bench.report import Figure, Plot, Result, Samples, Series, Table, histogram_samples, machine
from bench.stats import Estimate, Histogram, bootstrap, paired_ratio
from bench.transport_echo import GENERATION, LIMITS, NAME, NODE, SECRET_VARIABLE
from bench.transport_load import Contender, LinkContender, Payload, RayContender, Timed
from shards.orders import Endpoint, TlsFiles
from shards.transport import TlsContexts, connect

__all__ = ["BENCH"]

#: Bytes of the tensor that goes there and comes back.
SIZES: Final[Mapping[str, int]] = {
    "small": 64,
    "50kb": 50_000,
    "1mb": 1 << 20,
    "4mb": 4 << 20,
    "64mb": 64 << 20,
}
_BIG_BYTES: Final = 256 << 20
#: Small calls that are kept under way where the rate is measured.
_WINDOW: Final = 64
_START_S: Final = 30.0
_BUSY_SHARE_MAX: Final = 0.25
_PIPELINED: Final = "pipelined"
#: Whether the big frame is the call, or else the answer, to the name of the case.
_BEHIND: Final[Mapping[bool, str]] = {True: "behind_call", False: "behind_answer"}

_ENDS: Final = (
    "Both ends are processes of this machine; nothing is pinned. The far end answers with the very "
    "memory that it received."
)

#: Contender and case to what was measured, once a round.
Outcomes = Mapping[tuple[str, str], Sequence[Timed]]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-ray", action="store_true", help="measure the sockets alone; no ratio to Ray"
    )


def _run(options: Options) -> Result:
    # Before the load, so that the load average is what others do.
    conditions: dict[str, Figure] = {
        "quick": options.quick,
        "seed": options.seed,
        "machine": machine(),
    }
    outcomes = uvloop.run(_measure(options))
    return _result(outcomes, conditions, seed=options.seed)


async def _measure(options: Options) -> Outcomes:
    duration_s = 0.15 if options.quick else 0.5
    rounds = options.rounds_or(quick=3, full=9)
    random = np.random.default_rng(options.seed)
    payloads = {
        name: random.integers(0, 256, size, np.uint8)
        for name, size in {**SIZES, "256mb": _BIG_BYTES}.items()
    }
    outcomes: dict[tuple[str, str], list[Timed]] = {}
    async with _contenders(with_ray=not options.own.no_ray) as contenders:
        for contender in contenders:  # the warm-up, whose outcome is dropped
            await _visit(contender, payloads, duration_s / 4)
        gc.collect()
        gc.freeze()
        try:
            for number in range(rounds):
                print(f"round {number + 1} of {rounds}", file=sys.stderr)
                for contender in contenders if number % 2 == 0 else reversed(contenders):
                    timed = await _visit(contender, payloads, duration_s)
                    for case, found in timed.items():
                        outcomes.setdefault((contender.name, case), []).append(found)
        finally:
            gc.unfreeze()
    return outcomes


async def _visit(
    contender: Contender, payloads: Mapping[str, Payload], duration_s: float
) -> dict[str, Timed]:
    """Every case of one contender, once."""
    timed = {}
    for size in SIZES:
        timed[size] = await contender.round_trips(payloads[size], duration_s=duration_s, window=1)
    timed[_PIPELINED] = await contender.round_trips(
        payloads["small"], duration_s=duration_s, window=_WINDOW
    )
    if isinstance(contender, LinkContender) and contender.big:
        for outward, case in _BEHIND.items():
            timed[case] = await contender.small_behind(
                payloads["small"], payloads["256mb"], outward=outward
            )
    return timed


@contextlib.asynccontextmanager
async def _contenders(*, with_ray: bool) -> AsyncIterator[Sequence[Contender]]:
    """All contenders, in the order of a round; they live as long as the context."""
    secret = secrets.token_hex(16)
    contenders: list[Contender] = []
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shardserve-")))
        pem = _certificate(folder)
        plain = _far_end("plain", folder, secret, stack)
        secured = _far_end("tls", folder, secret, stack, "--tls", str(pem))
        unshared = dataclasses.replace(LIMITS, shared_bytes_max=0)
        tls = TlsContexts(TlsFiles(certificate=str(pem), key=str(pem), ca=str(pem)))
        for name, endpoint, node, limits in (
            ("uds", plain, NODE, LIMITS),
            ("uds_unshared", plain, NODE, unshared),
            ("tcp", plain, "another node", LIMITS),
            ("tls", secured, "another node", LIMITS),
        ):
            handler = LinkContender(name, big=name != "tls")
            link = await connect(
                endpoint,
                name="bench",
                node=node,
                secret=secret.encode(),
                handler=handler,
                tls=tls if name == "tls" else None,
                limits=limits,
            )
            stack.push_async_callback(handler.close)
            contenders.append(handler.over(link))
        if with_ray:
            contenders += await _ray_contenders(secret, stack)
        yield contenders


def _far_end(
    name: str, folder: Path, secret: str, stack: contextlib.AsyncExitStack, *arguments: str
) -> Endpoint:
    """A process that echoes, for as long as the stack lasts."""
    directory = folder / name
    said = stack.enter_context(
        child(
            python("bench.transport_echo", "--directory", str(directory), *arguments),
            log=folder / f"{name}.log",
            ready="echo ready",
            timeout_s=_START_S,
            environment={SECRET_VARIABLE: secret},
        )
    )
    return msgspec.json.decode(said, type=Endpoint)


def _certificate(folder: Path) -> Path:
    """One file of a certificate, its key and the CA that has issued it."""
    try:
        import trustme
    except ImportError as error:
        raise ToolMissing("it needs trustme: pip install 'shardserve[bench]'") from error
    authority = trustme.CA()
    issued = authority.issue_cert("echo.invalid")
    path = folder / "tls.pem"
    path.touch(mode=0o600)
    blobs = (issued.private_key_pem, *issued.cert_chain_pems, authority.cert_pem)
    path.write_bytes(b"".join(blob.bytes() for blob in blobs))
    return path


async def _ray_contenders(secret: str, stack: contextlib.AsyncExitStack) -> list[Contender]:
    # Here, since it imports Ray's side of the links and starts a Ray.
    from bench.transport_ray import echo_actor
    from shards.transport.raycalls import connect_actor

    actor = stack.enter_context(echo_actor(secret))
    handler = LinkContender("link_over_ray", big=False)
    link = await connect_actor(
        actor,
        Endpoint(actor=NAME, generation=GENERATION, node=NODE),
        name="bench",
        node=NODE,
        secret=secret.encode(),
        handler=handler,
        # The first call waits for the actor's process.
        limits=dataclasses.replace(LIMITS, handshake_timeout_s=_START_S),
    )
    stack.push_async_callback(handler.close)
    return [handler.over(link), RayContender("ray_call", actor)]


def _result(outcomes: Outcomes, conditions: Mapping[str, Figure], *, seed: int) -> Result:
    """All that is told of the outcomes; the ratio to Ray only where Ray was measured."""
    estimates: dict[str, Estimate] = {}
    for (name, case), found in outcomes.items():
        if case == _PIPELINED:
            values = {"rps": [timed.rate for timed in found]}
        else:
            values = {
                f"p{percent}_us": [timed.percentile(percent) for timed in found]
                for percent in (50, 99)
            }
        for figure, series in values.items():
            estimates[f"{name}_{case}_{figure}"] = bootstrap(series, seed=seed)
    marked = _marked(outcomes, estimates, seed=seed)
    return Result(
        bench=BENCH.name,
        ratios={name: estimate.value for name, estimate in marked.items()},
        figures={
            **{name: estimate.value for name, estimate in estimates.items()},
            "intervals": {
                name: [estimate.low, estimate.high]
                for name, estimate in (estimates | marked).items()
            },
            "rounds": next(iter(estimates.values())).rounds,
            **conditions,
        },
        tables=_tables(outcomes, estimates, marked),
        samples=_samples(outcomes),
        plot=_plot(outcomes, estimates),
        notes=_notes(conditions),
    )


def _marked(
    outcomes: Outcomes, estimates: Mapping[str, Estimate], *, seed: int
) -> dict[str, Estimate]:
    """What marks are set on."""
    marked = {
        "uds_small_us": estimates["uds_small_p50_us"],
        "uds_1mb_ms": _scaled(estimates["uds_1mb_p50_us"], 1e-3),
        # The worse of the two directions.
        "small_behind_256mb_ms": max(
            (_scaled(estimates[f"uds_{case}_p99_us"], 1e-3) for case in _BEHIND.values()),
            key=lambda estimate: estimate.value,
        ),
    }
    if ("ray_call", "small") in outcomes:
        marked["ray_call_over_uds_small"] = paired_ratio(
            [timed.percentile(50) for timed in outcomes["ray_call", "small"]],
            [timed.percentile(50) for timed in outcomes["uds", "small"]],
            seed=seed,
        )
    return marked


def _scaled(estimate: Estimate, factor: float) -> Estimate:
    return Estimate(
        value=estimate.value * factor,
        low=estimate.low * factor,
        high=estimate.high * factor,
        rounds=estimate.rounds,
    )


def _tables(
    outcomes: Outcomes, estimates: Mapping[str, Estimate], marked: Mapping[str, Estimate]
) -> tuple[Table, ...]:
    names = list(dict.fromkeys(name for name, _ in outcomes))
    trips = Table(
        title="Round trips of one tensor, one at a time: p50 in microseconds, medians over rounds",
        columns=("way", *SIZES),
        rows=tuple(
            (name, *(estimates[f"{name}_{size}_p50_us"].value for size in SIZES)) for name in names
        ),
    )
    rates = Table(
        title=f"Small round trips, {_WINDOW} under way: a second; and one at a time: p99 in us",
        columns=("way", "a second", "p99"),
        rows=tuple(
            (
                name,
                estimates[f"{name}_{_PIPELINED}_rps"].value,
                estimates[f"{name}_small_p99_us"].value,
            )
            for name in names
        ),
    )
    behind = Table(
        title="Small round trips beside a frame of 256 MB on the same link: microseconds",
        columns=("way", "the big frame is", "p50", "p99", "samples"),
        rows=tuple(
            (
                name,
                case.removeprefix("behind_"),
                estimates[f"{name}_{case}_p50_us"].value,
                estimates[f"{name}_{case}_p99_us"].value,
                sum(timed.latency_us.size for timed in found),
            )
            for (name, case), found in outcomes.items()
            if case in _BEHIND.values()
        ),
    )
    told = Table(
        title="What marks are set on: the median over rounds, [its 95 % bootstrap interval]",
        columns=("key", "value"),
        rows=tuple(marked.items()),
    )
    return (trips, rates, behind, told)


def _samples(outcomes: Outcomes) -> dict[str, Samples]:
    """Every latency of every round, and the rounds' rates."""
    rates = [
        (name, case, number, timed.rate, timed.latency_us.size)
        for (name, case), found in outcomes.items()
        for number, timed in enumerate(found)
    ]
    return {
        "rounds": Samples(columns=("way", "case", "round", "rps", "answered"), rows=rates),
        **{
            f"latency-{name}-{case}": histogram_samples(
                Histogram.of(np.concatenate([timed.latency_us for timed in found])),
                unit="microseconds",
            )
            for (name, case), found in outcomes.items()
        },
    }


def _plot(outcomes: Outcomes, estimates: Mapping[str, Estimate]) -> Plot:
    return Plot(
        title="Round trip of one tensor (p50)",
        x_label="bytes each way",
        y_label="microseconds",
        log_x=True,
        log_y=True,
        series=tuple(
            Series(
                label=name,
                x=tuple(float(size) for size in SIZES.values()),
                y=tuple(estimates[f"{name}_{size}_p50_us"].value for size in SIZES),
            )
            for name in dict.fromkeys(name for name, _ in outcomes)
        ),
    )


def _notes(conditions: Mapping[str, Figure]) -> tuple[str, ...]:
    """What a reader must know before believing the tables."""
    notes = [_ENDS]
    found = conditions["machine"]
    assert isinstance(found, Mapping)
    load, cpus = found.get("load_1min"), found.get("cpus")
    if isinstance(load, float) and isinstance(cpus, int) and load > _BUSY_SHARE_MAX * cpus:
        notes.append(
            f"The machine was busy before the run (load {load:g} on {cpus} processors): read "
            "ratios, not latencies."
        )
    return tuple(notes)


BENCH: Final = Bench(
    name="transport",
    summary="the data plane's links against Ray actor calls",
    run=_run,
    add_arguments=_add_arguments,
)
