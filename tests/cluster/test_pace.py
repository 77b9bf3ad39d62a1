"""Which replica of a shard is asked: by what it owes, and by how quickly it answered."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from cluster.pace import FRESH_S, LATE_S, Pace, quickest


class Replica:
    def __init__(self, name: str) -> None:
        self.name = name
        self.pace = Pace()
        self.in_flight = 0


def replicas(*row_us: float, now: float = 0.0) -> list[Replica]:
    """Replicas with what a row takes there; nothing is known of one that takes nothing."""
    made = [Replica(f"r{at}") for at in range(len(row_us))]
    for replica, each in zip(made, row_us, strict=True):
        if each:
            replica.pace.answered(each * 1e-6, 1, now)
    return made


def chosen(made: Sequence[Replica], now: float = 0.0, rows: int = 8) -> Replica:
    found = quickest(made, rows, now)
    assert found is not None
    return found


def test_without_replicas_nobody_is_chosen() -> None:
    assert quickest([], 1, 0.0) is None


def test_who_would_be_done_first_is_asked() -> None:
    quick, slow = made = replicas(1, 4)
    assert chosen(made) is quick
    quick.pace.sent(8)
    quick.pace.sent(8)
    assert chosen(made) is quick
    for _ in range(4):
        quick.pace.sent(8)
    assert chosen(made) is slow
    for _ in range(6):
        quick.pace.ended(8)
    assert chosen(made) is quick
    assert quick.pace.owed == 0


def test_equals_take_turns() -> None:
    made = replicas(1.0, 1.1, 1.2)
    names = [chosen(made, now=at * 0.001).name for at in range(6)]
    assert sorted(names[:3]) == sorted(names[3:]) == ["r0", "r1", "r2"]


def test_who_has_never_answered_gets_one_part_while_others_are_known() -> None:
    known, fresh = made = replicas(1, 0)
    assert chosen(made) is fresh
    fresh.pace.sent(8)
    known.pace.sent(8)
    assert chosen(made) is known


def test_where_nobody_has_answered_yet_parts_are_shared_out() -> None:
    made = replicas(0, 0)
    for at in range(10):
        chosen(made, now=at * 0.001).pace.sent(8)
    assert [replica.pace.owed for replica in made] == [200, 200]


def test_who_was_slow_and_is_not_heard_of_is_tried_with_one_part() -> None:
    quick, slow = made = replicas(1, 4)
    quick.pace.answered(1e-6, 1, FRESH_S)
    assert chosen(made, now=FRESH_S) is quick
    assert chosen(made, now=FRESH_S + 0.01) is slow
    slow.pace.sent(8)
    assert chosen(made, now=FRESH_S + 0.02) is quick


def test_who_was_late_is_the_last_choice_for_a_while() -> None:
    late, other = made = replicas(1, 40)
    late.pace.late_until = LATE_S
    assert chosen(made, now=0.1) is other
    assert chosen([late], now=0.1) is late
    assert chosen(made, now=LATE_S) is late


def test_who_was_outrun_took_at_least_so_long_and_is_not_thought_quicker_for_it() -> None:
    [replica] = replicas(1)
    replica.pace.outrun(0.5e-6, 1, 1.0)
    assert replica.pace.row_s == 1e-6
    replica.pace.outrun(0.1, 1, 1.0)
    assert replica.pace.row_s > 0.01


# A story: one replica of three is four times slower; each does one part after the other.

Choice = Callable[[Sequence[Replica], float], Replica]


def served(choose: Choice, seed: int) -> tuple[float, float]:
    """The 99th percentile in ms, and the slow replica's share of the parts."""
    chance = random.Random(seed)
    made = replicas(0, 0, 0)
    takes_s = [0.001, 0.001, 0.004]
    free_at = [0.0] * 3
    ends: list[tuple[float, int, float, int]] = []
    latencies: list[float] = []
    counts = [0, 0, 0]
    now = 0.0
    for _ in range(6000):
        now += chance.expovariate(0.85 * 2250)
        while ends and ends[0][0] <= now:
            end, at, since, owed = heapq.heappop(ends)
            made[at].pace.ended(8)
            made[at].pace.answered(end - since, owed, end)
            latencies.append(end - since)
        replica = choose(made, now)
        at = made.index(replica)
        counts[at] += 1
        free_at[at] = max(free_at[at], now) + takes_s[at] * chance.uniform(0.8, 1.2)
        heapq.heappush(ends, (free_at[at], at, now, replica.pace.sent(8)))
    return 1000 * float(np.percentile(latencies, 99)), counts[2] / sum(counts)


@pytest.mark.parametrize("seed", range(2))
def test_a_replica_four_times_slower_gets_its_just_share_and_does_not_make_the_rest_wait(
    seed: int,
) -> None:
    p99_ms, share = served(lambda made, now: chosen(made, now), seed)
    fewest_ms, fewest_share = served(
        lambda made, now: min(made, key=lambda replica: replica.pace.owed), seed
    )
    assert 0.03 < share < 1 / 9 < fewest_share
    assert p99_ms < 0.7 * fewest_ms
