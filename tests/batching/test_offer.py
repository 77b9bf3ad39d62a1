"""What a lane takes and what it turns away."""

from __future__ import annotations

import gc
import math
import pickle
import weakref

import pytest

from batching import (
    Batcher,
    Ladder,
    LaneBusy,
    LaneDraining,
    LaneExists,
    LaneFull,
    LaneKey,
    LaneUnknown,
    RoundRobin,
    Ticket,
    TicketState,
    TicketTooLarge,
    refusals,
)
from batching.errors import Code, DeadlineExceeded, InvalidArgument, ServingError
from tests.batching.scene import TICK, Scene


@pytest.mark.parametrize("batches", [1, 2, 5])
def test_capacity_counts_down_to_nothing_and_one_more_is_refused(batches: int) -> None:
    """TF shared_batch_scheduler_test ConstMethods: limit 2, the device blocked."""
    scene = Scene(sizes=(2,), rows_max=2 * batches)
    scene.offer("running", rows=2)
    assert scene.poll() == ["run a/2: running[0:2]"]
    for number in range(2 * batches):
        assert scene.stats().rows == number
        scene.offer(f"t{number}")
    before = scene.stats()
    with pytest.raises(LaneFull, match="1 rows and 1 bytes do not fit"):
        scene.offer("over")
    after = scene.stats()
    assert (after.rows, after.nbytes, after.total.offered) == (
        before.rows,
        before.nbytes,
        before.total.offered,
    )
    assert after.refused == after.total.refused_full == before.refused + 1


def test_a_refused_ticket_is_as_it_was_and_may_come_again() -> None:
    """TF: the task is consumed if and only if it was scheduled."""
    scene = Scene(rows_max=1)
    scene.offer("first")
    ticket = Ticket(LaneKey("a"), 1, 1, math.inf, "again")
    with pytest.raises(LaneFull):
        scene.batcher.offer(ticket, scene.clock())
    assert (ticket.state, ticket.id) == (TicketState.NEW, 0)
    assert not scene.cancel(ticket)
    assert scene.poll() == ["run a/1: first[0:1]"]
    scene.batcher.offer(ticket, scene.clock())
    assert scene.run_dry() == ["finished first", "run a/1: again[0:1]", "finished again"]


def test_offering_a_ticket_twice_is_a_bug_of_the_caller() -> None:
    scene = Scene()
    ticket = scene.offer("x")
    with pytest.raises(AssertionError, match="offered before"):
        scene.batcher.offer(ticket, scene.clock())


def test_one_full_lane_does_not_block_the_others() -> None:
    """TF OneFullQueueDoesntBlockOtherQueues."""
    scene = Scene(lanes="ab", sizes=(1, 2, 4), rows_max=4, credits=2)
    for _ in range(2):  # one batch on the device, then a full lane
        scene.offer("clog", rows=4)
        scene.poll()
    scene.offer("clog", rows=4)
    with pytest.raises(LaneFull):
        scene.offer("clog")
    for rows, bucket in ((1, 1), (2, 2), (3, 4)):
        scene.offer(f"b{rows}", rows=rows, lane="b")
        scene.complete()
        assert scene.poll() == [f"run b/{bucket}: b{rows}[0:{rows}]"]
        scene.complete()
        assert scene.poll() == ["run a/4: clog[0:4]"]
        scene.offer("clog", rows=4)


def test_the_bound_on_bytes_holds_by_itself() -> None:
    scene = Scene(bytes_max=10)
    scene.offer("x", nbytes=6)
    scene.offer("y", nbytes=4)
    with pytest.raises(LaneFull):
        scene.offer("z", nbytes=1)
    scene.offer("weightless", nbytes=0)


def test_the_bytes_of_a_ticket_count_until_its_last_row_has_left() -> None:
    scene = Scene(sizes=(2,), bytes_max=10, credits=1)
    scene.offer("x", rows=3, nbytes=10)
    assert scene.poll() == ["run a/2: x[0:2]"]
    assert (scene.stats().rows, scene.stats().nbytes) == (1, 10)
    scene.complete()
    assert scene.poll() == ["run a/2: x[2:3]"]
    assert (scene.stats().rows, scene.stats().nbytes) == (0, 0)


@pytest.mark.parametrize(("rows", "nbytes"), [(9, 1), (1, 17)])
def test_a_ticket_over_the_bounds_by_itself_is_told_that_waiting_would_not_help(
    rows: int, nbytes: int
) -> None:
    scene = Scene(rows_max=8, bytes_max=16)
    with pytest.raises(TicketTooLarge, match="can never wait") as refusal:
        scene.offer("x", rows=rows, nbytes=nbytes)
    assert refusal.value.retry_after_ms == 0


