"""Threads that share out a work: nobody is at it any more when it is over, however it ends."""

from __future__ import annotations

import threading
from collections import deque

import pytest

from shards.crew import Crew


def test_a_work_is_shared_out_and_its_greatest_result_told() -> None:
    pieces = deque(range(100))
    done: list[int] = []

    def work() -> int:
        most = -1
        while pieces:
            try:
                most = max(most, pieces.popleft())
            except IndexError:
                break
            done.append(most)
        return most

    assert Crew(3).run(work) == 99
    assert len(done) == 100


def test_a_work_that_fails_is_over_when_everybody_has_ended() -> None:
    both_began = threading.Barrier(3)
    may_end = threading.Event()
    turns = deque(["fails", "goes on"])
    ended: list[str] = []

    def work() -> int:
        if threading.current_thread() is asker:
            both_began.wait(10)
            threading.Timer(0.02, may_end.set).start()
            return 0
        turn = turns.popleft()
        both_began.wait(10)
        if turn == "fails":
            raise OSError("the disk is gone")
        may_end.wait(10)
        ended.append(turn)
        return 0

    asker = threading.current_thread()
    with pytest.raises(OSError, match="the disk is gone"):
        Crew(3).run(work)
    assert ended == ["goes on"]


def test_what_nobody_has_begun_is_not_begun_when_a_work_is_over() -> None:
    crew = Crew(2)
    let_go = threading.Event()
    crew._pool.submit(let_go.wait, 10)
    calls: list[str] = []

    def fail() -> int:
        calls.append(threading.current_thread().name)
        raise OSError("here")

    with pytest.raises(OSError, match="here"):
        crew.run(fail)
    let_go.set()
    crew._pool.submit(int).result(10)
    assert calls == [threading.current_thread().name]
