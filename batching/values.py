"""The values that pass between the batcher and its driver, and the life of a ticket.

A ticket is the rows of one request that wait in one lane. Its life is the literal table
`TRANSITIONS`; the README of this package prints the same table and a test holds them together.
`Ticket` is the one mutable value here: it is on the hot path, so the batcher keeps its progress in
plain attributes and sets its state directly instead of looking the table up.
`batching.testing.CheckedTicket` looks it up, and the tests run on that.

This file decides nothing. It does not know what a row is, nor what a payload holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NamedTuple, TypeAlias

from batching.telemetry import Distribution

__all__ = [
    "TRANSITIONS",
    "Batch",
    "Effect",
    "Expired",
    "Failed",
    "Finished",
    "LaneKey",
    "LaneStats",
    "Part",
    "OwnerStats",
    "Run",
    "Shed",
    "Stats",
    "Tally",
    "Ticket",
    "TicketEvent",
    "TicketState",
]


class LaneKey(NamedTuple):
    """What rows must share to run in one batch.

    Attributes:
        unit: identity of the unit; models that share a unit share its lanes.
        shape: the bucket of every length symbol, as `batching.buckets.bucketize` returns it.
    """

    unit: str
    shape: tuple[int, ...] = ()


class TicketState(StrEnum):
    """Where a ticket is in its life."""

    NEW = "new"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    EXPIRED = "expired"
    SHED = "shed"
    CANCELLED = "cancelled"


class TicketEvent(StrEnum):
    """What may happen to a ticket."""

    ADMIT = "admitted by its lane"
    DISPATCH = "its last waiting row went to the device"
    RETRY = "a batch of it failed and is tried again in halves"
    COMPLETE = "its last row came back"
    FAIL = "a batch of its rows alone failed, or the device is lost"
    EXPIRE = "its deadline came while rows waited"
    SHED = "it could not be served in time, or only at the cost of others"
    CANCEL = "its caller gave up"


#: The life of a ticket. What is not in this table cannot happen.
TRANSITIONS: Final[Mapping[tuple[TicketState, TicketEvent], TicketState]] = {
    (TicketState.NEW, TicketEvent.ADMIT): TicketState.WAITING,
    (TicketState.WAITING, TicketEvent.DISPATCH): TicketState.RUNNING,
    (TicketState.WAITING, TicketEvent.FAIL): TicketState.FAILED,
    (TicketState.WAITING, TicketEvent.EXPIRE): TicketState.EXPIRED,
    (TicketState.WAITING, TicketEvent.SHED): TicketState.SHED,
    (TicketState.WAITING, TicketEvent.CANCEL): TicketState.CANCELLED,
    (TicketState.RUNNING, TicketEvent.RETRY): TicketState.WAITING,
    (TicketState.RUNNING, TicketEvent.COMPLETE): TicketState.FINISHED,
    (TicketState.RUNNING, TicketEvent.FAIL): TicketState.FAILED,
    (TicketState.RUNNING, TicketEvent.CANCEL): TicketState.CANCELLED,
}


@dataclass(slots=True, eq=False)
class Ticket:
    """Rows of one request that wait in one lane. Compared by identity.

    The first eight attributes are the driver's. The others are the batcher's: read them, but do
    not write them.

    Attributes:
        lane: the lane in which the rows wait.
        rows: how many, at least 1.
        nbytes: what they weigh against the bound of the lane.
        deadline: the instant, in monotonic seconds, from which the answer is worthless;
            `math.inf` for never.
        payload: the driver's own; the batcher never looks at it.
        owner: whose share of the device the rows use: a servable's name.
        priority: rows of a higher one leave their line first, and are given up last; see
            `batching.allowance` for what is what.
        requests: how many it counts as; more than one only in `batching.at_once`.
        state: where the ticket is in its life.
        id: number of the ticket within its batcher, 0 until it was admitted.
        offered_at: when it was admitted.
        taken: rows that left the line; the next row to leave it has this index.
        retrying: rows that left the line and wait again because their batch failed.
        done: rows that came back.
    """

    lane: LaneKey
    rows: int
    nbytes: int
    deadline: float
    payload: object = None
    owner: str = ""
    priority: int = 0
    requests: int = 1
    state: TicketState = field(default=TicketState.NEW, init=False)
    id: int = field(default=0, init=False)
    offered_at: float = field(default=0.0, init=False)
    taken: int = field(default=0, init=False)
    retrying: int = field(default=0, init=False)
    done: int = field(default=0, init=False)


#: A run of a ticket's rows inside a batch: ``(ticket, start, stop)``. A plain tuple, because one
#: is made for every ticket.
Part: TypeAlias = tuple[Ticket, int, int]


@dataclass(slots=True, eq=False)
class Batch:
    """Rows of one lane that run together, at rows ``0 .. rows`` of the bucket in order of `parts`.

    Attributes:
        id: number of the batch within its batcher; never used again.
        lane: the lane of every row.
        bucket: the compiled size to run; ``bucket - rows`` rows of it are padding.
        rows: how many rows are real.
        parts: at most one for each ticket.
        formed_at: the instant at which it was formed.
        expected_s: device seconds that it is expected to take.
        spare_rows: how many of the rows are best-effort ones.
    """

    id: int
    lane: LaneKey
    bucket: int
    rows: int
    parts: list[Part]
    formed_at: float
    expected_s: float = 0.0
    spare_rows: int = 0


@dataclass(slots=True)
class Run:
    """Put this batch on the device and answer with `complete` or `fail`."""

    batch: Batch


@dataclass(slots=True)
class Finished:
    """Every row of the ticket came back."""

    ticket: Ticket


@dataclass(slots=True)
class Expired:
    """The ticket's deadline came while rows of it waited."""

    ticket: Ticket


