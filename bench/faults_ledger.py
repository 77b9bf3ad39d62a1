"""The books of ``faults``: what became of every request, and what that says of the cluster.

A request is asked in attempts. An attempt that somebody accepted ends with an answer or with one
typed error; one whose connection breaks, or that nobody accepts, is followed by another. Whether a
broken connection is to be expected depends on what was killed: only the doors that a fault breaks
may reset theirs, anywhere else the request is lost. A proxy that is not ours may hold a request
while nobody of ours is there to take it; nothing else may let one pass its deadline.

Pure: takes attempts and instants, all on one clock, and returns counts. Does not know HTTP,
processes, or how a fault is made.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Account", "Attempt", "Bounds", "Ending", "Phase", "account", "answered_twice"]


class Ending(StrEnum):
    """How an attempt ended."""

    ANSWER = "answer"  # right, as far as one answer can tell
    ERROR = "error"  # typed: one of those that a fault may cause
    RESET = "reset"  # the connection broke after the request was sent
    REFUSED = "refused"  # nobody of ours took it: no connection, or a proxy's own page
    SILENT = "silent"  # given up long after the deadline
    WRONG = "wrong"  # an answer that is not the request's, or an error of the wrong kind


_ENDS = frozenset({Ending.ANSWER, Ending.ERROR})


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt of a request.

    Attributes:
        request: number of the request, unique in a run.
        door: where it was sent.
        sent: when.
        ended: when its end was known.
        ending: see `Ending`.
        detail: the error's code, or why it was wrong.
        told: the number in the answer, which must be the request's; None where there is none.
        versions: what each part of the answer says of its version.
        life: names the process that ran the host unit, differently in each; 0 where none did.
    """

    request: int
    door: str
    sent: float
    ended: float
    ending: Ending
    detail: str = ""
    told: int | None = None
    versions: tuple[int, ...] = ()
    life: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """The time of one fault, from the instant it struck until the next one does.

    Attributes:
        fault: its name.
        struck: when.
        until: when it is over; the cluster is whole again, or was given up.
        breaks: doors whose connections the fault may break.
        holds: doors at which a proxy may hold requests while the fault lasts.
        whole_s: seconds until the cluster said that it was whole, or None if it never did.
        reloaded: actors of which another process runs, though the fault did not touch them.
    """

    fault: str
    struck: float
    until: float
    breaks: frozenset[str] = frozenset()
    holds: frozenset[str] = frozenset()
    whole_s: float | None = 0.0
    reloaded: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What is still in time.

    Attributes:
        deadline_s: of every request.
        grace_s: added to it, for the timers of a busy machine and the way back.
    """

    deadline_s: float
    grace_s: float

    @property
    def late_s(self) -> float:
        """An accepted request that ends after this is lost."""
        return self.deadline_s + self.grace_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What clients saw of one fault.

    Attributes:
        phase: the fault.
        answered: right answers.
        errors: code to number of typed errors.
        broken: connections that the fault itself may break, and did.
        held: attempts that a proxy may hold beyond their deadline, and did, answered or not.
        refused: attempts that nobody took.
        lost: requests that were accepted and ended otherwise than by one answer or one typed
            error in time, or never ended at all.
        mixed: answers whose parts are of different versions.
        dead: answers of a process whose successor had answered before the request was sent.
        slowest_s: the longest time of an attempt that ended with an answer or a typed error,
            where no proxy held any.
        back_s: seconds until the first right answer after the last bad end, over all doors; 0
            where clients saw nothing, None where no right answer came any more.
    """

    phase: Phase
    answered: int
    errors: Mapping[str, int]
    broken: int
    held: int
    refused: int
    lost: int
    mixed: int
    dead: int
    slowest_s: float
    back_s: float | None

    @property
    def recovered(self) -> bool:
        """Whether everything came back."""
        return self.back_s is not None and self.phase.whole_s is not None


