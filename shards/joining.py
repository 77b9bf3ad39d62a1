"""Joins: items whose rows come in parts, from several senders, in whatever order.

Decides which part belongs to which join, when a join has all of its parts, and what becomes of
parts that come before their join, after it, or instead of another. Pure: events and `now` go in,
effects come out; a part's rows are a payload that nobody here looks at.

* A join is opened by whoever wants the answer; it says who sends each part, of which process
  (generation), by which plan and in which epoch. A part that is not exactly what is awaited in its
  slot is never merged: it ends the join.
* A part may come first. It is held for as long as its request may live.
* A join that ended early is remembered for as long: parts that come after it are dropped.
* Whatever is held has a bound in number and in bytes, and a deadline.

Ids of joins are unique over all askers and their restarts. This file does not know links, tensors,
units or lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from batching.errors import Code
from shards.replies import UNJOINED
from shards.wire import Awaited

__all__ = [
    "Complete",
    "Effect",
    "JoinBounds",
    "JoinStats",
    "Joins",
    "Opening",
    "Part",
    "Place",
    "Refused",
]

_RETRY_MS: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinBounds:
    """How much may be held.

    Attributes:
        joins_max: open at one time.
        bytes_max: that the rows of open joins will have, together.
        early_max: parts that came before their join.
        early_bytes_max: of those parts.
        ended_max: joins that are remembered because parts of theirs may still come.
    """

    joins_max: int = 4096
    bytes_max: int = 512 << 20
    early_max: int = 4096
    early_bytes_max: int = 64 << 20
    ended_max: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """A join to be opened.

    Attributes:
        number: its id.
        epoch: that its request is pinned to.
        parts: what is awaited in each slot.
        nbytes: that its rows will have.
        deadline: instant after which it is worthless.
        owner: payload.
    """

    number: int
    epoch: int
    parts: Sequence[Awaited]
    nbytes: int
    deadline: float
    owner: object


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part that came.

    Attributes:
        number: of its join.
        actor: who sent it, proven by the link.
        generation: of that process, likewise.
        payload: its rows.
    """

    number: int
    slot: int
    actor: str
    generation: int
    epoch: int
    plan: str
    rows: int
    nbytes: int
    deadline: float
    payload: object


@dataclass(frozen=True, slots=True)
class Place:
    """These rows belong into this slot."""

    owner: object
    slot: int
    payload: object


@dataclass(frozen=True, slots=True)
class Complete:
    """Every part was placed; the join is forgotten."""

    owner: object


@dataclass(frozen=True, slots=True)
class Refused:
    """The join ends without its rows; it is not told again."""

    owner: object
    code: str
    message: str
    retry_after_ms: int = 0


Effect: TypeAlias = Place | Complete | Refused


class _Open:
    """A join that waits for parts."""

    __slots__ = ("missing", "opening")

    def __init__(self, opening: Opening) -> None:
        self.opening = opening
        self.missing = set(range(len(opening.parts)))


class JoinStats:
    """Counts since the start.

    Attributes:
        opened: joins taken.
        completed: of these, those that got every part.
        refused: joins that ended otherwise, or were not taken.
        mismatched: parts of another process, epoch, plan or size than was awaited.
        early: parts that came before their join.
        late: parts whose join had ended.
        overflowed: parts that came early and found no room.
    """

    __slots__ = ("completed", "early", "late", "mismatched", "opened", "overflowed", "refused")

    def __init__(self) -> None:
        self.opened = 0
        self.completed = 0
        self.refused = 0
        self.mismatched = 0
        self.early = 0
        self.late = 0
        self.overflowed = 0


