"""Making tables even over the shard actors while they are served, when a person asks for it.

That it was asked for is kept durably until it is done. Until then, whenever nothing is being
shifted, what would make load even is worked out anew from what is there (`cluster.balance`), and
its first step is begun (`cluster.shifting`): one actor gives parts of one version to another, and
nothing else is shifted in the cluster. So a controller that begins anew goes on, and whatever
happens in between, a lost node or another version, is part of the next answer. Drains and loads go
first, and actors that are about to come are waited for.

Decides what is shifted next and says why something stays. Does not know how a shift is made, nor
routers or time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from cluster.asked_rows import weights_of
from cluster.balance import Balance, Held, Leg, balanced
from cluster.draining import is_to_stay
from cluster.fleet import HoldState
from cluster.ledger import Version, is_whole
from cluster.lifecycle import State
from cluster.pieces import NOT_MEASURED, Partitioned, PieceKey, parts_with_pieces
from cluster.shifting import Shifting
from cluster.shifts import Shift
from cluster.world import World
from shards.manifest import CustomUnit

__all__ = ["Rebalancing", "rebalance_status", "shift_text"]

#: States of versions that are about to be elsewhere, or to make room.
_MOVING: Final = frozenset(
    {State.RESERVED, State.LOADING, State.WARMING, State.DRAINING, State.UNLOADING, State.ERROR}
)
#: Steps that an explanation goes into.
_LEGS_SHOWN_MAX: Final = 100


class Rebalancing:
    """Shifts parts of tables until load is even.

    Args:
        world: what is known.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._shifting = Shifting(world)
        self._is_on = False

    def move(self, epoch: int) -> bool:
        """Take every step that can be taken now.

        Args:
            epoch: the number that the next epoch will have.
        """
        world = self._world
        moved = is_under_way = False
        for version in world.versions():
            if version.shift is None or version.state is not State.AVAILABLE:
                continue
            if version.manifest is not None:
                moved |= self._shifting.go_on(version, epoch, world.fleet.leaving)
            is_under_way |= version.shift is not None
        if world.rebalancing and not self._is_on:
            # Whoever refused something when it was asked for the last time may take it now.
            self._shifting.forgive()
        self._is_on = world.rebalancing
        if not world.rebalancing or is_under_way or self._awaited():
            return moved
        legs = self._plan(legs_max=1).legs
        if legs:
            self._begin(legs[0])
        else:
            world.rebalancing = self._is_on = False
        return moved or bool(legs)

    def explained(self) -> dict[str, Any]:
        """That as plain values.

        Returns:
            ``moves``, a line each; ``more``, whether there are more after these; ``actors``: of
            each ``bytes`` and ``load`` before and after, load as a part of all; ``uneven``: what
            the most loaded has, in means, before and after; ``stays``: why something of a version
            is not moved; ``waits``: for what.
        """
        plan = self._plan(_LEGS_SHOWN_MAX)
        total = sum(load for _, load in plan.before.values()) or 1.0
        stays = {_label(held.key): held.stays for held in self._held() if held.stays}
        for version in self._world.versions():
            for name, why in self._shifting.refused(version).items():
                stays[f"{_label(version.key)} on {name}"] = why
        for name, short in plan.full.items():
            stays[f"more on {name}"] = f"{short:,} bytes short"
        return {
            "moves": [_leg_text(leg) for leg in plan.legs],
            "more": len(plan.legs) == _LEGS_SHOWN_MAX,
            "actors": {
                name: {
                    "bytes": [before[0], plan.after[name][0]],
                    "load": [round(before[1] / total, 4), round(plan.after[name][1] / total, 4)],
                }
                for name, before in plan.before.items()
            },
            "uneven": [round(each, 3) for each in plan.uneven],
            "stays": stays,
            "waits": self._awaited(),
        }

    def _plan(self, legs_max: int) -> Balance:
        """What would make load even, as things are."""
        fleet = self._world.fleet
        sites = [site for site in fleet.sites(self._world.pieces()) if site.kind == "shard"]
        return balanced([*self._held()], sites, legs_max)

    def _begin(self, leg: Leg) -> None:
        version = self._world.version(leg.key)
        assert version is not None
        self._shifting.begin(version, Shift(old=leg.old, new=leg.new, parts=leg.parts))

    def _awaited(self) -> str:
        """What goes first, or ""."""
        fleet = self._world.fleet
        names = fleet.awaited({"shard"})
        if names:
            return f"waits for {', '.join(names)}"
        for version in self._world.versions():
            if version.state in _MOVING:
                return f"waits for {version.life.name}, which is {version.state}"
            if version.moves or not fleet.leaving.isdisjoint(version.homes):
                return f"waits until {version.life.name} has left a node that is drained"
        return ""

    def _held(self) -> Iterable[Held]:
        for version in self._world.versions():
            if version.units and version.manifest is not None and version.state is not State.END:
                held = self._held_of(version)
                if held.parts:
                    yield held

    def _held_of(self, version: Version) -> Held:
        assert version.manifest is not None
        assert version.units is not None
        config, units = self._world.servables[version.key[0]].config, version.manifest.units
        cached = self._world.cached_part(version)
        parts = {
            (name, index): part
            for name, unit in units.items()
            if isinstance(unit, Partitioned) and name in version.units
            for index, part in enumerate(parts_with_pieces(unit, NOT_MEASURED, cached))
        }
        # As homes are chosen, see `cluster.table_homes`.
        weights = {key: float(next(iter(part.values()))) for key, part in parts.items()}
        if config.placement == "load":
            weights = _scaled(weights_of(version.manifest), weights)
        return Held(
            key=version.key,
            parts=parts,
            weights=weights,
            homes={(name, index): version.units[name][index] for name, index in parts},
            fixed=frozenset(n for n, unit in units.items() if isinstance(unit, CustomUnit)),
            stays=self._obstacle(version),
            shut=frozenset(self._shut(version)) | self._shifting.refused(version).keys(),
            actors_max=None if config.shards is None else config.shards * config.table_replicas,
        )

    def _shut(self, version: Version) -> Iterable[str]:
        """Actors that have something of a version which is about to go or to come."""
        for name, actor in self._world.fleet.actors.items():
            hold = actor.holds.get(version.key)
            if hold is not None and (
                hold.state is not HoldState.LOADED or name not in version.homes
            ):
                yield name

    def _obstacle(self, version: Version) -> str:
        """Why nothing of a version is shifted, or ""."""
        servable = self._world.servables[version.key[0]]
        if version.state is not State.AVAILABLE:
            return f"it is {version.state}"
        if version.idle or version.moves or version.shift is not None:
            return "it changes actors"
        if servable.config.transition == "shard-rolling":
            return "it gives way actor by actor (transition: shard-rolling)"
        if servable.config.placement == "messages":
            return "it is on as few actors as it may be (placement: messages)"
        if not is_to_stay(self._world, version):
            return "another version is to take its place"
        return "" if is_whole(version, self._world.fleet) else "a part of it is away"


