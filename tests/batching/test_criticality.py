"""What rows of different criticality, and owners of different allowances, do to one another."""

from __future__ import annotations

from math import inf

import pytest

from batching import EffSafe, LaneFull, LaneKey, TicketState, TicketTooLarge
from batching.allowance import BEST_EFFORT, CRITICAL, CRITICALITIES, DEFAULT, SHEDDABLE, Allowance
from batching.errors import InvalidArgument
from tests.batching.scene import TICK, Scene

# In which order


def test_the_more_critical_leave_first() -> None:
    scene = Scene(sizes=(1,), credits=1)
    for label, priority in (("d", DEFAULT), ("s", SHEDDABLE), ("b", BEST_EFFORT), ("c", CRITICAL)):
        scene.offer(label, priority=priority, ttl=1.0)
    told = [each for each in scene.run_dry() if each.startswith("finished")]
    assert told == ["finished c", "finished d", "finished s", "finished b"]


# Best-effort rows


def test_best_effort_rows_fill_the_size_and_do_not_make_it_larger() -> None:
    scene = Scene(sizes=(1, 4, 16))
    scene.offer("spare", 9, priority=BEST_EFFORT)
    scene.offer("paying", 3)
    assert scene.poll() == ["run a/4: paying[0:3] spare[0:1]"]
    assert scene.stats().padded_rows == 0
    assert scene.stats().spare_rows == 8


def test_a_size_that_is_full_takes_no_best_effort_rows() -> None:
    scene = Scene(sizes=(1, 4))
    scene.offer("spare", priority=BEST_EFFORT)
    scene.offer("paying", 4)
    assert scene.poll() == ["run a/4: paying[0:4]"]


@pytest.mark.parametrize("policy", [None, EffSafe()])
def test_best_effort_rows_run_where_nothing_else_waits(policy: EffSafe | None) -> None:
    scene = Scene(policy=policy)
    scene.offer("spare", 3, priority=BEST_EFFORT)
    assert scene.run_dry() == ["run a/4: spare[0:3]", "finished spare"]


def test_best_effort_rows_alone_make_no_batch_much_longer_than_one_of_a_row() -> None:
    """Who comes meanwhile has to wait for it: four times is the limit."""
    scene = Scene(sizes=(1, 4, 16), policy=EffSafe())
    costs = scene.batcher.costs[LaneKey("a")]
    for size, seconds in ((1, 1.0), (4, 4.0), (16, 4.5)):
        costs.observe(size, seconds)
    scene.offer("spare", 16, priority=BEST_EFFORT)
    assert scene.poll() == ["run a/4: spare[0:4]"]


def test_best_effort_rows_wait_where_running_them_makes_another_late() -> None:
    scene = Scene(lanes="ab", policy=EffSafe(guard_s=0.0))
    for lane in "ab":
        scene.batcher.costs[LaneKey(lane)].observe(4, 1.0)
        scene.batcher.costs[LaneKey(lane)].observe(1, 1.0)
    scene.offer("spare", 4, "b", priority=BEST_EFFORT)
    scene.offer("urgent", 1, "a", ttl=1.5)
    assert scene.poll() == ["run a/1: urgent[0:1]"]


def test_best_effort_rows_protect_nothing() -> None:
    scene = Scene(lanes="ab", policy=EffSafe(guard_s=0.0))
    for lane in "ab":
        scene.batcher.costs[LaneKey(lane)].observe(4, 1.0)
        scene.batcher.costs[LaneKey(lane)].observe(1, 1.0)
    scene.offer("spare", 1, "b", ttl=1.5, priority=BEST_EFFORT)
    scene.offer("many", 4, "a")
    assert scene.poll() == ["run a/4: many[0:4]"]


def test_best_effort_rows_expire_as_any_do() -> None:
    scene = Scene(credits=1)
    scene.offer("busy")
    scene.poll()
    scene.offer("spare", ttl=TICK, priority=BEST_EFFORT)
    scene.clock.advance(TICK)
    assert scene.poll() == ["expired spare"]


def test_best_effort_rows_cost_no_share_and_want_none() -> None:
    scene = Scene(sizes=(4,), policy=EffSafe())
    scene.offer("spare", 4, priority=BEST_EFFORT, owner="generous")
    scene.poll()
    scene.clock.advance(1.0)
    scene.complete()
    assert scene.batcher.shares.time_of("generous") == 0.0
    scene.offer("more", 4, priority=BEST_EFFORT, owner="generous")
    scene.offer("paying", 2, owner="payer")
    scene.poll()
    scene.clock.advance(1.0)
    scene.complete()
    assert scene.batcher.shares.time_of("generous") == 0.0
    assert scene.batcher.shares.time_of("payer") == pytest.approx(1.0)
    scene.offer("again", 1, owner="payer")
    assert scene.batcher.shares.in_share("payer"), "rows that want no share put another out of it"


def test_a_poisoned_best_effort_row_fails_alone() -> None:
    scene = Scene(sizes=(1, 4))
    scene.offer("paying", 2)
    scene.offer("poison", priority=BEST_EFFORT)
    told = scene.run_dry(poison="poison")
    assert "finished paying" in told
    assert "failed poison" in told


