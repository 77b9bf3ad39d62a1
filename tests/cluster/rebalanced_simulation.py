"""A simulated cluster of more and fewer shard actors, which is made even each time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from batching.errors import Unavailable
from cluster.config import Config, Transition
from cluster.control import ControlCore, Load
from cluster.editing import take_edit
from cluster.edits import Rebalance, decode_edited, encode_edit
from cluster.settling import unbalanced
from cluster.signals import Declared
from shards.orders import HostedUnit
from tests.cluster.control_models import Key
from tests.cluster.control_simulation import PUSH_S, ROUTE_S, Simulation
from tests.cluster.interruptible import Interruptible
from tests.cluster.simulated_parts import DEADLINE_S, LEASE_S, NONE, Faults, Process, Router
from tests.cluster.test_control_simulation import check_rest

__all__ = ["CALM_S", "Interrupted", "Rebalanced"]

#: When nothing goes wrong any more.
CALM_S = 5 * PUSH_S
#: When most stories have come to rest: before the next version is saved.
_REST_S = 10 * PUSH_S - 5.0
#: When versions serve, and every actor has had its part from the beginning.
_BEGUN_S = 20.0


class Rebalanced(Simulation):
    """A simulated cluster with two to five shard actors, made even every few seconds.

    Args:
        seed: of everything that is random.
        faults: what goes wrong, until `calm`.
        transition: of the servables.
        every_s: how often there are to be more shard actors, or fewer.
    """

    def __init__(
        self,
        seed: int,
        faults: Faults,
        *,
        transition: Transition = "availability",
        every_s: float = 30.0,
    ) -> None:
        self.shards = 2
        #: orders to hold other parts of what an actor has
        self.changed = 0
        super().__init__(seed, faults, transition=transition)
        self._every(every_s, self._resize)
        self._every(7.0, self.rebalance)
        self.is_quiet = False  # what is shifted does not take turns with what is loaded

    def declaration(self) -> Config:
        """As of every simulation, with as many shard actors as there are to be now."""
        config = super().declaration()
        return replace(config, cluster=replace(config.cluster, shards=self.shards))

    def rebalance(self) -> None:
        """Somebody asks for it."""
        if self._deferred is None and self.core.config is not None:
            answer = take_edit(self.core, encode_edit(Rebalance()), self.feed)
            assert decode_edited(answer).code == "OK"

    def _resize(self) -> None:
        if self.now < CALM_S:
            self.shards = self.random.randint(2, 5)
            self.feed(Declared(config=self.declaration()))

    # What an actor does that is to hold other parts of what it has

    def _load(self, process: Process, effect: Load, core: ControlCore) -> None:
        key, units = (effect.order.servable, effect.order.version), effect.order.units
        if key in process.loading and process.loading[key] != units:
            process.waiting[key].append(lambda: self._order(effect, core))
        elif key in process.held and process.held[key] != units:
            if self._happens(self.faults.fail) or not process.has_room(key, units):
                self._answer(core, effect.done(Unavailable("not now")))
                return
            self._check_given(process, key, units)
            process.held[key] = units
            self.changed += 1
            self._answer(core, effect.done())
        else:
            super()._load(process, effect, core)

    def _check_given(self, process: Process, key: Key, units: Iterable[HostedUnit]) -> None:
        """Nobody that the controller must know of has a request that needs what goes."""
        left = {(unit.name, index) for unit in units for index in unit.partitions}
        gone = {
            (unit.name, index) for unit in process.held[key] for index in unit.partitions
        } - left
        on_its_way_s = self.faults.late_s + ROUTE_S
        for router in self.routers:
            if self.now < router.sent_at - on_its_way_s + LEASE_S + DEADLINE_S:
                self._check_needs_none(router, process, key, gone)

    def _check_needs_none(
        self, router: Router, process: Process, key: Key, gone: Iterable[tuple[str, int]]
    ) -> None:
        for epoch, until in router.pinned:
            served = epoch.servables.get(key[0], {}).get(key[1])
            if until <= self.now or served is None:
                continue
            for unit, index in gone:
                if process.name in served.placement[unit][index]:
                    at = epoch.endpoints[process.name]
                    assert not process.is_at(at), (process.name, key, unit, index, epoch.number)

    def _check_load(self, effect: Load) -> None:
        """An actor may be told of what it holds: a later reign does not know which parts it has."""

    def _check_answered(self, router: Router, epoch: object) -> None:
        """Every part is where a new request would ask for it."""
        assert router.epoch is not None
        super()._check_answered(router, router.epoch)
        for name, versions in router.epoch.servables.items():
            for number, served in versions.items():
                for unit, parts in served.placement.items():
                    for index, actors in enumerate(parts):
                        for actor in actors:
                            process = self.processes.get(actor)
                            if process and process.is_at(router.epoch.endpoints[actor]):
                                process.check_part((name, number), unit, index)

    # The end

    def end(self) -> None:
        """Tell the story to its end, and check that everything is where it should be."""
        self.run(until=CALM_S)
        self.calm()
        self.run(until=_REST_S)
        # A version that kills whoever loads it may have done so just now, for the last time.
        self.versions_max = 0
        self.run(until=self.now + 60.0)
        self.check_whole()

    def check_whole(self) -> None:
        """Every part is held once, by whom the epoch names; load is even; nothing is on its way."""
        check_rest(self)
        assert self.core.epoch is not None
        named: dict[tuple[str, Key], set[tuple[str, int]]] = {}
        for name, versions in self.core.epoch.servables.items():
            for number, served in versions.items():
                for unit, parts in served.placement.items():
                    for index, part in enumerate(parts):
                        assert len(part) == self.copies, (name, number, unit, parts)
                        for actor in part:
                            named.setdefault((actor, (name, number)), set()).add((unit, index))
        for process in self.processes.values():
            for key, units in process.held.items():
                hosted = {(u.name, i) for u in units for i in (u.partitions or (0,))}
                assert hosted == named[process.name, key], (process.name, key)
        status = self.core.status()
        assert set(status["actors"]) == set(self.processes)
        assert unbalanced(status) == ""
        found = self.core.balance()
        assert found["moves"] == [], found


class Interrupted(Interruptible, Rebalanced):
    """Two more shard actors, and something that comes between two steps of making load even.

    Args:
        what: that comes.
        steps: effects that are carried out before.
    """

    def __init__(self, what: str, steps: float) -> None:
        super().__init__(1, NONE, every_s=math.inf)
        self.complete = {name: [1] for name in self.complete}
        self.versions_max = 1
        self.run(until=_BEGUN_S)
        self.check_whole()
        self.interrupt_after(what, steps)
        self.shards = 4
        self.feed(Declared(config=self.declaration()))

    def _interrupt(self) -> None:
        match self._what:
            case "who gets parts dies":
                self._die_if_there("shard-2")
            case "who gives parts dies":
                self._die_if_there("shard-0")
            case "a node is lost":
                for process in list(self.processes.values()):
                    if process.node == "n0":
                        self._die(process.name, process.generation)
            case "a version is saved":
                self.versions_max = 2
                self.complete = {name: [1, 2] for name in self.complete}
            case "fewer actors are declared":
                self.shards = 3
                self.feed(Declared(config=self.declaration()))
            case _:
                raise AssertionError(self._what)

    def _die_if_there(self, name: str) -> None:
        if name in self.processes:
            self._die(name, self.processes[name].generation)