def rebalance_status(world: World) -> dict[str, Any]:
    """Whether load is being made even, and what is on its way."""
    shifts = {
        version.life.name: shift_text(version.shift)
        for version in world.versions()
        if version.shift is not None
    }
    return {"wanted": world.rebalancing, "shifts": shifts}


def shift_text(shift: Shift) -> str:
    """What goes from where to where."""
    return f"{_parts_text(shift.parts)}: {shift.old} -> {shift.new}"


def _scaled(
    weights: Mapping[str, tuple[float, ...]] | None, sizes: Mapping[PieceKey, float]
) -> dict[PieceKey, float]:
    """What look-ups read in each part, so that it is as much together as their bytes."""
    found = {} if weights is None else {(n, i): weights[n][i] for n, i in sizes}
    total = sum(found.values())
    if not total:
        return dict(sizes)
    return {key: each * sum(sizes.values()) / total for key, each in found.items()}


def _label(key: tuple[str, int]) -> str:
    return f"{key[0]}:{key[1]}"


def _leg_text(leg: Leg) -> str:
    where = f"{_parts_text(leg.parts)}: {leg.old} -> {leg.new}"
    return f"{_label(leg.key)} {where}, {leg.nbytes:,} bytes"


def _parts_text(parts: Iterable[PieceKey]) -> str:
    by_unit: dict[str, list[str]] = {}
    for unit, index in parts:
        by_unit.setdefault(unit, []).append(str(index))
    return ", ".join(f"{unit}[{','.join(each)}]" for unit, each in by_unit.items())
