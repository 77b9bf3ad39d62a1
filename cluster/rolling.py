"""Where a version goes that takes the place of another actor by actor: ``shard-rolling``.

Two versions that do not fit beside each other change places in two halves. Before the new one is
published, the old one gives up some of its actors, and goes on answering from the others; the new
one is loaded there. Afterwards the rest of the new one takes what the old one has left. A part that
has one copy cannot be given up, so its successor must fit beside it.

Decides which actors are given up and where both halves go. Does not decide when: that is
`cluster.versions.shard_rolling`. Knows nothing of lives, epochs or time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import TypeAlias

from batching.errors import ResourceExhausted
from cluster.packing import Strategy
from cluster.pieces import NOT_MEASURED, Steps
from cluster.placement import Copies, Placement, pieces_on, place
from cluster.sites import Site
from shards.manifest import Manifest

__all__ = ["Parts", "given_up", "kept_copies", "parts_of", "place_rolling"]

#: For each part of a version the actors that hold a copy of it.
Parts: TypeAlias = tuple[tuple[str, ...], ...]


def parts_of(units: Iterable[Copies], without: Collection[str] = ()) -> Parts:
    """The parts of a placement, without the names of its units, nor some actors."""
    parts = tuple(part for copies in units for part in copies)
    if not without:
        return parts
    return tuple(tuple(actor for actor in part if actor not in without) for part in parts)


def kept_copies(copies: int) -> int:
    """Of so many copies of a part, those that answer on until the new version does.

    Half of them, so that never less than half of what is declared answers, before and after.
    """
    return max(1, copies // 2)


def given_up(parts: Iterable[Sequence[str]]) -> frozenset[str]:
    """The actors that versions with these parts give up before their successor is published.

    As many as leave enough copies of each part elsewhere, taken by name: equal placements give
    equal answers, so that a later reign goes on where the last one stopped.
    """
    held: dict[str, list[int]] = {}
    spare: list[int] = []
    for index, part in enumerate(parts):
        spare.append(len(part) - kept_copies(len(part)))
        for actor in part:
            held.setdefault(actor, []).append(index)
    found = []
    for actor, of_parts in sorted(held.items()):
        if all(spare[index] for index in of_parts):
            found.append(actor)
            for index in of_parts:
                spare[index] -= 1
    return frozenset(found)


def place_rolling(
    manifest: Manifest,
    old: Parts,
    beside: Iterable[Site],
    instead: Iterable[Site],
    *,
    replicas: int,
    table_replicas: int,
    shards: int | None,
    steps: Steps = NOT_MEASURED,
    cached: float | None = None,
    strategy: Strategy = "capacity",
) -> tuple[Placement, frozenset[str]]:
    """Find room for a version that takes the place of others.

    Args:
        manifest: the version.
        old: the parts of those that it replaces.
        beside: the actors that may be used, as they are.
        instead: the same, without what only the old versions hold.
        replicas: copies of each map and host unit.
        table_replicas: copies of each partition.
        shards: as of `cluster.placement.place`.
        steps: likewise.
        cached: likewise.
        strategy: likewise.

    Returns:
        Where its parts go, and those of the actors that it gets only once it is available.

    Raises:
        ResourceExhausted: there is no room, not even so.
    """
    emptied = sorted(instead, key=lambda site: site.name)
    now = _sites_now(old, sorted(beside, key=lambda site: site.name), emptied)
    put = partial(place, manifest, steps=steps, cached=cached)
    copies = replicas, table_replicas
    if strategy == "messages":
        try:
            units, rest = _halves(now, emptied, copies, partial(put, strategy=strategy))
        except ResourceExhausted:
            # The few actors of the first half may be those without which the second has no room.
            strategy = "capacity"
    if strategy != "messages":
        if shards is None:
            # One copy over so many actors that there are enough for all copies.
            count = sum(site.kind == "shard" for site in emptied)
            shards = max(1, count // max(1, table_replicas))
        put = partial(put, shards=shards, strategy=strategy)
        units, rest = _halves(now, emptied, copies, put)
    return Placement(units=units, pieces=pieces_on(manifest, units, steps, cached)), rest


def _halves(
    now: Sequence[Site],
    emptied: Sequence[Site],
    copies: tuple[int, int],
    put: Callable[..., Placement],
) -> tuple[dict[str, Copies], frozenset[str]]:
    """Where all copies go, those of the first half first, and the actors of the second."""
    early = [_first(count) for count in copies]
    first = put(now, replicas=early[0], table_replicas=early[1])
    # What comes later goes to other actors, so that the next change can be made in the same way.
    left = [site for site in emptied if site.name not in first.pieces]
    rest = put(left, replicas=copies[0] - early[0], table_replicas=copies[1] - early[1])
    units = {
        name: tuple((*one, *other) for one, other in zip(parts, rest.units[name], strict=True))
        for name, parts in first.units.items()
    }
    return units, frozenset(rest.pieces)


def _sites_now(old: Parts, beside: Iterable[Site], instead: Iterable[Site]) -> list[Site]:
    """The actors that may get a part before the old versions are gone.

    Where actors of a kind give way, those of them that do not are left to the second half.
    """
    leaving = given_up(old)
    giving = {site.kind for site in instead if site.name in leaving}
    holding = {actor for part in old for actor in part}
    found = {site.name: site for site in instead if site.name in leaving}
    for site in beside:
        if site.name not in leaving and (site.name not in holding or site.kind not in giving):
            found[site.name] = site
    return list(found.values())


def _first(copies: int) -> int:
    """Of so many copies, those that are loaded before the version is available."""
    return copies - copies // 2
