"""When a batch is formed, of what, and what becomes of its tickets.

The batcher is a state machine in virtual time. Its driver feeds it events, each with the instant
at which it happened, and carries out the effects it answers with:

    offer      rows came                    -> admitted, or a typed refusal
    poll       time passed, or a credit     -> Expired and Shed tickets, then batches to Run
    complete   a batch came back            -> Finished tickets
    fail       a batch came back in error   -> Failed tickets; innocent rows wait again
    cancel     a caller gave up             -> nothing; the ticket has ended

After any event the driver polls; without one it sleeps until `next_wakeup`.

A batch is formed when the device has a free credit and not before (late binding): rows that come
while the device is busy join a batch that does not exist yet, and nothing lingers to wait for
company. The second of two credits is there so that the device never waits for the host, so it is
used a moment before the device will be free, not as soon as it is there: a row would only wait
longer in a batch that is closed.

The batcher does not know clocks, threads, devices, arrays, or what a unit computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Final

from batching.admission import Admission
from batching.allowance import Allowance
from batching.at_once import AtOnce
from batching.buckets import Ladder
from batching.costs import CostTable
from batching.deadlines import Deadlines
from batching.errors import DeadlineExceeded, InvalidArgument, ServingError
from batching.flight import Flight
from batching.lane import Lane
from batching.line import Line
from batching.policy import Policy, Situation, runs_at_once
from batching.refusals import LaneBusy, LaneDraining, LaneExists, LaneUnknown
from batching.shares import Shares
from batching.together import admit_together
from batching.values import (
    Batch,
    Effect,
    Expired,
    Failed,
    Finished,
    LaneKey,
    Run,
    Shed,
    Stats,
    Tally,
    Ticket,
    TicketState,
)
from batching.views import check_invariants, stats_of

__all__ = ["LEAD_S", "Batcher"]

#: Longer than a host needs to lay a batch out and launch it, timers of a millisecond included. A
#: batch that takes less than this is followed at once.
LEAD_S: Final = 0.002

#: Reading a member off an enum class costs more than all else in the loops below.
_NEW: Final = TicketState.NEW
_WAITING: Final = TicketState.WAITING
_RUNNING: Final = TicketState.RUNNING
_FINISHED: Final = TicketState.FINISHED


class Batcher:
    """The lanes of one device, its credits, and the batches in flight.

    Attributes:
        admission: who would be late, and how long who comes now has to wait.
        at_once: rows that find the device idle.
        costs: what batches are expected to take.
        shares: who has had more than their share of the device.
    """

    __slots__ = (
        "_allowances", "_deadlines", "_evicted", "_flight", "_held_until", "_lanes", "_policy",
        "_ready", "_ticket_number", "admission", "at_once", "costs", "shares",
    )  # fmt: skip

    def __init__(
        self,
        policy: Policy,
        in_flight_max: int = 2,
        *,
        costs: CostTable | None = None,
        credit_s: float | None = None,
        lead_s: float = inf,
        admission: bool = False,
    ) -> None:
        """Make a batcher without lanes.

        Args:
            policy: which lane gets the next batch; it belongs to this batcher alone.
            in_flight_max: credits: batches on the device at once. Two keep it busy while the
                host prepares the next.
            costs: what batches are expected to take; None begins with nothing known.
            credit_s: device seconds by which an owner may be ahead and still be in share; None
                for a few batches' worth.
            lead_s: how long before the device is expected to be free the next batch is formed, if
                there is a credit for it. `LEAD_S` is what device actors take.
            admission: refuse tickets that are not expected to be answered in time.

        Raises:
            InvalidArgument: there are no credits, or the credit of shares or the lead is negative.
        """
        self.costs: Final = costs if costs is not None else CostTable()
        self.shares: Final = Shares(credit_s)
        self._policy = policy
        self._flight: Final = Flight(in_flight_max, lead_s)
        self._held_until: float | None = None  # when the device is to be looked at again
        self._deadlines: Final = Deadlines()
        self._lanes: Final[dict[LaneKey, Lane]] = {}
        self._ready: Final[dict[LaneKey, Lane]] = {}  # the lanes with rows that wait
        self._allowances: Final[dict[str, Allowance]] = {}
        self.admission: Final = Admission(
            self._lanes, self._ready, self.shares, self._flight, is_on=admission
        )
        self.at_once: Final = AtOnce(
            self._lanes, self._ready, self._flight, self.shares, self.admission, self._land
        )
        self.at_once.is_on = runs_at_once(policy)
        self._ticket_number = 0
        #: ends that the next poll tells
        self._evicted: list[Effect] = []

    # ---- lanes ------------------------------------------------------------------------------

    def add_lane(
        self,
        key: LaneKey,
        ladder: Ladder,
        rows_max: int,
        bytes_max: int,
        seeds: Mapping[int, float] | None = None,
    ) -> None:
        """Accept tickets for this lane from now on.

        Args:
            key: the lane's name.
            ladder: the batch sizes its unit is compiled for.
            rows_max: the most rows in the line of an owner without an allowance.
            bytes_max: the most bytes in it.
            seeds: seconds that warm-up measured, by batch size.

        Raises:
            LaneExists: there is such a lane, draining or not.
            InvalidArgument: a bound is not positive.
        """
        if key in self._lanes:
            raise LaneExists(f"lane {key} exists already")
        costs = self.costs.add(key, ladder, seeds)
        try:
            self._lanes[key] = Lane(
                key, costs, rows_max, bytes_max, self._deadlines, self.shares, self._allowances
            )
        except InvalidArgument:
            self.costs.remove(key)
            raise
        self._policy.added(key)

    def resize_lane(
        self, key: LaneKey, ladder: Ladder, seeds: Mapping[int, float] | None = None
    ) -> None:
        """Form batches of these sizes from now on; what waits and what runs goes on.

        Args:
            key: the lane's name.
            ladder: the batch sizes its unit is compiled for.
            seeds: seconds that warm-up measured, for sizes that the lane did not have.

        Raises:
            LaneUnknown: there is no such lane.
        """
        lane = self._lane(key)
        if ladder != lane.ladder:
            lane.resize(self.costs.resize(key, ladder, seeds))

    def drain_lane(self, key: LaneKey) -> None:
        """Refuse new tickets and finish those that are here. Safe to repeat.

        Raises:
            LaneUnknown: there is no such lane.
        """
        self._lane(key).draining = True

    def reopen_lane(self, key: LaneKey) -> None:
        """Take tickets again, as when another version wants the unit of a draining lane.

        Raises:
            LaneUnknown: there is no such lane.
        """
        self._lane(key).draining = False

    def remove_lane(self, key: LaneKey) -> None:
        """Forget an idle lane and its counters.

        Raises:
            LaneUnknown: there is no such lane.
            LaneBusy: rows of it wait or run.
        """
        lane = self._lane(key)
        if not lane.idle:
            raise LaneBusy(
                f"lane {key} has {lane.waiting} rows that wait and {lane.in_flight} batches "
                "in flight; drain it first"
            )
        del self._lanes[key]
        self.costs.remove(key)
        self._policy.removed(key)

    def lane_idle(self, key: LaneKey) -> bool:
        """Whether nothing waits and nothing runs in this lane.

        Raises:
            LaneUnknown: there is no such lane.
        """
        return self._lane(key).idle

    def _lane(self, key: LaneKey) -> Lane:
        try:
            return self._lanes[key]
        except KeyError:
            raise LaneUnknown(f"there is no lane {key} here") from None

    def use(self, policy: Policy) -> None:
        """Choose by this policy from now on. What waits, runs and was learned stays as it is.

        Args:
            policy: it belongs to this batcher alone from now on.
        """
        for key in self._lanes:
            policy.added(key)
        self._policy = policy
        self.at_once.is_on = runs_at_once(policy)

    # ---- owners -----------------------------------------------------------------------------

    def allow(self, owner: str, allowance: Allowance | None) -> None:
        """Treat this owner's rows by this allowance from now on; None for the lanes' own bounds.

        The criticality is for whoever makes tickets to heed (`allowance_of`).
        """
        if allowance is None:
            self._allowances.pop(owner, None)
        else:
            self._allowances[owner] = allowance
        self.shares.set_weight(owner, 1.0 if allowance is None else allowance.weight)
        for lane in self._lanes.values():
            lane.allow(owner)

    def allowance_of(self, owner: str) -> Allowance | None:
        """What this owner is allowed, None where nothing was said."""
        return self._allowances.get(owner)

    # ---- events -----------------------------------------------------------------------------

    def offer(self, ticket: Ticket, now: float, *, is_later: bool = False) -> None:
        """Take the ticket into its lane; it will end exactly once. A refused one is as it was.

        Args:
            ticket: rows of a unit.
            now: this instant.
            is_later: a device has worked for the request before, so its rows are taken even if they
                seem to be late: refusing them would waste what was done.

        Raises:
            LaneUnknown: there is no such lane.
            LaneDraining: the lane takes no more.
            InvalidArgument: the ticket has no rows, or a negative size.
            TicketTooLarge: it is over the lane's bounds by itself.
            LaneFull: it does not fit now.
            TooBusy: it would not be answered in time.
            DeadlineExceeded: its deadline has come already.
        """
        assert ticket.state is _NEW, f"{ticket} was offered before"
        lane = self._lanes.get(ticket.lane)
        if lane is None:
            raise LaneUnknown(f"there is no lane {ticket.lane} here")
        try:
            if lane.draining:
                raise LaneDraining(f"lane {ticket.lane} takes no more")
            if ticket.rows < 1 or ticket.nbytes < 0:
                raise InvalidArgument(f"a ticket of {ticket.rows} rows, {ticket.nbytes} bytes")
            if not ticket.deadline > now:  # written so that a deadline that is no number is past
                raise DeadlineExceeded("the deadline came before the rows did")
            if self.admission.is_on and not is_later:
                self.admission.check(lane, ticket, now)
            number = self._ticket_number + 1
            evicted = lane.admit(ticket, number, len(self._ready))
        except ServingError as error:
            lane.refuse(ticket, error)
            raise
        ticket.offered_at = now
        self._ticket_number = number
        if lane.rows + lane.spare_rows == ticket.rows:
            self._ready[lane.key] = lane
        if evicted is not None:
            for other in evicted:
                tally = self._end(other, TicketState.SHED)
                tally.shed += 1
                tally.evicted += 1
                wait_ms = self.admission.retry_ms(other, now)
                self._evicted.append(Shed(other, evicted=True, retry_after_ms=wait_ms))

    def offer_all(
        self, tickets: Sequence[Ticket], now: float, *, is_later: bool = False
    ) -> list[tuple[Ticket, ServingError]]:
        """Offer tickets of one lane, owner and priority that came together.

        Each ends as if they were offered one after the other; the usual case is found out at once.

        Returns:
            those that were refused, and why.
        """
        number = self._ticket_number + 1
        lane = self._lanes.get(tickets[0].lane)
        admission = self.admission if self.admission.is_on and not is_later else None
        if lane is not None and admit_together(lane, tickets, number, now, admission):
            self._ticket_number += len(tickets)
            self._ready[lane.key] = lane
            return []
        refused: list[tuple[Ticket, ServingError]] = []
        for ticket in tickets:
            try:
                self.offer(ticket, now, is_later=is_later)
            except ServingError as error:
                refused.append((ticket, error))
        return refused

    def poll(self, now: float) -> list[Effect]:
        """End the tickets whose deadline has come, then use every free credit.

        Tells first who was evicted since the last poll.
        """
        effects, self._evicted = self._evicted, []
        self.admission.changed()
        for ticket in self._deadlines.due(now):
            self.admission.missed(ticket, now)
            self._end(ticket, TicketState.EXPIRED).expired += 1
            effects.append(Expired(ticket))
        ready = self._ready
        self._held_until = None
        while ready and not self._flight.full:
            if self._flight.forms_at > now:
                self._held_until = self._flight.forms_at
                break
            start = max(now, self._flight.free_at)
            pick = self._policy.pick(Situation(now, start, ready, self.shares))
            if pick is None:
                break
            for ticket in pick.hopeless:
                self._shed(ticket, now, effects, hopeless=True)
            if pick.hopeless:
                # An estimate that keeps rows from being run is not confirmed by running them.
                for key in {ticket.lane for ticket in pick.hopeless}:
                    self._lanes[key].costs.doubt(now)
            for ticket in pick.dropped:
                self._shed(ticket, now, effects, hopeless=False)
            if pick.key is not None:
                effects.append(Run(self._launch(ready[pick.key], pick.rows, now)))
        return effects

    def _launch(self, lane: Lane, limit: int, now: float) -> Batch:
        batch = self._flight.launch(lane, limit, now)
        self.shares.charge_batch(batch, lane.lines, batch.expected_s)
        self.shares.ran(batch.expected_s)
        if not lane.waiting:
            del self._ready[lane.key]
        return batch

    def _shed(self, ticket: Ticket, now: float, effects: list[Effect], *, hopeless: bool) -> None:
        self.admission.missed(ticket, now)
        tally = self._end(ticket, TicketState.SHED)
        tally.shed += 1
        tally.hopeless += hopeless
        wait_ms = self.admission.retry_ms(ticket, now)
        effects.append(Shed(ticket, hopeless=hopeless, retry_after_ms=wait_ms))

    def complete(self, batch_id: int, now: float) -> list[Effect]:
        """The batch came back: return its credit and finish the tickets it was the last of."""
        return [Finished(ticket) for ticket in self.finish(batch_id, now)]

    def finish(self, batch_id: int, now: float) -> list[Ticket]:
        """The same; tells the tickets themselves, and makes no effect of each."""
        batch, lane = self._land(batch_id, now)
        finished: list[Ticket] = []
        line: Line | None = None
        for ticket, start, stop in batch.parts:
            state = ticket.state
            if state is _RUNNING or state is _WAITING:  # else it ended while it ran
                ticket.done += stop - start
                if ticket.done == ticket.rows:
                    ticket.state = _FINISHED
                    if line is None or line.owner != ticket.owner:
                        line = lane.lines[ticket.owner]
                    line.tally.finished += ticket.requests
                    if now > ticket.deadline:
                        line.tally.late += ticket.requests
                    finished.append(ticket)
        self.admission.landed(lane, batch.parts, now)
        return finished

    def fail(
        self, batch_id: int, error: Exception, now: float, fatal: bool = False
    ) -> list[Effect]:
        """The batch came back in error: return its credit and find out whose fault it is.

        A batch of several parts is tried again in two halves, ahead of its lane's line, until a
        part fails alone: that one fails its ticket. A part of n is tried again at most
        ceil(log2(n)) times.

        Args:
            batch_id: the batch.
            error: what came back; the error of the tickets it ends.
            now: this instant.
            fatal: the device is lost, so that no other try makes sense.
        """
        batch, lane = self._land(batch_id, now)
        live = [part for part in batch.parts if part[0].state in (_RUNNING, _WAITING)]
        if fatal or len(batch.parts) == 1:
            effects: list[Effect] = []
            for ticket, _, _ in live:
                self._end(ticket, TicketState.FAILED).failed += 1
                effects.append(Failed(ticket, error))
            return effects
        # A single survivor is tried alone: the fault may be with a part that has ended since.
        half = (len(live) + 1) // 2
        for group in (live[:half], live[half:]):
            if group:
                lane.return_for_retry(group)
                self._ready[lane.key] = lane
        lane.bisections += 1
        return []

    def cancel(self, ticket: Ticket, now: float) -> bool:
        """End the ticket, whatever becomes of its rows on the device.

        Returns:
            Whether it ended by this; False for one that had ended, or was never admitted.
        """
        if ticket.state is not _WAITING and ticket.state is not _RUNNING:
            return False
        self._end(ticket, TicketState.CANCELLED).cancelled += 1
        return True

    @property
    def has_waiting(self) -> bool:
        """Whether any row waits for a batch."""
        return bool(self._ready)

    def next_wakeup(self) -> float | None:
        """The first deadline of a ticket that waits, or when the next batch is to be formed.

        Unless rows come or a credit is returned, polling before this instant yields nothing.
        """
        earliest, held = self._deadlines.earliest(), self._held_until
        if held is None or not self._ready:
            return earliest
        return held if earliest is None else min(earliest, held)

    def _land(self, batch_id: int, now: float) -> tuple[Batch, Lane]:
        """The batch is off the device."""
        self.admission.changed()
        batch, seconds = self._flight.land(batch_id, now)
        lane = self._lanes[batch.lane]
        lane.landed(batch, seconds, now - seconds - batch.formed_at)
        lane.costs.observe(batch.bucket, seconds, now)
        self.shares.charge_batch(batch, lane.lines, seconds - batch.expected_s)
        self._policy.landed(batch, now)
        return batch, lane

    def _end(self, ticket: Ticket, state: TicketState) -> Tally:
        """End a live ticket before its last row is back; its owner's tally is to be told why."""
        lane = self._lanes[ticket.lane]
        if ticket.state is _WAITING:
            lane.forget(ticket)
            if not lane.waiting:
                del self._ready[lane.key]
        ticket.state = state
        return lane.lines[ticket.owner].tally

    # ---- views ------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """A snapshot of every lane."""
        return stats_of(self._lanes, self._flight, self._deadlines, self.shares)

    def check_invariants(self) -> None:
        """Hold the whole state against itself. O(n log n); for tests and simulation."""
        check_invariants(self._lanes, self._ready, self._flight, self._deadlines)
