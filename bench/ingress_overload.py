"""The overload part of ``ingress``: three times what a model can do, and ten thousand idle clients.

One cluster without peers. What counts under overload is what is answered within the deadline, next
to the most that the same door answered before; a full run measures both again with the device on
processors of its own, which shows what the server makes of the device, not how generator, router
and device share a small machine. Of idle connections it is what each costs the router, and that
they are still open after everybody else was served beside them.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from bench.doors import pss_mib
from bench.errors import ContenderFailed
from bench.ingress_doors import Door, save
from bench.ingress_model import MODELS, draw
from bench.ingress_result import Part
from bench.load import Outcome, closed_loop, open_loop, own_closed_loop, poisson_arrivals
from bench.peers import await_answer
from bench.processes import apart
from bench.product import declaration, start_product, status
from bench.registry import Options
from bench.report import Figure, Table
from bench.stats import Histogram, bootstrap, paired_ratio

__all__ = ["good_share", "measure_overload"]

_IDLE: Final = 10_000
#: Files beside the connections: of this process, and of the router.
_FILES: Final = _IDLE + 2_000
_TIMES: Final = 3.0
_DEADLINE_MS: Final = 1000
_PEAK_CONNECTIONS: Final = 32
#: As many requests may be under way as come in a quarter of a second and more.
_CONNECTIONS_MAX: Final = 1024
#: Of the deadline: beyond, an answer cannot have been late by the server alone.
_LATE_SHARE: Final = 1.1
#: Peaks that differ by more are of a machine that does something else, too.
_CHANGED: Final = 1.15
_SAMPLE_S: Final = 0.2
_RATIO: Final = "overload_3x_goodput_vs_peak"
_AVAILABLE_S: Final = 120.0
#: Idle clients must not be hung up on while others are measured.
_LIMITS: Final = {"idle_s": 600.0}
_ASKED: Final = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


def measure_overload(options: Options) -> Part:
    """Measure on a cluster of its own.

    Raises:
        ContenderFailed: it does not come up, or fewer files may be opened than are needed.
    """
    _allow_files()
    with tempfile.TemporaryDirectory(prefix="shardserve-") as name:
        folder = Path(name)
        for model in ("mlp", "heavy"):
            save(MODELS[model], options.seed, folder / "store")
        config = folder / "servables.yaml"
        servables = [{"name": "mlp"}, {"name": "heavy"}]
        cluster = {"http": {"port": 0, "limits": _LIMITS}}
        config.write_text(declaration(folder / "store", servables, cluster=cluster))
        with start_product(config, folder=folder) as url:
            known = status(config)
            pid = int(known["doors"][0]["pid"])
            device = int(known["actors"]["device-0"]["pid"])
            small = Door(name="product", url=url, model=MODELS["mlp"])
            heavy = Door(name="product", url=url, model=MODELS["heavy"])
            for door in (small, heavy):
                asked = door.request(draw(door.model, 1, options.seed))
                await_answer(url, asked, timeout_s=_AVAILABLE_S)
            idle = _idle(small, pid, options)
            overload = _overload(heavy, pid, options)
            beside: dict[str, Figure] = {}
            with contextlib.ExitStack() as stack:
                if not options.quick and stack.enter_context(apart(device, (pid, os.getpid()))):
                    apart_ratio = _overload(heavy, pid, options).ratios[_RATIO]
                    beside = {"overload_device_apart_goodput_vs_peak": apart_ratio}
    rows = (*overload.table.rows, *idle.table.rows)
    return Part(
        ratios={**overload.ratios, **idle.ratios},
        figures={**overload.figures, **beside, **idle.figures},
        table=replace(overload.table, rows=rows),
        notes=overload.notes,
    )


def good_share(outcome: Outcome, deadline_us: float) -> float:
    """Which share of the good answers came within a deadline."""
    latency = outcome.latency_us
    return float(latency.counts[latency.values <= deadline_us].sum()) / max(latency.total, 1)


def _overload(door: Door, pid: int, options: Options) -> Part:
    """Overload between two measurements of the most that is answered, so often as there is time.

    A machine that changes meanwhile is then on both sides of the ratio, and seen in the peaks.
    """
    patient = door.request(draw(door.model, 1, options.seed))
    request = replace(patient, headers={"x-request-timeout-ms": str(_DEADLINE_MS)})
    seconds, peak_s = (4.0, 1.5) if options.quick else (60.0, 8.0)
    turns = options.rounds_or(quick=2, full=1)

    def peak() -> float:
        found = own_closed_loop(
            door.url, [patient], connections=_PEAK_CONNECTIONS, duration_s=peak_s
        )
        found.must_be_clean("the heavy model alone")
        return found.rate

    print("the most that the heavy model answers", file=sys.stderr)
    own_closed_loop(door.url, [patient], connections=_PEAK_CONNECTIONS, duration_s=1.0)
    before = pss_mib(pid)
    peaks = [peak()]
    outcomes: list[Outcome] = []
    with _sampled(pid) as memory:
        for turn in range(turns):
            print(f"{_TIMES:g} times as much", file=sys.stderr)
            arrivals = poisson_arrivals(_TIMES * peaks[-1], seconds, seed=options.seed + turn)
            outcomes.append(
                open_loop(door.url, [request], arrivals_s=arrivals, connections=_CONNECTIONS_MAX)
            )
            peaks.append(peak())
    return _overload_part(peaks, outcomes, memory=(before, max(memory)), seed=options.seed)


def _overload_part(
    peaks: Sequence[float],
    outcomes: Sequence[Outcome],
    *,
    memory: tuple[float, float],
    seed: int,
) -> Part:
    """What was found: every outcome between two peaks, and the router's memory in MiB."""
    goodputs = [each.rate * good_share(each, 1e3 * _DEADLINE_MS) for each in outcomes]
    beside = [(one + other) / 2 for one, other in pairwise(peaks)]
    ratio = paired_ratio(goodputs, beside, seed=seed)
    latency = Histogram.pooled([each.latency_us for each in outcomes])
    lags = [each.lag_us for each in outcomes if each.lag_us is not None]
    errors = Counter[str]()
    for each in outcomes:
        errors.update(each.errors)
    peak = bootstrap(peaks, seed=seed).value
    figures: dict[str, Figure] = {
        "overload_peak_rps": peak,
        "overload_peaks_rps": list(peaks),
        "overload_offered_rps": _TIMES * peak,
        "overload_goodput_rps": bootstrap(goodputs, seed=seed).value,
        "overload_interval": [ratio.low, ratio.high],
        "overload_deadline_ms": _DEADLINE_MS,
        "overload_accepted_p50_ms": latency.percentile(50) / 1e3,
        "overload_accepted_p99_ms": latency.percentile(99) / 1e3,
        "overload_errors": dict(errors),
        "overload_pss_before_mib": memory[0],
        "overload_pss_max_mib": memory[1],
        "overload_generator_lag_p99_ms": Histogram.pooled(lags).percentile(99) / 1e3,
    }
    names = ("peak_rps", "goodput_rps", "accepted_p50_ms", "accepted_p99_ms", "pss_max_mib")
    return Part(
        ratios={_RATIO: ratio.value},
        figures=figures,
        table=_table(figures, tuple(f"overload_{name}" for name in names)),
        notes=_notes_on(latency.percentile(99) / 1e3, peaks),
    )


