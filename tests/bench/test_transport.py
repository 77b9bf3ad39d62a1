"""What the bench of the data plane makes of outcomes, and that it measures what it says."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pytest
import uvloop

from bench import transport
from bench.errors import AnswersDiffer, LoadFailed
from bench.registry import Options
from bench.report import Figure, json_line
from bench.transport_echo import ECHO, GENERATION, NAME, NODE
from bench.transport_load import LinkContender, RayContender, Timed
from bench.transport_ray import EchoActor
from shards.orders import Endpoint
from shards.transport import Link
from shards.transport.raycalls import connect_actor
from shards.wire import CallHeader, Frame, FrameKind, ReplyHeader

CASES = (*transport.SIZES, "pipelined", "behind_call", "behind_answer")
CONDITIONS: dict[str, Figure] = {"machine": {"load_1min": 0.1, "cpus": 2}}
SMALL = np.arange(64, dtype=np.uint8)


def _timed(latency_us: float) -> Timed:
    return Timed(latency_us=np.full(100, latency_us), elapsed_s=0.5)


def _outcomes(**ways: Sequence[float]) -> dict[tuple[str, str], list[Timed]]:
    """Each way's latencies of its rounds, in every case."""
    return {
        (way, case): [_timed(latency_us) for latency_us in rounds]
        for way, rounds in ways.items()
        for case in CASES
        if way != "ray_call" or not case.startswith("behind")
    }


def test_marked_figures_are_the_medians_and_the_ratio_is_paired_by_round() -> None:
    outcomes = _outcomes(uds=(20.0, 40.0, 30.0), ray_call=(400.0, 1200.0, 450.0))
    outcomes["uds", "1mb"] = [_timed(600.0)] * 3
    outcomes["uds", "behind_answer"] = [_timed(4000.0)] * 3
    result = transport._result(outcomes, CONDITIONS, seed=0)
    assert result.ratios == {
        "uds_small_us": pytest.approx(30.0),
        "uds_1mb_ms": pytest.approx(0.6),
        "small_behind_256mb_ms": pytest.approx(4.0),  # the worse direction
        "ray_call_over_uds_small": pytest.approx(20.0),
    }
    figures = json.loads(json_line(result))["figures"]
    assert figures["uds_pipelined_rps"] == 200.0
    assert figures["ray_call_64mb_p50_us"] == 450.0
    assert figures["intervals"]["ray_call_over_uds_small"] == pytest.approx([15.0, 30.0])
    assert figures["rounds"] == 3


def test_without_ray_there_is_no_ratio_to_it() -> None:
    result = transport._result(_outcomes(uds=(20.0,), tcp=(30.0,)), CONDITIONS, seed=0)
    assert "ray_call_over_uds_small" not in result.ratios
    assert result.plot is not None
    assert [series.label for series in result.plot.series] == ["uds", "tcp"]
    assert result.samples["latency-tcp-1mb"].rows == [(30.0, 100)]


@pytest.mark.parametrize(("load", "told"), [(0.1, 0), (1.5, 1)])
def test_a_busy_machine_is_told(load: float, told: int) -> None:
    conditions: dict[str, Figure] = {"machine": {"load_1min": load, "cpus": 2}}
    result = transport._result(_outcomes(uds=(20.0,)), conditions, seed=0)
    assert sum("busy" in note for note in result.notes) == told


@pytest.mark.slow
def test_links_are_measured_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real far end, with frames that are smaller than those of a run."""
    monkeypatch.setattr(transport, "SIZES", {"small": 64, "1mb": 1 << 20})
    monkeypatch.setattr(transport, "_BIG_BYTES", 8 << 20)
    options = Options(quick=True, rounds=1, own=argparse.Namespace(no_ray=True))
    result = transport.BENCH.run(options)
    assert set(result.ratios) == {"uds_small_us", "uds_1mb_ms", "small_behind_256mb_ms"}
    assert all(0 < ratio < 1e5 for ratio in result.ratios.values())
    rate = result.figures["tcp_pipelined_rps"]
    assert isinstance(rate, float)
    assert rate > 100


class _Method:
    """What an actor's method looks like to a caller."""

    def __init__(self, method: Callable[..., Awaitable[Any]]) -> None:
        self._method = method

    def remote(self, *arguments: Any) -> asyncio.Future[Any]:
        return asyncio.ensure_future(self._method(*arguments))


class _Handle:
    """What a handle of the actor looks like to a caller."""

    def __init__(self) -> None:
        actor = EchoActor("secret")
        self.echo = _Method(actor.echo)
        self.plane_send = _Method(actor.plane_send)
        self.plane_receive = _Method(actor.plane_receive)


def test_a_link_over_the_actors_calls_is_answered_by_the_same_echo() -> None:
    async def scenario() -> None:
        handler = LinkContender("link_over_ray", big=True)
        endpoint = Endpoint(actor=NAME, generation=GENERATION, node=NODE)
        link = await connect_actor(
            _Handle(), endpoint, name="t", node=NODE, secret=b"secret", handler=handler
        )
        contender = handler.over(link)
        timed = await contender.round_trips(SMALL, duration_s=0.02, window=8)
        assert timed.latency_us.size >= 8
        assert timed.rate > 0
        for outward in (True, False):
            big = np.zeros(1 << 20, np.uint8)
            behind = await contender.small_behind(SMALL, big, outward=outward)
            assert behind.latency_us.size >= 1
        await contender.close()

    uvloop.run(scenario())


def test_plain_calls_are_timed_one_by_one_and_many_at_a_time() -> None:
    async def scenario() -> None:
        contender = RayContender("ray_call", _Handle())
        for window in (1, 4):
            timed = await contender.round_trips(SMALL, duration_s=0.01, window=window)
            assert timed.latency_us.size >= window

    asyncio.run(scenario())


class _ScriptedLink:
    """Answers each call in its next turn, with what the script makes of it."""

    peer: Any = None
    waiting_bytes = 0

    def __init__(self, handler: LinkContender, answer: Callable[[bytes], bytes | None]) -> None:
        self._handler = handler
        self._answer = answer

    def send(
        self, kind: FrameKind, header: Any, buffers: Sequence[Any] = (), stream: int = 0
    ) -> None:
        assert isinstance(header, CallHeader)
        assert header.op == ECHO
        item = header.items[0]
        body = self._answer(b"".join(buffers))
        loop = asyncio.get_running_loop()
        if body is None:
            loop.call_soon(self._handler.on_closed, self, None)
            return
        reply = ReplyHeader("unit", 1, [(item.request, item.rows)], [])
        frame = Frame(FrameKind.REPLY, stream, reply, memoryview(body))
        loop.call_soon(self._handler.on_frame, self, frame)

    def flush(self) -> None: ...

    def close(self, reason: str = "") -> None: ...


@pytest.mark.parametrize(
    ("answer", "error"),
    [(lambda body: body[::-1], AnswersDiffer), (lambda body: None, LoadFailed)],
)
def test_a_wrong_or_missing_answer_ends_the_run(
    answer: Callable[[bytes], bytes | None], error: type[Exception]
) -> None:
    async def scenario() -> None:
        contender = LinkContender("uds", big=False)
        link: Link = _ScriptedLink(contender, answer)
        with pytest.raises(error, match="uds"):
            await contender.over(link).round_trips(SMALL, duration_s=0.01, window=1)

    asyncio.run(scenario())