@pytest.mark.parametrize(("rows", "nbytes"), [(8, 1), (1, 16)])
def test_a_ticket_exactly_at_the_bounds_is_taken(rows: int, nbytes: int) -> None:
    scene = Scene(rows_max=8, bytes_max=16)
    scene.offer("x", rows=rows, nbytes=nbytes)
    assert scene.run_dry()[-1] == "finished x"


@pytest.mark.parametrize(("rows", "nbytes"), [(0, 1), (-1, 1), (1, -1)])
def test_a_ticket_of_nothing_is_refused(rows: int, nbytes: int) -> None:
    scene = Scene()
    with pytest.raises(InvalidArgument):
        scene.offer("x", rows=rows, nbytes=nbytes)
    assert scene.stats().refused == 1


def test_cancelled_and_expired_rows_make_room_at_once() -> None:
    scene = Scene(rows_max=2)
    given_up = scene.offer("given up")
    scene.offer("late", ttl=TICK)
    assert scene.cancel(given_up)
    scene.offer("x")
    scene.batcher.poll(scene.clock())  # takes both rows
    scene.offer("y", ttl=TICK)
    scene.offer("z")
    scene.clock.advance(TICK)
    assert scene.poll() == ["expired y"]
    scene.offer("w")


@pytest.mark.parametrize(("ttl", "taken"), [(TICK, True), (0.0, False), (-TICK, False)])
def test_a_ticket_is_taken_up_to_the_tick_before_its_deadline(ttl: float, taken: bool) -> None:
    scene = Scene()
    if taken:
        scene.offer("x", ttl=ttl)
        assert scene.poll() == ["run a/1: x[0:1]"]
    else:
        with pytest.raises(DeadlineExceeded):
            scene.offer("x", ttl=ttl)
        assert scene.poll() == []
    assert scene.stats().refused == (not taken)


def test_a_deadline_that_is_no_number_is_refused() -> None:
    with pytest.raises(DeadlineExceeded):
        Scene().offer("x", ttl=math.nan)


def test_an_ended_ticket_keeps_no_payload_alive() -> None:
    """Hung device, callers that give up: what they sent must go although they are not in front."""

    class Buffer:
        pass

    scene = Scene(rows_max=4)
    scene.offer("front", ttl=1.0)
    buffer = Buffer()
    ghost = weakref.ref(buffer)
    ticket = Ticket(LaneKey("a"), 1, 1, scene.clock() + 9.0, buffer)
    scene.batcher.offer(ticket, scene.clock())
    assert scene.cancel(ticket)
    del ticket, buffer
    gc.collect()
    assert ghost() is None


def test_a_full_lane_with_no_past_gives_the_default_hint() -> None:
    scene = Scene(rows_max=1)
    scene.offer("x")
    with pytest.raises(LaneFull) as refusal:
        scene.offer("y")
    assert refusal.value.retry_after_ms == 100


def paced(lanes: str = "a", seconds: float = 0.008) -> Scene:
    """A scene whose lane a took `seconds` for 4 rows, and is full with 8 rows, 80 bytes."""
    scene = Scene(lanes=lanes, sizes=(4,), rows_max=8, bytes_max=80)
    scene.offer("past", rows=4)
    scene.poll()
    scene.clock.advance(seconds)
    scene.complete()
    scene.offer("x", rows=4, nbytes=40)
    scene.offer("y", rows=4, nbytes=40)
    return scene


@pytest.mark.parametrize(
    ("rows", "nbytes", "hint"),
    [
        (1, 0, 2),  # one row must leave, 2 ms a row
        (3, 0, 6),
        (1, 40, 8),  # half of the bytes must leave, so half of the rows
    ],
)
def test_the_hint_is_the_time_the_rows_ahead_take(rows: int, nbytes: int, hint: int) -> None:
    scene = paced()
    with pytest.raises(LaneFull) as refusal:
        scene.offer("z", rows=rows, nbytes=nbytes)
    assert refusal.value.retry_after_ms == hint


def test_the_hint_counts_the_lanes_that_share_the_device() -> None:
    scene = paced("ab")
    scene.offer("other", lane="b")
    with pytest.raises(LaneFull) as refusal:
        scene.offer("z", rows=1, nbytes=0)
    assert refusal.value.retry_after_ms == 4


@pytest.mark.parametrize(("seconds", "hint"), [(0.0, 1), (3600.0, 10_000)])
def test_the_hint_is_bounded(seconds: float, hint: int) -> None:
    scene = paced(seconds=seconds)
    with pytest.raises(LaneFull) as refusal:
        scene.offer("z", nbytes=0)
    assert refusal.value.retry_after_ms == hint


