"""Parts of a version's tables on their way from one shard actor to another, as a value.

Unlike a move (`cluster.moving`), which puts an actor in the place of another, a shift takes some of
an actor's parts, and either actor may have other parts of the version before and after.

It is *open* while both are to hold the parts and requests go to the one that had them. Once the
other holds them the placement names it alone, and the first *gives* them back when no request can
be asking it; then the shift is over. One that cannot be made is turned round: who should have got
the parts gives back what it has of them. How it goes from one to the next: `cluster.shifting`.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

__all__ = ["Shift", "added", "is_open", "removed"]


class Shift(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Some parts that go from one actor to another.

    Attributes:
        old: the actor that had them, or in one that was turned round should have got them.
        new: the one that has them in the end.
        parts: local unit name and partition of each; at least one.
    """

    old: str
    new: str
    parts: tuple[tuple[str, int], ...]

    def turned(self) -> Shift:
        """The same the other way round."""
        return Shift(old=self.new, new=self.old, parts=self.parts)


#: As `cluster.placement.Copies`, by local unit name.
_Units = Mapping[str, tuple[tuple[str, ...], ...]]


def is_open(shift: Shift, units: _Units) -> bool:
    """Whether a placement has the parts on both actors."""
    unit, partition = shift.parts[0]
    return shift.old in units[unit][partition]


def added(shift: Shift, units: _Units) -> dict[str, tuple[tuple[str, ...], ...]]:
    """The placement with the parts on the one that gets them, too."""
    return {
        unit: tuple(
            (*part, shift.new) if (unit, index) in shift.parts else part
            for index, part in enumerate(parts)
        )
        for unit, parts in units.items()
    }


def removed(shift: Shift, actor: str, units: _Units) -> dict[str, tuple[tuple[str, ...], ...]]:
    """The placement without the parts on one of the two."""
    return {
        unit: tuple(
            tuple(each for each in part if each != actor) if (unit, index) in shift.parts else part
            for index, part in enumerate(parts)
        )
        for unit, parts in units.items()
    }
