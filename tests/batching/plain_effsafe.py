"""EffSafe as one would write it down: every lane is tried against all others, one after another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

from batching import Pick, Situation, Ticket
from batching.policy import LaneView
from batching.window import Window, batch_down, window_of

__all__ = ["plainly_picked"]


@dataclass(frozen=True)
class Offer:
    """What a lane would run, and until when it must be done, where that is protected."""

    lane: LaneView
    window: Window
    deadline: float
    is_protected: bool

    @property
    def seconds(self) -> float:
        return self.window.expected_s

    @property
    def rate(self) -> float:
        return self.lane.worth(self.window.rows) / self.seconds


def plainly_picked(situation: Situation, guard_s: float | None) -> Pick | None:
    """What `EffSafe(guard_s)` is to pick."""
    start = situation.free_at
    hopeless: list[Ticket] = []
    offers: list[Offer] = []
    for lane in situation.lanes.values():
        window = window_of(lane, start)
        hopeless += window.hopeless
        if window.rows:
            window = batch_down(lane, window, start)
            offers.append(Offer(lane, window, window.deadline, window.deadline < inf))
    if not offers:
        return Pick(None, hopeless=hopeless) if hopeless else None
    best = chosen(offers, start, guard_s)
    return Pick(best.lane.key, best.window.rows, hopeless, best.window.dropped)


def chosen(offers: list[Offer], start: float, guard_s: float | None) -> Offer:
    """The best that leaves all in time, or all in share; else the most urgent."""
    if len(offers) == 1:
        return offers[0]
    for counted in (offers, [in_share(offer) for offer in offers]):
        # Python's sort and `max` keep the first of equals.
        order = sorted(counted, key=lambda offer: (offer.deadline, offer.seconds))
        safe = [offer for offer in order if leaves_in_time(offer, order, start, guard_s)]
        if safe:
            return max(safe, key=lambda offer: offer.rate)
    hurried = [offer for offer in order if offer.is_protected] or order
    return min(hurried, key=lambda offer: offer.deadline - offer.seconds)


def in_share(offer: Offer) -> Offer:
    protected = offer.window.protected
    if protected == inf:
        return replace(offer, is_protected=False)
    return replace(offer, deadline=protected, is_protected=True)


def leaves_in_time(first: Offer, order: list[Offer], start: float, guard_s: float | None) -> bool:
    """Whether all protected others are in time, by a guard, if they run after this one."""
    others = [offer for offer in order if offer is not first]
    if guard_s is None:
        guard_s = max(offer.lane.costs.estimates[0] for offer in others)
    at = start + first.seconds
    for offer in others:
        if offer.is_protected:
            at += offer.seconds
            if at + guard_s > offer.deadline:
                return False
    return True
