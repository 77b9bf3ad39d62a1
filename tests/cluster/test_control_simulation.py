"""Whole stories in virtual time: whatever goes wrong, the cluster comes to rest as declared."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.cluster.control_models import BAD, KILLER, MUTE
from tests.cluster.control_operator import Operator
from tests.cluster.control_simulation import END_S, Simulation
from tests.cluster.simulated_parts import NONE, SERVABLES, Faults

STORMY = Faults()
USURPED = Faults(lose=0.0, repeat=0.0, fail=0.0, die=0.0, usurp=0.05, late_s=1.0)
DYING = Faults(lose=0.0, repeat=0.2, fail=0.0, die=0.15, usurp=0.0, late_s=1.0)
LOSSY = Faults(lose=0.2, repeat=0.2, fail=0.2, die=0.0, usurp=0.0, late_s=4.0)


def check_rest(simulation: Simulation) -> None:
    """What was declared is what is, and nothing else is left anywhere."""
    core = simulation.core
    status = core.status()
    assert core.epoch is not None
    expected: dict[str, int] = {}
    for name in SERVABLES:
        good = [v for v in simulation.complete[name] if (name, v) not in (BAD, KILLER, MUTE)]
        latest = simulation.complete[name][-1]
        expected[name] = max(good)
        served = core.epoch.servables.get(name, {})
        if latest == expected[name]:
            assert list(served) == [latest], (name, status["servables"][name])
        else:
            # The newest cannot be loaded: some older one serves, if there was time for any, and
            # the newest says why.
            assert served or name not in simulation.served, (name, status["servables"][name])
            newest = next(v for v in status["servables"][name]["versions"] if v["aspired"])
            assert (newest["version"], newest["state"]) == (latest, "END")
            assert newest["error_code"] != "OK"
        for version in served.values():
            assert all(part for parts in version.placement.values() for part in parts)
    for process in simulation.processes.values():
        named = {
            (name, number)
            for name, versions in core.epoch.servables.items()
            for number, served_by in versions.items()
            if any(process.name in part for parts in served_by.placement.values() for part in parts)
        }
        assert set(process.held) == named, process.name
        assert not process.loading, process.name
    assert all(router.epoch == core.epoch for router in simulation.routers)
    assert not status["recovering"]


@pytest.mark.parametrize("seed", range(6))
def test_a_storm_ends_in_rest(seed: int) -> None:
    """Messages lost, late and repeated; actors and controllers die, at any step."""
    simulation = Simulation(seed, STORMY)
    simulation.run(until=300.0)
    simulation.calm()
    simulation.run(until=END_S)
    check_rest(simulation)


@pytest.mark.parametrize("faults", [USURPED, DYING, LOSSY], ids=["usurped", "dying", "lossy"])
@pytest.mark.parametrize("seed", range(2))
def test_one_kind_of_trouble_at_a_time(seed: int, faults: Faults) -> None:
    simulation = Simulation(1000 + seed, faults)
    simulation.run(until=300.0)
    simulation.calm()
    simulation.run(until=END_S)
    check_rest(simulation)


@pytest.mark.parametrize("faults", [STORMY, USURPED, LOSSY], ids=["storm", "usurped", "lossy"])
def test_an_operator_who_changes_everything_meanwhile(faults: Faults) -> None:
    """Labels never name what is not served, and never disappear while no actor dies."""
    operator = Operator()
    simulation = Simulation(3000, faults, operator)
    simulation.run(until=200.0)
    made = operator.edits
    done = sum(count for what, count in made.items() if what.endswith(" OK"))
    assert done > 20, made
    assert made.total() - done > 5, made
    simulation.calm()
    simulation.run(until=395.0)  # the next version would be saved at 400
    check_rest(simulation)
    assert simulation.core.epoch is not None
    assert simulation.core.epoch.labels == {}


def test_controllers_that_die_and_nothing_else_disturb_nothing() -> None:
    """However many reigns there are, what actors hold is adopted, and goes on serving."""
    reigns = 0
    for seed in range(3):
        simulation = Simulation(2000 + seed, NONE)
        simulation.versions_max = 1
        simulation.run(until=30.0)
        before = {process.name: dict(process.held) for process in simulation.processes.values()}
        loads = len(simulation.loads)
        assert loads == sum(len(held) for held in before.values()) > 0
        simulation.faults = USURPED
        simulation.run(until=150.0)
        simulation.faults = NONE
        simulation.run(until=200.0)
        reigns += simulation.reigns
        after = {process.name: dict(process.held) for process in simulation.processes.values()}
        assert after == before
        assert len(simulation.loads) == loads
        check_rest(simulation)
    assert reigns > 5, "the controllers did not die"


def test_the_same_seed_is_the_same_story() -> None:
    stories: list[tuple[int, int, list[tuple[str, int, tuple[str, int]]]]] = []
    for _ in range(2):
        simulation = Simulation(7, STORMY)
        simulation.run(until=120.0)
        stories.append((simulation.published, simulation.reigns, simulation.loads))
    assert stories[0] == stories[1]


def test_without_trouble_there_is_one_reign_and_each_part_is_loaded_once() -> None:
    simulation = Simulation(1, NONE)
    simulation.run(until=30.0)
    assert simulation.reigns == 1
    assert set(Counter(simulation.loads).values()) == {1}
    check_rest(simulation)
