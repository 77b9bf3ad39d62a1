"""The open loop's arithmetic, and a real device actor under it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from math import isnan
from typing import Any

import numpy as np
import pytest

from batching import LaneKey
from batching.errors import DeadlineExceeded, ResourceExhausted, ServingError
from batching.simulation import Arrival
from bench import device_model
from bench.device_actor import AIMD, UsePolicy
from bench.device_scene import device_scene
from bench.errors import LoadFailed
from bench.open_loop import OpenLoop, Outcome, OwnerOutcome

LANE = LaneKey("unit")


class Routed:
    """In a router's place: answers as it is told, some time after it was asked."""

    def __init__(self, end: Callable[[Any, float], None]) -> None:
        self.routes = self
        self.plans = {"serving_default": "plan"}
        self.deadlines: list[float] = []
        self._end = end

    def find(self, owner: str) -> Routed:
        return self

    def submit(
        self, plan: str, inputs: Mapping[str, Any], rows: int, deadline: float, sink: Any
    ) -> None:
        self.deadlines.append(deadline)
        self._end(sink, deadline)


def offered(end: Callable[[Any, float], None], *arrivals: Arrival, warm_s: float) -> Outcome:
    async def run() -> Outcome:
        load = OpenLoop(Routed(end), [{}])  # type: ignore[arg-type]
        return await load.offer(arrivals, warm_s=warm_s)

    return asyncio.run(run())


def failing(*errors: ServingError) -> Callable[[Any, float], None]:
    left = list(errors)
    return lambda sink, deadline: sink.failed(left.pop(0)) if left else sink.done({}, None)


def test_what_leaves_in_the_warm_up_is_sent_and_not_counted() -> None:
    arrivals = [Arrival(at, LANE, "a", 1, 1.0) for at in (0.0, 0.01, 0.02, 0.03)]
    outcome = offered(failing(ResourceExhausted("full", 1)), *arrivals, warm_s=0.01)
    assert outcome.owners["a"].offered == outcome.owners["a"].good == 3
    assert outcome.seconds == pytest.approx(0.02)
    assert outcome.goodput == pytest.approx(3 / 0.02)


def test_errors_are_counted_by_code_and_are_not_good() -> None:
    arrivals = [Arrival(0.01 * n, LANE, "ab"[n % 2], 1, 1.0) for n in range(4)]
    errors = (ResourceExhausted("full", 1), DeadlineExceeded("late"))
    outcome = offered(failing(*errors), *arrivals, warm_s=0.0)
    assert outcome.owners["a"].errors == {"RESOURCE_EXHAUSTED": 1}
    assert outcome.owners["b"].errors == {"DEADLINE_EXCEEDED": 1}
    assert [outcome.owners[name].attainment for name in "ab"] == [0.5, 0.5]
    assert outcome.attainment == 0.5
    assert len(outcome.owners["a"].latencies_s) == 1


def test_a_late_answer_is_not_good_and_its_latency_counts_from_the_intended_departure() -> None:
    def late(sink: Any, deadline: float) -> None:
        until = time.monotonic() + 0.2
        while time.monotonic() < until:  # the generator itself is held up
            pass
        sink.done({}, None)

    arrivals = [Arrival(0.0, LANE, "a", 1, 20.0), Arrival(0.001, LANE, "a", 1, 0.1)]
    outcome = offered(late, *arrivals, warm_s=0.0)
    assert outcome.owners["a"].good == 1
    assert outcome.owners["a"].latencies_s[1] > 0.35
    assert outcome.behind_s > 0.15
    assert outcome.percentile_s(99) == outcome.owners["a"].latencies_s[1]


def test_a_deadline_counts_from_the_intended_departure() -> None:
    """However late a request really leaves: deadlines are as far apart as departures were meant."""
    routed = Routed(lambda sink, deadline: sink.done({}, None))

    async def run() -> None:
        load = OpenLoop(routed, [{}])  # type: ignore[arg-type]
        arrivals = [Arrival(at, LANE, "a", 1, 5.0) for at in (0.0, 0.02)]
        await load.offer(arrivals, warm_s=0.0)

    asyncio.run(run())
    assert routed.deadlines[1] - routed.deadlines[0] == pytest.approx(0.02, abs=1e-6)


def test_nothing_asked_is_all_in_time_and_nothing_answered_has_no_latency() -> None:
    nobody = OwnerOutcome(offered=0, good=0, latencies_s=np.array([]), errors={})
    assert nobody.attainment == 1.0
    outcome = Outcome(seconds=1.0, owners={"a": nobody}, behind_s=0.0)
    assert isnan(outcome.percentile_s(50))


def test_a_model_answers_what_numpy_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_model, "_WIDTH", 16)
    weights = device_model.parameters(3)
    pair = device_model.rows(5, 0)
    found = device_model._encode(weights, pair)  # type: ignore[arg-type]
    expected = device_model.answer(weights, pair)
    np.testing.assert_allclose(found[device_model.OUTPUT], expected, rtol=1e-4)
    assert len(set(expected.tolist())) == 5


@pytest.mark.timeout(120)
def test_a_real_device_actor_is_told_its_policy_and_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device_model, "_WIDTH", 16)

    async def run() -> None:
        async with device_scene(1, buckets=(1, 4)) as scene:
            [name] = scene.servables
            assert set(scene.curve) == {1, 4}
            assert scene.bare(name, 0.02) > 0
            assert await scene.single_row_s(4) > 0
            assert await scene.capacity(name, 0.05) > 0
            for policy in ("effsafe", "shrink", AIMD):
                scene.use(UsePolicy(policy))
                before = scene.counts().lanes[name].rows
                arrivals = [Arrival(0.002 * n, LANE, name, 1, 30.0) for n in range(50)]
                outcome = await scene.offer(arrivals, warm_s=0.05)
                assert outcome.attainment == 1.0
                assert scene.counts().lanes[name].rows == before + 50
            with pytest.raises(LoadFailed, match="has ended"):
                scene.use(UsePolicy("no such policy"))

    cores = os.sched_getaffinity(0)
    asyncio.run(run())
    assert os.sched_getaffinity(0) == cores
