"""What `shardserve plan` is asked, read; and its answer as plain values.

Decides how tables and nodes are described: by the name of an example, in YAML, or by a bundle of a
store. The layouts themselves are `cluster.layouts`' to find.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgspec
import yaml

from batching.errors import InvalidArgument, NotFound
from cluster.fields import parse_size
from cluster.layout_costs import RESOURCES, Host, Load, Pace, Shape, Traffic, shape_of
from cluster.layouts import STRATEGIES, Figure, Layout, TooLarge, lay_out

__all__ = [
    "EXAMPLES",
    "Planned",
    "as_json",
    "hosts_of",
    "limits",
    "plan",
    "read_file",
    "with_ids",
]

#: Hosts that a plan has at most.
_HOSTS_MAX: Final = 4096

# MLPerf's DLRM-DCNv2: the multi-hot Criteo tables, and the ids that a sample has of each.
_DLRM_V2: Final = (
    (40_000_000, 3), (39_060, 2), (17_295, 1), (7_424, 2), (20_265, 6), (3, 1), (7_122, 1),
    (1_543, 1), (63, 1), (40_000_000, 7), (3_067_956, 3), (405_282, 8), (10, 1), (2_209, 6),
    (11_938, 9), (155, 5), (4, 1), (976, 1), (14, 1), (40_000_000, 12), (40_000_000, 100),
    (40_000_000, 27), (590_152, 10), (12_973, 3), (108, 1), (36, 1),
)  # fmt: skip

#: Tables of models that are published. A sample of the first is 214 ids, pooled; a request of the
#: second ranks 2,048 candidates, whose rows a model of sequences needs one by one. The rows of its
#: user's history, which come on top, are not said anywhere: ``--ids items=4096`` has 2,048 of them.
EXAMPLES: Final[Mapping[str, tuple[Shape, ...]]] = {
    "dlrm-v2": tuple(
        shape_of(f"criteo-{index:02}", rows, 128, "float32", ids=ids)
        for index, (rows, ids) in enumerate(_DLRM_V2)
    ),
    "dlrm-v3": (
        shape_of("items", 1_000_000_000, 512, "float16", ids=2048, pooled=False),
        shape_of("users", 10_000_000, 512, "float16", ids=1, pooled=False),
    ),
}


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    rows: int
    dim: int
    dtype: str = "float32"
    ids: float = 1.0
    pool: bool = True
    net: str = ""


class _Nodes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    memory: int | str
    nic: int | str
    bandwidth: int | str
    cores: int
    count: int = 1


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tables: tuple[_Table, ...]
    hosts: tuple[_Nodes, ...] = ()


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, and what other strategies would come to: a layout, or why there is none."""

    shapes: tuple[Shape, ...]
    hosts: tuple[Host, ...]
    copies: int
    layout: Layout
    others: Mapping[str, Layout | TooLarge]


def plan(
    shapes: Sequence[Shape],
    hosts: Sequence[Host],
    strategy: str,
    *,
    copies: int = 1,
    traffic: Traffic | None = None,
) -> Planned:
    """Lay tables out by a strategy, and by the others to compare with.

    Raises:
        InvalidArgument: see `lay_out`; or there is no such strategy.
        TooLarge: there is no room.
    """
    if strategy not in STRATEGIES:
        raise InvalidArgument(f"no strategy {strategy!r}; use {', '.join(STRATEGIES)}")
    layout = lay_out(shapes, hosts, strategy=strategy, copies=copies, traffic=traffic)
    others: dict[str, Layout | TooLarge] = {}
    for other in STRATEGIES:
        try:
            others[other] = (
                layout
                if other == strategy
                else lay_out(shapes, hosts, strategy=other, copies=copies, traffic=traffic)
            )
        except TooLarge as error:
            others[other] = error
    return Planned(tuple(shapes), tuple(hosts), copies, layout, others)


def hosts_of(
    count: int, memory: str | int, nic: str | int, bandwidth: str | int, cores: int, first: int = 0
) -> list[Host]:
    """Equal nodes.

    Args:
        count: how many.
        memory: bytes, or words such as ``256GiB``.
        nic: likewise, a second.
        bandwidth: of memory, likewise.
        cores: of each.
        first: number of the first.

    Raises:
        InvalidArgument: that is no size, or no number of nodes.
    """
    if not 1 <= first + count <= _HOSTS_MAX or count < 1:
        raise InvalidArgument(f"a plan is for 1 to {_HOSTS_MAX:,} nodes, not {first + count:,}")
    sizes = [_size(text) for text in (memory, nic, bandwidth)]
    return [
        Host(
            name=f"node-{index:03}", memory_bytes=sizes[0], nic_bytes_s=sizes[1],
            memory_bytes_s=sizes[2], cores=cores,
        )
        for index in range(first, first + count)
    ]  # fmt: skip


