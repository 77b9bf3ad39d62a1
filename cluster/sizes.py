"""What units of devices take, as their actors have measured it: more is known than manifests tell.

A manifest does not know what a step allocates for itself; who has compiled its program does. So the
promise that was made for a unit becomes what it takes once it is open, and the next unit with the
same programs, such as the next version's, is expected to take as much from the beginning.

Decides what a report teaches. Does not know placements, capacities or time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Final

from cluster.pieces import PieceKey, Programs, programs_of
from shards.manifest import MapUnit
from shards.needs import parameter_bytes
from shards.orders import ActorReport

__all__ = ["Measured", "measured"]

#: Programs that are remembered; the one that was seen longest ago is forgotten first.
_PROGRAMS_MAX: Final = 4096


class Measured:
    """What steps of units allocate."""

    def __init__(self) -> None:
        self._steps: OrderedDict[Programs, int] = OrderedDict()

    @property
    def steps(self) -> Mapping[Programs, int]:
        """Bytes by what a unit computes."""
        return self._steps

    def take(self, report: ActorReport, units: Iterable[MapUnit]) -> None:
        """Learn from a report of a device.

        Args:
            report: what it said.
            units: that may be open there.
        """
        if report.kind != "device":
            return
        states = {state.id: state for state in report.units}
        for unit in units:
            state = states.get(unit.id)
            # Larger batches are those of servables together: this version may come to be alone.
            if state is None or state.batch_max > unit.batch_buckets[-1]:
                continue
            key = programs_of(unit)
            self._steps[key] = max(state.nbytes - parameter_bytes(unit), 0)
            self._steps.move_to_end(key)
            if len(self._steps) > _PROGRAMS_MAX:
                self._steps.popitem(last=False)


def measured(pieces: Mapping[PieceKey, int], report: ActorReport | None) -> dict[PieceKey, int]:
    """What is promised on an actor, with what is open there at the size that it has.

    Of other kinds of actors manifests tell the sizes exactly.
    """
    found = dict(pieces)
    if report is not None and report.kind == "device":
        for state in report.units:
            if (state.id, 0) in found:
                found[state.id, 0] = state.nbytes
    return found
