"""What tables cost the nodes that hold them: bytes, messages, networks, memory, processors, time.

Decides nothing: works out, for a layout that somebody has made, what a request costs each node and
which resource is the first to be used up. Says what the wire carries as `cluster.tables` and
`cluster.pooled` send it. Does not know bundles, actors or a running cluster, and measures nothing:
`Pace` holds what is assumed of processors.

The model: ids are spread evenly over the rows of their table, every bag of a table has the same
number of ids, nothing is cached, a request asks for all tables. A node has one shard actor and one
router; requests come to all routers alike, and what happens to be on a router's own node costs no
network. Rows that are not pooled go where their request is, to a router or a device. What clients
send and get is not counted. Of two copies of a part each is asked half of the time, independently
of other parts (which tells more messages than a router sends that keeps to one node).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from batching.errors import InvalidArgument, ResourceExhausted

__all__ = [
    "RESOURCES",
    "Host",
    "Load",
    "Pace",
    "Part",
    "Resource",
    "Shape",
    "TooBusy",
    "Traffic",
    "loads_of",
    "read_bytes",
    "shape_of",
]

#: What a node can run out of, apart from room. The loops are those of one process each, which is
#: why more cores do not help them.
Resource: TypeAlias = Literal["nic", "memory bandwidth", "cores", "shard loop", "router loop"]
RESOURCES: Final[tuple[Resource, ...]] = (
    "nic", "memory bandwidth", "cores", "shard loop", "router loop",
)  # fmt: skip

#: Memory is read by lines of this many bytes.
_LINE: Final = 64
#: Of a number that says how many ids a bag has.
_COUNT_BYTES: Final = 4
#: Ids of rows go in 64 bits; those of bags in 32 where a table has no more rows than this.
_ID32_ROWS_MAX: Final = 1 << 31
#: Rows of so many bytes go to their device past the router (`cluster.continuation_bytes_min`).
_PAST_ROUTER_BYTES: Final = 64 << 10
#: How often the bytes of an answer pass a memory: written and read by the shard, written by the
#: receiver's socket, read and written where they are put together.
_PASSES_SHARD: Final = 2
_PASSES_RECEIVER: Final = 3
#: Bytes of an element, where it is held; an int8 row has a scale beside it, see `shape_of`.
_ELEMENTS: Final[Mapping[str, int]] = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int8": 1,
}  # fmt: skip
_SCALE_BYTES: Final = 4


class TooBusy(ResourceExhausted):
    """A layout cannot serve the traffic that is asked of it.

    Attributes (positional): the resource that is short, the node where it is shortest, the rate
    that was asked for and the highest that could be served, in requests a second.
    """

    def __init__(self, resource: str, host: str, requests_s: float, requests_s_max: float) -> None:
        super().__init__(
            f"{requests_s:,.0f} requests a second are {requests_s - requests_s_max:,.0f} more than "
            f"the {resource} of {host} can serve: {requests_s_max:,.0f}"
        )
        self.args = (resource, host, requests_s, requests_s_max)  # What pickle calls it with.
        self.resource = resource
        self.host = host
        self.requests_s = requests_s
        self.requests_s_max = requests_s_max


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Rows of a table that are held as a whole, and the bytes that they take."""

    rows: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A table, and how often a request's row looks it up.

    Attributes:
        row_bytes: of a row where it is held.
        answer_bytes: of a row, or of a pooled bag, on its way.
        id_bytes: of an id on its way.
        ids: mean ids of a row of a request.
        pooled: whether a node answers with sums of its rows, not with the rows.
        net: tables with one name here are asked for together; "" is a name, too.
        parts: how it is cut, where that is settled; nothing where a layout may choose.
    """

    name: str
    rows: int
    row_bytes: int
    answer_bytes: int
    id_bytes: int = 8
    ids: float = 1.0
    pooled: bool = True
    net: str = ""
    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        if min(self.rows, self.row_bytes, self.answer_bytes, self.id_bytes) < 1:
            raise InvalidArgument(f"table {self.name!r} has a size below 1")
        if not 0 <= self.ids < math.inf:
            raise InvalidArgument(f"table {self.name!r} has {self.ids} ids a row")
        if self.parts and sum(part.rows for part in self.parts) != self.rows:
            raise InvalidArgument(f"the parts of table {self.name!r} are not its {self.rows} rows")

    @property
    def nbytes(self) -> int:
        """Bytes of one copy of the table."""
        if self.parts:
            return sum(part.nbytes for part in self.parts)
        return self.rows * self.row_bytes


def shape_of(
    name: str,
    rows: int,
    dim: int,
    dtype: str,
    *,
    ids: float = 1.0,
    pooled: bool = True,
    net: str = "",
    parts: tuple[Part, ...] = (),
) -> Shape:
    """A table as it is held and sent: pooled rows are float32, and so are those that are int8.

    Raises:
        InvalidArgument: tables cannot have the dtype, or a size is out of range.
    """
    element = _ELEMENTS.get(dtype)
    if element is None:
        raise InvalidArgument(f"no dtype {dtype!r} of tables; use {', '.join(_ELEMENTS)}")
    is_coded = dtype == "int8"
    return Shape(
        name=name,
        rows=rows,
        row_bytes=dim * element + _SCALE_BYTES * is_coded,
        answer_bytes=dim * (4 if pooled or is_coded else element),
        id_bytes=4 if pooled and rows <= _ID32_ROWS_MAX else 8,
        ids=ids,
        pooled=pooled,
        net=net,
        parts=parts,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What a node has for tables.

    Attributes:
        nic_bytes_s: of its network, each way.
        memory_bytes_s: of its memory, reading and writing together.
    """

    name: str
    memory_bytes: int
    nic_bytes_s: float
    memory_bytes_s: float
    cores: int

    def __post_init__(self) -> None:
        if min(self.memory_bytes, self.nic_bytes_s, self.memory_bytes_s, self.cores) <= 0:
            raise InvalidArgument(f"node {self.name!r} needs all of its resources above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What work costs one core, in seconds, and what a message is on its way.

    Attributes:
        request_s: a router, for a request, whatever it asks for.
        asking_s: a router, for each message.
        message_s: a shard's loop, for each message.
        line_s: reading 64 bytes of a row that is not cached, with others under way.
        byte_s: taking a byte of rows through a socket, at each end.
        journey_s: there and back between two nodes.
    """

    request_s: float = 44e-6
    asking_s: float = 10e-6
    message_s: float = 26e-6
    line_s: float = 10e-9
    byte_s: float = 0.25e-9
    journey_s: float = 100e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What comes: rows of a request, and requests a second that latencies are told for."""

    rows: int = 1
    requests_s: float = 0.0

    def __post_init__(self) -> None:
        if self.rows < 1 or not 0 <= self.requests_s < math.inf:
            raise InvalidArgument("a request has a row or more, and a rate is 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one node holds, and what one request, anywhere, costs it on average.

    Attributes:
        tables: rows held, by table.
        nbytes: that these take.
        lookups: rows read.
        messages: how often it is asked, at most 1.
        read_bytes: what its memory moves, for rows and for answers.
        sent_bytes: leaves the node, of its shard and of its router.
        received_bytes: comes to the node, likewise.
        needs: seconds of each resource; 1 second of it is there every second.
        latency_s: expected time until it has answered, at the traffic that is planned for;
            infinite where it cannot serve that much, 0 where it is never asked.
    """

    host: str
    tables: Mapping[str, int]
    nbytes: int
    lookups: float
    messages: float
    read_bytes: float
    sent_bytes: float
    received_bytes: float
    needs: Mapping[Resource, float]
    latency_s: float

    @property
    def limit(self) -> tuple[float, Resource]:
        """Requests a second, of the cluster, at which it is busy all the time, and with what."""
        need, resource = max((self.needs[name], name) for name in RESOURCES)
        return (1 / need if need else math.inf), resource


@dataclass(slots=True)
class _Asked:
    """What a request moves at one node as a shard."""

    lookups: float = 0.0
    read_bytes: float = 0.0
    up_bytes: float = 0.0
    down_bytes: float = 0.0
    past_bytes: float = 0.0
    missed: float = 1.0
    lines: float = 0.0

    @property
    def messages(self) -> float:
        return 1 - self.missed


def read_bytes(shape: Shape) -> int:
    """What reading a row moves from memory: whole lines."""
    return math.ceil(shape.row_bytes / _LINE) * _LINE


def loads_of(
    shapes: Sequence[Shape],
    hosts: Sequence[Host],
    held: Mapping[str, Mapping[str, tuple[int, int]]],
    *,
    copies: int,
    traffic: Traffic,
    pace: Pace,
) -> tuple[Load, ...]:
    """What each node holds and does.

    Args:
        shapes: the tables.
        hosts: the nodes.
        held: node to table to the rows and bytes of it that are there.
        copies: of every part, on as many nodes.
        traffic: what comes.
        pace: what work costs.
    """
    tables = {shape.name: shape for shape in shapes}
    asked = [
        _asked([(tables[t], n) for t, (n, _) in held[h.name].items()], copies, traffic.rows)
        for h in hosts
    ]
    return tuple(
        _load(host, each, held[host.name], asked, traffic, pace)
        for host, each in zip(hosts, asked, strict=True)
    )


def _asked(held: Sequence[tuple[Shape, int]], copies: int, rows: int) -> _Asked:
    found = _Asked()
    for shape, count in held:
        share = count / shape.rows / copies
        ids = rows * shape.ids * share
        found.lookups += ids
        found.lines += ids * read_bytes(shape) / _LINE
        found.read_bytes += ids * read_bytes(shape)
        found.up_bytes += ids * shape.id_bytes
        if shape.pooled:
            bags = rows * _touched(shape.ids, share)
            found.up_bytes += bags * _COUNT_BYTES
            found.down_bytes += bags * shape.answer_bytes
        else:
            found.down_bytes += ids * shape.answer_bytes
            if rows * shape.ids * shape.answer_bytes >= _PAST_ROUTER_BYTES:
                found.past_bytes += ids * shape.answer_bytes
        found.missed *= 1 - _touched(rows * shape.ids, share)
    return found


def _touched(ids: float, share: float) -> float:
    """How likely one of so many ids is in a share of the rows."""
    if share >= 1:
        return min(ids, 1.0)
    return 1.0 - float((1.0 - share) ** ids) if ids >= 1 else ids * share


def _load(
    host: Host,
    mine: _Asked,
    held: Mapping[str, tuple[int, int]],
    asked: Sequence[_Asked],
    traffic: Traffic,
    pace: Pace,
) -> Load:
    routers = len(asked)
    remote = (routers - 1) / routers
    up = sum(each.up_bytes for each in asked) / routers
    down = sum(each.down_bytes for each in asked) / routers
    past = sum(each.past_bytes for each in asked) / routers
    sent, received = (mine.down_bytes + up) * remote, (mine.up_bytes + down) * remote
    moved = mine.read_bytes + _PASSES_SHARD * mine.down_bytes + _PASSES_RECEIVER * down
    router_s = (
        pace.request_s / routers
        + pace.asking_s * sum(each.messages for each in asked) / routers
        + pace.byte_s * (down - past)
    )
    shard_s = pace.message_s * mine.messages + pace.byte_s * mine.down_bytes
    work_s = shard_s + pace.line_s * mine.lines
    needs: dict[Resource, float] = {
        "nic": max(sent, received) / host.nic_bytes_s,
        "memory bandwidth": moved / host.memory_bytes_s,
        "cores": (work_s + router_s + pace.byte_s * past) / host.cores,
        "shard loop": shard_s,
        "router loop": router_s,
    }
    spare = 1 - traffic.requests_s * max(needs.values())
    latency = 0.0
    if spare <= 0:
        latency = math.inf
    elif mine.messages:
        wire_s = (mine.up_bytes + mine.down_bytes) * remote / host.nic_bytes_s
        # A request that asks this node has all of what requests cost it on average.
        latency = pace.journey_s * (routers > 1) + (work_s + wire_s) / mine.messages / spare
    return Load(
        host=host.name,
        tables={name: rows for name, (rows, _) in sorted(held.items())},
        nbytes=sum(size for _, size in held.values()),
        lookups=mine.lookups,
        messages=mine.messages,
        read_bytes=moved,
        sent_bytes=sent,
        received_bytes=received,
        needs=needs,
        latency_s=latency,
    )
