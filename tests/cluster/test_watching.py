"""Actors that are silent, and what ends are called."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from cluster.watching import SILENT_S, START_S, heard, reason_of
from cluster.world import ControlSettings
from shards.orders import Outcome, encode
from tests.cluster.routing_fakes import VirtualLoop, run_virtually


def test_an_answer_in_time_is_what_it_says() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        async def answer() -> bytes:
            await asyncio.sleep(4.9)
            return encode(Outcome(message="well"))

        assert await heard(answer(), Outcome, 5.0) == Outcome(message="well")

    run_virtually(scenario)


def test_who_says_nothing_is_given_up_at_the_bound_and_not_before() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        began = loop.time()
        with pytest.raises(TimeoutError) as caught:
            await heard(loop.create_future(), Outcome, 20.0)
        assert loop.time() - began == pytest.approx(20.0)
        assert reason_of(caught.value) == "not a word from it for 20 s"

    run_virtually(scenario)


def test_what_was_said_while_this_process_stood_still_is_heard() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        answer = loop.create_future()
        loop.call_later(10.0, loop.stand_still, 60.0)
        # It came long ago, and is handed over by another thread after the clock has rung.
        loop.call_at(loop.time() + 70.1, answer.set_result, encode(Outcome(message="well")))
        assert await heard(answer, Outcome, 20.0) == Outcome(message="well")

    run_virtually(scenario)


def test_the_actors_own_error_is_raised_as_it_is() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        async def dies() -> bytes:
            raise OSError("gone")

        with pytest.raises(OSError, match="gone"):
            await heard(dies(), Outcome, 20.0)

    run_virtually(scenario)


def test_an_answer_that_is_none_is_no_silence() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        async def odd() -> bytes:
            return b"\x01"

        with pytest.raises(msgspec.ValidationError):
            await heard(odd(), Outcome, 20.0)

    run_virtually(scenario)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError("The actor died.\nWorker exit type: SYSTEM_ERROR Worker exit detail: x"),
         "its process ended (SYSTEM_ERROR)"),
        (ValueError("first\n\nlast  \n"), "ValueError: last"),
        (KeyError(), "KeyError: "),
    ],
)  # fmt: skip
def test_a_reason_is_one_line(error: Exception, text: str) -> None:
    assert reason_of(error) == text


def test_a_start_is_given_up_before_it_is_asked_for_again() -> None:
    assert SILENT_S < START_S < ControlSettings().start_timeout_s