def _size(text: str | int) -> int:
    try:
        found = parse_size(int(text) if isinstance(text, str) and text.isdecimal() else text)
    except ValueError as error:
        raise InvalidArgument(str(error)) from None
    assert isinstance(found, int)
    return found


def read_file(file: Path) -> tuple[list[Shape], list[Host]]:
    """Tables and, if there are any, nodes that a YAML file describes.

    Raises:
        NotFound: there is no such file.
        InvalidArgument: it does not say what it should.
    """
    try:
        said = yaml.safe_load(file.read_text(encoding="utf-8"))
        found = msgspec.convert(said, _File)
    except OSError as error:
        raise NotFound(f"{file} cannot be read: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise InvalidArgument(f"{file}: {error}") from None
    shapes = [
        shape_of(t.name, t.rows, t.dim, t.dtype, ids=t.ids, pooled=t.pool, net=t.net)
        for t in found.tables
    ]
    hosts: list[Host] = []
    for n in found.hosts:
        hosts += hosts_of(n.count, n.memory, n.nic, n.bandwidth, n.cores, len(hosts))
    return shapes, hosts


def with_ids(shapes: Iterable[Shape], words: Iterable[str]) -> list[Shape]:
    """Tables with other numbers of ids.

    Args:
        shapes: the tables.
        words: such as ``items=20``: what a row of a request has of a table.

    Raises:
        InvalidArgument: that is no number of ids of one of the tables.
    """
    found = {shape.name: shape for shape in shapes}
    for word in words:
        name, _, number = word.rpartition("=")
        try:
            ids = float(number)
        except ValueError:
            raise InvalidArgument(f"{word!r} is not TABLE=NUMBER, such as items=20") from None
        if name not in found:
            raise InvalidArgument(f"no table {name!r}; there are {', '.join(found)}")
        found[name] = replace(found[name], ids=ids)
    return list(found.values())


def as_json(planned: Planned) -> dict[str, Any]:
    """Everything about a plan as plain values; what has no end is None."""
    layout = planned.layout
    rate, resource, host = layout.limit
    return {
        "strategy": layout.strategy,
        "copies": planned.copies,
        "rows_per_request": layout.traffic.rows,
        "requests_s": layout.traffic.requests_s,
        "limit": {"requests_s": _finite(rate), "resource": resource, "node": host},
        "limits": limits(layout),
        "latency_s": _finite(layout.latency_s),
        "messages": layout.messages,
        "full": asdict(layout.full),
        "busy_s": asdict(layout.busy),
        "spread": asdict(layout.spread),
        "tables": {
            shape.name: {
                "rows": shape.rows,
                "bytes": shape.nbytes,
                "ids": shape.ids,
                "pooled": shape.pooled,
                "parts": [
                    {"rows": part.rows, "bytes": part.nbytes} for part in layout.parts[shape.name]
                ],
                "homes": [list(nodes) for nodes in layout.homes[shape.name]],
            }
            for shape in planned.shapes
        },
        "nodes": [
            _node(node, host) for node, host in zip(layout.nodes, planned.hosts, strict=True)
        ],
        "strategies": {name: _summary(each) for name, each in planned.others.items()},
        "assumed": asdict(Pace()),
    }


def limits(layout: Layout) -> dict[str, dict[str, Any]]:
    """For each resource the rate at which it is used up somewhere, and where."""
    found: dict[str, dict[str, Any]] = {}
    for resource in RESOURCES:
        worst = max(layout.nodes, key=lambda node: node.needs[resource])
        need = worst.needs[resource]
        found[resource] = {
            "requests_s": 1 / need if need else None,
            "node": worst.host,
            "s_per_request": need,
        }
    return found


def _node(node: Load, host: Host) -> dict[str, Any]:
    rate, resource = node.limit
    return {
        "node": node.host,
        "tables": dict(node.tables),
        "bytes": node.nbytes,
        "memory_bytes": host.memory_bytes,
        "lookups": node.lookups,
        "messages": node.messages,
        "memory_moved_bytes": node.read_bytes,
        "sent_bytes": node.sent_bytes,
        "received_bytes": node.received_bytes,
        "needs_s": dict(node.needs),
        "limit": {"requests_s": _finite(rate), "resource": resource},
        "latency_s": _finite(node.latency_s),
    }


def _summary(found: Layout | TooLarge) -> dict[str, Any]:
    if isinstance(found, TooLarge):
        return {"error": found.message, "short_bytes": found.short_bytes, "where": found.where}
    rate, resource, host = found.limit
    return {
        "requests_s": _finite(rate),
        "resource": resource,
        "node": host,
        "latency_s": _finite(found.latency_s),
        "messages": found.messages,
        "parts": sum(map(len, found.parts.values())),
        **{name: asdict(_figure(found, name)) for name in ("full", "busy", "spread")},
    }


def _figure(layout: Layout, name: str) -> Figure:
    found = getattr(layout, name)
    assert isinstance(found, Figure)
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
