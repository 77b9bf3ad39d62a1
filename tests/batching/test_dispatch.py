"""When batches are formed, of what, and what becomes of their tickets."""

from __future__ import annotations

import pytest

from batching import (
    Batch,
    Batcher,
    EffSafe,
    Ladder,
    LaneKey,
    Pick,
    RoundRobin,
    Run,
    Situation,
    Ticket,
    TicketState,
)
from tests.batching.scene import TICK, Scene


def test_a_single_row_runs_at_once() -> None:
    """TF WithZeroTimeout: the clock stands still, nothing lingers for company."""
    scene = Scene()
    scene.offer("x")
    assert scene.poll() == ["run a/1: x[0:1]"]
    assert scene.complete() == ["finished x"]


def test_rows_that_come_while_the_device_is_busy_join_one_batch() -> None:
    """Late binding: the second batch is formed when the credit comes back, not before."""
    scene = Scene(sizes=(1, 8))
    scene.offer("first")
    scene.poll()
    for label in "xyz":
        scene.offer(label, rows=2)
        assert scene.poll() == []
    assert scene.complete() == ["finished first"]
    assert scene.poll() == ["run a/8: x[0:2] y[0:2] z[0:2]"]
    assert scene.complete() == ["finished x", "finished y", "finished z"]


def long_batches(lead_s: float) -> Scene:
    """A lane whose batches take a second, one of which runs, and a row that waits."""
    scene = Scene(credits=2, lead_s=lead_s)
    scene.batcher.costs[LaneKey("a")].observe(1, 1.0)
    scene.offer("first")
    scene.poll()
    scene.offer("x")
    return scene


def test_the_second_credit_is_used_a_moment_before_the_device_is_free() -> None:
    scene = long_batches(lead_s=0.25)
    assert scene.poll() == []
    assert scene.batcher.next_wakeup() == scene.clock() + 0.75
    scene.clock.advance(0.5)
    scene.offer("y")
    assert scene.poll() == []
    scene.clock.advance(0.25)
    assert scene.poll() == ["run a/2: x[0:1] y[0:1]"]
    assert scene.batcher.next_wakeup() is None


def test_a_batch_that_is_back_early_is_followed_at_once() -> None:
    scene = long_batches(lead_s=0.25)
    scene.clock.advance(0.5)
    assert scene.complete() == ["finished first"]
    assert scene.poll() == ["run a/1: x[0:1]"]


def test_a_short_batch_and_one_that_is_overdue_are_followed_at_once() -> None:
    assert long_batches(lead_s=1.0).poll() == ["run a/1: x[0:1]"]
    scene = long_batches(lead_s=0.0)
    scene.clock.advance(1.5)
    assert scene.poll() == ["run a/1: x[0:1]"]


def test_deadlines_come_while_the_credit_is_held() -> None:
    scene = long_batches(lead_s=0.25)
    scene.offer("y", ttl=0.5)
    assert scene.poll() == []
    assert scene.batcher.next_wakeup() == scene.clock() + 0.5
    scene.clock.advance(0.5)
    assert scene.poll() == ["expired y"]
    assert scene.batcher.next_wakeup() == scene.clock() + 0.25


@pytest.mark.parametrize("credits", [1, 2, 3])
def test_no_more_batches_fly_than_there_are_credits(credits: int) -> None:
    scene = Scene(sizes=(1,), credits=credits)
    for number in range(5):
        scene.offer(f"t{number}")
    assert len(scene.poll()) == credits
    assert scene.poll() == []
    scene.complete()
    assert len(scene.poll()) == 1


def test_a_failed_batch_returns_its_credit() -> None:
    scene = Scene(sizes=(1,))
    scene.offer("x")
    scene.offer("y")
    scene.poll()
    assert scene.fail() == ["failed x"]
    assert scene.poll() == ["run a/1: y[0:1]"]


def test_rows_fill_a_batch_to_the_largest_bucket_and_spill_into_the_next() -> None:
    """TF ObeyBatchSizeConstraint with splitting: tasks 3,5,3,1,6,1 at limit 10."""
    scene = Scene(sizes=(10,), credits=2)
    for label, rows in zip("abcdef", (3, 5, 3, 1, 6, 1), strict=True):
        scene.offer(label, rows)
    assert scene.poll() == [
        "run a/10: a[0:3] b[0:5] c[0:2]",
        "run a/10: c[2:3] d[0:1] e[0:6] f[0:1]",
    ]
    assert scene.complete() == ["finished a", "finished b"]
    assert scene.complete() == ["finished c", "finished d", "finished e", "finished f"]


