"""A simulated cluster of which nodes are drained all the time, some by halves, and some lost."""

from __future__ import annotations

import math

from cluster.config import Transition
from cluster.control import ControlCore
from cluster.editing import take_edit
from cluster.edits import DrainNode, decode_edited, encode_edit
from cluster.signals import NodesSeen
from tests.cluster.control_simulation import END_S, PUSH_S, Simulation
from tests.cluster.interruptible import Interruptible
from tests.cluster.simulated_parts import NONE, Faults
from tests.cluster.test_control_simulation import check_rest

__all__ = ["CALM_S", "Drained", "Interrupted", "tell"]

#: When nothing goes wrong any more.
CALM_S = 5 * PUSH_S
#: When versions serve, nobody having been drained yet.
_BEGUN_S = 20.0
#: When most stories have come to rest: before the next version is saved.
_REST_S = 10 * PUSH_S - 5.0


class Drained(Simulation):
    """A simulated cluster of three nodes, of which all the time some other is drained.

    Args:
        seed: of everything that is random.
        faults: what goes wrong, until `calm`.
        transition: of the servables.
        every_s: how often another node is drained.
        undo: how likely a drain is undone soon, in the midst of its moves.
        lose: how likely a node is lost soon after that, the drained one or another.
    """

    def __init__(
        self,
        seed: int,
        faults: Faults,
        *,
        transition: Transition = "availability",
        every_s: float = 30.0,
        undo: float = 0.0,
        lose: float = 0.0,
    ) -> None:
        self.drains = 0
        self.undone = 0
        self.nodes = ["node-a", "node-b", "node-c"]
        self.lost: list[str] = []
        self._undo_likely, self._lose_likely = undo, lose
        #: what the operator wants, and is told again until it is so
        self._wanted: str | None = None
        super().__init__(seed, faults, transition=transition)
        self._every(every_s, self._drain)
        self._every(1.0, self._insist)
        self.is_quiet = False  # what is moved does not take turns with what is loaded

    def node_for(self, name: str) -> str:
        """Where the next process is started."""
        usable = sorted(set(self.nodes) - self.core.drained)
        return usable[self._generation % len(usable)]

    def calm(self) -> None:
        """As of every simulation; the node that is drained last stays so."""
        super().calm()
        self._undo_likely = self._lose_likely = 0.0
        if self._wanted is None:
            self._wanted = self.nodes[0]

    def _drain(self) -> None:
        if self.operator_is_done:
            return
        self._wanted = self.random.choice(self.nodes)
        self.drains += 1
        if self._happens(self._undo_likely):
            self._at(self.now + self.random.uniform(0.5, 12.0), self._change_mind)
        if self._happens(self._lose_likely):
            self._at(self.now + self.random.uniform(0.5, 12.0), self._lose_node)

    @property
    def operator_is_done(self) -> bool:
        """Whether no further node is to be drained."""
        return self.now >= CALM_S

    def _change_mind(self) -> None:
        if not self.operator_is_done:
            self._wanted = None
            self.undone += 1

    def _insist(self) -> None:
        """Say what is wanted until it is so: a controller may die before it has written it down."""
        if self._deferred is not None or self.core.config is None:
            return
        core = self.core
        self.feed(NodesSeen(memory_bytes=dict.fromkeys(self.nodes, 0)))
        edits = [DrainNode(node=node, undo=True) for node in sorted(core.drained - {self._wanted})]
        if self._wanted is not None and self._wanted not in core.drained:
            edits.append(DrainNode(node=self._wanted))
        for edit in edits:
            if core is not self.core or self._deferred is not None:
                return
            tell(self, core, edit)

    def _lose_node(self) -> None:
        """All that runs there ends at once; another machine comes in its place."""
        if self.operator_is_done:
            return
        self._lose(self.random.choice(self.nodes))

    def _lose(self, node: str) -> None:
        self.nodes[self.nodes.index(node)] = f"node-{len(self.lost):03}"
        self.lost.append(node)
        if self._wanted == node:
            self._wanted = None
        for process in list(self.processes.values()):
            if process.node == node:
                self._die(process.name, process.generation)

    def end(self) -> None:
        """Tell the story to its end, and check that everything is where it should be."""
        self.run(until=CALM_S)
        self.calm()
        self.run(until=END_S if self.transition == "shard-rolling" else _REST_S)
        # A version that kills whoever loads it may have done so just now, for the last time.
        self.versions_max = 0
        until = self.now + 30.0
        while any(each.loading for each in self.processes.values()) and self.now < until:
            self.run(until=self.now + 1.0)
        assert self.drains > 3
        assert self._wanted is not None
        self.check_whole()

    def check_whole(self) -> None:
        """Nothing is there twice that should be there once, no actor too many, none on the node."""
        check_rest(self)
        drained = self.core.drained
        assert drained == ({self._wanted} if self._wanted else set())
        assert not {process.node for process in self.processes.values()} & drained
        assert self.core.epoch is not None
        for name, versions in self.core.epoch.servables.items():
            for number, served in versions.items():
                for unit, parts in served.placement.items():
                    for part in parts:
                        assert len(part) == self.copies, (name, number, unit, parts)
        status = self.core.status()
        named = {
            actor
            for versions in self.core.epoch.servables.values()
            for served in versions.values()
            for parts in served.placement.values()
            for part in parts
            for actor in part
        }
        assert set(status["actors"]) == set(self.processes)
        # One that was lost while its node was drained may hold on, beside those that are declared.
        assert self.processes.keys() - named <= self.core._world.fleet.declared


class Interrupted(Interruptible, Drained):
    """A drain of one node, and something that comes between two of its steps.

    Args:
        what: that comes.
        steps: effects of the drain that are carried out before.
    """

    def __init__(self, what: str, steps: float, *, transition: Transition = "availability") -> None:
        super().__init__(1, NONE, transition=transition, every_s=math.inf)
        self.complete = {name: [1] for name in self.complete}
        self.versions_max = 1
        self.run(until=_BEGUN_S)
        self.check_whole()
        self.interrupt_after(what, steps)
        # Where something of everything is, a table's part as well as a unit of a device.
        self._wanted = self.processes["device-0"].node

    def _interrupt(self) -> None:
        drained = self._wanted
        others = [node for node in self.nodes if node != drained]
        match self._what:
            case "it is undone":
                self._wanted = None
            case "another node is drained instead":
                self._wanted = others[0]
            case "the node is lost":
                assert drained is not None
                self._lose(drained)
            case "another node is lost":
                self._lose(others[1])
            case _:
                raise AssertionError(self._what)


def tell(simulation: Simulation, core: ControlCore, change: DrainNode) -> None:
    """Drain a node or undo it, as somebody who knows which nodes there are."""
    code = decode_edited(take_edit(core, encode_edit(change), simulation.feed)).code
    assert code == "OK", code
