"""A plan as tables on a terminal, with what it takes for granted.

Decides what is left out where there are many nodes, and how exact a figure may look: three digits,
as nothing here is measured. Does not know how a figure was worked out.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cluster.layout_costs import Host, Load, Pace
from cluster.layouts import Layout, TooLarge
from cluster.plans import Planned, limits

__all__ = ["show_plan"]

#: Nodes and tables that are shown at most: those that hold, or take, most.
_LINES_MAX: Final = 16
_WIDTH_MIN: Final = 132
#: Rates that are worked out from what is assumed of processors deserve no more digits than this.
_DIGITS: Final = 3
#: So much of a shard's loop goes to messages, at so many of a request, that rows hardly matter.
_MOSTLY: Final = 0.8
_ASKED_OFTEN: Final = 0.5
#: What the figures of a plan do not have in them, as `cluster.layout_costs` says at length.
_NOT_COUNTED: Final = (
    "Taken for granted: ids spread evenly over the rows of a table (ids that are asked for more "
    "often make their nodes the limit sooner), no caches. Not counted: what clients send and get, "
    "and what the rest of the model takes of the same nodes."
)
_COPIES: Final = (
    "Of the copies of a part each is taken to be asked equally often, whatever a request asks for "
    "beside it: routers that keep to the same nodes send fewer messages than this."
)


def show_plan(planned: Planned, console: Console) -> None:
    """Print a plan: tables, nodes, what is used up first, and what other strategies come to."""
    layout = planned.layout
    copies = f", {planned.copies} copies" if planned.copies > 1 else ""
    rows = f", {layout.traffic.rows} rows a request" if layout.traffic.rows > 1 else ""
    total = planned.copies * sum(shape.nbytes for shape in planned.shapes)
    # A cell that is cut off tells nothing; a terminal wraps lines that are too long for it.
    wide = Console(
        file=console.file, width=max(console.width, _WIDTH_MIN), highlight=False, markup=False
    )
    wide.print(
        f"{len(planned.shapes)} tables of {_size(total)}{copies} on {len(planned.hosts)} nodes, "
        f"strategy {layout.strategy}{rows}. Worked out, not measured."
    )
    for table in (_tables(planned), _nodes(planned), _limits(layout), _strategies(planned)):
        wide.print(table)
    rate, resource, host = layout.limit
    seldom = 1 - 0.99**layout.messages
    _print_host(planned, host, wide)
    wide.print(
        f"Up to {_rate(rate)} requests a second, then the {resource} of {host} is used up. A "
        f"request's look-ups take {_time(layout.latency_s)} at "
        f"{_rate(layout.traffic.requests_s)} requests a second; {seldom:.1%} of requests wait for "
        "a shard's slowest hundredth."
    )
    _print_loop(layout, wide)
    wide.print(_NOT_COUNTED)
    if planned.copies > 1:
        wide.print(_COPIES)


def _print_loop(layout: Layout, console: Console) -> None:
    """Where messages use a shard's loop up, say that buying nodes is no way out."""
    _, resource, name = layout.limit
    node = next(node for node in layout.nodes if node.host == name)
    for_messages = Pace().message_s * node.messages
    if resource != "shard loop" or node.messages < _ASKED_OFTEN:
        return
    if for_messages >= _MOSTLY * node.needs[resource]:
        console.print(
            f"{_share(node.messages)} of requests send {name} a message, and messages are "
            f"{_share(for_messages / node.needs[resource])} of what its loop does: more nodes, "
            "more cores and faster networks raise this rate little."
        )


def _print_host(planned: Planned, name: str, console: Console) -> None:
    """Say what the node that is the limit was taken to have: every rate here hangs on it."""
    host = next(host for host in planned.hosts if host.name == name)
    others = len({replace(each, name="") for each in planned.hosts}) > 1
    console.print(
        f"{name if others else 'Each node'} is taken to have {_size(host.memory_bytes)} for "
        f"tables, a network of {_size(host.nic_bytes_s)}/s each way, memory of "
        f"{_size(host.memory_bytes_s)}/s at random rows, and {host.cores} cores, of which a "
        "shard's loop is one and a router's loop another."
    )


