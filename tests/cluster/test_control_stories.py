"""Stories in virtual time for every way in which versions change places; `make stories` tells many.

Beside what every simulated story checks: while no actor dies, a request is always answered, and an
actor with room for one version is never told to load two.
"""

from __future__ import annotations

import os

import pytest

from cluster.config import Transition
from tests.cluster.control_operator import Operator
from tests.cluster.control_simulation import END_S, Simulation
from tests.cluster.simulated_parts import NONE, Faults
from tests.cluster.test_control_simulation import DYING, LOSSY, STORMY, USURPED, check_rest

STALLED = Faults(lose=0.0, repeat=0.1, fail=0.0, die=0.0, usurp=0.0, stall=0.3, late_s=0.5)
KINDS = {
    "storm": STORMY,
    "usurped": USURPED,
    "dying": DYING,
    "lossy": LOSSY,
    "stalled": STALLED,
    "none": NONE,
}
TRANSITIONS: tuple[Transition, ...] = ("shard-rolling", "resource", "availability")
SEEDS = int(os.environ.get("STORIES", "0"))
#: Without many seeds, one story of each of these.
FEW: list[tuple[Transition, str, int]] = [
    ("shard-rolling", "storm", 32),
    ("shard-rolling", "usurped", 0),
    ("resource", "storm", 0),
]
MANY = [(each, kind, seed) for each in TRANSITIONS for kind in KINDS for seed in range(SEEDS)]


@pytest.mark.parametrize(("transition", "kind", "seed"), MANY or FEW)
def test_a_story_ends_in_rest(transition: Transition, kind: str, seed: int) -> None:
    simulation = Simulation(seed, KINDS[kind], transition=transition, routers=1 + seed % 3)
    if transition == "resource":
        # Versions that cannot be loaded take the old one with them, which unloads first.
        simulation.versions_max = 2
    simulation.run(until=200.0)
    simulation.calm()
    simulation.run(until=END_S)
    check_rest(simulation)


if SEEDS:

    @pytest.mark.parametrize(("kind", "seed"), [(k, s) for k in KINDS for s in range(SEEDS)])
    def test_a_story_with_an_operator_ends_in_rest(kind: str, seed: int) -> None:
        simulation = Simulation(
            seed, KINDS[kind], Operator(), transition="shard-rolling", routers=3
        )
        simulation.run(until=200.0)
        simulation.calm()
        simulation.run(until=END_S)
        check_rest(simulation)


def test_versions_without_room_for_two_change_places_and_every_request_is_answered() -> None:
    simulation = Simulation(3, NONE, transition="shard-rolling")
    simulation.versions_max = 2
    simulation.run(until=150.0)
    check_rest(simulation)
    assert [versions[-1] for versions in simulation.complete.values()] == [2, 2]
    assert simulation.refused == 0
    assert all(router.answering == set(simulation.complete) for router in simulation.routers)
