"""What several versions have in common and actors hold once: who uses it, where, how much it is.

A copy of a unit on a device, or a node's of partitions and files, which all its processes map from
the same blobs. Two versions have in common what placement takes for the same piece: equal units,
and the bases of tables that differ in overlays; and a version uses what it refers to. Counted from
what is placed and has been loaded. Values for a status; decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cluster.fleet import Fleet
from cluster.ledger import Version
from cluster.pieces import STAGING, PieceKey, kind_of, parts_with_pieces
from cluster.sizes import measured
from shards.orders import ActorKind

__all__ = ["held_once"]


class _Place(NamedTuple):
    """A piece at a place: a device actor, or a node."""

    piece: PieceKey
    where: str


@dataclass(slots=True)
class _Piece:
    kind: ActorKind
    nbytes: int
    users: set[str] = field(default_factory=set)


def held_once(versions: Iterable[Version], fleet: Fleet) -> list[dict[str, Any]]:
    """What has several users: its kind, where it is, its bytes, and its users.

    Users are ``servable:version/unit``; pieces at one place with the same users are one row.
    """
    known = list(versions)
    found: dict[_Place, _Piece] = {}
    #: servable, version and unit to where it is
    homes: dict[tuple[str, int, str], set[_Place]] = {}
    for version in known:
        for name in version.units or {}:
            places = _note(version, name, fleet, found)
            homes[(*version.key, name)] = places
    for version in known:
        for name, (key, unit) in ({} if version.bound is None else version.bound.targets).items():
            for place in homes.get((*key, unit), ()):
                found[place].users.add(_text(version, name))
    rows: dict[tuple[str, ActorKind, tuple[str, ...]], int] = {}
    for place, piece in found.items():
        if len(piece.users) > 1:
            row = (place.where, piece.kind, tuple(sorted(piece.users)))
            rows[row] = rows.get(row, 0) + piece.nbytes
    return [
        {"where": where, "kind": kind, "bytes": nbytes, "refs": len(users), "users": list(users)}
        for (where, kind, users), nbytes in sorted(rows.items())
    ]


def _note(version: Version, name: str, fleet: Fleet, found: dict[_Place, _Piece]) -> set[_Place]:
    """Note where a unit of a version is; the places."""
    assert version.units is not None
    places: set[_Place] = set()
    if version.manifest is None:
        return places
    unit = version.manifest.units[name]
    for part, actors in zip(parts_with_pieces(unit), version.units[name], strict=True):
        for actor in actors:
            known = fleet.actors.get(actor)
            if known is None or known.report is None or not known.has_loaded(version.key):
                continue
            kind = kind_of(unit)
            where = actor if kind == "device" else known.report.endpoint.node
            promised = version.pieces.get(actor, part)
            here = {piece: promised.get(piece, nbytes) for piece, nbytes in part.items()}
            for piece, nbytes in measured(here, known.report).items():
                if piece != STAGING:
                    place = _Place(piece, where)
                    found.setdefault(place, _Piece(kind, nbytes)).users.add(_text(version, name))
                    places.add(place)
    return places


def _text(version: Version, name: str) -> str:
    return f"{version.key[0]}:{version.key[1]}/{name}"
