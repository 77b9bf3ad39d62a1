"""A controller that dies at any step of a change: the change is finished or undone, never half.

Every place between two effects of every kind of change is tried. Nothing else goes wrong, but what
the change itself brings: a version that cannot be loaded, or that answers no warm-up request.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import pytest

from cluster.config import Config, Transition, VersionPolicy
from cluster.control import ControlCore, Effect, ListStore, Load
from cluster.editing import take_edit
from cluster.edits import Edit, LoadVersion, RollBack, UnloadVersion, decode_edited, encode_edit
from cluster.epochs import Epoch
from tests.cluster.control_models import DELTA, MUTE
from tests.cluster.control_simulation import Simulation
from tests.cluster.simulated_parts import NONE, SERVABLES, Process, Router

BEGUN_S = 12.0
#: After a crash: what actors hold is heard, routers have moved on, and failures are tried again.
MADE_S = 24.0
#: A change in two halves waits for routers twice.
ROLLED_S = 60.0

#: versions, labels, and the versions of the split, of one servable in one epoch
Shown = tuple[tuple[int, ...], dict[str, int], tuple[int, ...]]


def only(version: int) -> Shown:
    """One version has everything."""
    return (version,), {"stable": version}, (version,)


NOTHING: Shown = (), {}, ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """One change of one servable.

    Attributes:
        edit: what makes it.
        shown: all that users may see, in order: before, perhaps something between, and after.
        error: why the new version is not there after all; "" where it is.
        name: the servable.
        serving: the versions that it begins with; those in the store are 1, 2 and what is loaded.
        labels: that it begins with.
        transition: how its versions change places.
        spoiled: an actor that can load nothing of version 2; "" for none.
        capacity: bytes of each actor; 0 for what the simulation has.
    """

    edit: Edit
    shown: tuple[Shown, ...]
    error: str = ""
    name: str = SERVABLES[0]
    serving: tuple[int, ...] = (1,)
    labels: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"stable": 1})
    transition: Transition = "availability"
    spoiled: str = ""
    capacity: int = 0


def replace(name: str = SERVABLES[0], version: int = 2) -> LoadVersion:
    """Load a version in the place of the one that serves, with the label and its requests."""
    return LoadVersion(servable=name, version=version, only=True, label="stable")


NAME = SERVABLES[0]
CHANGES = {
    "load": Change(edit=replace(), shown=(only(1), only(2))),
    "resource": Change(
        edit=replace(), shown=(only(1), NOTHING, only(2)), transition="resource"
    ),
    "shard-rolling": Change(
        edit=replace(), shown=(only(1), only(2)), transition="shard-rolling"
    ),
    "rollback": Change(
        edit=RollBack(servable=NAME), shown=(only(2), only(1)), serving=(2,), labels={"stable": 2}
    ),
    "rollback that rolls": Change(
        edit=RollBack(servable=NAME), shown=(only(2), only(1)), serving=(2,), labels={"stable": 2},
        transition="shard-rolling",
    ),
    "unload of a version": Change(
        edit=UnloadVersion(servable=NAME, version=2),
        shown=(((1, 2), {"stable": 1}, (1,)), only(1)), serving=(1, 2),
    ),
    "unload of a servable": Change(
        edit=UnloadVersion(servable=NAME), shown=(only(1), NOTHING)
    ),
    # Its base fits once: were the delta to bring one of its own, it could not be loaded.
    "delta": Change(
        edit=replace(DELTA), shown=(only(1), only(2)), name=DELTA, capacity=70
    ),
    "warm-up fails": Change(
        edit=replace(MUTE[0], MUTE[1]), shown=(only(1),), name=MUTE[0],
        error="INTERNAL: warm-up request 1 of 3 failed",
    ),
    "one actor fails": Change(
        edit=replace(), shown=(only(1),), spoiled="shard-1",
        error="INVALID_ARGUMENT: shard-1: shapes do not fit",
    ),
}  # fmt: skip


class Mortal(Simulation):
    """A simulation whose controller dies just before it carries out one effect of a change.

    Args:
        change: the change.
        steps: effects of it that are carried out before.
    """

    def __init__(self, change: Change, steps: float) -> None:
        self.change = change
        super().__init__(1, NONE, transition=change.transition)
        self.capacity = change.capacity or self.capacity
        self.versions_max = 0
        self.complete = {change.name: sorted({1, 2, *_wanted(change.edit)})}
        self.left = math.inf
        self.made = 0
        self.shown: list[Shown] = []
        self.run(until=BEGUN_S)
        self.left = steps
        self.made = 0
        del self.shown[:-1]
        self.refused = 0

    def declaration(self) -> Config:
        declared = super().declaration()
        found = dataclasses.replace(
            declared.servables[0],
            name=self.change.name,
            policy=VersionPolicy(specific=self.change.serving),
            labels=dict(self.change.labels),
            split=dict.fromkeys(self.change.labels, 1),
        )
        return dataclasses.replace(declared, servables=(found,))

    def make(self) -> None:
        """Begin the change."""
        request = encode_edit(self.change.edit)
        edited = decode_edited(take_edit(self.core, request, self.feed))
        assert edited.code == "OK", edited.message

    def _carry_out(self, effect: Effect, core: ControlCore) -> None:
        if core is not self.core:
            return  # it has died
        if self.left == 0:
            self.left = math.inf
            if self.interrupt():
                return
        if not isinstance(effect, ListStore):  # which goes on for ever
            self.left -= 1
            self.made += 1
        super()._carry_out(effect, core)

    def interrupt(self) -> bool:
        """What comes between two steps; returns whether the next one is lost with it."""
        self._reign()
        return True

    def _load(self, process: Process, effect: Load, core: ControlCore) -> None:
        if process.name == self.change.spoiled and effect.order.version == 2:
            self.spoil(effect, core)
        else:
            super()._load(process, effect, core)

    def _push(self) -> None:
        """Nobody saves anything meanwhile."""

    def _check_epoch(self, epoch: Epoch) -> None:
        super()._check_epoch(epoch)
        name = self.change.name
        shown = (
            tuple(sorted(epoch.servables.get(name, {}))),
            dict(epoch.labels.get(name, {})),
            tuple(sorted(share.version for share in epoch.splits.get(name, ()))),
        )
        if not self.shown or self.shown[-1] != shown:
            self.shown.append(shown)

    def _check_answered(self, router: Router, epoch: Epoch) -> None:
        if self.change.shown[-1] != NOTHING:
            super()._check_answered(router, epoch)

    def held(self) -> set[int]:
        """Versions of which any actor has anything."""
        return {
            version
            for process in self.processes.values()
            for _, version in (*process.held, *process.loading)
        }

    def why(self) -> str:
        """What the status says of the version that was to come."""
        (wanted,) = _wanted(self.change.edit)
        (row,) = (
            each
            for each in self.core.status()["servables"][self.change.name]["versions"]
            if each["version"] == wanted
        )
        return f"{row['error_code']}: {row['error_message']}"


def _wanted(edit: Edit) -> tuple[int, ...]:
    return (edit.version,) if isinstance(edit, LoadVersion) and edit.version else ()


def changed(change: Change, steps: float) -> Mortal:
    """The change as it ends, where the controller dies after so many steps."""
    simulation = Mortal(change, steps)
    assert simulation.shown == [change.shown[0]]
    simulation.make()
    rolls = change.transition == "shard-rolling"
    simulation.run(until=simulation.now + (ROLLED_S if rolls else MADE_S))
    return simulation


@pytest.mark.parametrize("kind", CHANGES)
def test_a_controller_that_dies_at_any_step_of_a_change_leaves_it_whole_or_undone(
    kind: str,
) -> None:
    change = CHANGES[kind]
    whole = changed(change, math.inf)
    assert whole.shown == list(change.shown)
    assert 3 < whole.made < 60
    for dies_after in range(whole.made):
        simulation = changed(change, dies_after)
        assert simulation.reigns == 2
        # What was not kept was not declared: the first step is to keep it.
        shown = list(change.shown) if dies_after else [change.shown[0]]
        assert simulation.shown == shown, dies_after
        assert simulation.held() == set(shown[-1][0]), dies_after
        assert all(router.epoch == simulation.core.epoch for router in simulation.routers)
        assert simulation.refused == 0, dies_after
        if change.error and dies_after:
            assert change.error in simulation.why(), dies_after