def _tables(planned: Planned) -> Table:
    table = _table("table", "rows", "bytes", "ids", "answer", "parts", "on nodes", title="Tables")
    shapes = sorted(planned.shapes, key=lambda shape: (-shape.nbytes, shape.name))
    for shape in shapes[:_LINES_MAX]:
        homes = planned.layout.homes[shape.name]
        nodes = sorted({node for part in homes for node in part})
        table.add_row(
            shape.name, f"{shape.rows:,}", _size(shape.nbytes), f"{shape.ids:g}",
            "sums" if shape.pooled else "rows", str(len(homes)),
            nodes[0] if len(nodes) == 1 else f"{len(nodes)} nodes",
        )  # fmt: skip
    if len(shapes) > _LINES_MAX:
        rest = shapes[_LINES_MAX:]
        table.add_row(f"{len(rest)} smaller ones", "", _size(sum(s.nbytes for s in rest)))
    return table


def _nodes(planned: Planned) -> Table:
    table = _table(
        "node", "holds", "of", "look-ups", "messages", "moved", "sent", "received", "limit req/s",
        "by", "latency", title="Nodes: what one request costs each, on average",
    )  # fmt: skip
    pairs = sorted(
        zip(planned.layout.nodes, planned.hosts, strict=True),
        key=lambda pair: (pair[0].limit[0], pair[0].host),
    )
    alike: dict[tuple[str, ...], list[str]] = {}
    for node, host in pairs:
        alike.setdefault(_node(node, host), []).append(node.host)
    for cells, names in list(alike.items())[:_LINES_MAX]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        table.add_row(f"{names[0]}{more}", *cells)
    if len(alike) > _LINES_MAX:
        rest = sum(len(names) for names in list(alike.values())[_LINES_MAX:])
        table.add_row(f"{rest} that serve more")
    return table


def _node(node: Load, host: Host) -> tuple[str, ...]:
    rate, resource = node.limit
    return (
        _size(node.nbytes), _share(node.nbytes / host.memory_bytes),
        f"{node.lookups:.3g}", f"{node.messages:.2f}", _size(node.read_bytes),
        _size(node.sent_bytes), _size(node.received_bytes), _rate(rate), resource,
        _time(node.latency_s),
    )  # fmt: skip


def _limits(layout: Layout) -> Table:
    table = _table(
        "resource", "limit req/s", "first on", "a request takes there", "used at the limit of all",
        title="What can be used up",
    )  # fmt: skip
    most = layout.limit[0]
    for resource, found in limits(layout).items():
        rate = found["requests_s"]
        table.add_row(
            resource,
            _rate(math.inf if rate is None else rate),
            found["node"],
            _time(found["s_per_request"]),
            _share(found["s_per_request"] * most) if math.isfinite(most) else "",
        )
    return table


def _strategies(planned: Planned) -> Table:
    table = _table(
        "strategy", "limit req/s", "by", "latency", "messages", "parts", "fullest",
        "reads of the busiest", "nodes", title="Strategies (in brackets: no layout has less)",
    )  # fmt: skip
    for name, found in planned.others.items():
        if isinstance(found, TooLarge):
            table.add_row(name, "", found.message)
            continue
        rate, resource, _ = found.limit
        table.add_row(
            name, _rate(rate), resource, _time(found.latency_s), f"{found.messages:.1f}",
            str(sum(map(len, found.parts.values()))),
            f"{_share(found.full.value)} [{_share(found.full.bound)}]",
            f"{_time(found.busy.value)} [{_time(found.busy.bound)}]",
            f"{found.spread.value:.0f} [{found.spread.bound:.0f}]",
        )  # fmt: skip
    return table


def _table(*columns: str, title: str) -> Table:
    return Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _size(count: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{_rounded(count / scale):g} {unit}"
    return f"{count:.0f} B"


def _time(seconds: float) -> str:
    if math.isinf(seconds):
        return "no end"
    if seconds < 1e-6:
        return f"{_rounded(seconds * 1e9):g} ns"
    if seconds < 1e-3:
        return f"{_rounded(seconds * 1e6):g} µs"
    return f"{_rounded(seconds * 1e3):g} ms"


def _rate(rate: float) -> str:
    if math.isinf(rate):
        return "no limit"
    return f"{_rounded(rate):,.0f}"


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _share(value: float) -> str:
    return f"{value:.1%}" if value == 0 or value >= 1e-3 else "<0.1%"
