"""``shardserve top``: what devices do, live, in a terminal or a pipe.

Reads ``/metrics`` of nodes' routers: they are there while the controller is not, ask their devices
when they are read, and need no Ray on the machine that looks. So it shows exactly what Prometheus
would, of the seconds between two readings (`cluster.rates`). A router that does not answer is told
of below the table; the others go on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from math import inf
from typing import Any, Final, NamedTuple

import msgspec
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from batching.errors import InvalidArgument, ServingError, Unavailable
from cluster.rates import DeviceRates, Samples, ServableRates, rates
from cluster.requesting import fetch

__all__ = ["ORDERS", "Reading", "View", "parse", "read", "render", "run", "views"]

_TIMEOUT_S: Final = 2.0
_PIPE_COLUMNS: Final = 250

#: In which order rows are, what matters most first.
ORDERS: Final[dict[str, Callable[[ServableRates], Any]]] = {
    "attainment": lambda row: inf if row.attainment is None else row.attainment,
    "device": lambda row: -row.device,
    "drops": lambda row: -sum(row.drops_s.values()),
    "name": lambda row: (row.servable, row.unit, row.device_name),
    "queue": lambda row: -(row.queue_p99_s or 0.0),
    "requests": lambda row: -row.requests_s,
}


class Reading(NamedTuple):
    """What was read at once: the numbers, and why some routers gave none."""

    samples: Samples
    troubles: list[str]


class View(NamedTuple):
    """What is shown once."""

    devices: list[DeviceRates]
    troubles: list[str]


def parse(text: str) -> Samples:
    """The numbers in what a router tells Prometheus.

    Raises:
        InvalidArgument: it is something else.
    """
    try:
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
    except ValueError as error:
        raise InvalidArgument(f"not what a router tells: {error}") from None


def read(urls: Sequence[str], get: Callable[[str, str, float], str] = fetch) -> Reading:
    """Read all routers at the same time."""

    def one(url: str) -> Samples | str:
        try:
            return parse(get(url, "/metrics", _TIMEOUT_S))
        except ServingError as error:
            return error.message

    samples: dict[Any, float] = {}
    troubles: list[str] = []
    with ThreadPoolExecutor(max(len(urls), 1)) as threads:
        for url, found in zip(urls, threads.map(one, urls), strict=True):
            if isinstance(found, str):
                troubles.append(found if url in found else f"{url}: {found}")
            else:
                samples.update(found)
    return Reading(samples, troubles)


def views(
    reading: Callable[[], Reading], interval_s: float, sleep: Callable[[float], None]
) -> Iterator[View]:
    """What goes on between one reading and the next, for ever.

    Raises:
        Unavailable: the first reading finds no router at all.
    """
    before = reading()
    if before.troubles and not before.samples:
        raise Unavailable("; ".join(before.troubles))
    while True:
        sleep(interval_s)
        after = reading()
        yield View(rates(before.samples, after.samples), after.troubles)
        if after.troubles:
            # What a router said last stays the measure for when it is back.
            after = Reading({**before.samples, **after.samples}, [])
        before = after


def run(
    urls: Sequence[str],
    console: Console,
    *,
    interval_s: float = 1.0,
    order: str = "requests",
    is_once: bool = False,
    as_json: bool = False,
) -> None:
    """Show until interrupted.

    Args:
        urls: of routers.
        console: where to.
        interval_s: between two readings.
        order: a name of `ORDERS`.
        is_once: show one interval and return.
        as_json: a line of JSON instead of a table.

    Raises:
        InvalidArgument: there is no such order.
        Unavailable: no router answers.
    """
    if order not in ORDERS:
        raise InvalidArgument(f"no order {order!r}: {', '.join(sorted(ORDERS))}")
    if not console.is_terminal:
        # A pipe has no width, and whoever reads it wants whole lines.
        console = Console(file=console.file, width=_PIPE_COLUMNS, highlight=False)
    found = views(lambda: read(urls), interval_s, time.sleep)
    with suppress(KeyboardInterrupt):
        if console.is_terminal and not as_json and not is_once:
            with Live(console=console, auto_refresh=False, screen=True) as live:
                for view in found:
                    live.update(render(view, order), refresh=True)
        for view in found:
            if as_json:
                print(json.dumps(msgspec.to_builtins(view._asdict())), flush=True)  # noqa: T201
            else:
                console.print(render(view, order))
            if is_once:
                return


def render(view: View, order: str = "requests") -> Group:
    """The view for people.

    Columns after the device: requests answered a second, rows in a batch, how full batches are,
    time in line, the device's time, the servable's share of its work and the padding in that, rows
    in line, requests answered in time, and what went wrong.
    """
    heads = [Text(_head(device)) for device in view.devices]
    if not heads:
        heads = [Text("no device serves anything")]
    table = Table(box=None, pad_edge=False)
    for name in ("servable", "unit", "device"):
        table.add_column(name, no_wrap=True, min_width=len(name))
    for name in (
        "req/s", "rows", "full", "p50", "p99", "busy", "share", "padding", "in line", "in time",
    ):  # fmt: skip
        table.add_column(name, no_wrap=True, justify="right", min_width=max(len(name), 6))
    table.add_column("drops/s", no_wrap=True)
    rows = [row for device in view.devices for row in device.servables]
    for row in sorted(rows, key=ORDERS[order]):
        table.add_row(*map(Text, _cells(row)))
    return Group(*heads, table, *(Text(trouble) for trouble in view.troubles))


def _head(device: DeviceRates) -> str:
    if not device.is_up:
        return f"{device.name}: down"
    told = (
        f"{device.name}: busy {device.busy:.0%}, {device.in_flight} batches in flight, "
        f"{device.waiting_rows} rows in line"
    )
    # It must never happen, so it is told only when it has.
    return told + (f", {device.compiles} COMPILED WHILE SERVING" if device.compiles else "")


def _cells(row: ServableRates) -> tuple[str, ...]:
    drops = sorted(row.drops_s.items(), key=lambda each: -each[1])
    return (
        row.servable,
        row.unit,
        row.device_name,
        f"{row.requests_s:.1f}",
        "-" if row.batch_rows is None else f"{row.batch_rows:.1f}",
        _percent(row.occupancy),
        _ms(row.queue_p50_s),
        _ms(row.queue_p99_s),
        f"{row.device:.1%}",
        _percent(row.share),
        _percent(row.padding),
        str(row.waiting_rows),
        "-" if row.attainment is None else f"{row.attainment:.2%}",
        ", ".join(f"{cause.replace('_', ' ')} {rate:.1f}" for cause, rate in drops),
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    ms = seconds * 1000
    return f"{ms:.2f}ms" if ms < 10 else f"{ms:.0f}ms"
