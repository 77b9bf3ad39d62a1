"""``isolation-load``: what others feel while a large model loads and compiles.

Two small servables are asked all the time. In every round it is quiet for a while; then a version
of a large model, whose program nobody has compiled before, is loaded, and unloaded again. Compared
are the latencies within the load alone, from the command until the version is available, with
those of the quiet before: an average over the run would hide what this is about.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from bench import large_model, swap_model
from bench.errors import ContenderFailed, LoadFailed
from bench.operating import Operator, metric
from bench.processes import first_in_line
from bench.product import declaration, start_product
from bench.registry import Bench, Options
from bench.report import Figure, Plot, Result, Samples, Table, machine
from bench.stats import Estimate, bootstrap, paired_ratio
from bench.traffic import Attempt, Span, Traffic, latencies_ms, samples_of, series_of
from cluster.ports import free_ports

__all__ = ["BENCH", "Round"]

#: Requests a second, over both servables.
_RATE: Final = 400.0
_WARM_S: Final = 1.0
#: After an unload, before it counts as quiet.
_SETTLE_S: Final = 1.0
_MIB: Final = 1024
_FAILED_SHARE_MAX: Final = 0.001
_COMPILED: Final = "shardserve_device_compiles_for_loads_total"
_PERCENTS: Final = (50.0, 90.0, 99.0, 99.9)


class Round(NamedTuple):
    """A while of quiet, and a load."""

    quiet: Span
    load: Span


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mib", type=int, default=_MIB, help="weights of the large model")


def _run(options: Options) -> Result:
    conditions = machine()
    count = options.rounds_or(quick=2, full=7)
    quiet_s = 4.0 if options.quick else 8.0
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shardserve-")))
        store = folder / "store"
        for name in swap_model.SERVABLES:
            swap_model.save(store, name, 1)
        versions = range(1, count + 1)
        large_model.save(store, versions, options.own.mib, seed=options.seed)
        config = folder / "servables.yaml"
        (port,) = free_ports(1)
        config.write_text(
            declaration(
                store,
                [{"name": name} for name in swap_model.SERVABLES],
                cluster={"http": {"port": port, "admin": True}, "shards": 2},
            )
        )
        # A cache of its own: what earlier runs compiled is not there.
        own = {"XDG_CACHE_HOME": str(folder / "cache")}
        url = stack.enter_context(start_product(config, folder=folder, environment=own))
        operator = Operator(url)
        for name in swap_model.SERVABLES:
            operator.until_only(name, 1)
        before = metric(operator.metrics(), _COMPILED)
        kinds = swap_model.kinds(options.seed)
        with (
            first_in_line() as is_first,
            Traffic(url, kinds, rate=_RATE, seed=options.seed) as traffic,
        ):
            time.sleep(_WARM_S)
            rounds = [_round(operator, version, quiet_s) for version in versions]
        compiled = metric(operator.metrics(), _COMPILED) - before
    wanted = count * len(large_model.BUCKETS)
    if compiled < wanted:
        raise ContenderFailed(f"{compiled:g} programs were compiled in loads, not {wanted}")
    failed = sum(traffic.errors.values())
    if failed > _FAILED_SHARE_MAX * len(traffic.attempts):
        raise LoadFailed(f"requests failed: {traffic.errors}")
    figures: dict[str, Figure] = {
        "quick": options.quick,
        "seed": options.seed,
        "rate": _RATE,
        "mebibytes": options.own.mib,
        "buckets": len(large_model.BUCKETS),
        "requests": len(traffic.attempts),
        "errors": traffic.errors,
        "generator_behind_p99_ms": traffic.behind_ms,
        "generator_first_in_line": is_first,
        "machine": conditions,
    }
    return _result(traffic.attempts, rounds, figures, options.seed)


def _round(operator: Operator, version: int, quiet_s: float) -> Round:
    time.sleep(_SETTLE_S)
    quiet_at = time.monotonic()
    time.sleep(quiet_s)
    began = time.monotonic()
    operator.load(large_model.NAME, version, only=True)
    ended = time.monotonic()
    operator.unload(large_model.NAME)
    return Round(Span(quiet_at, began), Span(began, ended))


def _percentiles(attempts: Sequence[Attempt], spans: Sequence[Span], percent: float) -> list[float]:
    """One figure a span, in milliseconds, over both small servables."""
    found = []
    for span in spans:
        pooled = latencies_ms(attempts, swap_model.SERVABLES, span)
        if not pooled:
            raise ContenderFailed("nothing was answered for a whole round")
        found.append(float(np.percentile(pooled, percent)))
    return found


def _result(
    attempts: Sequence[Attempt],
    rounds: Sequence[Round],
    conditions: Mapping[str, Figure],
    seed: int,
) -> Result:
    latencies: dict[str, tuple[Estimate, Estimate, Estimate]] = {}
    for percent in _PERCENTS:
        within = _percentiles(attempts, [each.load for each in rounds], percent)
        quiet = _percentiles(attempts, [each.quiet for each in rounds], percent)
        latencies[f"p{percent:g}"] = (
            bootstrap(within, seed=seed),
            bootstrap(quiet, seed=seed),
            paired_ratio(within, quiet, seed=seed),
        )
    p99 = latencies["p99"][2]
    loads = [each.load.ended - each.load.began for each in rounds]
    whole = Span(rounds[0].quiet.began, rounds[-1].load.ended)
    columns = ("quiet_s", "load_s", "available_s")
    return Result(
        bench=BENCH.name,
        ratios={"p99_inside_load_window_vs_quiet": p99.value},
        figures={
            "rounds": len(rounds),
            "load_s": float(np.median(loads)),
            **{f"load_{name}_ms": each[0].value for name, each in latencies.items()},
            **{f"quiet_{name}_ms": each[1].value for name, each in latencies.items()},
            **{f"{name}_vs_quiet": each[2].value for name, each in latencies.items()},
            "intervals": {"p99_inside_load_window_vs_quiet": [p99.low, p99.high]},
            **conditions,
        },
        tables=(
            Table(
                title="The other servables, milliseconds: medians over rounds [95 %]",
                columns=("", "within the load", "quiet", "ratio"),
                rows=tuple((name, *each) for name, each in latencies.items()),
            ),
        ),
        samples={
            "requests": samples_of(attempts, whole),
            "rounds": Samples(
                columns=columns,
                rows=[
                    tuple(at - whole.began for at in (each.quiet.began, *each.load))
                    for each in rounds
                ],
            ),
        },
        plot=Plot(
            title="Latency of the others, and when the large model loads",
            x_label="seconds",
            y_label="milliseconds",
            log_y=True,
            series=tuple(series_of(attempts, name, whole) for name in swap_model.SERVABLES),
            uprights=tuple(
                (at - whole.began, name)
                for each in rounds
                for at, name in zip(each.load, ("load", "available"), strict=True)
            ),
        ),
        notes=(
            f"Open loop, {_RATE:g} requests a second over both; latency counts from the arrival.",
            f"A load took {float(np.median(loads)):.1f} s.",
        ),
    )


BENCH: Final = Bench(
    name="isolation-load",
    summary="other servables while a large model loads and compiles",
    run=_run,
    add_arguments=_add_arguments,
)
