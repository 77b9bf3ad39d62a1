"""One bad row fails its own request."""

from __future__ import annotations

import gc
import weakref
from math import ceil, inf, log2

import pytest

from batching import Failed, LaneKey, Run, Ticket, TicketState
from tests.batching.scene import POISON, TICK, Scene


def test_a_failing_batch_is_cut_in_half_until_the_poison_is_alone() -> None:
    scene = Scene(sizes=(1, 2, 4))
    for label in "wxyz":
        scene.offer(label)
    assert scene.run_dry(poison="y") == [
        "run a/4: w[0:1] x[0:1] y[0:1] z[0:1]",
        "run a/2: w[0:1] x[0:1]",
        "finished w",
        "finished x",
        "run a/2: y[0:1] z[0:1]",
        "run a/1: y[0:1]",
        "failed y",
        "run a/1: z[0:1]",
        "finished z",
    ]


@pytest.mark.parametrize("count", range(1, 10))
def test_every_poison_and_nobody_else_fails_and_no_part_is_tried_too_often(count: int) -> None:
    """All sets of poisoned tickets among `count`."""
    labels = "abcdefghi"[:count]
    for mask in range(2**count):
        poison = {label for bit, label in enumerate(labels) if mask >> bit & 1}
        scene = Scene(sizes=(16,))
        for label in labels:
            scene.offer(label)
        told = scene.run_dry(poison="".join(poison))
        assert {line[-1] for line in told if line.startswith("failed")} == poison
        assert {line[-1] for line in told if line.startswith("finished")} == set(labels) - poison
        for label in labels:
            runs = sum(f"{label}[0:1]" in line for line in told)
            assert runs <= 1 + ceil(log2(count)), f"{label} ran {runs} times"


def test_the_error_reaches_the_ticket_that_caused_it() -> None:
    scene = Scene()
    ticket = scene.offer("x")
    scene.poll()
    effects = scene.batcher.fail(scene.device[0].id, POISON, scene.clock())
    assert effects == [Failed(ticket, POISON)]


def test_a_failing_batch_that_holds_one_ticket_of_many_rows_fails_it_whole() -> None:
    """Rows are not cut: a ticket is one request's, and fails as one."""
    scene = Scene(sizes=(4,))
    scene.offer("x", rows=10)
    assert scene.poll() == ["run a/4: x[0:4]"]
    assert scene.fail() == ["failed x"]
    assert scene.poll() == []
    assert scene.stats().rows == scene.stats().nbytes == 0


def test_an_error_in_any_split_ends_the_whole_ticket_once() -> None:
    """TF Serving BatchHandlesSplitError, but the neighbour in the same batch is spared."""
    scene = Scene(sizes=(2,), credits=2)
    scene.offer("split", rows=3)
    scene.offer("neighbour")
    assert scene.poll() == ["run a/2: split[0:2]", "run a/2: split[2:3] neighbour[0:1]"]
    assert scene.fail() == ["failed split"]
    assert scene.fail() == []
    assert scene.run_dry() == ["run a/2: neighbour[0:1]", "finished neighbour"]


def test_retries_go_before_the_line_of_their_lane() -> None:
    scene = Scene(sizes=(2,))
    for label in "xyz":
        scene.offer(label)
    scene.poll()
    scene.fail()
    assert scene.poll() == ["run a/2: x[0:1]"]
    scene.complete()
    assert scene.poll() == ["run a/2: y[0:1]"]
    scene.complete()
    assert scene.poll() == ["run a/2: z[0:1]"]


def test_a_retry_takes_no_new_rows_along() -> None:
    """Else a poison could ride with fresh victims for ever."""
    scene = Scene(sizes=(4,))
    for label in "xyz":
        scene.offer(label)
    scene.poll()
    scene.fail()
    scene.offer("fresh")
    assert scene.poll() == ["run a/4: x[0:1] y[0:1]"]


def test_rows_that_wait_for_a_retry_stay_outside_the_bounds() -> None:
    scene = Scene(sizes=(2,), rows_max=2)
    scene.offer("w")
    scene.offer("x")
    scene.poll()
    scene.offer("y")
    scene.offer("z")
    scene.fail()
    stats = scene.stats()
    assert (stats.rows, stats.retry_rows) == (2, 2)
    assert [told[-1] for told in scene.run_dry() if "finished" in told] == list("wxyz")


@pytest.mark.parametrize(
    ("ticks", "expected"), [(-1, ["run a/2: x[0:1]"]), (0, ["expired x", "run a/2: y[0:1]"])]
)
def test_a_retry_is_not_dispatched_after_the_deadline(ticks: int, expected: list[str]) -> None:
    scene = Scene(sizes=(2,))
    scene.offer("x", ttl=1.0)
    scene.offer("y")
    scene.poll()
    scene.fail()
    assert scene.batcher.next_wakeup() == scene.clock() + 1.0
    scene.clock.advance(1.0 + ticks * TICK)
    assert scene.poll() == expected