def test_a_ticket_larger_than_any_bucket_is_split_and_ends_once() -> None:
    """TF Serving BatchingWithLargeBatch: a 4-row request with room for 1."""
    scene = Scene(sizes=(1, 2), credits=2)
    scene.offer("x")
    scene.offer("large", rows=4)
    assert scene.poll() == ["run a/2: x[0:1] large[0:1]", "run a/2: large[1:3]"]
    assert scene.complete() == ["finished x"]
    assert scene.poll() == ["run a/1: large[3:4]"]
    assert scene.complete() == []
    assert scene.complete() == ["finished large"]


def test_a_split_ticket_finishes_whichever_batch_comes_back_last() -> None:
    scene = Scene(sizes=(2,), credits=2)
    scene.offer("x", rows=4)
    scene.poll()
    scene.device.reverse()
    assert scene.complete() == []
    assert scene.complete() == ["finished x"]


def test_padding_is_counted() -> None:
    """TF Serving AllowedBatchSizesRequirePadding: input +2, processed +3, padding +1."""
    scene = Scene(sizes=(1, 3, 4))
    scene.offer("x", rows=2)
    assert scene.poll() == ["run a/3: x[0:2]"]
    stats = scene.stats()
    assert (stats.batches, stats.rows_run, stats.padded_rows) == (1, 2, 1)


def test_a_batch_holds_rows_of_one_lane_and_shapes_are_lanes() -> None:
    """TF MultipleSignatures: separate queues."""
    scene = Scene(lanes="ab", credits=2)
    scene.offer("x", lane="a")
    scene.offer("y", lane="b")
    scene.offer("z", lane="a")
    assert sorted(scene.poll()) == ["run a/2: x[0:1] z[0:1]", "run b/1: y[0:1]"]


# ---- whose turn -----------------------------------------------------------------------------


def test_a_newcomer_runs_before_the_next_batch_of_a_busy_lane() -> None:
    """TF Fairness: a runs one batch and has two more; b's only row goes before a's second."""
    scene = Scene(lanes="ab", sizes=(1, 10))
    for label in ("a1", "a2", "a3"):
        scene.offer(label, rows=10)
    assert scene.poll() == ["run a/10: a1[0:10]"]
    scene.offer("b1", lane="b")
    scene.complete()
    assert scene.poll() == ["run b/1: b1[0:1]"]
    scene.complete()
    assert scene.poll() == ["run a/10: a2[0:10]"]


def test_lanes_with_work_take_turns() -> None:
    scene = Scene(lanes="abc", sizes=(1,))
    for label in ("1", "2"):
        for lane in "abc":
            scene.offer(lane + label, lane=lane)
    turns = [told.split()[1][0] for told in scene.run_dry() if told.startswith("run")]
    assert turns == list("abcabc")


def test_a_lane_that_comes_back_from_idleness_gains_no_second_turn() -> None:
    scene = Scene(lanes="ab", sizes=(1,))
    scene.offer("b1", lane="b")
    scene.offer("b2", lane="b")
    scene.offer("a1", lane="a")
    assert scene.step() == ["run b/1: b1[0:1]", "finished b1"]
    assert scene.step() == ["run a/1: a1[0:1]", "finished a1"]
    scene.offer("a2", lane="a")
    assert scene.step() == ["run b/1: b2[0:1]", "finished b2"]
    assert scene.step() == ["run a/1: a2[0:1]", "finished a2"]


def test_retries_take_their_lane_s_turns_and_not_the_others() -> None:
    """A unit whose every batch fails must not take the device away from its neighbours."""
    scene = Scene(lanes="ab", sizes=(1, 4))
    for label in ("p1", "p2", "p3", "p4"):
        scene.offer(label, lane="a")
    for label in ("b1", "b2", "b3"):
        scene.offer(label, rows=4, lane="b")
    turns = [told.split()[1][0] for told in scene.run_dry(poison="p1p2p3p4") if "run" in told]
    assert turns == list("abababaaaa")


class Deferring:
    """A policy that knows its lanes and gives a credit to none until told to."""

    def __init__(self) -> None:
        self.lanes: set[LaneKey] = set()
        self.open = False
        self.saw: list[tuple[int, int, list[int]]] = []
        self.came_back: list[int] = []

    def added(self, key: LaneKey) -> None:
        self.lanes.add(key)

    def removed(self, key: LaneKey) -> None:
        self.lanes.remove(key)

    def landed(self, batch: Batch, now: float) -> None:
        self.came_back.append(batch.rows)

    def pick(self, situation: Situation) -> Pick | None:
        assert situation.lanes.keys() <= self.lanes
        for lane in situation.lanes.values():
            rows = [ticket.rows for ticket in lane.tickets()]
            self.saw.append((lane.rows, lane.in_flight, rows))
        return Pick(next(iter(situation.lanes)), 4) if self.open else None


