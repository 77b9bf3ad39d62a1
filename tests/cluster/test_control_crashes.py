"""A controller that dies at any step of a change: the change is finished or undone, never half.

Every place between two effects of a change is tried. Nothing else goes wrong.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from cluster.config import Config, ServableConfig, VersionPolicy
from cluster.control import ControlCore, Effect, ListStore
from cluster.editing import take_edit
from cluster.edits import Edit, LoadVersion, decode_edited, encode_edit
from cluster.epochs import Epoch
from tests.cluster.control_simulation import Simulation
from tests.cluster.simulated_parts import NONE, SERVABLES

NAME = SERVABLES[0]
BEGUN_S = 12.0
MADE_S = 40.0

#: versions, labels, and the versions of the split, of one servable in one epoch
Shown = tuple[tuple[int, ...], dict[str, int], tuple[int, ...]]


class Mortal(Simulation):
    """A simulation whose controller dies just before it carries out one effect of a change.

    Args:
        steps: effects of the change that it carries out before.
    """

    def __init__(self, steps: float) -> None:
        super().__init__(1, NONE)
        self.versions_max = 0
        self.complete = {name: [1, 2] for name in SERVABLES}
        self.left = math.inf
        self.made = 0
        self.shown: list[Shown] = []
        self.run(until=BEGUN_S)
        self.left = steps
        self.made = 0
        del self.shown[:-1]

    def declaration(self) -> Config:
        declared = super().declaration()
        only = ServableConfig(
            name=NAME,
            policy=VersionPolicy(specific=(1,)),
            deadline_ms=self.deadline_ms,
            labels={"stable": 1},
            split={"stable": 1},
        )
        return dataclasses.replace(declared, servables=(only,))

    def make(self, edit: Edit) -> None:
        edited = decode_edited(take_edit(self.core, encode_edit(edit), self.feed))
        assert edited.code == "OK", edited.message

    def _carry_out(self, effect: Effect, core: ControlCore) -> None:
        if core is not self.core:
            return  # it has died
        if self.left == 0:
            self.left = math.inf
            self._reign()
            return
        if not isinstance(effect, ListStore):  # which goes on for ever
            self.left -= 1
            self.made += 1
        super()._carry_out(effect, core)

    def _check_epoch(self, epoch: Epoch) -> None:
        super()._check_epoch(epoch)
        shares = epoch.splits.get(NAME, ())
        shown = (
            tuple(sorted(epoch.servables.get(NAME, {}))),
            dict(epoch.labels.get(NAME, {})),
            tuple(share.version for share in shares),
        )
        if not self.shown or self.shown[-1] != shown:
            self.shown.append(shown)

    def held(self) -> set[Any]:
        """Versions of the servable of which any actor has anything."""
        return {
            key[1]
            for process in self.processes.values()
            for key in (*process.held, *process.loading)
            if key[0] == NAME
        }


BEFORE: Shown = ((1,), {"stable": 1}, (1,))
AFTER: Shown = ((2,), {"stable": 2}, (2,))


def changed(steps: float) -> Mortal:
    """A version is replaced, with its label and the split that goes by the label."""
    simulation = Mortal(steps)
    assert simulation.shown == [BEFORE]
    simulation.make(LoadVersion(servable=NAME, version=2, only=True, label="stable"))
    simulation.run(until=simulation.now + MADE_S)
    return simulation


def test_a_controller_that_dies_at_any_step_of_a_change_leaves_it_whole_or_undone() -> None:
    steps = changed(math.inf).made
    assert 10 < steps < 40
    undone = 0
    for dies_after in range(steps):
        simulation = changed(dies_after)
        assert simulation.reigns == 2
        # One epoch brought version, label and split; there was nothing in between.
        assert simulation.shown in ([BEFORE], [BEFORE, AFTER]), (dies_after, simulation.shown)
        end = simulation.shown[-1]
        assert simulation.held() == set(end[0]), dies_after
        assert all(router.epoch == simulation.core.epoch for router in simulation.routers)
        undone += end == BEFORE
    # What was not kept was not declared; everything that was is made.
    assert undone == 1
