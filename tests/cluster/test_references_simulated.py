"""Parents and what they refer to in stories of chance: labels move, actors and controllers die.

A small world around the real controller core, in which orders are answered late and in any order,
loads fail, and routers stay behind. Whatever happens: an epoch has all who refer to a label with
the version that the label is on, no actor is told to let go of what a router that holds an old
epoch may still ask for, and when it is calm everything is as declared.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable

import pytest

from batching.errors import Unavailable
from cluster.config import Config, ServableConfig, VersionPolicy
from cluster.control import Declared, Effect, Load, Publish, ReadManifest, Unload
from cluster.epochs import Epoch
from shards.manifest import Manifest
from tests.cluster.control_fakes import Shell, config, of
from tests.cluster.test_references import encoder, ranker, to

PARENTS = ("a", "b", "through", "pinned")
MODELS: dict[tuple[str, int], Manifest] = {
    **{("encoder", version): encoder(version) for version in (1, 2, 3)},
    # What nobody who refers to it can use.
    ("encoder", 4): encoder(4, width=8),
    **{("a", version): ranker(to(label="stable"), version, "a") for version in (1, 2)},
    ("b", 1): ranker(to(label="stable"), name="b"),
    ("through", 1): ranker(to("b", version=1), name="through"),
    ("pinned", 1): ranker(to(version=1), name="pinned"),
}
ROUTERS = ("r0", "r1")
LISTED = {"encoder": (1, 2, 3, 4), "a": (1, 2), "b": (1,), "through": (1,), "pinned": (1,)}


def declared(label: int, parents: Iterable[str]) -> Config:
    names = [("encoder", {"stable": label}), *((name, {}) for name in parents)]
    servables = tuple(
        ServableConfig(name=name, policy=VersionPolicy(latest=1), labels=labels)
        for name, labels in names
    )
    return dataclasses.replace(config(), servables=servables)


class Story:
    """One run; see `step`."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.shell = Shell()
        self.due: list[Effect] = []
        self.pinned = dict.fromkeys(ROUTERS, 0)
        self.epochs: dict[int, Epoch] = {}
        self.generations = {"device-0": 1, "shard-0": 1}
        self.label, self.parents = 1, set(PARENTS)
        self.terms = 1
        self.held: set[tuple[str, int]] = set()
        self.moves = 0
        self.bound: set[str] = set()
        self.is_calm = False
        self.take(self.shell.send(Declared(config=declared(1, PARENTS))))
        for name in self.generations:
            self.take(self.shell.up(name))
        self.list_all()

    def list_all(self) -> None:
        for name, versions in LISTED.items():
            self.take(self.shell.listed(name, *versions))

    def take(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Publish):
                self.check(effect.epoch)
            elif isinstance(effect, Load | Unload | ReadManifest):
                if isinstance(effect, Unload):
                    self.check_unload(effect)
                self.due.append(effect)

    def check(self, epoch: Epoch) -> None:
        self.epochs[epoch.number] = epoch
        stable = epoch.labels.get("encoder", {}).get("stable")
        seen: set[str] = set()
        for name, versions in epoch.servables.items():
            for served in versions.values():
                trunk = served.manifest.units["trunk"].id
                assert not served.manifest.references
                assert served.placement.keys() == served.manifest.units.keys()
                if name == "pinned":
                    assert trunk == "encoder-1-trunk"
                elif name != "encoder":
                    seen.add(trunk)
        assert len(seen) <= 1, seen
        if seen and stable is not None:
            assert seen == {f"encoder-{stable}-trunk"}
        self.moves += bool(seen) and seen != self.bound and bool(self.bound)
        self.bound = seen or self.bound

    def check_unload(self, unload: Unload) -> None:
        """No router that is heard has an epoch in which somebody needs it."""
        gone = f"{unload.servable}-{unload.version}-"
        for number in self.pinned.values():
            epoch = self.epochs.get(number)
            endpoint = None if epoch is None else epoch.endpoints.get(unload.actor)
            if epoch is None or endpoint is None or endpoint.generation != unload.generation:
                continue
            for versions in epoch.servables.values():
                for served in versions.values():
                    for name, parts in served.placement.items():
                        if any(unload.actor in part for part in parts):
                            assert not served.manifest.units[name].id.startswith(gone), unload

    def answer(self, effect: Effect) -> None:
        if isinstance(effect, ReadManifest):
            self.take(self.shell.send(effect.done(MODELS[effect.servable, effect.version])))
            return
        assert isinstance(effect, Load | Unload)
        if self.generations[effect.actor] != effect.generation:
            return
        if isinstance(effect, Unload):
            self.held.discard((effect.servable, effect.version))
        elif not self.is_calm and self.chance.random() < 0.05:
            self.take(self.shell.send(effect.done(Unavailable("the cache is full"))))
            return
        else:
            self.held.add((effect.order.servable, effect.order.version))
        self.take(self.shell.send(effect.done()))

    def step(self) -> None:
        """One thing that happens."""
        dice = self.chance.random()
        if self.due and dice < 0.5:
            # Words to one actor come in their order.
            self.answer(self.due.pop(0))
        elif dice < 0.75:
            self.lease(self.chance.choice(ROUTERS))
        elif dice < 0.85:
            # Routers are heard, however old the epoch is that they still have requests of.
            for router, number in self.pinned.items():
                self.take(self.shell.router(router, epoch=number))
            self.take(self.shell.sleep(self.chance.uniform(0.1, 3.0)))
        elif dice < 0.92:
            self.label = self.chance.choice((1, 2, 3, 4))
            self.declare()
        elif dice < 0.97:
            self.parents ^= {self.chance.choice(PARENTS)}
            self.declare()
        elif dice < 0.985:
            self.die()
        else:
            self.reign()

    def declare(self) -> None:
        self.take(self.shell.send(Declared(config=declared(self.label, sorted(self.parents)))))
        self.list_all()

    def lease(self, router: str) -> None:
        """A router reports the epoch that it has, and then takes the latest."""
        if self.shell.core.epoch is not None:
            self.take(self.shell.router(router, epoch=self.pinned[router]))
            self.pinned[router] = self.shell.epoch.number

    def die(self) -> None:
        self.take(self.shell.lost("device-0", self.generations["device-0"]))
        self.generations["device-0"] += 1
        self.held.clear()
        self.take(self.shell.up("device-0", generation=self.generations["device-0"]))

    def reign(self) -> None:
        """Another controller, which hears what actors hold; orders that were under way are done."""
        waiting, self.due = self.due, []
        for effect in waiting:
            if isinstance(effect, Load) and effect.generation == self.generations[effect.actor]:
                self.held.add((effect.order.servable, effect.order.version))
            elif isinstance(effect, Unload):
                self.held.discard((effect.servable, effect.version))
        self.terms += 1
        state = dataclasses.replace(self.shell.core._to_keep(), term=self.terms, seq=0)
        now = self.shell.now
        self.shell = Shell(state)
        self.shell.now = now
        self.take(self.shell.send())
        for name, generation in self.generations.items():
            held = self.held if name == "device-0" else ()
            self.take(self.shell.up_holding(name, *sorted(held), generation=generation))
        self.list_all()

    def rest(self) -> None:
        """Nothing goes wrong any more."""
        self.is_calm = True
        self.label, self.parents = 2, set(PARENTS)
        self.declare()
        for _ in range(200):
            while self.due:
                self.answer(self.due.pop(0))
            for router in ROUTERS:
                self.lease(router)
            self.take(self.shell.sleep(2.0))


@pytest.mark.parametrize("seed", range(5))
def test_whatever_happens_parents_stay_together_and_come_to_rest_as_declared(seed: int) -> None:
    story = Story(seed)
    for _ in range(250):
        story.step()
    story.rest()
    served = {name: sorted(found) for name, found in story.shell.epoch.servables.items()}
    assert served == {"encoder": [1, 2, 4], "a": [2], "b": [1], "through": [1], "pinned": [1]}
    assert story.shell.epoch.labels == {"encoder": {"stable": 2}}
    for versions in story.shell.epoch.servables.values():
        for each in versions.values():
            assert all(part for parts in each.placement.values() for part in parts)
    assert story.held == {(name, n) for name, numbers in served.items() for n in numbers}
    assert of(Publish, story.shell.effects)


def test_the_stories_move_labels_under_parents() -> None:
    moves = 0
    for seed in range(100, 102):
        story = Story(seed)
        for _ in range(250):
            story.step()
        moves += story.moves
    assert moves > 1