def test_the_pace_follows_the_device() -> None:
    scene = paced()  # 2 ms a row, then 10 ms a row for long
    for _ in range(60):
        scene.poll()
        scene.clock.advance(0.040)
        scene.complete()
        if scene.stats().rows == 0:
            scene.offer("more", rows=8, nbytes=0)
    while scene.stats().rows < 8:
        scene.offer("fill", rows=1, nbytes=0)
    with pytest.raises(LaneFull) as refusal:
        scene.offer("z", nbytes=0)
    assert refusal.value.retry_after_ms == 10


# ---- lanes ----------------------------------------------------------------------------------


def test_a_ticket_for_no_lane_is_unavailable_here() -> None:
    scene = Scene(lanes="a")
    with pytest.raises(LaneUnknown, match="'b'") as refusal:
        scene.offer("x", lane="b")
    assert refusal.value.code is Code.UNAVAILABLE


def test_a_draining_lane_finishes_what_it_has_and_takes_no_more() -> None:
    """TF QueueDestructorBlocksUntilAllTasksProcessed, without the blocking."""
    scene, key = Scene(sizes=(1,)), LaneKey("a")
    for label in "xyz":
        scene.offer(label)
    scene.batcher.drain_lane(key)
    scene.batcher.drain_lane(key)
    with pytest.raises(LaneDraining):
        scene.offer("late")
    for left in (3, 2, 1):
        assert not scene.batcher.lane_idle(key), f"{left} left"
        with pytest.raises(LaneBusy, match="drain it first"):
            scene.batcher.remove_lane(key)
        scene.poll()
        with pytest.raises(LaneBusy):  # the last one runs, nothing waits
            scene.batcher.remove_lane(key)
        scene.complete()
    assert scene.batcher.lane_idle(key)
    scene.batcher.remove_lane(key)
    with pytest.raises(LaneUnknown):
        scene.offer("x")
    assert scene.poll() == []


def test_a_draining_lane_may_reopen() -> None:
    scene = Scene()
    scene.offer("x")
    scene.batcher.drain_lane(LaneKey("a"))
    assert scene.stats().draining
    scene.batcher.reopen_lane(LaneKey("a"))
    scene.offer("y")
    assert scene.run_dry() == ["run a/2: x[0:1] y[0:1]", "finished x", "finished y"]


def test_rows_that_wait_for_a_retry_keep_the_lane_busy() -> None:
    scene = Scene()
    scene.offer("x")
    scene.offer("y")
    scene.poll()
    scene.fail()
    assert scene.stats().in_flight == 0
    assert not scene.batcher.lane_idle(LaneKey("a"))
    with pytest.raises(LaneBusy):
        scene.batcher.remove_lane(LaneKey("a"))


def test_a_lane_is_added_once_and_may_come_back() -> None:
    scene, key = Scene(), LaneKey("a")
    with pytest.raises(LaneExists):
        scene.batcher.add_lane(key, Ladder((1,)), 1, 1)
    scene.batcher.remove_lane(key)
    scene.batcher.add_lane(key, Ladder((8,)), 8, 8)
    scene.offer("x", rows=8)
    assert scene.poll() == ["run a/8: x[0:8]"]


@pytest.mark.parametrize("verb", ["drain_lane", "reopen_lane", "remove_lane", "lane_idle"])
def test_a_lane_that_is_not_there_is_unknown_to_every_verb(verb: str) -> None:
    with pytest.raises(LaneUnknown):
        getattr(Scene().batcher, verb)(LaneKey("a", (1,)))


@pytest.mark.parametrize(("rows_max", "bytes_max"), [(0, 1), (1, 0), (-1, 1)])
def test_a_lane_without_room_is_refused(rows_max: int, bytes_max: int) -> None:
    batcher = Batcher(RoundRobin())
    with pytest.raises(InvalidArgument, match="must be positive"):
        batcher.add_lane(LaneKey("a"), Ladder((1,)), rows_max, bytes_max)
    assert batcher.stats().lanes == {}


def test_a_batcher_without_credits_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="must be positive; was 0"):
        Batcher(RoundRobin(), 0)


@pytest.mark.parametrize("name", refusals.__all__)
def test_a_refusal_survives_the_way_between_processes(name: str) -> None:
    refusal = getattr(refusals, name)("why", 250)
    assert isinstance(refusal, ServingError)
    back = pickle.loads(pickle.dumps(refusal))  # noqa: S301  (our own bytes)
    assert type(back) is type(refusal)
    assert (str(back), back.retry_after_ms, back.code) == ("why", 250, refusal.code)
