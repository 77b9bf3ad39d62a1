"""When rows that are offered now would be answered, and whether they are taken."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any

import pytest

from batching import Batch, Batcher, Effect, EffSafe, Ladder, LaneKey, RoundRobin, Run, Shed, Ticket
from batching.allowance import BEST_EFFORT, CRITICAL, DEFAULT, SHEDDABLE
from batching.line import Line
from batching.refusals import TooBusy
from batching.simulation import Report, SimulatedLane, simulate
from batching.stretch import STRETCH_MAX, STRETCH_MIN, STRETCH_STEP
from batching.workloads import merged, poisson, with_criticalities

COSTS = {1: 0.010, 4: 0.020, 16: 0.040}
A, B = LaneKey("a"), LaneKey("b")


def about(ms: float) -> object:
    """Instants are not exact, and a hint is rounded up."""
    return pytest.approx(ms, abs=1.01)


class Device:
    """A batcher that refuses what would be late, and the device that it serves."""

    def __init__(
        self,
        lanes: str = "ab",
        costs: Mapping[int, float] = COSTS,
        credit_s: float = 0.05,
        policy: EffSafe | RoundRobin | None = None,
    ) -> None:
        self.now = 100.0
        self.batcher = Batcher(
            policy or EffSafe(0.0), in_flight_max=1, credit_s=credit_s, admission=True
        )
        for unit in lanes:
            self.batcher.add_lane(LaneKey(unit), Ladder(costs), 4096, 1 << 30, costs)
        self.running: list[Batch] = []
        self.shed: list[Shed] = []

    def offer(
        self,
        key: LaneKey = A,
        rows: int = 1,
        left: float = inf,
        owner: str = "",
        priority: int = 0,
        is_later: bool = False,
    ) -> Ticket:
        owner = owner or key.unit
        deadline = self.now + left
        ticket = Ticket(key, rows, rows, deadline, None, owner, priority)
        self.batcher.offer(ticket, self.now, is_later=is_later)
        return ticket

    def refused_for(self, key: LaneKey = A, **options: Any) -> int:
        """For how many milliseconds such a ticket is refused; 0 where it is taken."""
        try:
            self.offer(key, **options)
        except TooBusy as refusal:
            return refusal.retry_after_ms
        return 0

    def poll(self) -> list[Effect]:
        effects = self.batcher.poll(self.now)
        self.running += [effect.batch for effect in effects if isinstance(effect, Run)]
        self.shed += [effect for effect in effects if isinstance(effect, Shed)]
        self.batcher.check_invariants()
        return effects

    def busy(self, key: LaneKey = A, rows: int = 16, owner: str = "") -> None:
        """Rows without a deadline go to the device and take what they are expected to."""
        self.offer(key, rows, owner=owner)
        self.poll()

    def complete(self, late_s: float = 0.0) -> None:
        """The batch comes back when it was expected, or so much later."""
        batch = self.running.pop(0)
        self.now = max(self.now, batch.formed_at + batch.expected_s + late_s)
        self.batcher.complete(batch.id, self.now)
        self.poll()

    def line(self, key: LaneKey = A, owner: str = "a") -> Line:
        return self.batcher._lanes[key].lines[owner]


# One lane


def test_rows_of_a_request_for_which_a_device_has_worked_are_taken() -> None:
    """What was done for it would be wasted; whether it is in time is seen when it is its turn."""
    device = Device()
    device.busy(rows=16)
    assert device.refused_for(left=0.045) > 0
    assert device.refused_for(left=0.045, is_later=True) == 0


def test_an_idle_device_tries_whatever_comes() -> None:
    """An estimate that is too high would otherwise never be corrected."""
    assert Device().refused_for(left=0.001) == 0


def test_rows_that_would_be_in_time_are_taken_and_others_told_when_they_would_be() -> None:
    device = Device()
    device.busy()  # until 40 ms from now
    assert device.refused_for(left=0.051) == 0
    assert device.refused_for(left=0.035) == about(15)  # 40 + 10 ms: it would go first
    tally = device.batcher.stats().lanes[A].owners["a"].tally
    assert (tally.offered, tally.refused_admission) == (2, 1)


def test_a_refused_ticket_is_taken_after_the_time_that_it_was_told() -> None:
    device = Device()
    device.busy()
    wait = device.refused_for(left=0.030)
    assert wait == about(20)
    device.now += wait / 1000
    assert device.refused_for(left=0.0301) == 0


def test_the_more_waits_the_longer_one_is_told_to_wait() -> None:
    device = Device(policy=RoundRobin())
    device.busy()
    waits = []
    for _ in range(4):
        waits.append(device.refused_for(left=0.020))
        device.offer(rows=16, priority=1)
    assert waits == [about(30), about(70), about(110), about(150)]


def test_rows_without_a_deadline_are_always_taken() -> None:
    device = Device()
    for _ in range(20):
        device.busy()
    assert device.refused_for(rows=16) == 0


def test_the_batch_of_an_accepted_ticket_does_not_grow_until_it_is_late() -> None:
    device = Device()
    device.busy()
    for _ in range(4):  # 40 + 20 ms
        device.offer(left=0.065)
    # A batch of 5 would take 40 ms and be late for the four, though not for a fifth of 90 ms: it
    # is to come when the four are on the device.
    assert device.refused_for(left=0.090) == about(40)
    device.complete()
    assert not device.shed
    assert device.refused_for(left=0.090) == 0


def test_rows_with_time_for_several_batches_are_taken_and_left_behind() -> None:
    device = Device()
    device.busy()
    for _ in range(4):
        device.offer(left=0.065)
    for _ in range(12):
        device.offer(left=10.0)
    device.complete()
    assert not device.shed
    assert [batch.rows for batch in device.running] == [4]


def test_an_urgent_ticket_waits_for_what_is_before_it_in_line() -> None:
    device = Device()
    device.busy()
    device.offer(rows=16, left=5.0)
    assert device.refused_for(left=0.085) == 0  # 40, and 40 of a batch of 16
    assert device.refused_for(left=0.085, rows=16) == about(
        35
    )  # 40 + 80, and the one row before it


def test_a_ticket_of_higher_priority_goes_before_the_line() -> None:
    device = Device()
    device.busy()
    device.offer(rows=16, priority=1)
    device.offer(rows=16, priority=1)
    assert device.refused_for(left=0.055, priority=2) == 0
    assert device.refused_for(left=0.055) == about(85)  # 40 + 40 + 40 + 20 ms


# Other lanes


def test_the_backlog_of_another_lane_in_share_is_waited_for() -> None:
    device = Device()
    device.busy(B)
    device.offer(B, rows=4, left=0.060)
    assert device.refused_for(A, left=0.065) == about(5)  # 40 + 20 + 10 ms


def test_another_lane_with_later_deadlines_is_not_waited_for() -> None:
    device = Device()
    device.busy(B)
    device.offer(B, rows=4, left=1.0)
    assert device.refused_for(A, left=0.065) == 0


def flooded() -> Device:
    """Lane b has had far more than its share, and wants more."""
    device = Device()
    device.offer(A, rows=1)  # wants the device, too
    device.poll()
    for _ in range(8):
        device.offer(A, rows=1, owner="x")
        device.offer(B, rows=16, owner="y")
        device.complete()
    for _ in range(10):
        device.offer(B, rows=16, left=10.0, owner="y", priority=1)
    device.offer(A, rows=1, left=10.0, owner="x")
    assert not device.batcher.shares.in_share("y")
    return device


def test_a_flood_of_another_does_not_keep_one_in_share_out() -> None:
    device = flooded()
    free_in = device.batcher._flight.free_at - device.now
    assert device.refused_for(A, left=free_in + 0.021, owner="x") == 0


def test_the_flooder_waits_for_those_in_share_and_for_itself() -> None:
    device = flooded()
    free_s = device.batcher._flight.free_at - device.now
    expected_s = free_s + 0.010 + 11 * 0.040  # one row of x, and eleven batches
    wait = device.refused_for(B, rows=16, left=0.1, owner="y")
    assert wait == pytest.approx(1000 * (expected_s - 0.1), abs=90)
    assert device.refused_for(B, rows=1, left=0.1, owner="y") > 100


def test_one_that_floods_from_nothing_is_waited_for_no_longer_than_it_stays_in_share() -> None:
    device = Device(credit_s=0.05)
    device.busy(B)
    for _ in range(10):
        device.offer(B, rows=16, left=0.6)
    # 40 ms run; it may have some 50 ms more than others have had, then it is out of share.
    assert device.refused_for(A, left=0.601) == 0
    assert device.refused_for(A, left=0.09) < 20


def test_in_a_shared_lane_a_flooders_rows_do_not_keep_others_out() -> None:
    device = Device(credit_s=0.02)
    device.offer(A, owner="x")
    device.busy(A, rows=16, owner="y")
    for _ in range(10):
        device.offer(A, rows=16, left=10.0, owner="y", priority=1)
    device.offer(A, left=10.0, owner="x")
    for _ in range(3):
        device.complete()
        device.offer(A, left=10.0, owner="x")
    assert not device.batcher.shares.in_share("y")
    assert device.refused_for(A, left=0.085, owner="x") == 0
    assert device.refused_for(A, left=0.085, owner="y") > 100


# What is told of waiting


def test_who_comes_to_an_idle_device_does_not_wait() -> None:
    device = Device()
    assert device.batcher.admission.wait_s(A, "a", 0, device.now) == 0.0


def test_rows_join_the_batch_that_forms_and_wait_for_full_ones() -> None:
    device = Device()
    device.busy()
    device.offer(rows=4, left=5.0)
    assert device.batcher.admission.wait_s(A, "a", 0, device.now) == pytest.approx(0.040)
    device.offer(rows=16, left=5.0)
    assert device.batcher.admission.wait_s(A, "a", 0, device.now) == pytest.approx(0.080)


def test_a_batch_that_is_landing_is_not_waited_for() -> None:
    device = Device()
    device.busy()
    landing = device.running[0].id
    assert device.batcher.admission.wait_s(A, "a", 0, device.now, landing) == 0.0


def test_who_is_given_up_hears_when_the_device_would_begin_with_others() -> None:
    hints = []
    for rows in (1, 16):
        device = Device()
        device.busy()
        device.offer(left=0.051)
        device.offer(B, rows=rows, left=10.0)
        device.complete(late_s=0.005)
        hints += [shed.retry_after_ms for shed in device.shed]
    assert hints == [about(10), about(41)]  # a batch of b comes first


def test_a_hint_is_at_least_a_millisecond_and_at_most_ten_seconds() -> None:
    device = Device(policy=RoundRobin())
    like = Ticket(A, 1, 1, inf, None, "a")
    assert device.batcher.admission.retry_ms(like, device.now) == 1
    device.busy()
    for _ in range(250):
        device.offer(rows=16, priority=1)
    assert device.batcher.admission.retry_ms(like, device.now) == 10_000


# The stretch


def test_a_line_whose_tickets_are_late_is_believed_less_until_they_are_not() -> None:
    device = Device(policy=RoundRobin())
    device.busy()
    device.offer(rows=4, left=0.061)
    device.complete(late_s=0.010)
    device.complete()  # 9 ms late
    assert device.line().stretch_of(DEFAULT).factor == pytest.approx(1.0 + STRETCH_STEP, abs=0.002)
    for _ in range(200):
        device.offer(left=1.0)
        device.poll()
        device.complete()
    assert device.line().stretch_of(DEFAULT).factor == STRETCH_MIN


def test_tickets_that_are_late_together_count_once() -> None:
    device = Device(policy=RoundRobin())
    device.busy()
    for _ in range(10):
        device.offer(left=0.090)
    device.now += 0.091
    device.poll()
    assert device.line().tally.expired == 10
    assert device.line().stretch_of(DEFAULT).factor == pytest.approx(1.0 + STRETCH_STEP)


def test_what_is_given_up_says_nothing_about_more_critical_rows() -> None:
    device = Device(policy=RoundRobin())
    device.busy()
    device.offer(left=0.090, priority=SHEDDABLE)
    device.now += 0.091
    device.poll()
    line = device.line()
    assert line.stretch_of(SHEDDABLE).factor == pytest.approx(1.0 + STRETCH_STEP)
    assert line.stretch_of(DEFAULT).factor == line.stretch_of(CRITICAL).factor == 1.0


def test_best_effort_rows_that_are_late_stretch_nothing() -> None:
    device = Device(policy=RoundRobin())
    device.offer(left=0.001, priority=BEST_EFFORT)
    device.poll()
    device.complete(late_s=0.010)
    assert device.line().stretch_of(BEST_EFFORT).factor == 1.0


def test_a_stretch_is_bounded_and_an_idle_device_ignores_it() -> None:
    device = Device(policy=RoundRobin())
    device.busy()
    device.offer(left=0.060)
    device.line().stretch_of(DEFAULT).factor = STRETCH_MAX - STRETCH_STEP / 2
    device.now += 0.061
    device.poll()
    assert device.line().stretch_of(DEFAULT).factor == STRETCH_MAX
    device.complete()
    device.busy()
    assert device.refused_for(left=0.055) > 4 * 45 - 55
    device.complete()
    assert device.refused_for(left=0.011) == 0


# What it is worth: a batch of b rows takes 4 + b/4 ms


def cost(key: LaneKey, bucket: int) -> float:
    return (4.0 + bucket / 4.0) / 1000


def lane(name: str, largest: int = 1024) -> SimulatedLane:
    sizes = [1 << power for power in range(largest.bit_length())]
    return SimulatedLane(key=LaneKey(name), ladder=Ladder(sizes))


def missed(report: Report) -> float:
    """The share of the accepted requests that were not answered in time."""
    ends = report.owners.values()
    accepted = sum(each.offered - each.refused for each in ends)
    return sum(each.late + each.expired + each.shed for each in ends) / accepted


@pytest.mark.parametrize("times", [1.1, 1.5, 3.0])
def test_at_overload_what_is_accepted_is_answered_and_no_less_than_without(times: float) -> None:
    capacity = 64 / cost(A, 64)

    def run(*, admission: bool) -> Report:
        load = poisson(A, "a", times * capacity, 2.0, budget_s=0.05, seed=1)
        return simulate(EffSafe(), [lane("a")], load, cost, admission=admission)

    with_, without = run(admission=True), run(admission=False)
    assert with_.goodput > 0.97 * without.goodput
    assert missed(with_) < 0.01
    assert missed(without) > 0.05


def test_with_batches_of_uncertain_length_few_accepted_requests_are_late() -> None:
    def run(*, admission: bool) -> Report:
        load = poisson(A, "a", 4800.0, 2.0, budget_s=0.05, seed=1)
        return simulate(EffSafe(), [lane("a")], load, cost, admission=admission, noise=0.1, seed=2)

    with_, without = run(admission=True), run(admission=False)
    assert with_.goodput > 0.95 * without.goodput
    assert missed(with_) < 0.05


def test_under_a_flood_nobody_in_share_is_refused_and_the_flooder_keeps_what_it_got() -> None:
    def run(*, admission: bool) -> Report:
        lanes = [lane(f"m{number}", 64) for number in range(8)]
        loads = [
            poisson(each.key, each.key.unit, 6000.0 if n == 7 else 60.0, 3.0, budget_s=0.1, seed=2)
            for n, each in enumerate(lanes)
        ]
        return simulate(
            EffSafe(), lanes, merged(*loads), cost, in_flight_max=1, admission=admission
        )

    with_, without = run(admission=True), run(admission=False)
    victims = [each for name, each in with_.owners.items() if name != "m7"]
    assert sum(each.refused for each in victims) <= 0.005 * sum(each.offered for each in victims)
    assert sum(each.good for each in victims) >= 0.99 * sum(each.offered for each in victims)
    assert with_.owners["m7"].good > 0.9 * without.owners["m7"].good
    assert missed(with_) < 0.05


def test_a_device_that_is_slower_than_was_measured_is_found_out() -> None:
    """Batches take half as long again, and estimates are not corrected fast enough."""
    seen = iter(range(1 << 30))

    def slower(key: LaneKey, bucket: int) -> float:
        warm_up = next(seen) < 11  # one call for each size
        return cost(key, bucket) * (1.0 if warm_up else 1.5)

    load = poisson(A, "a", 3000.0, 3.0, budget_s=0.05, seed=1)
    report = simulate(EffSafe(), [lane("a")], load, slower, admission=True)
    assert missed(report) < 0.05


@pytest.mark.parametrize("budget_s", [0.04, 0.08])
def test_at_overload_less_critical_requests_are_given_up_for_the_others(budget_s: float) -> None:
    """The critical and the default ones alone are two thirds of what the device can do."""
    load = poisson(A, "a", 3500.0, 4.0, budget_s=budget_s, seed=1)
    load = with_criticalities(load, {"critical": 0.1, "sheddable": 0.4}, seed=1)
    found = simulate(EffSafe(), [lane("a")], load, cost, admission=True).criticalities
    assert found[CRITICAL].attainment > 0.99
    assert found[DEFAULT].attainment > 0.99
    assert found[SHEDDABLE].attainment < 0.85
