"""A cluster in virtual time around the real controller core, with everything that can go wrong.

One heap of events keyed by (time, sequence), one seeded random source. Actors, routers and the
store are models of what the shells promise; messages to and from them come late, twice or never. An
operator, where there is one, labels, splits, loads and rolls back all the time. Actors die while
they load, the controller dies between any two of its effects, and a new one claims the next term,
on a machine whose clock shows something else; or it stands still for a while, and does not know.
What must always hold is checked against the models, which know the truth.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial

from batching.errors import (
    FailedPrecondition,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from cluster.config import Config, Transition
from cluster.control import (
    EPOCHS_PER_TERM,
    ActorLost,
    ActorUp,
    ControlCore,
    ControlSettings,
    Declared,
    Effect,
    EnsureActor,
    Event,
    ListStore,
    Load,
    Persist,
    Publish,
    ReadManifest,
    RouterLeased,
    StopActor,
    Tick,
    Unload,
)
from cluster.declared import claim
from cluster.epochs import Epoch
from cluster.signals import Rehearse
from tests.cluster.control_models import BAD, KILLER, MUTE, Key, Memory, model
from tests.cluster.control_operator import Operator
from tests.cluster.simulated_parts import (
    DEADLINE_S,
    LEASE_S,
    NONE,
    RECOVERY_S,
    SERVABLES,
    STALL_S,
    Faults,
    Process,
    Router,
    Timeline,
    check_named,
    check_parallel,
    declared,
)

__all__ = ["END_S", "ROUTE_S", "Simulation"]

#: How often a router takes a request and reports.
ROUTE_S = 0.7
#: How often a version is saved.
PUSH_S = 40.0
#: When a story ends: as long as can be after a version was saved, so that there was time for it.
END_S = 15 * PUSH_S - 1.0


class Simulation(Timeline):
    """One run.

    Args:
        seed: of everything that is random.
        faults: what goes wrong, until `calm`.
        operator: changes what is declared, until `calm`.
        transition: of the servables; with ``shard-rolling`` actors have no room for two versions.
        routers: how many.
    """

    def __init__(
        self,
        seed: int,
        faults: Faults,
        operator: Operator | None = None,
        *,
        transition: Transition = "availability",
        routers: int = 2,
    ) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.faults = faults
        self.operator = operator
        self.is_lossless = faults.lose == 0.0
        self.store = Memory()
        self.complete: dict[str, list[int]] = {name: [1] for name in SERVABLES}
        self.processes: dict[str, Process] = {}
        self.starting: set[str] = set()
        self.transition: Transition = transition
        #: versions that may load at once: so few that some wait
        self.parallel = 1 + seed % 2
        self.is_quiet = faults == NONE and operator is None and transition != "shard-rolling"
        self.capacity = 100 if transition == "shard-rolling" else 1000
        self.routers = [Router(f"r{number}") for number in range(routers)]
        self.refused = 0
        self.stalls = 0
        self._clock = 0.0
        self._deferred: list[Event] | None = None
        self.loads: list[tuple[str, int, Key]] = []
        self.rehearsed: set[Key] = set()
        self.served: set[str] = set()
        self.versions_max = 5
        self.published = 0
        self.reigns = 0
        self.deadline_ms = int(DEADLINE_S * 1000)
        self._generation = 0
        self._timer = 0
        self._arrival: dict[tuple[int, str], float] = {}
        self.core: ControlCore
        self._reign()
        for router in self.routers:
            self._every(ROUTE_S, partial(self._route, router))
        self._every(15.0, self._refresh)
        self._every(PUSH_S, self._push)
        self._died_at = -math.inf
        self._every(3.0, self._operate)
        self._every(25.0, self._stall)

    # Running

    def calm(self) -> None:
        """Nothing goes wrong any more, and an operator declares anew what had been given up."""
        self.faults = NONE
        self.operator = None
        self.deadline_ms += 1
        self.feed(Declared(config=self.declaration()))

    def declaration(self) -> Config:
        return declared(self.transition, self.copies, self.parallel, self.deadline_ms)

    @property
    def copies(self) -> int:  # of every part
        return 2 if self.transition == "shard-rolling" else 1

    def feed(self, event: Event) -> None:
        """The shell of the present reign: one event in, its effects out, unless it dies."""
        if self._deferred is not None:
            self._deferred.append(event)
            return
        core = self.core
        effects = core.handle(event, self.now + self._clock)
        core.check_invariants()
        again = core.handle(Tick(), self.now + self._clock)
        assert again == [], (event, again)
        for effect in effects:
            if self._happens(self.faults.usurp):
                self._reign()
                return
            self._carry_out(effect, core)
        at = core.next_wakeup()
        if at is not None and core is self.core:
            assert at > self.now + self._clock
            self._timer += 1
            timer = self._timer
            self._at(at - self._clock, lambda: self._wake(core, timer))

    def _wake(self, core: ControlCore, timer: int) -> None:
        # A shell has one timer; setting it anew forgets when it was to ring before.
        if timer == self._timer:
            self._tell(core, Tick())

    def _reign(self) -> None:
        self.reigns += 1
        self._clock = self.random.uniform(0.0, 2e4)
        state = claim(self.store, "c")
        self.core = ControlCore(
            state,
            ControlSettings(
                order_timeout_s=20.0, start_timeout_s=15.0, recovery_timeout_s=RECOVERY_S
            ),
        )
        core = self.core
        event = Tick() if state.config is not None else Declared(config=self.declaration())
        self._at(self.now + 0.5, lambda: self._tell(core, event))

    def _tell(self, core: ControlCore, event: Event) -> None:
        if core is self.core:
            self.feed(event)

    def _answer(self, core: ControlCore, event: Event) -> None:
        """An event on its way to a reign: late, twice or never."""
        for _ in range(1 + self._happens(self.faults.repeat)):
            if not self._happens(self.faults.lose):
                self._later(lambda: self._tell(core, event))

    # Effects

    def _carry_out(self, effect: Effect, core: ControlCore) -> None:
        match effect:
            case Persist():
                self.store.put_state("c", effect.term, effect.seq, effect.data)
            case Publish():
                self._check_epoch(effect.epoch)
                for router in self.routers:
                    self._give(router, effect.epoch)
            case EnsureActor():
                if not self._happens(self.faults.lose):
                    self._later(lambda: self._ensure(effect.name, core))
            case StopActor():
                self._later(lambda: self._die(effect.name, effect.generation))
            case ListStore():
                if self._happens(self.faults.fail):
                    self._answer(core, effect.failed(OSError("away")))
                else:
                    self._answer(core, effect.done(tuple(self.complete[effect.servable])))
            case ReadManifest():
                if self._happens(self.faults.fail):
                    self._answer(core, effect.failed(Unavailable("away")))
                else:
                    self._answer(core, effect.done(model((effect.servable, effect.version))))
            case Load() | Unload() | Rehearse():
                self._give_order(effect, core)

    def _give_order(self, effect: Load | Unload | Rehearse, core: ControlCore) -> None:
        if isinstance(effect, Load) and self.is_lossless:
            self._check_load(effect)
        if self._happens(self.faults.lose):
            return
        if isinstance(effect, Rehearse):
            self._later(lambda: self._rehearse(effect, core))
        else:
            self._in_turn(effect, core)

    def _ensure(self, name: str, core: ControlCore) -> None:
        process = self.processes.get(name)
        if process is not None:
            process.term = max(process.term, core.term)
            self._answer(core, ActorUp(report=process.report()))
        elif name not in self.starting:
            self.starting.add(name)
            self._later(lambda: self._start(name))

    def _start(self, name: str) -> None:
        self.starting.discard(name)
        if self._happens(self.faults.fail):
            self.feed(ActorLost(name=name, generation=0, reason="cannot start"))
            return
        self._generation += 1
        self.processes[name] = Process(
            name, self._generation, self.node_for(name), self.capacity, term=self.core.term
        )
        self.feed(ActorUp(report=self.processes[name].report()))

    def node_for(self, name: str) -> str:
        """Where the next process is started."""
        return f"n{self._generation % 2}"

    def _order(self, effect: Load | Unload, core: ControlCore) -> None:
        process = self.processes.get(effect.actor)
        if process is None or process.generation != effect.generation:
            self._answer(
                core, ActorLost(name=effect.actor, generation=effect.generation, reason="gone")
            )
        elif core.term < process.term:
            self._answer(core, effect.done(FailedPrecondition("a higher term was seen")))
        elif isinstance(effect, Load):
            process.term = core.term
            self._load(process, effect, core)
        else:
            process.term = core.term
            key = (effect.servable, effect.version)
            self._check_unload(process, key)
            process.held.pop(key, None)
            process.proven.discard(key)
            process.loading.pop(key, None)
            process.waiting.pop(key, None)
            self._answer(core, effect.done())

    def _load(self, process: Process, effect: Load, core: ControlCore) -> None:
        key = (effect.order.servable, effect.order.version)
        units = effect.order.units
        self.loads.append((process.name, process.generation, key))
        known = process.held.get(key) or process.loading.get(key)
        if known is not None and known != units:
            self._answer(core, effect.done(Unavailable("other parts of it are here")))
        elif key in process.held:
            self._answer(core, effect.done())
        elif key in process.loading:
            process.waiting[key].append(lambda: self._answer(core, effect.done()))
        elif key == BAD:
            self.spoil(effect, core)
        elif not process.has_room(key, units):
            self.refused += 1
            self._answer(core, effect.done(ResourceExhausted("no room")))
        elif self._happens(self.faults.fail):
            self._answer(core, effect.done(Unavailable("the cache is full")))
        else:
            process.loading[key] = units
            if self.is_quiet and self.reigns == 1 and self._died_at < 0:
                check_parallel(self.processes, self.parallel)
            process.waiting[key] = [lambda: self._answer(core, effect.done())]
            seconds = self.random.uniform(0.1, 6.0)
            self._at(self.now + seconds / 2, lambda: self._answer(core, effect.warming()))
            self._at(self.now + seconds, lambda: self._loaded(process, key))

    def spoil(self, effect: Load, core: ControlCore) -> None:
        """An order that no other try can mend."""
        self._answer(core, effect.done(InvalidArgument("shapes do not fit")))

    def _rehearse(self, effect: Rehearse, core: ControlCore) -> None:
        """A router replays over links to the very processes that it was told of."""
        manifest = effect.order.served.manifest
        key = (manifest.name, manifest.version)
        asked = [
            (self.processes.get(name), endpoint.generation)
            for name, endpoint in effect.order.endpoints.items()
        ]
        there = all(
            process is not None and process.generation == generation and key in process.held
            for process, generation in asked
        )
        if key == MUTE:
            self._answer(core, effect.done(Internal("warm-up request 1 of 3 failed")))
        elif not there or self._happens(self.faults.fail):
            self._answer(core, effect.done(Unavailable("an actor is away")))
        else:
            self.rehearsed.add(key)
            for process, _ in asked:
                assert process is not None
                process.proven.add(key)
            self._answer(core, effect.done())

    def _loaded(self, process: Process, key: Key) -> None:
        if self.processes.get(process.name) is not process or key not in process.loading:
            return
        if key == KILLER or self._happens(self.faults.die):
            self._die(process.name, process.generation)
            return
        process.held[key] = process.loading.pop(key)
        process.held_since[key] = self.now
        for answer in process.waiting.pop(key):
            answer()

    def _die(self, name: str, generation: int) -> None:
        process = self.processes.get(name)
        if process is not None and process.generation == generation:
            del self.processes[name]
            if process.held or process.loading:
                self._died_at = self.now
        event = ActorLost(name=name, generation=generation, reason="killed")
        for _ in range(1 + self._happens(self.faults.repeat)):
            self._later(lambda: self.feed(event))

    # What happens by itself

    def _route(self, router: Router) -> None:
        router.pinned = [(epoch, until) for epoch, until in router.pinned if until > self.now]
        if router.epoch is not None:
            self._check_answered(router, router.epoch)
            until = self.now + self.random.uniform(0, DEADLINE_S)
            router.pinned.append((router.epoch, until))
        oldest = min((epoch.number for epoch, _ in router.pinned), default=0)
        if not self._happens(self.faults.lose):
            router.sent_at = self.now
            self._later(lambda: self._lease(router, oldest))

    def _lease(self, router: Router, oldest: int) -> None:
        self.feed(RouterLeased(router=router.name, oldest_live_epoch=oldest))
        if self.core.epoch is not None and self._deferred is None:
            self._give(router, self.core.epoch)

    def _give(self, router: Router, epoch: Epoch) -> None:
        if not self._happens(self.faults.lose):
            self._later(lambda: self._switch(router, epoch))

    def _switch(self, router: Router, epoch: Epoch) -> None:
        if self._deferred is not None:
            # Nothing leaves a process that stands still, whatever it has done before.
            self._at(self.now + ROUTE_S, lambda: self._switch(router, epoch))
        elif router.epoch is None or epoch.number > router.epoch.number:
            router.epoch = epoch

    def _refresh(self) -> None:
        """Actors report again, the dead are noticed, and now and then one dies."""
        for process in list(self.processes.values()):
            if self._happens(self.faults.die):
                self._die(process.name, process.generation)
            else:
                self._answer(self.core, ActorUp(report=process.report()))
        for name, actor in self.core.status()["actors"].items():
            generation = actor["generation"]
            process_now = self.processes.get(name)
            if generation and (process_now is None or process_now.generation != generation):
                self.feed(ActorLost(name=name, generation=generation, reason="no answer"))

    def _push(self) -> None:
        """Someone saves a new version."""
        name = self.random.choice(SERVABLES)
        if len(self.complete[name]) < self.versions_max:
            self.complete[name].append(self.complete[name][-1] + 1)

    def _stall(self) -> None:
        """The controller's process stands still; its timer is the first to know that it did."""
        if self._deferred is None and self._happens(self.faults.stall):
            self.stalls += 1
            self._deferred = []
            self._at(self.now + self.random.uniform(1.0, STALL_S), self._go_on)

    def _go_on(self) -> None:
        waiting, self._deferred = self._deferred, None
        for event in [Tick(), *(waiting or ())]:
            self.feed(event)

    def _operate(self) -> None:
        if self._deferred is not None:
            return
        if self.operator is not None and self.core.config is not None:
            self.operator.operate(self.random, self.complete, self.core, self.feed)

    # What must always hold

    def _check_epoch(self, epoch: Epoch) -> None:
        """Numbers grow; whoever is named and lives holds exactly what it is named for."""
        assert epoch.number > self.published
        begins = epoch.number // EPOCHS_PER_TERM != self.published // EPOCHS_PER_TERM
        self.published = epoch.number
        self.served |= epoch.servables.keys()
        if self.operator is not None:
            assert self.core.config is not None
            lately = self.now < self._died_at + 60.0
            self.operator.check(epoch, self.core.config, died_lately=lately)
        for name, versions in epoch.servables.items():
            for number, served in versions.items():
                assert served.manifest.warmups is None or (name, number) in self.rehearsed
        check_named(epoch, self.processes, begins=begins)

    def _check_load(self, effect: Load) -> None:
        """Nobody is told to load what it holds, but for words that cross on their way.

        A new reign has heard an actor at its beginning, and may have waited for others since.
        """
        key = (effect.order.servable, effect.order.version)
        process = self.processes.get(effect.actor)
        if process is not None and process.generation == effect.generation and key in process.held:
            # The answer may have come while the controller stood still, even if that was long ago.
            lately_s = 3 * self.faults.late_s + RECOVERY_S + (STALL_S if self.stalls else 0.0)
            assert self.now - process.held_since[key] <= lately_s, (effect, key)

    def _check_answered(self, router: Router, epoch: Epoch) -> None:
        """Where no actor has died and nothing is lost, every request is answered."""
        if not self.is_lossless or self._died_at > 0 or self.transition == "resource":
            return
        router.check_answered(epoch, self.processes)

    def _check_unload(self, process: Process, key: Key) -> None:
        """Nobody that the controller must know of has a request that needs what goes."""
        # What was sent has been heard by now, but for what is on its way.
        on_its_way_s = self.faults.late_s + ROUTE_S
        for router in self.routers:
            if self.now >= router.sent_at - on_its_way_s + LEASE_S + DEADLINE_S:
                continue
            router.check_done_with(process, key, self.now)

    # Chance and time

    def _happens(self, probability: float) -> bool:
        return self.random.random() < probability

    def _later(self, action: Callable[[], None]) -> None:
        self._at(self.now + self.random.uniform(0.0, self.faults.late_s), action)

    def _in_turn(self, order: Load | Unload, core: ControlCore) -> None:
        """An order comes late, and never before an earlier one of its reign: as Ray has it."""
        way = (core.term, order.actor)
        at = max(self.now + self.random.uniform(0.0, self.faults.late_s), self._arrival.get(way, 0))
        self._arrival[way] = at
        self._at(at, lambda: self._order(order, core))
