"""Pooled look-ups spread over shards: bags of ids out, one row for each bag back.

Every shard is asked only for the bags that have ids in its partitions, and answers with what it can
work out alone: a sum or a greatest. Which shard that is, what a missing id does to its bag, and how
parts become one row are decided here. Parts are added in the order of the partitions, whichever
came first, so that the same placement gives the same bits. A bag in which all ids are missing, or
none is, is a row of zeros; a shard that timed out is an error.

Look-ups in several tables (`cluster.bunches`) are one here: their bags have one numbering, those of
one table after those of another, and so have their ids, and their rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from cluster.bunches import Bunch
from cluster.locating import Located, locate, locate_all
from cluster.routes import PlannedNode
from shards.errors import SpecMismatch
from shards.tables import split_ids

__all__ = ["BagPart", "Pool"]

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.intp]
Ids = npt.NDArray[np.int32] | npt.NDArray[np.int64]

#: Outlines of more bags are made each time: those that are kept would take gigabytes.
_KEPT_BAGS_MAX: Final = 1 << 14


class BagPart(NamedTuple):
    """What one shard is asked.

    Attributes:
        holder: its name.
        bags: which of the look-up's bags these are, ascending.
        arrays: as `shards.bags` says.
        sizes: of several tables: how many of these bags are of each.
    """

    holder: str
    bags: Indices
    arrays: tuple[Array, ...]
    sizes: tuple[int, ...]


class _Outline(NamedTuple):
    """Where bags and ids of each member are, given how many of both it has.

    Attributes:
        numbers: of all bags.
        counts: int32, ids of each, missing ones included.
        edges: ``[members + 1]``: the first bag of each member, and after the last.
        edges_of_ids: ``[members + 1]``: the first id of each member, and after the last.
        sizes: bags of each.
        length: ids of every bag; None where they differ.
    """

    numbers: Indices
    counts: npt.NDArray[np.int32]
    edges: Indices
    edges_of_ids: Indices
    sizes: tuple[int, ...]
    length: int | None


class Pool:
    """Look-ups that are asked for together, or one.

    Args:
        bunch: which.
        asked: for each member: ids, integers or text ``[..., length]``, -1 or "" where a bag has
            none; and float32 weights of the same shape, or None, for all members alike.

    Attributes:
        missing: ids that are not in their table.

    Raises:
        SpecMismatch: ids or weights are not of such a shape or dtype.
        InvalidArgument: an id is missing and the table's policy is ``error``.
    """

    def __init__(self, bunch: Bunch, asked: Sequence[tuple[Array, Array | None]]) -> None:
        for member, (ids, weights) in zip(bunch.members, asked, strict=True):
            _check(member, ids, weights)
        self._bunch = bunch
        self._shapes = [ids.shape for ids, _ in asked]
        sizes = tuple([(math.prod(shape[:-1]), shape[-1]) for shape in self._shapes])
        is_large = sum([bags for bags, _ in sizes]) > _KEPT_BAGS_MAX
        self._outline = _outline(sizes) if is_large else _outline_before(sizes)
        self._bags = len(self._outline.numbers)
        found = self._located([ids.reshape(-1) for ids, _ in asked])
        #: where the ids are that exist, None if all do; and where those are that are missing
        self._at, self._lost = found.at, found.lost
        self.missing = len(found.lost)
        self._ids: Ids = found.places.astype(bunch.ids, copy=False)
        self._weights: Array | None = None
        self._lost_weights: Array | None = None
        weighted = [weights.reshape(-1) for _, weights in asked if weights is not None]
        if weighted:
            given = weighted[0] if len(weighted) == 1 else np.concatenate(weighted)
            self._weights = given if self._at is None else given[self._at]
            self._lost_weights = given[self._lost]
        self._asked: list[BagPart] = []
        self._parts: list[Floats | None] = []

    def _located(self, ids: list[Array]) -> Located:
        bunch = self._bunch
        if len(ids) == 1:
            return locate(bunch.tables[0], ids[0], in_bags=True)
        whole = np.concatenate([_numbers(each) for each in ids])
        return locate_all(bunch.tables, bunch.rows, whole, self._outline.edges_of_ids)

    @property
    def missing_by(self) -> list[tuple[str, int]]:
        """How many ids are missing, by the label of their table."""
        if not self.missing:
            return []
        counts = np.bincount(self._owners(self._lost), minlength=len(self._shapes)).tolist()
        members = self._bunch.members
        return [(each.label, count) for each, count in zip(members, counts, strict=True)]

    def split(self, holders: Sequence[str]) -> list[BagPart]:
        """What to ask of whom, given the chosen holder of every partition of a table.

        A part's place in the list is its number for `put`.
        """
        outline = self._outline
        parts: list[BagPart] = []
        for holder, found in self._places(holders).items():
            is_all = len(found) == len(self._ids)
            if is_all and self._at is None:
                bags, counts, sizes = outline.numbers, outline.counts, outline.sizes
            else:
                places = found if self._at is None else self._at[found]
                per_bag = np.bincount(self._bags_of(places), minlength=self._bags)
                bags = np.flatnonzero(per_bag)
                counts = per_bag[bags].astype(np.int32)
                sizes = tuple(np.diff(np.searchsorted(bags, outline.edges)).tolist())
            arrays: list[Array] = [counts, self._ids if is_all else self._ids[found]]
            if self._weights is not None:
                arrays.append(self._weights if is_all else self._weights[found])
            is_set = len(self._shapes) > 1
            parts.append(BagPart(holder, bags, tuple(arrays), sizes if is_set else ()))
        self._asked = parts
        self._parts = [None] * len(parts)
        return parts

    def _places(self, holders: Sequence[str]) -> dict[str, Indices]:
        """Which of the ids go to which holder."""
        bunch, members = self._bunch, len(self._shapes)
        if members == 1 or len(set(holders)) == 1:
            return split_ids(self._ids, bunch.first_rows, holders)
        places = np.arange(len(self._ids)) if self._at is None else self._at
        rows = self._ids + bunch.base[self._owners(places)]
        return split_ids(rows, bunch.first_rows, list(holders) * members)

    def _owners(self, places: Indices) -> Indices:
        """Whose the ids at these places are."""
        found: Indices = np.searchsorted(self._outline.edges_of_ids[:-1], places, side="right") - 1
        return found

    def _bags_of(self, places: Indices) -> Indices:
        """In which bags the ids at these places are."""
        outline = self._outline
        if outline.length is not None:
            return places // outline.length if outline.length else places
        return np.repeat(outline.numbers, outline.counts)[places]

    def address(self, partition: int) -> str:
        """What a shard is asked for: the tables, whichever partitions it has."""
        return self._bunch.node.unit

    def sizes(self, partition: int) -> tuple[int, ...]:
        """How many bags of each table a part has, where there are several."""
        return self._asked[partition].sizes

    @property
    def is_complete(self) -> bool:
        """Whether every shard that was asked has answered."""
        return all([part is not None for part in self._parts])

    def put(self, partition: int, tensors: Sequence[Array]) -> None:
        """Take a shard's answer.

        Args:
            partition: the part's number.
            tensors: one, ``[bags of the part, dim]``.

        Raises:
            SpecMismatch: it is not of that shape or dtype.
        """
        [rows] = tensors
        wanted = (len(self._asked[partition].bags), self._bunch.dim)
        if rows.dtype != np.float32 or rows.shape != wanted:
            raise SpecMismatch(f"a shard answered {rows.dtype}{list(rows.shape)} for bags")
        self._parts[partition] = rows  # type: ignore[assignment]

    def outputs(self, rows: int) -> list[tuple[PlannedNode, Mapping[str, Array]]]:
        """The row of every bag, shaped like the ids with the row dimension for the last one.

        Args:
            rows: not needed: of a part's call.

        Returns:
            The outputs of each member.
        """
        merged = self._greatest() if self._bunch.op == "max" else self._total()
        found: list[tuple[PlannedNode, Mapping[str, Array]]] = []
        if any([member.pool == "mean" for member in self._bunch.members]):
            divisors = np.maximum(self._counts(), 1).astype(np.float32)[:, None]
        dim, stop = (self._bunch.dim,), 0
        for member, shape, size in zip(
            self._bunch.members, self._shapes, self._outline.sizes, strict=True
        ):
            start, stop = stop, stop + size
            own = merged[start:stop]
            if member.pool == "mean":
                own = own / divisors[start:stop]
            found.append((member, {"rows": own.reshape(shape[:-1] + dim)}))
        return found

    def _total(self) -> Floats:
        defaults = self._bunch.defaults if self.missing else None
        if defaults is None and len(self._parts) == 1 and len(self._asked[0].bags) == self._bags:
            [only] = self._parts
            assert only is not None
            return only
        out = np.zeros((self._bags, self._bunch.dim), np.float32)
        for asked, part in zip(self._asked, self._parts, strict=True):
            assert part is not None, "asked before all shards have answered"
            out[asked.bags] += part
        if defaults is not None:
            rows = defaults[self._owners(self._lost)]
            if self._lost_weights is not None:
                rows = rows * self._lost_weights[:, None]  # type: ignore[operator]
            np.add.at(out, self._bags_of(self._lost), rows)
        return out

    def _greatest(self) -> Floats:
        out = np.full((self._bags, self._bunch.dim), -np.inf, np.float32)
        touched = np.zeros(self._bags, bool)
        for asked, part in zip(self._asked, self._parts, strict=True):
            assert part is not None, "asked before all shards have answered"
            out[asked.bags] = np.maximum(out[asked.bags], part)
            touched[asked.bags] = True
        if self.missing:
            # What a missing id yields is a row, which takes part like any other.
            lost, defaults = self._bags_of(self._lost), self._bunch.defaults
            filled = np.float32(0) if defaults is None else defaults[self._owners(self._lost)]
            out[lost] = np.maximum(out[lost], filled)
            touched[lost] = True
        out[~touched] = 0
        return out

    def _counts(self) -> Indices:
        """How many ids each bag has, missing ones included."""
        if self._at is None:
            return self._outline.counts  # type: ignore[return-value]
        places = np.concatenate((self._at, self._lost)) if self.missing else self._at
        return np.bincount(self._bags_of(places), minlength=self._bags)


def _check(member: PlannedNode, ids: Array, weights: Array | None) -> None:
    if not ids.ndim:
        raise SpecMismatch(f"ids of table {member.unit[:12]} must be bags, got one {ids.dtype}")
    if member.table is not None and member.table.keys == "rows" and ids.dtype.kind not in "iu":
        raise SpecMismatch(f"ids of table {member.unit[:12]} must be integers, got {ids.dtype}")
    if weights is not None and (weights.dtype != np.float32 or weights.shape != ids.shape):
        raise SpecMismatch(
            f"weights of table {member.unit[:12]} must be float32{list(ids.shape)}, got "
            f"{weights.dtype}{list(weights.shape)}"
        )


def _numbers(ids: Array) -> Ids:
    """Ids of an integer dtype as one of the two that look-ups know."""
    return ids if ids.dtype == np.int32 else ids.astype(np.int64, copy=False)  # type: ignore


def _outline(sizes: tuple[tuple[int, int], ...]) -> _Outline:
    """Of so many bags of so many ids for each member."""
    bags = [size for size, _ in sizes]
    numbers = np.arange(sum(bags))
    counts = np.repeat(np.array([length for _, length in sizes], np.int32), bags)
    numbers.flags.writeable = counts.flags.writeable = False
    lengths = {length for _, length in sizes}
    return _Outline(
        numbers=numbers,
        counts=counts,
        edges=np.cumsum([0, *bags]),
        edges_of_ids=np.cumsum([0, *[size * length for size, length in sizes]]),
        sizes=tuple(bags),
        length=lengths.pop() if len(lengths) == 1 else None,
    )


_outline_before = lru_cache(maxsize=64)(_outline)
