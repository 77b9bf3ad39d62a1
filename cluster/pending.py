"""What a router keeps of a request that is under way, and who asked for it. Decides nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from batching.allowance import CRITICAL
from batching.errors import ServingError
from cluster.hedging import Shard
from cluster.partials import Parts
from cluster.peers import Peer
from cluster.routes import REQUEST, PlannedNode, Routes, SignaturePlan
from cluster.tables import Gather
from shards.specs import check

__all__ = ["Call", "Execution", "RouterStats", "Sink", "Spare"]

Array = npt.NDArray[np.generic]

_NO_SIZES: tuple[int, ...] = ()


class Sink(Protocol):
    """Who asked. Exactly one of the two is called, once, on the loop thread. Must not raise."""

    def done(self, outputs: Mapping[str, Array], frame: Sequence[Array] | None) -> None:
        """The answer.

        Args:
            outputs: the signature's outputs by name.
            frame: where the outputs are rows of one reply frame, that frame's tensors: the same
                object for every request answered by the frame, so that a check of all its rows
                can be made once.
        """

    def failed(self, error: ServingError) -> None:
        """The one error."""


class RouterStats(msgspec.Struct):
    """Counts since the start. Expired and cancelled requests are among those that failed.

    Attributes:
        joined: units whose look-ups' rows went straight to their device.
        unjoined: of these, those whose rows could not be joined there.
        mismatched: answers refused, as being of another unit, plan or size than was asked for.
        turned_away: requests that no device was asked for, as none would have been in time.
        elsewhere: units that a device refused and another was asked for.
        replaced: parts of look-ups that another replica was asked for, as one had broken.
        hedged: parts that another replica was asked for besides, as one was late.
        hedges_won: of these, those that the other answered first.
        missing_by: `missing_rows` by servable and table.
    """

    accepted: int = 0
    answered: int = 0
    failed: int = 0
    expired: int = 0
    cancelled: int = 0
    refused: int = 0
    retried: int = 0
    late_replies: int = 0
    missing_rows: int = 0
    joined: int = 0
    unjoined: int = 0
    mismatched: int = 0
    turned_away: int = 0
    elsewhere: int = 0
    replaced: int = 0
    hedged: int = 0
    hedges_won: int = 0
    missing_by: dict[tuple[str, str], int] = {}

    def count_missing(self, servable: str, table: str, rows: int) -> None:
        """Note that look-ups did not find so many rows; "" for a table that counts elsewhere."""
        if rows and table:
            self.missing_rows += rows
            self.missing_by[servable, table] = self.missing_by.get((servable, table), 0) + rows


class Execution:
    """One accepted request on its way through its plan."""

    __slots__ = (
        "calls", "criticality", "deadline", "inputs", "plan", "retried", "routes", "rows", "sink",
        "slot", "trace", "values", "waiting",
    )  # fmt: skip

    def __init__(
        self,
        routes: Routes,
        plan: SignaturePlan,
        inputs: Mapping[str, Array],
        rows: int,
        deadline: float,
        sink: Sink,
        trace: bytes,
        criticality: int = CRITICAL,
    ) -> None:
        self.routes = routes
        self.plan = plan
        self.inputs = inputs
        self.rows = rows
        self.deadline = deadline
        self.sink = sink
        self.trace = trace
        self.criticality = criticality
        #: where the deadline wheel has it; -1 once the request has ended
        self.slot = 0
        self.retried = False
        #: numbers of the calls that are under way
        self.calls: set[int] = set()
        #: outputs of finished nodes; made when a graph is walked
        self.values: dict[int, Mapping[str, Array]]
        #: for every node, how many of its needs are not there yet; likewise
        self.waiting: list[int]

    def rows_of(self, node: PlannedNode) -> int:
        """How many rows a unit of this request runs on."""
        return 1 if node.per_request else self.rows

    def bags_of(self, node: PlannedNode) -> tuple[Array, Array | None]:
        """The ids of a pooled look-up, and weights if it has any."""
        ids: Array | None = None
        weights: Array | None = None
        for name, (at, source) in node.inputs:
            found = self.inputs[source] if at == REQUEST else self.values[at][source]
            if name == "ids":
                ids = found
            else:
                weights = found
        assert ids is not None
        return ids, weights

    def arguments(self, node: PlannedNode) -> tuple[Array, ...]:
        """What a unit of a graph is given.

        Raises:
            SpecMismatch: it does not fit the unit's specs.
        """
        values, inputs = self.values, self.inputs
        arrays = tuple(
            [inputs[name] if at == REQUEST else values[at][name] for _, (at, name) in node.inputs]
        )
        named = {name: array for (name, _), array in zip(node.inputs, arrays, strict=True)}
        check(node.specs, named, node.limits)
        return arrays


class Spare:
    """What several replicas can be asked for: one part of a look-up, shared by all its calls.

    Attributes:
        shard: whose times it has.
        op: what is asked.
        arrays: likewise.
        names: of the replicas.
        asked: of these, the ones that have been asked, the first one first.
        numbers: of their calls.
        since: when the first was sent.
    """

    __slots__ = ("arrays", "asked", "names", "numbers", "op", "shard", "since")

    def __init__(
        self, shard: Shard, op: str, arrays: tuple[Array, ...], names: Sequence[str], asked: str
    ) -> None:
        self.shard = shard
        self.op = op
        self.arrays = arrays
        self.names = names
        self.asked = [asked]
        self.numbers: list[int] = []
        self.since: float


class Call:
    """One item sent to one actor.

    Attributes:
        address: the unit that is asked, or one partition of a unit of a registered kind.
        gather: the look-up that its rows are part of, where they come back here.
        partials: what its answer is one part of, in another way.
        onward: the device that its rows go to, where they do not.
        parts: numbers of the calls whose rows go to this one's actor.
        due: by when it should be answered; set when it is sent.
        sent_at: when it was sent, of a graph's calls.
        is_second: whether another device has refused the same.
        spare: what other replicas can be asked for in its place; None where there are none.
        is_hedge: whether another replica had been asked, and was late.
        sizes: how many of its rows are of each table, where it is of several.
        owed: rows under way at its actor when it was sent, where it has a spare; see `Pace.sent`.
    """

    __slots__ = (
        "address", "due", "execution", "gather", "is_hedge", "is_second", "node", "onward",
        "owed", "partials", "partition", "parts", "peer", "positions", "rows", "sent_at", "sizes",
        "spare",
    )  # fmt: skip

    def __init__(
        self,
        execution: Execution,
        node: PlannedNode,
        peer: Peer,
        rows: int,
        gather: Gather | None = None,
        positions: npt.NDArray[np.intp] | None = None,
        partials: Parts | None = None,
        partition: int = 0,
    ) -> None:
        self.address, self.sizes = node.unit, _NO_SIZES
        if partials is not None:
            self.address, self.sizes = partials.address(partition), partials.sizes(partition)
        self.execution = execution
        self.node = node
        self.peer = peer
        self.rows = rows
        self.gather = gather
        self.positions = positions
        self.partials = partials
        self.partition = partition
        self.onward: Peer | None = None
        self.parts: list[int] = []
        self.due = self.sent_at = 0.0
        self.is_second = self.is_hedge = False
        self.spare: Spare | None = None
        self.owed: int