@dataclass(slots=True)
class Shed:
    """The ticket is given up before its deadline.

    Attributes:
        hopeless: it would have missed its deadline in any case; otherwise serving it would have
            made several others late.
        evicted: its line was full, and a more critical ticket has taken its place.
        retry_after_ms: until the device would begin with rows that came now.
    """

    ticket: Ticket
    hopeless: bool = False
    evicted: bool = False
    retry_after_ms: int = 0


@dataclass(slots=True)
class Failed:
    """The ticket's own rows make a batch fail, or the device is lost."""

    ticket: Ticket
    error: Exception


Effect: TypeAlias = Run | Finished | Expired | Shed | Failed


@dataclass(slots=True, kw_only=True)
class Tally:
    """What became of one owner's tickets in one lane. Only ever counted up.

    Attributes:
        offered: tickets admitted.
        finished: tickets answered.
        late: of these, those whose last row came back after the deadline.
        failed: tickets that failed.
        expired: tickets that waited past their deadline.
        shed: tickets that were given up before it.
        hopeless: of these, those that would have missed it in any case.
        evicted: of these, those whose place in a full line a more critical ticket has taken.
        cancelled: tickets whose caller gave up.
        refused_full: tickets turned away because their line was full.
        refused_admission: because they would not have been answered in time.
        refused_late: because their deadline had come already.
        refused_other: for any other reason.
        rows_run: real rows that went to the device, retries included.
        busy_s: device seconds of them: each batch's, shared out by rows.
        padding_s: of these, the seconds that went into padding.
    """

    offered: int = 0
    finished: int = 0
    late: int = 0
    failed: int = 0
    expired: int = 0
    shed: int = 0
    hopeless: int = 0
    evicted: int = 0
    cancelled: int = 0
    refused_full: int = 0
    refused_admission: int = 0
    refused_late: int = 0
    refused_other: int = 0
    rows_run: int = 0
    busy_s: float = 0.0
    padding_s: float = 0.0

    @property
    def live(self) -> int:
        """Tickets that were admitted and have not ended."""
        return self.offered - (
            self.finished + self.failed + self.expired + self.shed + self.cancelled
        )

    @property
    def refused(self) -> int:
        """Tickets turned away."""
        return self.refused_full + self.refused_admission + self.refused_late + self.refused_other


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerStats:
    """One owner's line in one lane: what waits, and what became of the rest.

    Attributes:
        tickets: tickets with rows in line.
        rows: rows in line; the bound on rows counts these.
        nbytes: bytes of the tickets in line; the bound on bytes counts these.
        tally: what became of its tickets.
        queue: seconds from a ticket's admission until the last of its rows left the line.
    """

    tickets: int
    rows: int
    nbytes: int
    tally: Tally
    queue: Distribution


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneStats:
    """What one lane holds and has done.

    Attributes:
        rows: rows in line, of all owners.
        spare_rows: best-effort rows among them.
        nbytes: bytes of the tickets in line.
        retry_rows: rows of failed batches that wait for another try; outside the bounds, and at
            most what was in flight.
        in_flight: batches on the device.
        refused: tickets turned away.
        batches: batches dispatched, retries included.
        rows_run: real rows in them.
        padded_rows: padding rows in them.
        bisections: failed batches that were cut in two.
        busy_s: device time of them, each counted from when it was formed or, if that is later,
            from when the batch before it came back.
        draining: whether new tickets are refused.
        owners: the same by owner, as far as it can be told apart.
        runs: of batches that came back, by compiled size: how many, and their real rows.
        wait: seconds from when a batch was formed until the device began with it.
        device: seconds of the device that a batch took.
        error: how far the estimate of a batch was off, as a share of what it took.
    """

    rows: int
    spare_rows: int
    nbytes: int
    retry_rows: int
    in_flight: int
    refused: int
    batches: int
    rows_run: int
    padded_rows: int
    bisections: int
    busy_s: float
    draining: bool
    owners: Mapping[str, OwnerStats]
    runs: Mapping[int, tuple[int, int]]
    wait: Distribution
    device: Distribution
    error: Distribution

    @property
    def total(self) -> Tally:
        """What became of all tickets."""
        found = Tally()
        for owner in self.owners.values():
            for name in Tally.__slots__:
                setattr(found, name, getattr(found, name) + getattr(owner.tally, name))
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """A snapshot of a batcher.

    Attributes:
        lanes: the lanes by key.
        in_flight: batches on the device.
        waiting: tickets with rows that wait.
        busy_s: seconds of the device, of lanes that are gone as well.
        depths: batches that were launched, by how many were then in flight; the first is for one.
        shares: virtual time of every owner with a line.
    """

    lanes: Mapping[LaneKey, LaneStats]
    in_flight: int
    waiting: int
    busy_s: float
    depths: Sequence[int]
    shares: Mapping[str, float]