def test_how_large_a_batch_of_others_is_does_not_depend_on_best_effort_rows() -> None:
    """A padded eight costs 1.6 a row, a full four 1: that it could be filled changes nothing."""
    scene = Scene(sizes=(1, 4, 8), policy=EffSafe())
    costs = scene.batcher.costs[LaneKey("a")]
    for size, seconds in ((1, 1.0), (4, 4.0), (8, 8.0)):
        costs.observe(size, seconds)
    scene.offer("paying", 5)
    scene.offer("spare", 3, priority=BEST_EFFORT)
    assert scene.poll() == ["run a/4: paying[0:4]"]
    scene.clock.advance(4.0)
    scene.complete()
    assert scene.poll() == ["run a/1: paying[4:5]"]


# Who makes room in a full line


def test_a_critical_ticket_takes_the_place_of_the_latest_best_effort_one() -> None:
    scene = Scene(rows_max=3)
    for label in "xyz":
        scene.offer(label, priority=BEST_EFFORT)
    scene.offer("critical", priority=CRITICAL)
    assert scene.poll()[0] == "shed z"
    tally = scene.stats().total
    assert (tally.shed, tally.evicted, tally.hopeless) == (1, 1, 0)


def test_the_least_critical_make_room_first_and_only_as_many_as_are_needed() -> None:
    scene = Scene(rows_max=4)
    sheddable = scene.offer("s", priority=SHEDDABLE)
    spare = [scene.offer(label, priority=BEST_EFFORT) for label in "xy"]
    scene.offer("d")
    scene.offer("c", 2, priority=CRITICAL)
    assert [ticket.state for ticket in spare] == [TicketState.SHED] * 2
    assert sheddable.state is TicketState.WAITING


@pytest.mark.parametrize("priority", CRITICALITIES.values())
def test_nobody_makes_room_for_what_is_as_critical_or_less(priority: int) -> None:
    scene = Scene(rows_max=2)
    for label in "xy":
        scene.offer(label, priority=CRITICAL)
    with pytest.raises(LaneFull):
        scene.offer("late", priority=priority)
    assert scene.stats().total.shed == 0


def test_nobody_makes_room_where_that_would_not_do() -> None:
    scene = Scene(rows_max=4)
    scene.offer("d", 3)
    scene.offer("b", 1, priority=BEST_EFFORT)
    with pytest.raises(LaneFull):
        scene.offer("c", 4, priority=DEFAULT)
    with pytest.raises(TicketTooLarge):
        scene.offer("never", 5, priority=CRITICAL)
    assert scene.stats().rows == 4


def test_rows_of_a_ticket_that_is_on_the_device_in_part_keep_their_place() -> None:
    scene = Scene(sizes=(1, 2), rows_max=4, credits=1)
    scene.offer("large", 4, priority=SHEDDABLE)
    assert scene.poll() == ["run a/2: large[0:2]"]
    with pytest.raises(LaneFull):
        scene.offer("critical", 3, priority=CRITICAL)


def test_another_owner_makes_no_room() -> None:
    scene = Scene(rows_max=1)
    scene.offer("spare", priority=BEST_EFFORT, owner="m")
    scene.offer("other", priority=CRITICAL, owner="n")
    assert scene.stats().rows == 2


# Allowances


def test_a_line_is_bounded_by_what_was_agreed_with_its_owner() -> None:
    scene = Scene(rows_max=64)
    scene.batcher.allow("small", Allowance(rows_max=1))
    scene.offer("x", owner="small")
    with pytest.raises(LaneFull, match="bounded to 1 rows"):
        scene.offer("y", owner="small")
    scene.offer("z", 64, owner="other")


def test_allowances_change_while_rows_wait() -> None:
    scene = Scene(rows_max=4)
    scene.offer("x", 3, owner="m")
    scene.batcher.allow("m", Allowance(rows_max=2, bytes_max=9))
    with pytest.raises(LaneFull):
        scene.offer("y", owner="m")
    scene.batcher.allow("m", None)
    scene.offer("y", owner="m")
    assert scene.batcher.allowance_of("m") is None


def test_an_owner_of_twice_the_weight_is_in_share_with_twice_the_time() -> None:
    scene = Scene()
    scene.batcher.allow("heavy", Allowance(weight=2.0))
    scene.batcher.shares.charge("heavy", 2.0)
    scene.batcher.shares.charge("light", 1.0)
    assert scene.batcher.shares.time_of("heavy") == scene.batcher.shares.time_of("light")


def test_rows_count_by_weight_when_lanes_compete() -> None:
    scene = Scene(lanes="ab", sizes=(4,), policy=EffSafe())
    for lane in "ab":
        scene.batcher.costs[LaneKey(lane)].observe(4, 1.0)
    scene.offer("heavy", 3, "a", owner="m")
    scene.offer("many", 4, "b", owner="n")
    scene.batcher.allow("m", Allowance(weight=2.0))
    assert scene.poll() == ["run a/4: heavy[0:3]"]


def test_in_a_shared_lane_every_row_counts_by_its_own_owner() -> None:
    scene = Scene(lanes="ab", sizes=(4,), policy=EffSafe())
    scene.offer("h", 1, "a", owner="heavy")
    scene.offer("l", 2, "a", owner="light")
    scene.offer("o", 4, "b", owner="other")
    scene.batcher.allow("heavy", Allowance(weight=3.0))
    assert scene.poll() == ["run a/4: h[0:1] l[0:2]"]


@pytest.mark.parametrize(
    "wrong",
    [{"weight": 0.0}, {"weight": inf}, {"criticality": 7}, {"rows_max": 0}, {"bytes_max": 0}],
)
def test_allowances_that_cannot_be_meant_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidArgument):
        Allowance(**wrong)  # type: ignore[arg-type]