class Joins:
    """All joins of one device.

    Args:
        bounds: what may be held.
    """

    def __init__(self, bounds: JoinBounds | None = None) -> None:
        self.stats = JoinStats()
        self._bounds = bounds or JoinBounds()
        self._open: dict[int, _Open] = {}
        self._open_bytes = 0
        self._early: dict[int, list[Part]] = {}
        self._early_count = 0
        self._early_bytes = 0
        #: joins that ended before their last part, and until when such a part may come
        self._ended: dict[int, float] = {}

    @property
    def is_idle(self) -> bool:
        """Whether nothing is held that time could end."""
        return not (self._open or self._early or self._ended)

    def open(self, opening: Opening, now: float) -> list[Effect]:
        """Take a join, and the parts of it that are here already."""
        refusal = self._refusal(opening, now)
        early = self._take_early(opening.number)
        if refusal is not None:
            self.stats.refused += 1
            if opening.number not in self._open:
                self._remember(opening.number, opening.deadline)
            return [refusal]
        self.stats.opened += 1
        join = self._open[opening.number] = _Open(opening)
        self._open_bytes += opening.nbytes
        effects: list[Effect] = []
        for part in early:
            if opening.number not in self._open:
                break  # one of its parts was not what is awaited
            effects += self._take(join, part)
        return effects

    def arrive(self, part: Part, now: float) -> list[Effect]:
        """Take a part; it is placed, held, or dropped and counted."""
        join = self._open.get(part.number)
        if join is not None:
            return self._take(join, part)
        if part.number in self._ended or part.deadline <= now:
            self.stats.late += 1
            return []
        self.stats.early += 1
        bounds = self._bounds
        if (
            self._early_count >= bounds.early_max
            or self._early_bytes + part.nbytes > bounds.early_bytes_max
        ):
            # Without this part its join cannot complete, so it is refused as soon as it comes.
            self.stats.overflowed += 1
            self._take_early(part.number)
            self._remember(part.number, part.deadline)
            return []
        self._early.setdefault(part.number, []).append(part)
        self._early_count += 1
        self._early_bytes += part.nbytes
        return []

    def close(self, number: int) -> None:
        """Nobody wants this join any more."""
        join = self._open.get(number)
        if join is not None:
            self._end(join)

    def lose(self, actor: str, generation: int) -> list[Effect]:
        """A sender's link broke: what is still awaited from that process may never come."""
        effects: list[Effect] = []
        for join in list(self._open.values()):
            parts = join.opening.parts
            if any(
                parts[slot].actor == actor and parts[slot].generation == generation
                for slot in join.missing
            ):
                effects.append(self._refuse(join, UNJOINED, f"the link to {actor} broke"))
        return effects

    def poll(self, now: float) -> list[Effect]:
        """End what is past its deadline."""
        effects: list[Effect] = []
        for join in list(self._open.values()):
            if join.opening.deadline <= now:
                text = "the deadline passed while rows of look-ups were awaited"
                effects.append(self._refuse(join, Code.DEADLINE_EXCEEDED, text))
        for number, parts in list(self._early.items()):
            if all(part.deadline <= now for part in parts):
                self._take_early(number)
        for number in [number for number, until in self._ended.items() if until <= now]:
            del self._ended[number]
        return effects

    def check_invariants(self) -> None:
        """Hold the whole state against itself and its bounds; for tests."""
        bounds = self._bounds
        assert self._open_bytes == sum(join.opening.nbytes for join in self._open.values())
        held = [part for parts in self._early.values() for part in parts]
        assert self._early_count == len(held) <= bounds.early_max
        assert self._early_bytes == sum(part.nbytes for part in held) <= bounds.early_bytes_max
        assert len(self._open) <= bounds.joins_max
        assert self._open_bytes <= bounds.bytes_max
        assert len(self._ended) <= bounds.ended_max
        assert not self._open.keys() & self._early.keys()
        assert not self._open.keys() & self._ended.keys()
        assert not self._early.keys() & self._ended.keys()
        assert all(join.missing for join in self._open.values())
        assert all(self._early.values())
        stats = self.stats
        assert stats.completed <= stats.opened

    def _refusal(self, opening: Opening, now: float) -> Refused | None:
        bounds = self._bounds
        if opening.number in self._open or not opening.parts:
            text = "a join must have parts, and an id of its own"
            return Refused(opening.owner, Code.INVALID_ARGUMENT, text)
        if opening.number in self._ended:
            text = "a part of it came first, and could not be held"
            return Refused(opening.owner, UNJOINED, text)
        if opening.deadline <= now:
            text = "the deadline had passed when the item came"
            return Refused(opening.owner, Code.DEADLINE_EXCEEDED, text)
        if (
            len(self._open) >= bounds.joins_max
            or self._open_bytes + opening.nbytes > bounds.bytes_max
        ):
            text = (
                f"{len(self._open)} items of {self._open_bytes} bytes wait for rows of look-ups; "
                f"the bounds are {bounds.joins_max} and {bounds.bytes_max}"
            )
            return Refused(opening.owner, Code.RESOURCE_EXHAUSTED, text, _RETRY_MS)
        return None

    def _take(self, join: _Open, part: Part) -> list[Effect]:
        opening = join.opening
        problem = _mismatch(join, part)
        if problem:
            self.stats.mismatched += 1
            return [self._refuse(join, UNJOINED, f"{part.actor} sent {problem}")]
        join.missing.remove(part.slot)
        effects: list[Effect] = [Place(opening.owner, part.slot, part.payload)]
        if not join.missing:
            self.stats.completed += 1
            del self._open[opening.number]
            self._open_bytes -= opening.nbytes
            effects.append(Complete(opening.owner))
        return effects

    def _refuse(self, join: _Open, code: str, message: str) -> Refused:
        self.stats.refused += 1
        self._end(join)
        return Refused(join.opening.owner, code, message)

    def _end(self, join: _Open) -> None:
        opening = join.opening
        del self._open[opening.number]
        self._open_bytes -= opening.nbytes
        self._remember(opening.number, opening.deadline)

    def _remember(self, number: int, until: float) -> None:
        self._ended.pop(number, None)
        self._ended[number] = until
        while len(self._ended) > self._bounds.ended_max:
            del self._ended[next(iter(self._ended))]

    def _take_early(self, number: int) -> list[Part]:
        parts = self._early.pop(number, [])
        self._early_count -= len(parts)
        self._early_bytes -= sum(part.nbytes for part in parts)
        return parts


def _mismatch(join: _Open, part: Part) -> str:
    """What is wrong with a part, or ""."""
    opening = join.opening
    if part.slot not in join.missing:
        return f"part {part.slot}, which is not awaited"
    wanted = opening.parts[part.slot]
    if (part.actor, part.generation) != (wanted.actor, wanted.generation):
        return (
            f"part {part.slot} from generation {part.generation}; "
            f"{wanted.actor} of generation {wanted.generation} was asked"
        )
    if part.epoch != opening.epoch:
        return f"a part of epoch {part.epoch} for a request of epoch {opening.epoch}"
    if part.plan != wanted.plan:
        return f"a part cut by plan {part.plan or 'none'}, not by {wanted.plan}"
    if part.rows != wanted.rows:
        return f"{part.rows} rows where {wanted.rows} were asked for"
    return ""
