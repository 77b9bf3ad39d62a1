"""Calls that hang hold up nobody but themselves."""

from __future__ import annotations

import threading

import pytest

from batching.errors import Unavailable
from shards.calls import Calls, under_way


def test_a_result_and_an_error_come_back() -> None:
    calls = Calls(2)
    assert calls.run("asking", lambda: 7, 5.0) == 7

    def broken() -> int:
        raise KeyError("x")

    with pytest.raises(KeyError):
        calls.run("asking", broken, 5.0)


def test_who_waits_for_a_call_that_hangs_is_told_in_time() -> None:
    release = threading.Event()
    calls = Calls(2)
    with pytest.raises(Unavailable, match="asking: no answer in time"):
        calls.run("asking", release.wait, 0.05)
    assert under_way()
    assert calls.run("asking", lambda: "next", 5.0) == "next"
    release.set()


def test_calls_that_hang_are_bounded_and_their_places_come_back() -> None:
    release = threading.Event()
    calls = Calls(3)
    for _ in range(3):
        with pytest.raises(Unavailable):
            calls.run("asking", release.wait, 0.0)
    with pytest.raises(Unavailable, match="3 earlier calls"):
        calls.run("asking", lambda: 1, 0.05)
    release.set()
    assert calls.run("asking", lambda: 1, 5.0) == 1
