"""A simulated cluster in which something comes between two steps of what is under way."""

from __future__ import annotations

import math

from cluster.control import ControlCore, Effect, ListStore
from tests.cluster.control_simulation import Simulation

__all__ = ["Interruptible"]


class Interruptible(Simulation):
    """A simulation that counts its steps: effects that are carried out.

    Attributes:
        made: steps since they are counted.
    """

    made = 0
    _left = math.inf
    _what = ""

    def interrupt_after(self, what: str, steps: float) -> None:
        """Count from now on, and have this come after so many; see `_interrupt`."""
        self._what, self.made, self._left = what, 0, steps

    def _carry_out(self, effect: Effect, core: ControlCore) -> None:
        if core is not self.core:
            return  # it has died
        if self._left == 0:
            self._left = math.inf
            if self._what == "the controller dies":
                self._reign()
                return
            self._at(self.now, self._interrupt)
        if not isinstance(effect, ListStore):  # which goes on for ever
            self._left -= 1
            self.made += 1
        super()._carry_out(effect, core)

    def _interrupt(self) -> None:
        """What comes, by its name."""
        raise NotImplementedError(self._what)