def test_the_policy_is_replaceable_and_may_leave_a_credit_unused() -> None:
    policy = Deferring()
    scene = Scene(lanes="ab", policy=policy)
    scene.offer("x", rows=3)
    scene.offer("y", rows=2)
    assert scene.poll() == []
    assert policy.saw == [(5, 0, [3, 2])]
    policy.open = True
    assert scene.poll() == ["run a/4: x[0:3] y[0:1]"]
    assert policy.lanes == {LaneKey("a"), LaneKey("b")}
    scene.batcher.remove_lane(LaneKey("b"))
    assert policy.lanes == {LaneKey("a")}
    scene.complete()
    assert policy.came_back == [4]


def test_another_policy_takes_over_what_waits_and_what_runs() -> None:
    scene = Scene(lanes="ab", policy=RoundRobin())
    for label, lane in (("x", "a"), ("y", "b"), ("z", "b")):
        scene.offer(label, rows=4, lane=lane)
    assert scene.poll() == ["run a/4: x[0:4]"]
    deferring = Deferring()
    scene.batcher.use(deferring)
    assert deferring.lanes == {LaneKey("a"), LaneKey("b")}
    assert scene.complete() == ["finished x"]
    assert deferring.came_back == [4]
    assert scene.poll() == []
    deferring.open = True
    assert scene.run_dry() == ["run b/4: y[0:4]", "finished y", "run b/4: z[0:4]", "finished z"]


# ---- deadlines ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ticks", "expected"), [(-1, ["run a/1: x[0:1]"]), (0, ["expired x"]), (1, ["expired x"])]
)
def test_a_row_is_dispatched_up_to_the_tick_before_its_deadline(
    ticks: int, expected: list[str]
) -> None:
    """TF Serving EnqueuedLongerThanTimeout; ours answers DEADLINE_EXCEEDED."""
    scene = Scene()
    scene.offer("x", ttl=1.0)
    scene.clock.advance(1.0 + ticks * TICK)
    assert scene.poll() == expected


def test_a_ticket_in_the_middle_expires_at_its_own_deadline() -> None:
    scene = Scene(sizes=(1, 2, 4))
    scene.offer("busy")
    scene.poll()
    scene.offer("x", ttl=9.0)
    scene.offer("middle", ttl=1.0)
    scene.offer("z", ttl=5.0)
    assert scene.batcher.next_wakeup() == scene.clock() + 1.0
    scene.clock.advance(1.0 - TICK)
    assert scene.poll() == []
    scene.clock.advance(TICK)
    assert scene.poll() == ["expired middle"]
    assert scene.batcher.next_wakeup() == scene.clock() + 4.0
    scene.complete()
    assert scene.poll() == ["run a/2: z[0:1] x[0:1]"]


def test_expired_tickets_are_told_earliest_first_and_before_new_batches() -> None:
    scene = Scene()
    scene.offer("later", ttl=2.0)
    scene.offer("sooner", ttl=1.0)
    scene.offer("x")
    scene.clock.advance(3.0)
    assert scene.poll() == ["expired sooner", "expired later", "run a/1: x[0:1]"]


def test_a_ticket_whose_rows_all_fly_finishes_although_its_deadline_passes() -> None:
    scene = Scene()
    scene.offer("x", ttl=1.0)
    scene.poll()
    assert scene.batcher.next_wakeup() is None
    scene.clock.advance(2.0)
    assert scene.poll() == []
    assert scene.complete() == ["finished x"]


def test_a_ticket_with_rows_left_in_line_expires_and_its_flying_rows_are_ignored() -> None:
    scene = Scene(sizes=(2,))
    ticket = scene.offer("x", rows=3, ttl=1.0)
    assert scene.poll() == ["run a/2: x[0:2]"]
    scene.clock.advance(1.0)
    assert scene.poll() == ["expired x"]
    assert ticket.state is TicketState.EXPIRED
    assert scene.complete() == []
    assert scene.run_dry() == []


def test_without_deadlines_nobody_is_woken() -> None:
    scene = Scene()
    assert scene.batcher.next_wakeup() is None
    scene.offer("x")
    assert scene.batcher.next_wakeup() is None


