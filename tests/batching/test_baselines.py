"""The policies to compare with: each by its own rule, and all of them safe."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batching import (
    Aimd,
    Batch,
    Batcher,
    EarliestDeadline,
    EffSafe,
    FairShare,
    FirstCome,
    Ladder,
    LaneKey,
    LeastSlack,
    Policy,
    RoundRobin,
    Run,
    Shrink,
    TicketState,
)
from batching.errors import InvalidArgument, ResourceExhausted
from batching.testing import CheckedTicket
from tests.batching.scene import Scene

POLICIES: dict[str, Callable[[], Policy]] = {
    "aimd": lambda: Aimd(0.5),
    "effsafe": EffSafe,
    "edf": EarliestDeadline,
    "fair": FairShare,
    "fifo": FirstCome,
    "fifo without drop": lambda: FirstCome(early_drop=False),
    "slack": LeastSlack,
    "rr": RoundRobin,
    "shrink": Shrink,
    "rr with drop": lambda: RoundRobin(early_drop=True),
}


def first_run(policy: Policy, *offers: tuple[str, str, int, float]) -> str:
    """The first batch, of offers of (label, lane, rows, seconds to live)."""
    scene = Scene(lanes="abc", policy=policy)
    for label, lane, rows, ttl in offers:
        scene.offer(label, rows, lane, ttl)
    told = scene.poll()
    assert len(told) == 1
    return told[0].split(":")[0]


def test_first_come_is_first_served() -> None:
    assert first_run(FirstCome(), ("x", "b", 1, 9.0), ("y", "a", 1, 1.0)) == "run b/1"


def test_the_earliest_deadline_goes_first() -> None:
    assert first_run(EarliestDeadline(), ("x", "b", 1, 9.0), ("y", "a", 1, 1.0)) == "run a/1"


def test_least_slack_counts_what_the_batch_takes() -> None:
    scene = Scene(lanes="ab", policy=LeastSlack())
    for _ in range(50):
        scene.batcher.costs[LaneKey("b")].observe(1, 0.5)
    scene.offer("x", lane="a", ttl=2.0)
    scene.offer("y", lane="b", ttl=2.2)
    assert scene.poll() == ["run b/1: y[0:1]"]


def test_a_fair_share_goes_to_whom_has_had_least() -> None:
    batcher = Batcher(FairShare(), 1, credit_s=1.0)
    for unit in "ab":
        batcher.add_lane(LaneKey(unit), Ladder((1,)), 10, 10)
    batcher.shares.charge("greedy", 5.0)
    for unit, owner in (("a", "greedy"), ("b", "modest")):
        batcher.offer(CheckedTicket(LaneKey(unit), 1, 0, 9.0, owner=owner), 0.0)
    [run] = batcher.poll(0.0)
    assert isinstance(run, Run)
    assert run.batch.lane == LaneKey("b")


def test_shrink_saves_the_head_at_the_cost_of_the_batch() -> None:
    scene = Scene(policy=Shrink())
    for size, seconds in ((1, 0.1), (2, 0.2), (4, 0.4)):
        scene.batcher.costs[LaneKey("a")].observe(size, seconds)
    for label, ttl in (("gone", 0.05), ("head", 0.3), ("x", 9.0), ("y", 9.0), ("z", 9.0)):
        scene.offer(label, ttl=ttl)
    assert scene.poll() == ["shed gone", "run a/2: head[0:1] x[0:1]"]


def clipper(*batches: tuple[int, float]) -> int:
    """The limit after batches of (rows, seconds), of an objective of a second."""
    policy = Aimd(1.0)
    policy.added(LaneKey("a"))
    for rows, seconds in batches:
        policy.landed(Batch(1, LaneKey("a"), 64, rows, [], 10.0), 10.0 + seconds)
    return policy.limit_of(LaneKey("a"))


def test_clippers_limit_grows_by_one_and_shrinks_by_a_tenth() -> None:
    growing = [(rows, 1.0) for rows in range(1, 20)]
    assert clipper() == 1
    assert clipper(*growing) == 20
    assert clipper(*growing, (20, 1.1)) == 18
    assert clipper(*growing, (20, 1.1), (18, 1.1)) == 16
    assert clipper((1, 9.0), (1, 9.0)) == 1


def test_clippers_limit_learns_nothing_from_a_batch_that_was_not_full() -> None:
    assert clipper((1, 0.1), (1, 0.1), (1, 0.1)) == 2


def test_clippers_lanes_take_turns_within_their_limits_and_the_compiled_sizes() -> None:
    scene = Scene(lanes="ab", sizes=(1, 2), policy=Aimd(1.0))
    for label in "stuvwxyz":
        scene.offer(label, lane="a")
    scene.offer("other", lane="b")
    sizes = [told.split()[1][:-1] for told in scene.run_dry() if "run" in told]
    assert sizes == ["a/1", "b/1", "a/2", "a/2", "a/2", "a/1"]


def test_clipper_forgets_a_lane_whose_last_batch_is_still_out() -> None:
    policy = Aimd(1.0)
    policy.added(LaneKey("a"))
    policy.removed(LaneKey("a"))
    policy.landed(Batch(1, LaneKey("a"), 1, 1, [], 0.0), 0.1)
    with pytest.raises(KeyError):
        policy.limit_of(LaneKey("a"))


def test_an_objective_is_positive() -> None:
    with pytest.raises(InvalidArgument, match="an objective is positive"):
        Aimd(0.0)


ticket_shapes = st.tuples(
    st.sampled_from("abc"),  # lane
    st.sampled_from(("m", "n", "")),  # owner
    st.integers(1, 6),  # rows
    st.sampled_from((0.5, 1.0, 3.0, float("inf"))),  # seconds to live
    st.integers(-1, 1),  # priority
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("offer"), ticket_shapes),
        st.tuples(st.just("pass"), st.sampled_from((0.0, 0.2, 0.9))),
        st.tuples(st.just("land"), st.integers(0, 2)),
        st.tuples(st.just("fail"), st.integers(0, 2)),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
    ),
    max_size=40,
)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=60, deadline=None)
@given(steps, st.sampled_from((0.0, 0.1, float("inf"))))
def test_under_every_policy_every_ticket_ends_once_and_no_row_runs_late(
    name: str, script: list[tuple[str, object]], lead_s: float
) -> None:
    scene = Scene(
        lanes="abc", sizes=(1, 2, 4), rows_max=12, credits=2, policy=POLICIES[name](), lead_s=lead_s
    )
    offered: list[CheckedTicket] = []
    for verb, what in script:
        match verb, what:
            case "offer", (str(lane), str(owner), int(rows), float(ttl), int(priority)):
                ticket = CheckedTicket(
                    LaneKey(lane), rows, 1, scene.clock() + ttl, str(len(offered)), owner, priority
                )
                try:
                    scene.batcher.offer(ticket, scene.clock())
                except ResourceExhausted:
                    continue
                offered.append(ticket)
            case "pass", float(seconds):
                scene.clock.advance(seconds)
            case "land", int() if scene.device:
                scene.complete()
            case "fail", int() if scene.device:
                scene.fail()
            case "cancel", int(choice) if offered:
                scene.cancel(offered[choice % len(offered)])
        flying = len(scene.device)
        scene.poll()
        for batch in scene.device[flying:]:
            assert all(ticket.deadline > scene.clock() for ticket, _, _ in batch.parts)
            ranks = [(-ticket.priority, ticket.deadline) for ticket, _, _ in batch.parts]
            owners = {ticket.owner for ticket, _, _ in batch.parts}
            assert ranks == sorted(ranks) or len(owners) > 1 or scene.stats().bisections
    while scene.device or scene.batcher.has_waiting:
        scene.step()
    ended = {
        TicketState.FINISHED,
        TicketState.FAILED,
        TicketState.EXPIRED,
        TicketState.SHED,
        TicketState.CANCELLED,
    }
    # `CheckedTicket` refuses a second end, and any other step that is not in the table.
    assert {ticket.state for ticket in offered} <= ended
    assert not scene.batcher.has_waiting
