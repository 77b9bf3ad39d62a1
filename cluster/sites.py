"""Actors as placement sees them: what is promised there, what has room, and what is short.

Does not know whether an actor really has the room that it reports, nor where anything should go.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from cluster.pieces import STAGING, Part, PieceKey, add_pieces
from shards.orders import ActorKind

__all__ = ["Book", "Site", "shortages"]

#: Actors that a refusal lists.
_LISTED_MAX: Final = 4
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """An actor as placement sees it.

    Attributes:
        name: the actor.
        kind: what it can host.
        node: where it runs.
        capacity_bytes: the most it may promise; 0 where it states no bound.
        pieces: what is promised there already, with bytes.
    """

    name: str
    kind: ActorKind
    node: str
    capacity_bytes: int = 0
    pieces: Mapping[PieceKey, int] = field(default_factory=dict)


class Book:
    """A site while a placement is being worked out."""

    __slots__ = ("pieces", "site", "used")

    def __init__(self, site: Site) -> None:
        self.site = site
        self.pieces = dict(site.pieces)
        self.used = sum(self.pieces.values())

    @property
    def free(self) -> float:
        """Bytes that are left; infinite where it states no bound."""
        return self.site.capacity_bytes - self.used if self.site.capacity_bytes else math.inf

    def cost(self, part: Part) -> int:
        """Bytes that a part would take; what is there already costs nothing."""
        staging = max(part.get(STAGING, 0) - self.pieces.get(STAGING, 0), 0)
        return staging + sum(
            size for piece, size in part.items() if piece not in self.pieces and piece != STAGING
        )

    def has_room(self, part: Part) -> bool:
        """Whether a part fits."""
        return self.cost(part) <= max(self.free, 0)

    def put(self, part: Part) -> None:
        """Promise a part."""
        self.used += self.cost(part)
        add_pieces(self.pieces, part)

    def holds(self, part: Part) -> bool:
        """Whether a part is there already: a partition whose base is, its overlays are small."""
        return next(iter(part)) in self.pieces

    def rank(self, part: Part) -> tuple[bool, float, int, str]:
        """Smallest is best: holds the part already, most room, least used, first by name."""
        return (not self.holds(part), -self.free, self.used, self.site.name)


def shortages(books: Sequence[Book], kind: ActorKind, part: Part) -> str:
    """What is short on each actor, the one that lacks the least first."""
    ordered = sorted(books, key=lambda book: (book.cost(part) - book.free, book.site.name))
    told = [_shortage(book, kind, part) for book in ordered[:_LISTED_MAX]]
    more = len(ordered) - len(told)
    return "; ".join(told) + (f"; and {more} more" if more else "")


def _shortage(book: Book, kind: ActorKind, part: Part) -> str:
    free, size = max(int(book.free), 0), book.cost(part)
    return (
        f"{book.site.name} needs {_bytes_text(size)} of {kind} memory, "
        f"{_bytes_text(free)} free of {_bytes_text(book.site.capacity_bytes)}: "
        f"{_bytes_text(size - free)} short"
    )


def _bytes_text(count: int) -> str:
    power = min(max(count.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    return f"{count / 1024**power:.4g} {_UNITS[power]}"