def _notes_on(accepted_p99_ms: float, peaks: Sequence[float]) -> tuple[str, ...]:
    """What was spent in the generator, not the server, and whether the machine was the same."""
    notes: list[str] = []
    if accepted_p99_ms > _LATE_SHARE * _DEADLINE_MS:
        notes.append(
            f"p99 of what was accepted is {accepted_p99_ms:.0f} ms, and the server gives up after "
            f"{_DEADLINE_MS} ms: the rest was spent in the generator. Goodput is too low."
        )
    if max(peaks) > _CHANGED * min(peaks):
        told = ", ".join(f"{peak:.0f}" for peak in peaks)
        notes.append(f"the machine changed meanwhile: peaks of {told} requests/s around overload.")
    return tuple(notes)


def _idle(door: Door, pid: int, options: Options) -> Part:
    seconds = 2.0 if options.quick else 5.0
    request = door.request(draw(door.model, 1, options.seed))

    def load() -> Outcome:
        return closed_loop(door.url, [request], connections=32, duration_s=seconds)

    load()
    alone = load()
    before = pss_mib(pid)
    print(f"{_IDLE} idle connections", file=sys.stderr)
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(_connection(door.url)) for _ in range(_IDLE)]
        kb = (pss_mib(pid) - before) * 1024 / _IDLE
        beside = load()
        still_open = sum(_is_open(one) for one in sockets)
    beside.must_be_clean("beside idle connections")
    figures: dict[str, Figure] = {
        "idle_alone_rps": alone.rate,
        "idle_beside_rps": beside.rate,
        "idle_alone_p99_us": alone.latency_us.percentile(99),
        "idle_beside_p99_us": beside.latency_us.percentile(99),
        "idle_pss_before_mib": before,
    }
    ratios = {"idle_connections": float(still_open), "idle_connection_kb": kb}
    return Part(ratios=ratios, figures=figures, table=_table({**ratios, **figures}))


@contextlib.contextmanager
def _connection(url: str) -> Iterator[socket.socket]:
    """One that has asked once, and then says nothing; one that never asked would be cut off."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=10.0) as one:
        one.sendall(_ASKED)
        told = b""
        while not told.endswith(b"ok\n"):
            data = one.recv(1024)
            if not data:
                raise ContenderFailed(f"a connection was ended after {told[:100]!r}")
            told += data
        one.setblocking(False)
        yield one


def _is_open(one: socket.socket) -> bool:
    try:
        one.recv(1)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


@contextlib.contextmanager
def _sampled(pid: int) -> Iterator[list[float]]:
    """The memory of a process for as long as the context lasts, in MiB."""
    found = [pss_mib(pid)]
    is_over = threading.Event()

    def sample() -> None:
        while not is_over.wait(_SAMPLE_S):
            found.append(pss_mib(pid))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        is_over.set()
        thread.join()


def _allow_files() -> None:
    """Let this process, and those that it starts, open enough files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < _FILES:
        raise ContenderFailed(f"{_FILES} files are needed, ulimit -Hn says {hard}")
    if soft != resource.RLIM_INFINITY and soft < _FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (_FILES, hard))


def _table(figures: Mapping[str, Figure], names: tuple[str, ...] = ()) -> Table:
    return Table(
        title="Overload and idle connections, direct port",
        columns=("what", "value"),
        rows=tuple(
            (name, value) for name in names or figures if isinstance(value := figures[name], float)
        ),
    )