# ---- cancelling -----------------------------------------------------------------------------


def test_a_cancelled_ticket_in_line_never_runs() -> None:
    scene = Scene()
    scene.offer("x")
    given_up = scene.offer("given up", ttl=1.0)
    scene.offer("z")
    assert scene.cancel(given_up)
    assert not scene.cancel(given_up)
    scene.clock.advance(2.0)
    assert scene.run_dry() == ["run a/2: x[0:1] z[0:1]", "finished x", "finished z"]
    assert scene.stats().total.cancelled == 1


def test_a_cancelled_ticket_on_the_device_is_ignored_when_it_comes_back() -> None:
    scene = Scene(sizes=(2,))
    given_up = scene.offer("given up")
    scene.offer("y")
    scene.poll()
    assert scene.cancel(given_up)
    assert scene.complete() == ["finished y"]


def test_a_ticket_cancelled_between_its_batches_sends_no_more_rows() -> None:
    scene = Scene(sizes=(2,))
    given_up = scene.offer("given up", rows=5)
    scene.poll()
    assert scene.cancel(given_up)
    assert scene.complete() == []
    assert scene.poll() == []
    assert scene.stats().rows == scene.stats().nbytes == 0


def test_cancelling_the_last_waiting_row_leaves_nothing_to_dispatch() -> None:
    scene = Scene()
    assert scene.cancel(scene.offer("x"))
    assert scene.poll() == []
    assert scene.batcher.lane_idle(LaneKey("a"))


def test_an_answered_ticket_cannot_be_cancelled() -> None:
    scene = Scene()
    ticket = scene.offer("x")
    scene.run_dry()
    assert not scene.cancel(ticket)
    assert ticket.state is TicketState.FINISHED


# ---- the books ------------------------------------------------------------------------------


def test_a_batch_comes_back_once() -> None:
    scene = Scene()
    scene.offer("x")
    scene.poll()
    batch = scene.device[0]
    scene.complete()
    with pytest.raises(AssertionError, match="not in flight"):
        scene.batcher.complete(batch.id, scene.clock())
    with pytest.raises(AssertionError, match="not in flight"):
        scene.batcher.fail(batch.id, RuntimeError(), scene.clock())


def test_device_time_is_counted_once_for_batches_that_overlap() -> None:
    """Two credits: the second batch waits on the device until the first is done."""
    scene = Scene(lanes="ab", sizes=(1,), credits=2)
    scene.offer("x", lane="a")
    scene.offer("y", lane="b")
    scene.poll()
    scene.clock.advance(3.0)
    scene.complete()
    scene.clock.advance(2.0)
    scene.complete()
    assert (scene.stats("a").busy_s, scene.stats("b").busy_s) == (3.0, 2.0)


def test_the_books_balance() -> None:
    scene = Scene(sizes=(1, 2), rows_max=8, credits=2)
    scene.offer("poison")
    scene.offer("x")
    scene.offer("late", ttl=1.0)
    given_up = scene.offer("given up")
    with pytest.raises(Exception, match="can never wait"):
        scene.offer("huge", rows=9)
    scene.cancel(given_up)
    assert scene.batcher.stats().waiting == 3
    scene.clock.advance(1.0)
    scene.run_dry(poison="poison")
    stats, total = scene.stats(), scene.stats().total
    assert (total.offered, stats.refused) == (4, 1)
    assert (total.finished, total.failed, total.expired, total.cancelled) == (1, 1, 1, 1)
    assert (stats.batches, stats.rows_run, stats.padded_rows, stats.bisections) == (3, 4, 0, 1)
    assert (scene.batcher.stats().in_flight, scene.batcher.stats().waiting) == (0, 0)


@pytest.mark.parametrize("admission", [False, True])
def test_a_seed_that_is_far_too_high_does_not_keep_rows_from_running_for_good(
    admission: bool,
) -> None:
    batcher = Batcher(EffSafe(0.0), in_flight_max=2, admission=admission)
    lane = LaneKey("a")
    batcher.add_lane(lane, Ladder((1,)), 16, 1 << 20, {1: 0.040})
    ran = 0
    for number in range(100):
        now = 10.0 + number / 10
        batcher.offer(Ticket(lane, 1, 1, now + 0.005, None), now)
        for effect in batcher.poll(now):
            if isinstance(effect, Run):
                ran += 1
                batcher.complete(effect.batch.id, now + 0.002)
    assert ran > 20