def test_a_ticket_cancelled_while_it_waits_for_a_retry_is_left_out() -> None:
    scene = Scene(sizes=(4,))
    tickets = [scene.offer(label) for label in "wxyz"]
    scene.poll()
    scene.fail()
    for ticket in tickets[:3]:
        assert scene.cancel(ticket)
    assert scene.run_dry() == ["run a/4: z[0:1]", "finished z"]


def test_a_batch_whose_tickets_all_ended_is_not_tried_again() -> None:
    scene = Scene(sizes=(2,))
    tickets = [scene.offer(label) for label in "xy"]
    scene.poll()
    for ticket in tickets:
        scene.cancel(ticket)
    assert scene.fail() == []
    assert scene.poll() == []


def test_a_survivor_of_a_failing_batch_gets_another_try() -> None:
    """The ticket that was cancelled may have been the poison."""
    scene = Scene(sizes=(2,))
    poison = scene.offer("poison")
    scene.offer("x")
    scene.poll()
    scene.cancel(poison)
    assert scene.fail() == []
    assert scene.run_dry() == ["run a/2: x[0:1]", "finished x"]


def test_a_ticket_in_two_failing_batches_is_put_together_again() -> None:
    scene = Scene(sizes=(2,), credits=2)
    scene.offer("x")
    scene.offer("split", rows=2)
    scene.offer("y")
    assert scene.poll() == ["run a/2: x[0:1] split[0:1]", "run a/2: split[1:2] y[0:1]"]
    assert scene.fail() == []
    assert scene.fail() == []
    assert (
        scene.run_dry()
        == [
            "run a/2: x[0:1]",
            "run a/2: split[0:1]",
            "finished x",
            "run a/2: split[1:2]",
            "run a/2: y[0:1]",
            "finished split",
            "finished y",
        ]
        or set(scene.device) == set()
    )


def test_a_ticket_that_is_retried_while_its_tail_is_in_line_still_waits() -> None:
    scene = Scene(sizes=(2,))
    scene.offer("x", ttl=0.5)
    ticket = scene.offer("split", rows=2, ttl=1.0)
    assert scene.poll() == ["run a/2: x[0:1] split[0:1]"]
    scene.fail()
    assert [scene.step() for _ in range(2)] == [
        ["run a/2: x[0:1]", "finished x"],
        ["run a/2: split[0:1]"],
    ]
    assert ticket.state is TicketState.WAITING
    assert scene.batcher.next_wakeup() == ticket.deadline
    assert scene.run_dry() == ["run a/2: split[1:2]", "finished split"]


def test_a_retry_that_nobody_waits_for_keeps_no_payload_alive() -> None:
    class Buffer:
        pass

    scene = Scene(sizes=(2,))
    buffer = Buffer()
    ghost = weakref.ref(buffer)
    tickets = [Ticket(LaneKey("a"), 1, 1, inf, payload) for payload in (buffer, None)]
    for ticket in tickets:
        scene.batcher.offer(ticket, scene.clock())
    [run] = scene.batcher.poll(scene.clock())
    assert isinstance(run, Run)
    scene.batcher.fail(run.batch.id, POISON, scene.clock())
    for ticket in tickets:
        scene.cancel(ticket)
    del tickets, ticket, run, buffer
    gc.collect()
    assert ghost() is None


@pytest.mark.parametrize("labels", ["x", "xyz"])
def test_a_lost_device_fails_every_ticket_of_the_batch_at_once(labels: str) -> None:
    scene = Scene(sizes=(4,))
    tickets = [scene.offer(label) for label in labels]
    scene.poll()
    assert scene.fail(fatal=True) == [f"failed {label}" for label in labels]
    assert all(ticket.state is TicketState.FAILED for ticket in tickets)
    assert scene.poll() == []


def test_a_lost_device_does_not_end_a_ticket_that_had_ended() -> None:
    scene = Scene(sizes=(4,))
    given_up = scene.offer("given up")
    scene.offer("x")
    scene.poll()
    scene.cancel(given_up)
    assert scene.fail(fatal=True) == ["failed x"]


def test_a_lost_device_ends_the_rows_in_line_of_a_split_ticket() -> None:
    scene = Scene(sizes=(2,))
    scene.offer("split", rows=3)
    scene.offer("y")
    scene.poll()
    assert scene.fail(fatal=True) == ["failed split"]
    assert scene.run_dry() == ["run a/2: y[0:1]", "finished y"]
