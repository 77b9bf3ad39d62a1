"""``faults``: what clients see when parts of the cluster die under load, and how it comes back.

Under an open loop of requests whose answers can all be checked, one fault follows the other. Each
must leave everything accepted with one answer or one typed error in time, and the cluster whole
again by itself, with the weights that it did not touch where they were.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Final

from batching.errors import Code
from bench.errors import ContenderFailed
from bench.faults_client import Client, Door
from bench.faults_cluster import OneHost, Site, Status, is_whole
from bench.faults_far import DISKS_FULL, PARTITION, RAYLET, STORE_SILENT, STORE_SLOW
from bench.faults_hosts import TwoHosts
from bench.faults_kinds import DIRECT, ONE_HOST, QUICK, SERVE, Fault
from bench.faults_ledger import Account, Attempt, Bounds, Ending, Phase, account, answered_twice
from bench.hosts import available
from bench.registry import Bench, Options
from bench.report import Figure, Plot, Result, Samples, Series, Table, machine, show
from cluster.api.status import http_status

__all__ = ["BENCH", "strike_all"]

#: Requests carry this deadline; a busy machine's timers and the way back are the grace.
_BOUNDS: Final = Bounds(deadline_s=2.0, grace_s=1.0)
_DIRECT_RATE: Final = 100.0
_SERVE_RATE: Final = 5.0
#: A fault that is not over by now counts as one that the cluster never recovered from.
_RECOVERY_S: Final = 60.0
#: The cluster has been answering well for so long before the next fault.
_SETTLE_S: Final = 1.0
_LOOK_S: Final = 0.05
#: A node that was lost comes back empty; the actors that are killed next are placed on it again.
_TWO_HOSTS: Final = (
    *ONE_HOST[:2],
    RAYLET,
    *ONE_HOST[2:],
    DISKS_FULL,
    STORE_SILENT,
    STORE_SLOW,
    PARTITION,
)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--one-host", action="store_true", help="even where two can be had")
    parser.add_argument("--only", metavar="TEXT", help="faults with this in their name")


def _run(options: Options) -> Result:
    conditions = machine()
    one_host = options.quick or options.own.one_host
    reason = "asked for one host" if one_host else available(ssh=False)
    with contextlib.ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="shardserve-", dir="/tmp"))
        )
        site: Site
        network: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
        faults: tuple[Fault, ...] = QUICK if options.quick else ONE_HOST
        if reason:
            site = stack.enter_context(OneHost(folder).up())
        else:
            site = hosts = stack.enter_context(TwoHosts(folder).up())
            faults, network = _TWO_HOSTS, hosts.hosts.joined
        if options.own.only:
            chosen = [fault for fault in faults[1:] if options.own.only in fault.name]
            faults = (faults[0], *chosen)
        doors = (
            Door(DIRECT, site.rest, _DIRECT_RATE),
            Door(SERVE, site.serve, _SERVE_RATE, is_proxied=True),
        )
        client = Client(doors, _BOUNDS, seed=options.seed, network=network)
        with client:
            phases = strike_all(site, client, faults)
        # Until here, so that what was under way at the end is in the books, too.
        phases = (*phases[:-1], replace(phases[-1], until=time.monotonic()))
    figures: dict[str, Figure] = {
        "quick": options.quick,
        "one_host_because": reason,
        "unfinished": client.unfinished,
        "machine": conditions,
    }
    return _result(client.attempts, client.unasked, phases, figures, client.unfinished)


def strike_all(site: Site, client: Client, faults: Sequence[Fault]) -> tuple[Phase, ...]:
    """Let each fault strike in turn, and wait until the cluster is whole and answers well.

    Raises:
        ContenderFailed: the cluster was not whole when the first should have struck.
    """
    phases: list[Phase] = []
    began = time.monotonic()
    site.watch.until("a whole cluster", is_whole, 0.0, _RECOVERY_S)
    _await(lambda: not client.bad_since(time.monotonic() - _SETTLE_S))
    for fault in faults:
        try:
            before = site.watch.until("a status", is_whole, time.monotonic(), _RECOVERY_S).status
        except ContenderFailed as error:
            # What strikes a cluster that is not whole tells nothing; what struck before does.
            if not phases:
                raise
            phases[-1] = replace(phases[-1], whole_s=None)
            _complain(error)
            break
        phase = _strike(site, client, fault, before)
        if phases:
            phases[-1] = replace(phases[-1], until=phase.struck)
        else:
            phase = replace(phase, struck=began)  # whatever went wrong until then counts, too
        phases.append(phase)
    return tuple(phases)


def _strike(site: Site, client: Client, fault: Fault, before: Status) -> Phase:
    struck_at = time.monotonic()
    struck = fault.strike(site, before)
    whole_s: float | None = None
    reloaded: tuple[str, ...] = ()
    try:
        moment = site.watch.until(
            fault.name,
            lambda status: is_whole(status) and struck.is_back(status),
            struck_at,
            _RECOVERY_S,
        )
        reloaded = _reloaded(before, moment.status, struck.touched)
        struck.mend()
        whole_s = moment.at - struck_at
    except ContenderFailed as error:
        _complain(error)
    # What was under way when it struck has its whole time to end in.
    time.sleep(max(0.0, struck_at + _BOUNDS.late_s - time.monotonic()))
    _await(lambda: not client.bad_since(time.monotonic() - _SETTLE_S))
    return Phase(
        fault=fault.name,
        struck=struck_at,
        until=time.monotonic(),
        breaks=fault.breaks,
        holds=fault.holds,
        whole_s=whole_s,
        reloaded=reloaded,
    )


def _reloaded(before: Status, after: Status, touched: frozenset[str]) -> tuple[str, ...]:
    """Actors that are other processes than before, though nothing was done to them."""
    generations = {name: actor["generation"] for name, actor in after["actors"].items()}
    return tuple(
        name
        for name, actor in before["actors"].items()
        if name not in touched and generations.get(name) != actor["generation"]
    )


def _complain(error: ContenderFailed) -> None:
    print(f"bench faults: {error}", file=sys.stderr)


def _await(holds: Callable[[], bool], timeout_s: float = _RECOVERY_S) -> None:
    """Wait until something holds, or the time is over; the books tell which."""
    deadline = time.monotonic() + timeout_s
    while not holds() and time.monotonic() < deadline:
        time.sleep(_LOOK_S)


def _result(
    attempts: Sequence[Attempt],
    unasked: int,
    phases: Sequence[Phase],
    conditions: Mapping[str, Figure],
    unfinished: int = 0,
) -> Result:
    accounts = account(attempts, phases, _BOUNDS)
    ratios = {
        "lost": unfinished + sum(each.lost for each in accounts),
        "answered_twice": answered_twice(attempts, unasked),
        "mixed_version_answers": sum(each.mixed for each in accounts),
        "never_recovered": sum(not each.recovered for each in accounts),
    }
    figures: dict[str, Figure] = {
        "requests": len({attempt.request for attempt in attempts}),
        "answered_by_the_dead": sum(each.dead for each in accounts),
        "reloaded_without_need": sum(len(each.phase.reloaded) for each in accounts),
        "faults": {each.phase.fault: _figures_of(each) for each in accounts},
        "deadline_s": _BOUNDS.deadline_s,
        "grace_s": _BOUNDS.grace_s,
        **conditions,
    }
    return Result(
        bench=BENCH.name,
        ratios={name: float(count) for name, count in ratios.items()},
        figures=figures,
        tables=(_table(accounts),),
        samples={"attempts": _samples(attempts)},
        plot=_plot(attempts, phases),
        notes=_notes(attempts, accounts, str(conditions.get("one_host_because") or "")),
    )


def _figures_of(found: Account) -> Figure:
    return {
        "answered": found.answered,
        "errors": dict(found.errors),
        "reset": found.broken,
        "held": found.held,
        "refused": found.refused,
        "lost": found.lost,
        "slowest_s": found.slowest_s,
        "back_s": found.back_s,
        "whole_s": found.phase.whole_s,
    }


def _table(accounts: Sequence[Account]) -> Table:
    return Table(
        title="What clients saw of each fault; seconds: worst end, answers again, cluster whole",
        columns=(
            *("fault", "right", "typed errors", "reset", "held", "refused", "lost"),
            *("worst", "back", "whole"),
        ),
        rows=tuple(
            (
                each.phase.fault,
                each.answered,
                _errors(each),
                each.broken,
                each.held,
                each.refused,
                each.lost,
                f"{each.slowest_s:.2f}",
                "never" if each.back_s is None else f"{each.back_s:.1f}",
                "never" if each.phase.whole_s is None else f"{each.phase.whole_s:.1f}",
            )
            for each in accounts
        ),
    )


def _errors(found: Account) -> str:
    """Typed errors as clients see them: by HTTP status."""
    by_status = sorted((http_status(Code(code)), count) for code, count in found.errors.items())
    return " ".join(f"{count}x{status}" for status, count in by_status) or "0"


def _samples(attempts: Sequence[Attempt]) -> Samples:
    columns = ("request", "door", "sent_s", "ended_s", "ending", "detail", "life")
    return Samples(
        columns=columns,
        rows=[
            (a.request, a.door, a.sent, a.ended, str(a.ending), a.detail, a.life) for a in attempts
        ],
    )


def _plot(attempts: Sequence[Attempt], phases: Sequence[Phase]) -> Plot:
    """Ends a second over the run, and where each fault struck."""
    start = phases[0].struck
    seconds = range(int(phases[-1].until - start) + 1)
    ends = {ending: dict.fromkeys(seconds, 0) for ending in Ending}
    for attempt in attempts:
        second = math.floor(attempt.ended - start)
        if second in ends[attempt.ending]:
            ends[attempt.ending][second] += 1
    lines = [
        Series(label=str(ending), x=tuple(map(float, seconds)), y=tuple(map(float, counts)))
        for ending, counts in ((ending, found.values()) for ending, found in ends.items())
        if any(counts)
    ]
    return Plot(
        title="How requests ended, and when each fault struck",
        x_label="seconds",
        y_label="ends a second",
        series=tuple(lines),
        uprights=tuple((phase.struck - start, phase.fault) for phase in phases),
    )


def _notes(
    attempts: Sequence[Attempt], accounts: Sequence[Account], one_host: str
) -> tuple[str, ...]:
    notes = [
        (
            f"Open loop, {_DIRECT_RATE:g} requests a second on the direct port and "
            f"{_SERVE_RATE:g} on Ray Serve's, with a deadline of {_BOUNDS.deadline_s:g} s; an end "
            f"is late {_BOUNDS.grace_s:g} s after it."
        ),
        "A reset connection or a refused one is followed by another attempt of the same request.",
        "Held: beyond its deadline by Ray Serve's proxy, which had no replica to give it to.",
    ]
    if one_host:
        notes.append(f"On one host, so without the faults that need two: {one_host}.")
    dead = sum(each.dead for each in accounts)
    if dead:
        notes.append(f"{dead} answers came from a process whose successor had answered before.")
    for each in accounts:
        if each.phase.reloaded:
            who = ", ".join(each.phase.reloaded)
            notes.append(f"{each.phase.fault}: {who} lost what it had loaded, without need.")
    wrong = [attempt.detail for attempt in attempts if attempt.ending is Ending.WRONG]
    notes += [f"Not an answer to its request: {detail}" for detail in wrong[:5]]
    slowest = max((each.slowest_s for each in accounts), default=0.0)
    notes.append(f"The slowest end of an accepted request took {show(slowest)} s.")
    return tuple(notes)


BENCH: Final = Bench(
    name="faults",
    summary="what clients see when parts of the cluster die under load",
    run=_run,
    add_arguments=_add_arguments,
)
