"""Which parts of tables should be on another actor, so that load is even.

A part has a weight: bytes, or what look-ups read in it, in the measure that makes a version's parts
weigh as much together as they have bytes. An actor's load is the weight that it holds, `L`, and of
one version, `V`: a request asks for the rows of one version, so those of each should be spread,
too. A part of weight `w` that goes from one actor to another lowers the sum of the squares of both
by twice ``w * (L_from - L_to - w + V_from - V_to - w)``. Steepest descent: of all pairs the one
with the greatest difference, of its parts the one that lowers the sum most. The sum falls with each
part, so it ends; and where a part would bring the two actors no nearer than by a twentieth of what
actors have on average it stays, so what was made even stays as it is.

Decides by values alone; does not know how anything is moved.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from cluster.pieces import STAGING, Part, PieceKey
from cluster.sites import Site

__all__ = ["Balance", "Held", "Leg", "balanced"]

#: Of what actors have on average: what a part must bring two actors nearer by.
_WORTH: Final = 0.05
#: That go together: who gives them has them in memory, beside who gets them, until they are there.
_PARTS_MAX: Final = 64

Key = tuple[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """The tables of a version, and who holds them.

    Attributes:
        key: servable and version.
        parts: local unit name and partition to the pieces of it, with bytes.
        weights: of each part; none are negative.
        homes: the actors with a copy of each part.
        fixed: local names of units of which nothing is to be moved.
        stays: why nothing of it is to be moved, or "".
        shut: actors that cannot get anything of it.
        actors_max: the most actors that it may be on; None for any number.
    """

    key: Key
    parts: Mapping[PieceKey, Part]
    weights: Mapping[PieceKey, float]
    homes: Mapping[PieceKey, tuple[str, ...]]
    fixed: frozenset[str] = frozenset()
    stays: str = ""
    shut: frozenset[str] = frozenset()
    actors_max: int | None = None


class Leg(NamedTuple):
    """Parts of a version that go from one actor to another.

    Attributes:
        key: servable and version.
        old: who has them.
        new: who gets them.
        parts: local unit name and partition of each.
        nbytes: of them, as far as the new one does not have them yet.
    """

    key: Key
    old: str
    new: str
    parts: tuple[PieceKey, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Balance:
    """What is to be moved, and what it is good for.

    Attributes:
        legs: in order.
        before: by actor, the bytes that it holds and its load.
        after: the same when all is done.
        full: actors that should get parts and have no room, with the bytes that are short.
    """

    legs: tuple[Leg, ...]
    before: Mapping[str, tuple[int, float]]
    after: Mapping[str, tuple[int, float]]
    full: Mapping[str, int] = field(default_factory=dict)

    @property
    def uneven(self) -> tuple[float, float]:
        """Load of the actor that has most, as a multiple of the mean: before and after."""
        return _uneven(self.before), _uneven(self.after)


def _uneven(actors: Mapping[str, tuple[int, float]]) -> float:
    loads = [load for _, load in actors.values()]
    mean = sum(loads) / len(loads) if loads else 0.0
    return max(loads) / mean if mean else 1.0


def balanced(held: Sequence[Held], sites: Sequence[Site], legs_max: int) -> Balance:
    """What makes the load of shard actors even.

    Equal inputs give equal answers, and of what comes of an answer nothing is moved again.

    Args:
        held: every version's tables: those that stay count as load.
        sites: the shard actors that may hold parts, with what is promised there.
        legs_max: the most to answer; who asks again when they are done gets the rest.
    """
    books = _Books(held, sites)
    before = books.actors()
    legs: list[Leg] = []
    while len(legs) < legs_max and (leg := books.next_leg()) is not None:
        legs.append(leg)
    return Balance(tuple(legs), before, books.actors(), books.full)


class _Books:
    """Who has what while an answer is worked out."""

    def __init__(self, held: Sequence[Held], sites: Sequence[Site]) -> None:
        self._held = {each.key: each for each in held}
        self._sites = {site.name: site for site in sites}
        self._used = {site.name: sum(site.pieces.values()) for site in sites}
        self._homes = {each.key: dict(each.homes) for each in held}
        #: by version and actor, its parts there
        self._at: dict[Key, dict[str, set[PieceKey]]] = {each.key: {} for each in held}
        self._loads = dict.fromkeys(self._sites, 0.0)
        self._own: dict[Key, dict[str, float]] = {
            each.key: dict.fromkeys(self._sites, 0.0) for each in held
        }
        #: by actor and piece: how many parts have it
        self._users: Counter[tuple[str, PieceKey]] = Counter()
        for each in held:
            for part, actors in each.homes.items():
                for actor in actors:
                    self._at[each.key].setdefault(actor, set()).add(part)
                    self._users.update((actor, piece) for piece in each.parts[part])
                    if actor in self._sites:
                        self._loads[actor] += each.weights[part]
                        self._own[each.key][actor] += each.weights[part]
        mean = sum(self._loads.values()) / max(1, len(self._loads))
        self._worth = _WORTH * mean
        self.full: dict[str, int] = {}

    def actors(self) -> dict[str, tuple[int, float]]:
        """Bytes and load of each."""
        return {name: (self._used[name], self._loads[name]) for name in sorted(self._sites)}

    def next_leg(self) -> Leg | None:
        """Move some parts in the books: of one version, between the two that gain most by it."""
        best: tuple[float, Key, str, str, PieceKey] | None = None
        for key, each in sorted(self._held.items()):
            if not each.stays:
                found = self._best_of(each)
                if found is not None and (best is None or found[0] > best[0]):
                    best = (found[0], key, *found[1:])
        if best is None:
            return None
        _, key, old, new, first = best
        held = self._held[key]
        parts, nbytes = [first], self._move(held, old, new, first)
        mean = sum(self._own[key].values()) / len(self._sites)
        # As long as the one has not got its share of the version: others may want the rest.
        while len(parts) < _PARTS_MAX and self._own[key][new] < mean:
            found_next = self._best_part(held, old, new)
            if found_next is None or self._own[key][new] + held.weights[found_next[1]] > mean:
                break
            nbytes += self._move(held, old, new, found_next[1])
            parts.append(found_next[1])
        return Leg(key, old, new, tuple(sorted(parts)), nbytes)

    def _best_of(self, held: Held) -> tuple[float, str, str, PieceKey] | None:
        """The pair of actors that differ most of which one can give the other a part."""
        own = self._own[held.key]
        ranks = {name: load + own[name] for name, load in self._loads.items()}
        takers = sorted(ranks, key=lambda name: (ranks[name], name))
        givers = [name for name in reversed(takers) if own[name]]
        # The pairs by their difference, of which mostly the first will do.
        due = [(ranks[takers[0]] - ranks[givers[0]], 0, 0)] if givers else []
        while due:
            difference, one, other = heapq.heappop(due)
            if -difference <= self._worth:
                return None
            old, new = givers[one], takers[other]
            found = self._best_part(held, old, new)
            if found is not None:
                return found[0], old, new, found[1]
            if other + 1 < len(takers):
                heapq.heappush(due, (ranks[takers[other + 1]] - ranks[old], one, other + 1))
            if not other and one + 1 < len(givers):
                heapq.heappush(due, (ranks[new] - ranks[givers[one + 1]], one + 1, 0))
        return None

    def _difference(self, held: Held, old: str, new: str) -> float:
        own = self._own[held.key]
        return self._loads[old] - self._loads[new] + own[old] - own[new]

    def _best_part(self, held: Held, old: str, new: str) -> tuple[float, PieceKey] | None:
        """By how much the sum of squares is lowered (half of it), and by which part."""
        difference = self._difference(held, old, new)
        if new in held.shut or not self._may_be_on(held, old, new):
            return None
        worth = [
            (held.weights[part] * (difference - 2 * held.weights[part]), part)
            for part in self._at[held.key].get(old, ())
            if part[0] not in held.fixed
            and new not in self._homes[held.key][part]
            and held.weights[part] > 0
            and difference - 2 * held.weights[part] > self._worth
        ]
        for gain, part in sorted(worth, key=lambda each: (-each[0], each[1])):
            if self._may_go(held, old, new, part):
                return gain, part
        return None

    def _may_be_on(self, held: Held, old: str, new: str) -> bool:
        """Whether a version may be on one actor more."""
        if held.actors_max is None:
            return True
        actors = [actor for actor, parts in self._at[held.key].items() if parts]
        return new in actors or len(actors) < held.actors_max

    def _may_go(self, held: Held, old: str, new: str, part: PieceKey) -> bool:
        """Whether there is room, nothing is held twice for it, and copies stay apart."""
        nodes = {
            self._sites[each].node
            for each in self._homes[held.key][part]
            if each != old and each in self._sites
        }
        here, there = self._sites[old].node, self._sites[new].node
        if there in nodes and here not in nodes:
            return False
        cost = self._cost(held, new, part)
        if cost > sum(size for _, size in self._freed(held, old, part)):
            return False
        site = self._sites[new]
        short = cost - (site.capacity_bytes - self._used[new])
        if site.capacity_bytes and short > 0:
            self.full[new] = min(short, self.full.get(new, short))
            return False
        return True

    def _cost(self, held: Held, new: str, part: PieceKey) -> int:
        site = self._sites[new]
        return sum(
            size
            for piece, size in held.parts[part].items()
            if piece != STAGING
            and not self._users[new, piece]
            and (piece not in site.pieces or (new, piece) in self._users)
        )

    def _freed(self, held: Held, old: str, part: PieceKey) -> Iterator[tuple[PieceKey, int]]:
        for piece, size in held.parts[part].items():
            if self._users[old, piece] == 1:
                yield piece, size

    def _move(self, held: Held, old: str, new: str, part: PieceKey) -> int:
        """Note it; the bytes that it takes there."""
        cost = self._cost(held, new, part)
        self._used[old] -= sum(size for _, size in self._freed(held, old, part))
        self._used[new] += cost
        for piece in held.parts[part]:
            self._users[old, piece] -= 1
            self._users[new, piece] += 1
        weight, homes = held.weights[part], self._homes[held.key]
        homes[part] = tuple(new if each == old else each for each in homes[part])
        self._at[held.key][old].remove(part)
        self._at[held.key].setdefault(new, set()).add(part)
        for loads in (self._loads, self._own[held.key]):
            loads[old] -= weight
            loads[new] += weight
        return cost
