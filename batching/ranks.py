"""In which order the rows of a lane's lines leave.

First those of owners that are in share, then those of the others, so that what an owner sends
beyond its share waits behind everybody's; in each group the more critical first, then by deadline,
then by arrival. Best-effort rows stand apart (`Line.spare`): they have a place in no such order, as
they run in the room that the others leave.

A *segment* is a run of rows of one group and one criticality: inside it rows stand by deadline.
Does not know how many rows leave, nor what a batch costs.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, groupby
from math import inf
from operator import itemgetter

from batching.allowance import SHEDDABLE
from batching.line import Entry, Line
from batching.shares import Shares
from batching.values import Ticket

__all__ = ["heads", "in_order", "segments", "spares"]

_class_of = itemgetter(0)


def in_order(lines: Mapping[str, Line], shares: Shares) -> Iterator[Ticket]:
    """The tickets in the order in which their rows leave; any may have left in part."""
    if len(lines) == 1:
        [line] = lines.values()
        return iter([entry[3] for entry in line.entries])
    first, then = _groups(lines, shares, shares.limit())
    return (entry[3] for entry in chain(heapq.merge(*first), heapq.merge(*then)))


def segments(
    lines: Mapping[str, Line], shares: Shares, limit: float
) -> Iterator[tuple[bool, Iterator[Ticket]]]:
    """The same, segment by segment: whether it is in share, and its tickets.

    Args:
        lines: by owner.
        shares: who is in share.
        limit: what `Shares.limit` says at this instant.
    """
    for in_share, group in zip((True, False), _groups(lines, shares, limit), strict=True):
        if group:
            for _, run in groupby(heapq.merge(*group), key=_class_of):
                yield in_share, (entry[3] for entry in run)


def heads(
    lines: Iterable[Line], shares: Shares, limit: float, priority: int = SHEDDABLE
) -> tuple[float, float]:
    """The earliest deadline of all rows, and of those of owners in share; inf for none.

    Args:
        lines: of a lane.
        shares: who is in share.
        limit: what `Shares.limit` says at this instant.
        priority: rows of a lower one do not count.
    """
    earliest = protected = inf
    for line in lines:
        if line.entries:
            deadline = line.earliest(priority)
            if deadline < earliest:
                earliest = deadline
            if deadline < protected and shares.in_share(line.owner, limit):
                protected = deadline
    return earliest, protected


def spares(lines: Mapping[str, Line]) -> Iterator[Ticket]:
    """The best-effort tickets in the order in which their rows leave, whoever they are of."""
    return (entry[3] for entry in heapq.merge(*[line.spare for line in lines.values()]))


def _groups(
    lines: Mapping[str, Line], shares: Shares, limit: float
) -> tuple[list[list[Entry]], list[list[Entry]]]:
    first: list[list[Entry]] = []
    then: list[list[Entry]] = []
    for line in lines.values():
        if line.entries:
            (first if shares.in_share(line.owner, limit) else then).append(line.entries)
    return first, then
