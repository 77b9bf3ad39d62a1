"""``swap``: versions change under a constant load, which must not notice.

A plain servable and one over a sharded table are asked all the time, while an operator loads the
next version of one of them in place of the other, and now and then rolls back. Between any two
changes it is quiet for as long. Answers tell the versions of all their parts, so that one of two
versions is seen; latencies of the changed servable are held against those of the quiet before.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from bench.errors import ContenderFailed
from bench.operating import Operator, metric
from bench.product import declaration, start_product
from bench.registry import Bench, Options
from bench.report import Figure, Plot, Result, Samples, Table, machine
from bench.stats import Estimate, bootstrap, paired_ratio
from bench.swap_model import SERVABLES, kinds, save
from bench.traffic import Attempt, Span, Traffic, latencies_ms, samples_of, series_of
from cluster.ports import free_ports

__all__ = ["BENCH", "Change", "plan", "rounds_of"]

#: Requests a second, over both servables.
_RATE: Final = 400.0
#: A change is over when the older version is gone; what it leaves behind is in its window, too.
_AFTER_S: Final = 0.25
_QUIET_S: Final = 1.0
_WARM_S: Final = 1.0
_COMPILED: Final = "shardserve_device_compiles_for_loads_total"
_COMPILED_SERVING: Final = "shardserve_device_compiles_after_available_total"
_ROUND: Final = 6


class Step(NamedTuple):
    """What the operator will do: bring a servable to a version, by a load or a rollback."""

    servable: str
    version: int
    is_rollback: bool


class Change(NamedTuple):
    """What the operator did.

    Attributes:
        step: what it was.
        quiet: the time before it, in which nothing changed.
        span: from its command until a while after the older version was gone.
        took_s: until the older version was gone.
    """

    step: Step
    quiet: Span
    span: Span
    took_s: float


def plan(swaps: int, rollbacks: int) -> list[Step]:
    """Swaps of the servables in turn, with rollbacks evenly among them.

    A rollback takes the servable of the swap before it back by one version; the next swap goes on
    to a version that was never there.

    Raises:
        ValueError: there are more rollbacks than swaps.
    """
    if rollbacks > swaps:
        raise ValueError(f"{rollbacks} rollbacks need as many swaps, not {swaps}")
    steps: list[Step] = []
    newest = dict.fromkeys(SERVABLES, 1)
    for swap in range(swaps):
        servable = SERVABLES[swap % len(SERVABLES)]
        newest[servable] += 1
        steps.append(Step(servable, newest[servable], is_rollback=False))
        if (swap + 1) * rollbacks // swaps > swap * rollbacks // swaps:
            steps.append(Step(servable, newest[servable] - 1, is_rollback=True))
    return steps


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--swaps", type=int, help="how many versions come; 50, or 6 with --quick")
    parser.add_argument("--rollbacks", type=int, help="how many go; 10, or 2 with --quick")


def _run(options: Options) -> Result:
    conditions = machine()
    swaps = options.own.swaps or (6 if options.quick else 50)
    rollbacks = options.own.rollbacks
    rollbacks = (2 if options.quick else 10) if rollbacks is None else rollbacks
    steps = plan(swaps, rollbacks)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shardserve-")))
        store = folder / "store"
        for servable, version in {(name, 1) for name in SERVABLES} | {
            (step.servable, step.version) for step in steps
        }:
            save(store, servable, version)
        config = folder / "servables.yaml"
        (port,) = free_ports(1)
        config.write_text(
            declaration(
                store,
                [{"name": name, "policy": {"specific": [1]}} for name in SERVABLES],
                cluster={"http": {"port": port, "admin": True}, "shards": 2},
            )
        )
        # A cache of its own: what earlier runs compiled is not there.
        own = {"XDG_CACHE_HOME": str(folder / "cache")}
        url = stack.enter_context(start_product(config, folder=folder, environment=own))
        operator = Operator(url)
        for name in SERVABLES:
            operator.until_only(name, 1)
        before = operator.metrics()
        with Traffic(url, kinds(options.seed), rate=_RATE, seed=options.seed) as traffic:
            time.sleep(_WARM_S)
            began = time.monotonic()
            changes = [_change(operator, step) for step in steps]
            ended = time.monotonic()
        after = operator.metrics()
    figures: dict[str, Figure] = {
        "quick": options.quick,
        "seed": options.seed,
        "rate": _RATE,
        "requests": len(traffic.attempts),
        "errors": traffic.errors,
        "generator_behind_p99_ms": traffic.behind_ms,
        "compiles_while_serving": metric(after, _COMPILED_SERVING),
        "compiles_at_start": metric(before, _COMPILED),
        "machine": conditions,
    }
    compiled = metric(after, _COMPILED) - metric(before, _COMPILED)
    span = Span(began, ended)
    failed = sum(traffic.errors.values())
    return _result(traffic.attempts, changes, span, compiled, figures, failed, options.seed)


def _change(operator: Operator, step: Step) -> Change:
    quiet_at = time.monotonic()
    time.sleep(_QUIET_S)
    began = time.monotonic()
    if step.is_rollback:
        operator.roll_back(step.servable, step.version)
    else:
        operator.load(step.servable, step.version, only=True)
    ended = time.monotonic()
    time.sleep(_AFTER_S)
    return Change(
        step=step,
        quiet=Span(quiet_at, began),
        span=Span(began, time.monotonic()),
        took_s=ended - began,
    )


def rounds_of(changes: Sequence[Change]) -> list[Sequence[Change]]:
    """Consecutive changes, enough in each round for a percentile to mean something."""
    count = max(1, len(changes) // _ROUND)
    return [changes[at * len(changes) // count : (at + 1) * len(changes) // count]
            for at in range(count)]  # fmt: skip


def _percentiles(
    attempts: Sequence[Attempt], changes: Sequence[Change], percent: float
) -> tuple[list[float], list[float]]:
    """Of each round, the changed servable's latency in milliseconds: within changes, and quiet."""
    within: list[float] = []
    quiet: list[float] = []
    for each in rounds_of(changes):
        for spans, found in (
            ([(change.step.servable, change.span) for change in each], within),
            ([(change.step.servable, change.quiet) for change in each], quiet),
        ):
            pooled = [ms for name, span in spans for ms in latencies_ms(attempts, [name], span)]
            if not pooled:
                raise ContenderFailed("a round of changes without a single answer")
            found.append(float(np.percentile(pooled, percent)))
    return within, quiet


