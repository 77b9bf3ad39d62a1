"""Actors are made, heard and ended; a controller that was succeeded touches none of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from batching.errors import Unavailable
from cluster.crew import Crew
from cluster.declared import claim
from cluster.reign import Deeds, Reign, ReignOver
from cluster.signals import ActorLost, ActorUp, EnsureActor, Event, StopActor
from cluster.watching import SILENT_S, START_S
from shards.orders import ActorKind, Outcome, encode
from tests.cluster.control_fakes import report
from tests.cluster.control_models import Memory
from tests.cluster.routing_fakes import VirtualLoop, run_virtually


class Method:
    """A method of a handle, as Ray calls it."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.remote = call


class Actor:
    """A process under a name.

    Attributes:
        silent: it says nothing any more.
        term: the highest that it knows.
    """

    def __init__(self, ground: Ground, name: str, generation: int) -> None:
        self._ground = ground
        self.name = name
        self.generation = generation
        self.silent = False
        self.term = 0
        self.died = asyncio.get_running_loop().create_future()
        self.report = Method(self._report)
        self.watch = Method(self._watch)
        self.stop = Method(self._stop)

    async def _report(self) -> bytes:
        if self.silent:
            await self._death()
        return encode(report(self.name, self.generation))

    async def _watch(self) -> bytes:
        await asyncio.wait({self.died}, timeout=5.0)
        if self.died.done():
            raise ActorDiedError()
        return await self._report()

    async def _stop(self, term: int) -> bytes:
        if self.silent:
            await self._death()
        if term < self.term:
            return encode(Outcome(code="FAILED_PRECONDITION", message=f"term {self.term}"))
        self.end()
        raise ActorDiedError()

    async def _death(self) -> None:
        await asyncio.wait({self.died})
        raise ActorDiedError()

    def end(self) -> None:
        self._ground.actors.pop(self.name, None)
        if not self.died.done():
            self.died.set_result(None)


class Ground:
    """What Ray is to a crew: actors by name, shared by all controllers."""

    def __init__(self) -> None:
        self.actors: dict[str, Actor] = {}
        self.made = 0
        self.killed: list[int] = []

    def make(self, name: str, kind: ActorKind, node: str) -> Actor:
        if name not in self.actors:
            self.made += 1
            self.actors[name] = Actor(self, name, self.made)
        return self.actors[name]

    def kill(self, actor: Actor) -> None:
        self.killed.append(actor.generation)
        actor.end()


class Store(Memory):
    """Durable states that can be out of reach."""

    away = False

    def latest_state(self, cluster: str) -> tuple[int, int, bytes] | None:
        if self.away:
            raise Unavailable("the store is away")
        return super().latest_state(cluster)


class Controller:
    """One reign's crew, and what it was told."""

    def __init__(self, store: Memory, ground: Ground) -> None:
        self.events: list[Event] = []
        self.term = claim(store, "c").term

        async def inline(deed: Callable[[], Any]) -> Any:
            return deed()

        async def nodes() -> list[str]:
            return ["n1"]

        self.crew = Crew(
            self.term,
            Deeds(Reign(store, "c", self.term, lambda: 0.0), inline),
            nodes=nodes,
            make=ground.make,
            kill=ground.kill,
            feed=self.events.append,
        )

    def ensure(self, name: str = "shard-0") -> asyncio.Task[None]:
        return asyncio.ensure_future(self.crew.ensure(EnsureActor(name=name, kind="shard")))

    def generations(self, kind: type[ActorUp | ActorLost]) -> list[int]:
        """Of the actors that events of this kind were about, repetitions left out."""
        found = [
            event.generation if isinstance(event, ActorLost) else event.report.endpoint.generation
            for event in self.events
            if isinstance(event, kind) and isinstance(event, ActorLost | ActorUp)
        ]
        return list(dict.fromkeys(found))


def test_an_actor_is_heard_until_it_dies_and_then_lost() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        ground = Ground()
        controller = Controller(Store(), ground)
        ensured = controller.ensure()
        await asyncio.sleep(60.0)
        assert controller.generations(ActorUp) == [1]
        assert len(controller.events) > 5
        assert controller.crew.pid("shard-0") == 1
        ground.actors["shard-0"].end()
        await ensured
        assert controller.generations(ActorLost) == [1]
        assert (ground.killed, controller.crew.handle("shard-0")) == ([], None)

    run_virtually(scenario)


def test_who_is_silent_is_killed_before_it_is_called_lost() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        ground = Ground()
        controller = Controller(Store(), ground)
        ensured = controller.ensure()
        await asyncio.sleep(1.0)
        ground.actors["shard-0"].silent = True
        await ensured
        assert ground.killed == controller.generations(ActorLost) == [1]

    run_virtually(scenario)