def account(
    attempts: Iterable[Attempt], phases: Sequence[Phase], bounds: Bounds
) -> tuple[Account, ...]:
    """Each fault's account.

    An attempt belongs to the fault during which it ended, since that is what ended it.

    Args:
        attempts: of all requests, in any order.
        phases: in order, without overlap.
        bounds: of lateness.
    """
    known = sorted(attempts, key=lambda attempt: attempt.ended)
    dead = {id(attempt) for attempt in _of_the_dead(known)}
    unended = _never_ended(known)
    by_phase: dict[int, list[Attempt]] = defaultdict(list)
    for attempt in known:
        for index, phase in enumerate(phases):
            if phase.struck <= attempt.ended < phase.until:
                by_phase[index].append(attempt)
    return tuple(
        _account(phase, by_phase[index], bounds, unended, dead)
        for index, phase in enumerate(phases)
    )


def answered_twice(attempts: Iterable[Attempt], unasked: int) -> int:
    """Answers too many: a number that was told again, and answers on an idle connection."""
    told = Counter(attempt.told for attempt in attempts if attempt.told is not None)
    return unasked + sum(count - 1 for count in told.values())


def _account(
    phase: Phase,
    attempts: Sequence[Attempt],
    bounds: Bounds,
    unended: frozenset[int],
    dead: set[int],
) -> Account:
    ended = [attempt for attempt in attempts if attempt.ending in _ENDS]
    broken = [attempt for attempt in attempts if attempt.ending is Ending.RESET]
    late = [attempt for attempt in attempts if attempt.ending is Ending.SILENT]
    late += [attempt for attempt in ended if attempt.ended - attempt.sent > bounds.late_s]
    lost = {attempt.request for attempt in attempts if attempt.ending is Ending.WRONG}
    lost |= {attempt.request for attempt in broken if attempt.door not in phase.breaks}
    lost |= {attempt.request for attempt in late if attempt.door not in phase.holds}
    lost |= {attempt.request for attempt in attempts if attempt.request in unended}
    return Account(
        phase=phase,
        answered=sum(attempt.ending is Ending.ANSWER for attempt in attempts),
        errors=Counter(each.detail for each in ended if each.ending is Ending.ERROR),
        broken=sum(attempt.door in phase.breaks for attempt in broken),
        held=sum(attempt.door in phase.holds for attempt in late),
        refused=sum(attempt.ending is Ending.REFUSED for attempt in attempts),
        lost=len(lost),
        mixed=sum(len(set(attempt.versions)) > 1 for attempt in attempts),
        dead=sum(id(attempt) in dead for attempt in attempts),
        slowest_s=max(
            (each.ended - each.sent for each in ended if each.door not in phase.holds), default=0.0
        ),
        back_s=_back_s(phase, attempts),
    )


def _back_s(phase: Phase, attempts: Sequence[Attempt]) -> float | None:
    """Over doors, the longest time from the fault to the first answer after the last bad end."""
    back_s = 0.0
    for door in {attempt.door for attempt in attempts}:
        here = [attempt for attempt in attempts if attempt.door == door]
        bad = [attempt.sent for attempt in here if attempt.ending is not Ending.ANSWER]
        if not bad:
            continue
        good = [
            attempt.ended
            for attempt in here
            if attempt.ending is Ending.ANSWER and attempt.sent > max(bad)
        ]
        if not good:
            return None
        back_s = max(back_s, min(good) - phase.struck)
    return back_s


def _never_ended(attempts: Iterable[Attempt]) -> frozenset[int]:
    """Requests of which no attempt ended with an answer or a typed error."""
    asked: set[int] = set()
    over: set[int] = set()
    for attempt in attempts:
        asked.add(attempt.request)
        if attempt.ending in _ENDS:
            over.add(attempt.request)
    return frozenset(asked - over)


def _of_the_dead(attempts: Sequence[Attempt]) -> list[Attempt]:
    """Answers from a life that was over: its successor had answered before they were asked.

    Lives are told apart by version, since each version has processes or at least state of its own.

    Args:
        attempts: by the instant of their end.
    """
    first: dict[tuple[tuple[int, ...], int], float] = {}
    for attempt in attempts:
        if attempt.life:
            first.setdefault((attempt.versions, attempt.life), attempt.ended)
    found: list[Attempt] = []
    for attempt in attempts:
        if not attempt.life:
            continue
        born = first[attempt.versions, attempt.life]
        if any(
            versions == attempt.versions and at > born and at < attempt.sent
            for (versions, _), at in first.items()
        ):
            found.append(attempt)
    return found
