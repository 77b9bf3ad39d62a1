"""A change that is itself changed at any step: what is declared last is what comes of it.

Actors have room for one version, so versions that are placed where others give way are loaded
nowhere else. Nobody may be told to load what has no room, and but for ``resource`` every request is
answered at any time, which `tests.cluster.control_simulation` sees to.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import pytest

from cluster.config import Config
from cluster.control import ControlCore, Declared, Effect
from cluster.editing import take_edit
from cluster.edits import Edit, SetSplit, decode_edited, encode_edit
from cluster.epochs import Epoch
from tests.cluster.test_control_crashes import (
    NOTHING,
    ROLLED_S,
    Change,
    Mortal,
    Shown,
    only,
    replace,
)

#: Bytes of an actor: a version takes 40 of a device and 50 of a shard actor.
ROOM = 60

TO_AVAILABILITY: Mapping[str, Any] = {"transition": "availability"}
TO_RESOURCE: Mapping[str, Any] = {"transition": "resource"}
TO_ROLLING: Mapping[str, Any] = {"transition": "shard-rolling"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """What is declared in the midst of a change.

    Attributes:
        change: from version 1 to version 2.
        to: what is declared then: keys of the servable, or an edit.
        ends: what users may see in the end.
        sees: what else they may see before.
    """

    change: Change
    to: Mapping[str, Any] | Edit
    ends: tuple[Shown, ...] = (only(2),)
    sees: tuple[Shown, ...] = ()


ROLLING = Change(
    edit=replace(), shown=(only(1), only(2)), transition="shard-rolling", capacity=ROOM
)
RESOURCE = Change(
    edit=replace(), shown=(only(1), NOTHING, only(2)), transition="resource", capacity=ROOM
)
BESIDE = Change(edit=replace(), shown=(only(1), only(2)))

TURNS = {
    # Where version 2 does not serve yet it finds no room beside version 1.
    "rolling to availability": Turn(
        change=ROLLING, to=TO_AVAILABILITY, ends=(only(1), only(2))
    ),
    "rolling to resource": Turn(change=ROLLING, to=TO_RESOURCE, sees=(NOTHING,)),
    "resource to rolling": Turn(change=RESOURCE, to=TO_ROLLING, sees=(NOTHING,)),
    "resource to availability": Turn(change=RESOURCE, to=TO_AVAILABILITY, sees=(NOTHING,)),
    "availability to rolling": Turn(change=BESIDE, to=TO_ROLLING),
    "availability to resource": Turn(change=BESIDE, to=TO_RESOURCE, sees=(NOTHING,)),
    "fewer replicas": Turn(change=ROLLING, to={"replicas": 1}),
    "without a split": Turn(
        change=ROLLING,
        to=SetSplit(servable=ROLLING.name, weights={}),
        ends=(((2,), {"stable": 2}, ()),),
        sees=(((1,), {"stable": 1}, ()),),
    ),
    "rolled back": Turn(change=ROLLING, to=replace(version=1), ends=(only(1),)),
    "another version": Turn(change=ROLLING, to=replace(version=4), ends=(only(4),)),
}  # fmt: skip


SEEDS = int(os.environ.get("STORIES", "0"))
#: Without many stories these, at some of their steps.
FEW = ("rolling to availability", "rolling to resource", "resource to rolling")
EVERY = 1 if SEEDS else 5


class Turned(Mortal):
    """A simulation in which something else is declared after so many steps of a change.

    Args:
        turn: what.
        steps: effects of the change that are carried out before.
    """

    def __init__(self, turn: Turn, steps: int) -> None:
        self.turn = turn
        self.instants: dict[float, int] = {}
        super().__init__(turn.change, steps)
        self.instants.clear()
        self.complete[turn.change.name] = [1, 2, 4]

    @property
    def copies(self) -> int:
        return 2

    def interrupt(self) -> bool:
        self._at(self.now, self.declare)
        return False

    def declare(self) -> None:
        """Declare what is to be instead, once everything of this instant is carried out."""
        to = self.turn.to
        if isinstance(to, Mapping):
            self.feed(Declared(config=self._declared(to)))
        else:
            edited = decode_edited(take_edit(self.core, encode_edit(to), self.feed))
            assert edited.code == "OK", edited.message

    def _declared(self, keys: Mapping[str, Any]) -> Config:
        config = self.core.config
        assert config is not None
        (servable,) = config.servables
        return dataclasses.replace(config, servables=(dataclasses.replace(servable, **keys),))

    def roll(self) -> None:
        """Let versions change places actor by actor from now on."""
        self.feed(Declared(config=self._declared(TO_ROLLING)))

    def _carry_out(self, effect: Effect, core: ControlCore) -> None:
        super()._carry_out(effect, core)
        self.instants.setdefault(self.now, self.made)

    def _check_epoch(self, epoch: Epoch) -> None:
        super()._check_epoch(epoch)
        transition = (self.core.config or self.declaration()).servables[0].transition
        if transition == "resource":
            self.transition = transition


def turned(turn: Turn, steps: int) -> Turned:
    """The change as it ends, where something else is declared after so many steps."""
    simulation = Turned(turn, steps)
    assert simulation.shown == [turn.change.shown[0]]
    simulation.make()
    # Two changes may follow each other, and each takes its time.
    simulation.run(until=simulation.now + 2 * ROLLED_S)
    return simulation


@pytest.mark.parametrize("kind", TURNS if SEEDS else FEW)
def test_what_is_declared_in_the_midst_of_a_change_is_what_comes_of_it(kind: str) -> None:
    turn = TURNS[kind]
    whole = turned(turn, 10**9)
    assert whole.shown == list(turn.change.shown)
    ends: list[Shown] = []
    for steps in list(whole.instants.values())[2::EVERY]:
        simulation = turned(turn, steps)
        end = simulation.shown[-1]
        ends.append(end)
        assert end in turn.ends, (steps, simulation.shown)
        may_be_seen = (*turn.change.shown, *turn.sees, *turn.ends)
        assert all(shown in may_be_seen for shown in simulation.shown), (steps, simulation.shown)
        assert simulation.held() == set(end[0]), steps
        assert all(router.epoch == simulation.core.epoch for router in simulation.routers)
        assert simulation.refused == 0, steps
        if end == only(1) and kind == "rolling to availability":
            assert "RESOURCE_EXHAUSTED" in simulation.why()
            simulation.roll()
            simulation.run(until=simulation.now + ROLLED_S)
            assert simulation.shown[-1] == only(2), steps
    assert len(ends) > 2
    assert all(end in ends for end in turn.ends)