def test_a_start_that_is_not_heard_is_killed_and_told() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        ground = Ground()
        ground.make("shard-0", "shard", "n1").silent = True
        controller = Controller(Store(), ground)
        await controller.ensure()
        assert loop.time() >= START_S
        assert ground.killed == [1]
        assert controller.generations(ActorLost) == [0]

    run_virtually(scenario)


def test_a_controller_that_was_succeeded_kills_nobody_that_seems_silent_to_it() -> None:
    """Two controllers over one store: the old one wakes, and believes that all are silent."""

    async def scenario(loop: VirtualLoop) -> None:
        store, ground = Store(), Ground()
        old = Controller(store, ground)
        ensured = old.ensure()
        await asyncio.sleep(1.0)
        new = Controller(store, ground)
        theirs = new.ensure()
        await asyncio.sleep(1.0)
        assert new.generations(ActorUp) == [1]
        ground.actors["shard-0"].silent = True
        with pytest.raises(ReignOver, match=r"term 1 .* is over: .* term 2"):
            await ensured
        assert (ground.killed, old.generations(ActorLost)) == ([], [])
        await theirs
        assert (ground.killed, new.generations(ActorLost)) == ([1], [1])

    run_virtually(scenario)


def test_a_controller_that_was_succeeded_makes_no_actor() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        store, ground = Store(), Ground()
        old = Controller(store, ground)
        Controller(store, ground)
        with pytest.raises(ReignOver):
            await old.ensure()
        assert (ground.made, old.events) == (0, [])

    run_virtually(scenario)


def test_a_controller_that_was_succeeded_stops_nobody() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        store, ground = Store(), Ground()
        old = Controller(store, ground)
        ensured = old.ensure()
        await asyncio.sleep(1.0)
        new = Controller(store, ground)
        # This actor has heard of the new reign, and refuses; the next is silent.
        actor = ground.actors["shard-0"]
        actor.term = new.term
        await old.crew.stop(StopActor(name="shard-0", generation=1))
        actor.silent = True
        with pytest.raises(ReignOver):
            await old.crew.stop(StopActor(name="shard-0", generation=1))
        assert ground.killed == []
        with pytest.raises(ReignOver):
            await ensured

    run_virtually(scenario)


def test_only_the_process_that_is_meant_is_stopped() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        ground = Ground()
        controller = Controller(Store(), ground)
        ensured = controller.ensure()
        await asyncio.sleep(1.0)
        await controller.crew.stop(StopActor(name="shard-0", generation=7))
        assert "shard-0" in ground.actors
        await controller.crew.stop(StopActor(name="shard-0", generation=1))
        assert "shard-0" not in ground.actors
        await ensured
        assert controller.generations(ActorLost) == [1]

    run_virtually(scenario)


def test_while_the_store_is_away_actors_are_made_and_none_is_killed() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        store, ground = Store(), Ground()
        controller = Controller(store, ground)
        store.away = True
        ensured = controller.ensure()
        await asyncio.sleep(1.0)
        assert controller.generations(ActorUp) == [1]
        ground.actors["shard-0"].silent = True
        await asyncio.sleep(10 * SILENT_S)
        assert (ground.killed, controller.generations(ActorLost)) == ([], [])
        store.away = False
        await ensured
        assert ground.killed == controller.generations(ActorLost) == [1]

    run_virtually(scenario)


def test_who_was_silent_while_the_store_was_away_and_speaks_again_stays() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        store, ground = Store(), Ground()
        controller = Controller(store, ground)
        ensured = controller.ensure()
        await asyncio.sleep(1.0)
        actor = ground.actors["shard-0"]
        store.away = actor.silent = True
        await asyncio.sleep(2 * SILENT_S)
        store.away = actor.silent = False
        await asyncio.sleep(10 * SILENT_S)
        assert (ground.killed, controller.generations(ActorLost)) == ([], [])
        ensured.cancel()

    run_virtually(scenario)


def test_a_look_that_took_long_is_repeated_before_the_deed() -> None:
    """The process stood still behind the look, for long enough to be succeeded."""
    store = Store()
    term = claim(store, "c").term
    times = iter([0.0, 30.0, 30.0, 30.1])
    reign = Reign(store, "c", term, lambda: next(times))
    assert reign.act(lambda: "done") == "done"
    assert next(times, None) is None, "it did not look twice"


def test_a_store_that_always_takes_long_says_nothing() -> None:
    store = Store()
    term = claim(store, "c").term
    now = iter(range(0, 1000, 2))
    reign = Reign(store, "c", term, lambda: float(next(now)))
    done: list[str] = []
    with pytest.raises(Unavailable, match="takes over 1 s"):
        reign.act(lambda: done.append("killed"))
    assert done == []
    reign.act(lambda: done.append("made"), blindly=True)
    assert done == ["made"]