def _result(
    attempts: Sequence[Attempt],
    changes: Sequence[Change],
    span: Span,
    compiled: float,
    conditions: Mapping[str, Figure],
    failed: int,
    seed: int,
) -> Result:
    wrong = Counter(str(each.status) for each in attempts if not each.is_right)
    mixed = [each for each in attempts if each.is_mixed]
    _check_seen(attempts, changes)
    latencies: dict[str, tuple[Estimate, Estimate, Estimate]] = {}
    for percent in (50.0, 90.0, 99.0):
        within, quiet = _percentiles(attempts, changes, percent)
        latencies[f"p{percent:g}"] = (
            bootstrap(within, seed=seed),
            bootstrap(quiet, seed=seed),
            paired_ratio(within, quiet, seed=seed),
        )
    p99 = latencies["p99"][2]
    took = {
        name: [change.took_s for change in changes if change.step.is_rollback is is_rollback]
        for name, is_rollback in (("swap", False), ("rollback", True))
    }
    figures: dict[str, Figure] = {
        "changes": len(changes),
        "rollbacks": len(took["rollback"]),
        **{f"{name}_s": float(np.median(each)) for name, each in took.items() if each},
        **{f"within_{name}_ms": each[0].value for name, each in latencies.items()},
        **{f"quiet_{name}_ms": each[1].value for name, each in latencies.items()},
        "intervals": {"swapped_model_p99_vs_quiet": [p99.low, p99.high]},
        "failed_by_status": dict(wrong),
        **conditions,
    }
    return Result(
        bench=BENCH.name,
        ratios={
            "failed_requests": float(failed),
            "mixed_version_answers": float(len(mixed)),
            "swapped_model_p99_vs_quiet": p99.value,
            "compiles_for_same_shape_version": compiled,
        },
        figures=figures,
        tables=_tables(latencies, took),
        samples=_samples(attempts, changes, span),
        plot=_plot(attempts, changes, span),
        notes=(
            f"Open loop, {_RATE:g} requests a second over both; latency counts from the arrival.",
            f"Within: from the command until {_AFTER_S:g} s after the older version was gone.",
            "Quiet: before each change, the same servable.",
            *(f"An answer of several versions: {each}" for each in mixed[:5]),
        ),
    )


def _check_seen(attempts: Sequence[Attempt], changes: Sequence[Change]) -> None:
    """Every change was seen by somebody, or nothing was measured.

    Raises:
        ContenderFailed: a version that was brought never answered before the next change.
    """
    for change, after in zip(changes, [*changes[1:], None], strict=True):
        until = change.span.ended if after is None else after.span.began
        if not any(
            change.span.began <= each.due < until
            and each.owner == change.step.servable
            and change.step.version in each.told
            for each in attempts
        ):
            raise ContenderFailed(f"{change.step} was never seen by a client")


def _tables(
    latencies: Mapping[str, tuple[Estimate, Estimate, Estimate]],
    took: Mapping[str, Sequence[float]],
) -> tuple[Table, ...]:
    return (
        Table(
            title="The changed servable, milliseconds: medians over rounds [95 %]",
            columns=("", "within changes", "quiet", "ratio"),
            rows=tuple((name, *each) for name, each in latencies.items()),
        ),
        Table(
            title="Seconds from the command until the older version was gone",
            columns=("", "changes", "median", "worst"),
            rows=tuple(
                (name, len(each), float(np.median(each)), max(each))
                for name, each in took.items()
                if each
            ),
        ),
    )


def _samples(
    attempts: Sequence[Attempt], changes: Sequence[Change], span: Span
) -> dict[str, Samples]:
    done = [
        (
            *(change.step.servable, change.step.version, int(change.step.is_rollback)),
            *(change.span.began - span.began, change.span.ended - span.began, change.took_s),
        )
        for change in changes
    ]
    columns = ("servable", "version", "rollback", "began_s", "ended_s", "took_s")
    return {
        "requests": samples_of(attempts, span),
        "changes": Samples(columns=columns, rows=done),
    }


def _plot(attempts: Sequence[Attempt], changes: Sequence[Change], span: Span) -> Plot:
    """Every latency over the run, and when each change was commanded."""
    return Plot(
        title="Latency of every request, and when versions changed",
        x_label="seconds",
        y_label="milliseconds",
        log_y=True,
        series=tuple(series_of(attempts, name, span) for name in SERVABLES),
        uprights=tuple(
            (change.span.began - span.began, f"{change.step.servable} {change.step.version}")
            for change in changes
        ),
    )


BENCH: Final = Bench(
    name="swap",
    summary="versions change under load: failed and mixed answers, latency, compiles",
    run=_run,
    add_arguments=_add_arguments,
)
