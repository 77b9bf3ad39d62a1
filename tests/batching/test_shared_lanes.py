"""One lane of several servables: each keeps its deadlines and its share, whatever the others do."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from batching import Batcher, EffSafe, Ladder, LaneKey, Run, Ticket
from batching.simulation import Arrival, Report, SimulatedLane, simulate
from batching.workloads import merged, poisson

TRUNK = LaneKey("trunk")
VICTIMS = ("a", "b", "c")
SLO_S = 0.1


def cost(lane: LaneKey, rows: int) -> float:
    return (4 + rows / 4) / 1000


def flood(*, largest: int = 128) -> Report:
    """Three servables at 150 requests a second each, and a fourth at nearly twice what there is."""
    quiet = [poisson(TRUNK, name, 150, 3.0, budget_s=SLO_S) for name in VICTIMS]
    loud = poisson(TRUNK, "loud", 6000, 3.0, budget_s=SLO_S)
    ladder = Ladder(2**place for place in range(largest.bit_length()))
    lanes = [SimulatedLane(key=TRUNK, ladder=ladder)]
    return simulate(EffSafe(), lanes, merged(*quiet, loud), cost)


def test_a_flood_on_a_shared_trunk_takes_no_deadline_of_the_others() -> None:
    report = flood()
    for name in VICTIMS:
        assert report.owners[name].attainment >= 0.99, name
    loud = report.owners["loud"]
    assert loud.attainment < 0.6
    # What the others leave is used: of 3,555 rows a second that the largest batches would make.
    assert loud.good / report.seconds > 2500


def test_batches_of_one_users_size_serve_a_shared_trunk_worse_than_those_of_all_together() -> None:
    good = [sum(each.good for each in flood(largest=n).owners.values()) for n in (16, 128)]
    assert good[1] > 1.3 * good[0]


def shares(parts: Iterable[tuple[str, int]], ladder: Ladder) -> dict[str, float]:
    """What each owner was charged for one batch of these rows."""
    batcher = Batcher(EffSafe(), 1)
    batcher.add_lane(
        TRUNK, ladder, 1000, 1 << 30, {size: cost(TRUNK, size) for size in ladder.sizes}
    )
    tickets = [Ticket(TRUNK, rows, 1, 1000.0, owner=owner) for owner, rows in parts]
    for ticket in tickets:
        batcher.offer(ticket, 0.0)
    [run] = batcher.poll(0.0)
    assert isinstance(run, Run)
    batcher.complete(run.batch.id, 0.5)
    return {ticket.owner: batcher.shares.time_of(ticket.owner) for ticket in tickets}


def test_a_batch_of_several_users_is_charged_to_each_by_rows() -> None:
    charged = shares([("a", 12), ("b", 3), ("c", 1)], Ladder((1, 16)))
    assert charged == pytest.approx({"a": 0.5 * 12 / 16, "b": 0.5 * 3 / 16, "c": 0.5 / 16})


def test_arrivals_of_versions_of_one_servable_are_of_one_owner() -> None:
    # Two versions that share the trunk bring rows under the servable's name: one share, one line.
    arrivals = [Arrival(0.001 * number, TRUNK, "a", 1, SLO_S) for number in range(40)]
    report = simulate(EffSafe(), [SimulatedLane(key=TRUNK, ladder=Ladder((1, 32)))], arrivals, cost)
    assert report.owners.keys() == {"a"}
    assert report.owners["a"].good == 40
