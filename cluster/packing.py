"""Parts of tables and nodes with room: which part goes where, whatever it is that is made even.

Decides by one of the strategies of `cluster.layouts`, for parts that are cut already: the largest
first onto the node that is used least, then parts are moved and exchanged; or as tight as they
fit, tables of one net together. Equal inputs give equal results. Does not know what a part is of,
nor what it costs to ask for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from batching.errors import ResourceExhausted
from cluster.layout_costs import Host

__all__ = ["Book", "Piece", "Strategy", "TooLarge", "arranged", "evenly"]

Strategy: TypeAlias = Literal["capacity", "load", "messages"]

#: The most changes that improve an arrangement, and the nodes with which parts are exchanged.
_CHANGES_MAX: Final = 200
_PARTNERS_MAX: Final = 8


class TooLarge(ResourceExhausted):
    """The nodes have no room for the tables.

    Attributes (positional): what has no room, the place that lacks the least ("" for all nodes
    together), and the bytes that are short there.
    """

    def __init__(self, what: str, where: str, short_bytes: int) -> None:
        place = f"on {where}, which has most left" if where else "on all nodes together"
        super().__init__(f"{what} has no room: {short_bytes:,} bytes are short {place}")
        self.args = (what, where, short_bytes)  # What pickle calls the class with.
        self.what = what
        self.where = where
        self.short_bytes = short_bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """A copy of a part of a table, with the bytes that are read in it for a row of a request."""

    table: str
    index: int
    net: str
    nbytes: int
    rows: int
    read_bytes: float

    @property
    def key(self) -> tuple[str, int]:
        """The part, of which no node holds two copies."""
        return self.table, self.index


#: How full or busy something makes a node: by strategy, so that a search need not know which.
_Weigh: TypeAlias = Callable[[Piece], float]


@dataclass(slots=True)
class Book:
    """A node and what is put there.

    Attributes:
        scale: what the weights of its parts are held against: bytes, or bytes a second.
        weight: of its parts together.
        free: bytes that are left.
    """

    host: Host
    scale: float
    free: int
    weight: float = 0.0
    pieces: dict[tuple[str, int], Piece] = field(default_factory=dict)

    @property
    def busy(self) -> float:
        """What is made even."""
        return self.weight / self.scale

    def takes(self, piece: Piece, instead: Piece | None = None) -> bool:
        """Whether there is room, and no other copy of the part."""
        room = self.free + (instead.nbytes if instead else 0)
        return piece.nbytes <= room and piece.key not in self.pieces

    def put(self, piece: Piece, weigh: _Weigh) -> None:
        """Hold a part."""
        self.pieces[piece.key] = piece
        self.free -= piece.nbytes
        self.weight += weigh(piece)

    def drop(self, piece: Piece, weigh: _Weigh) -> None:
        """Hold it no longer."""
        del self.pieces[piece.key]
        self.free += piece.nbytes
        self.weight -= weigh(piece)


def evenly(books: Sequence[Book]) -> float:
    """How busy nodes are if all are equally busy: none can do with less on the busiest."""
    return sum(book.weight for book in books) / sum(book.scale for book in books)


def arranged(pieces: Sequence[Piece], hosts: Sequence[Host], strategy: Strategy) -> list[Book]:
    """Put every part on a node.

    Raises:
        TooLarge: this search found no room for one of them.
    """
    if strategy == "messages":
        return _packed(pieces, hosts)
    weigh: _Weigh = _bytes_of if strategy == "capacity" else _reads_of
    try:
        books = _spread(sorted(pieces, key=_by(weigh)), hosts, strategy, weigh, _least_busy)
    except TooLarge:
        # What is looked up much went first, and left large cold parts no room: the other way round.
        by_size = sorted(pieces, key=_by(_bytes_of))
        books = _spread(by_size, hosts, strategy, weigh, _most_room)
    _improve(books, weigh)
    return books


def _bytes_of(piece: Piece) -> float:
    return float(piece.nbytes)


def _reads_of(piece: Piece) -> float:
    return piece.read_bytes


def _by(weigh: _Weigh) -> Callable[[Piece], tuple[float, float, str, int]]:
    return lambda piece: (-weigh(piece), -piece.nbytes, piece.table, piece.index)


def _least_busy(book: Book) -> tuple[float, float]:
    return book.busy, -book.free


def _most_room(book: Book) -> tuple[float, float]:
    return -book.free, book.busy


def _books(hosts: Sequence[Host], strategy: Strategy) -> list[Book]:
    by_memory = strategy != "load"
    return [
        Book(host, host.memory_bytes if by_memory else host.memory_bytes_s, host.memory_bytes)
        for host in hosts
    ]


def _spread(
    pieces: Iterable[Piece],
    hosts: Sequence[Host],
    strategy: Strategy,
    weigh: _Weigh,
    rank: Callable[[Book], tuple[float, float]],
) -> list[Book]:
    books = _books(hosts, strategy)
    for piece in pieces:
        taking = [book for book in books if book.takes(piece)]
        if not taking:
            raise _shortage(books, piece)
        min(taking, key=rank).put(piece, weigh)
    return books


def _shortage(books: Sequence[Book], piece: Piece) -> TooLarge:
    without = [book for book in books if piece.key not in book.pieces]
    roomiest = max(without, key=lambda book: book.free)
    what = f"part {piece.index} of table {piece.table!r}, {piece.nbytes:,} bytes,"
    return TooLarge(what, roomiest.host.name, piece.nbytes - roomiest.free)


def _packed(pieces: Sequence[Piece], hosts: Sequence[Host]) -> list[Book]:
    """Each net where it fits tightest, whole if it can be; an unused node only where it must."""
    books = _books(hosts, "messages")
    left = dict(enumerate(sorted(pieces, key=_by(_bytes_of))))
    nets: dict[str, list[Piece]] = {}
    for piece in left.values():
        nets.setdefault(piece.net, []).append(piece)
    for _, net in sorted(nets.items(), key=lambda item: (-sum(map(_bytes_of, item[1])), item[0])):
        together = _tightest_for_all(books, net)
        for piece in net:
            book = together or _tightest(books, piece)
            if book is None:
                raise _shortage(books, piece)
            book.put(piece, _bytes_of)
    _empty(books)
    return books


def _tightest_for_all(books: Sequence[Book], net: Sequence[Piece]) -> Book | None:
    needed = sum(piece.nbytes for piece in net)
    if len({piece.key for piece in net}) < len(net):
        return None  # Copies go to nodes of their own.
    return min((book for book in books if needed <= book.free), key=_tightness, default=None)


def _tightest(books: Iterable[Book], piece: Piece) -> Book | None:
    return min((book for book in books if book.takes(piece)), key=_tightness, default=None)


def _tightness(book: Book) -> tuple[bool, int]:
    # The largest of those that are unused, the tightest of the others.
    return (True, -book.free) if not book.pieces else (False, book.free)


def _empty(books: Sequence[Book]) -> None:
    """Give nodes up whose parts fit where others are, those with the least first."""
    for book in sorted(books, key=lambda each: each.weight):
        taken: list[tuple[Book, Piece]] = []
        others = [each for each in books if each is not book and each.pieces]
        for piece in sorted(book.pieces.values(), key=_by(_bytes_of)):
            other = _tightest(others, piece)
            if other is None:
                break
            other.put(piece, _bytes_of)
            taken.append((other, piece))
        if len(taken) < len(book.pieces):
            for other, piece in taken:
                other.drop(piece, _bytes_of)
            continue
        for piece in list(book.pieces.values()):
            book.drop(piece, _bytes_of)


def _improve(books: Sequence[Book], weigh: _Weigh) -> None:
    """Take parts off the busiest node while it, and whoever gets them, is less busy for it."""
    for _ in range(_CHANGES_MAX):
        busiest = max(books, key=lambda book: book.busy)
        idle = sorted((b for b in books if b is not busiest), key=lambda book: book.busy)
        best: tuple[float, Book, Piece, Piece | None] | None = None
        for book in idle[:_PARTNERS_MAX]:
            for given in busiest.pieces.values():
                for got in (None, *book.pieces.values()):
                    after = _after(busiest, book, given, got, weigh)
                    # The sum of many parts is not exact, and what changes nothing must end.
                    if after < (best[0] if best else busiest.busy * (1 - 1e-9)):
                        best = after, book, given, got
        if best is None:
            return
        _, book, given, got = best
        busiest.drop(given, weigh)
        if got is not None:
            book.drop(got, weigh)
            busiest.put(got, weigh)
        book.put(given, weigh)


def _after(busiest: Book, book: Book, given: Piece, got: Piece | None, weigh: _Weigh) -> float:
    """How busy the busier of two nodes is once they have exchanged parts; never, if they cannot."""
    if not book.takes(given, got) or (got is not None and not busiest.takes(got, given)):
        return math.inf
    moved = weigh(given) - (weigh(got) if got is not None else 0.0)
    return max((busiest.weight - moved) / busiest.scale, (book.weight + moved) / book.scale)
