"""EFFSAFE: the most useful rows for a device second, as long as nobody in share is made late by it.

Every lane offers a batch (`batching.window`). A batch is *feasible* if, after it, the first batches
of all other lanes, run in the order of their deadlines, are still in time, with a guard to spare.
Of the feasible ones the one with most rows a second runs, each row counted by its owner's weight.
Where none is, not everybody can be in time: then only deadlines of owners in share count, and if
still none is feasible, the lane with least slack to one of these runs. So a burst that there is
room for is in time, and a flood of one servable gets what is left over in large, cheap batches, and
the others their deadlines: order by deadline alone lets the flood win by volume, order by share
alone makes batches of one. Best-effort rows have no claim: they run where that is feasible.

What the rule is worth beside the baselines is held by tests/batching/test_simulation.py. Its parts
are the feasibility test of earliest-deadline-first scheduling (Liu and Layland, 1973) and the early
drop of Nexus (SOSP 2019). A pick costs O(n log n) for n lanes with rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import ClassVar, Final, TypeAlias

from batching.errors import InvalidArgument
from batching.policy import LaneView, Pick, Situation
from batching.values import Batch, LaneKey, Ticket
from batching.window import batch_down, usual_of, window_of

__all__ = ["EffSafe"]


#: What a lane would run: deadline, seconds, place among the lanes, protected or not, rows, lane,
#: first deadline of owners in share, tickets to give up for it. In this order a plain sort is by
#: deadline, and places are distinct.
_Offer: TypeAlias = tuple[float, float, int, bool, int, LaneView, float, Sequence[Ticket]]


class EffSafe:
    """See the module.

    Args:
        guard_s: seconds by which protected batches are to be early. None: what one row of the most
            expensive other lane costs, since a batch that has begun cannot be stopped.
    """

    __slots__ = ("_guard_s",)

    #: See `batching.policy.runs_at_once`.
    runs_at_once: ClassVar[bool] = True

    def __init__(self, guard_s: float | None = None) -> None:
        if guard_s is not None and not guard_s >= 0:
            raise InvalidArgument(f"a guard is at least 0 s, not {guard_s}")
        self._guard_s: Final = guard_s

    def added(self, key: LaneKey) -> None:
        """See `Policy.added`."""

    def removed(self, key: LaneKey) -> None:
        """See `Policy.removed`."""

    def landed(self, batch: Batch, now: float) -> None:
        """See `Policy.landed`."""

    def pick(self, situation: Situation) -> Pick | None:
        """See `Policy.pick`."""
        start = situation.free_at
        limit = situation.shares.limit()
        hopeless: list[Ticket] = []
        offers: list[_Offer] = []
        for lane in situation.lanes.values():
            usual = usual_of(lane, start, limit)
            dropped: Sequence[Ticket] = ()
            if usual is not None:
                deadline, expected_s, rows, protected = usual
            else:
                window = window_of(lane, start, limit)
                if window.hopeless:
                    hopeless += window.hopeless
                    if not window.rows:
                        continue
                deadline, expected_s, rows, _, dropped, protected = batch_down(lane, window, start)
            offers.append(
                (
                    deadline, expected_s, len(offers), deadline < inf, rows, lane, protected,
                    dropped,
                )
            )  # fmt: skip
        if not offers:
            return Pick(None, hopeless=hopeless) if hopeless else None
        _, _, _, _, rows, lane, _, dropped = (
            offers[0]
            if len(offers) == 1
            else self._choose(offers, start, situation.shares.is_weighted)
        )
        return Pick(lane.key, rows, hopeless, dropped)

    def _choose(self, offers: list[_Offer], start: float, is_weighted: bool) -> _Offer:
        guards = self._guards(offers)
        best = _best_feasible(offers, guards, start, is_weighted)
        if best is None and any([offer[6] > offer[0] for offer in offers]):
            offers = [_of_owners_in_share(offer) for offer in offers]
            best = _best_feasible(offers, guards, start, is_weighted)
        if best is not None:
            return best
        protected = [offer for offer in offers if offer[3]] or offers
        return min(protected, key=lambda offer: offer[0] - offer[1])

    def _guards(self, offers: list[_Offer]) -> list[float]:
        """For each offer, by its place, the most that one row of any other lane costs."""
        if self._guard_s is not None:
            return [self._guard_s] * len(offers)
        costs = [offer[5].costs.estimates[0] for offer in offers]
        most = max(costs)
        at = costs.index(most)
        guards = [most] * len(costs)
        guards[at] = max(costs[:at] + costs[at + 1 :])
        return guards


def _of_owners_in_share(offer: _Offer) -> _Offer:
    """The same, with only the deadlines of owners in share protected."""
    deadline, protected = offer[0], offer[6]
    is_protected = protected < inf
    return (protected if is_protected else deadline, *offer[1:3], is_protected, *offer[4:])


def _best_feasible(
    offers: list[_Offer], guards: Sequence[float], start: float, is_weighted: bool
) -> _Offer | None:
    """The offer of most rows a second, of those that leave all protected others in time.

    Args:
        offers: are put in the order of their deadlines; of equals the first is taken.
        guards: by place, by how much the others are to be early.
        start: when the device is free.
        is_weighted: whether rows count by their owners' weights.
    """
    offers.sort()
    # Slack of each protected offer if all protected ones before it, and it, run first; and the
    # least of those before each.
    slacks: list[float] = []
    before: list[float] = []
    total, least = start, inf
    for deadline, expected_s, _, is_protected, _, _, _, _ in offers:
        before.append(least)
        if is_protected:
            total += expected_s
            slack = deadline - total
            if slack < least:
                least = slack
            slacks.append(slack)
        else:
            slacks.append(inf)
    best: _Offer | None = None
    best_rate = 0.0
    least = inf  # of those behind
    at = len(offers)
    for offer in reversed(offers):
        at -= 1
        _, expected_s, place, is_protected, rows, lane, _, _ = offer
        # Those behind it counted this offer's own time already, if it is protected.
        latest = least + expected_s if is_protected else least
        if before[at] < latest:
            latest = before[at]
        if expected_s + guards[place] <= latest:
            rate = (lane.worth(rows) if is_weighted else rows) / expected_s
            if rate >= best_rate:
                best, best_rate = offer, rate
        if slacks[at] < least:
            least = slacks[at]
    return best
