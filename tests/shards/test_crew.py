"""Threads that share a work out: who takes part, who is waited for, and what goes wrong."""

from __future__ import annotations

import gc
import threading

import pytest

from shards.crew import Crew
from tests.shards.serving import DEADLINE_S, eventually


def test_everybody_takes_part_and_the_greatest_result_counts() -> None:
    crew, met, lock = Crew(3), threading.Barrier(3), threading.Lock()
    numbers = [4, 9, 2]

    def work() -> int:
        met.wait(DEADLINE_S)  # all three are here at once
        with lock:
            return numbers.pop()

    assert crew.run(work) == 9
    assert not numbers


def test_who_is_busy_with_what_others_asked_for_is_not_waited_for() -> None:
    crew, begun, go = Crew(2), threading.Semaphore(0), threading.Event()

    def slow() -> int:
        begun.release()
        assert go.wait(DEADLINE_S)
        return 1

    asker = threading.Thread(target=crew.run, args=(slow,))
    asker.start()
    for _ in range(2):  # the asker and the only helper
        assert begun.acquire(timeout=DEADLINE_S)
    calls: list[int] = []

    def quick() -> int:
        calls.append(1)
        return 5

    assert crew.run(quick) == 5
    assert calls == [1]
    go.set()
    asker.join(DEADLINE_S)
    # What came too late is never begun.
    assert crew.run(lambda: 2) == 2
    assert calls == [1]


@pytest.mark.parametrize("who", ["asker", "helper"])
def test_a_work_that_fails_fails_its_asker_once_all_have_ended(who: str) -> None:
    crew, met = Crew(2), threading.Barrier(2)
    ended: list[bool] = []

    def work() -> int:
        is_asker = threading.current_thread() is threading.main_thread()
        met.wait(DEADLINE_S)
        if is_asker == (who == "asker"):
            raise ValueError("wrong")
        ended.append(True)
        return 1

    with pytest.raises(ValueError, match="wrong"):
        crew.run(work)
    assert ended == [True]
    assert crew.run(lambda: 3) == 3


def test_threads_end_when_nobody_has_the_crew_any_more() -> None:
    crew = Crew(3, name="of a test")
    crew.run(lambda: 1)
    mine = [each for each in threading.enumerate() if each.name.startswith("of a test")]
    assert len(mine) == 2
    del crew
    gc.collect()
    eventually(lambda: not any(each.is_alive() for each in mine))
