"""What the bench of fan-out makes of its rounds."""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt

from bench import fanout
from bench.fanout_compute import WAYS, Turn
from bench.fanout_hedging import Round
from bench.report import Result, json_line


def latencies(p99_ms: float) -> npt.NDArray[np.float64]:
    return np.concatenate([np.full(95, 2.0), np.full(5, p99_ms)])


def result() -> Result:
    compute = {
        way: [Turn(latencies_ms=latencies(p99_ms), behind_ms=0.5) for _ in range(3)]
        for way, p99_ms in (("whole", 20.0), ("sharded", 21.0))
    }
    hedged = {
        way: [
            Round(latencies_ms=latencies(p99_ms), extra_calls=extra, behind_ms=0.5)
            for _ in range(3)
        ]
        for way, p99_ms, extra in (
            ("plain", 50.0, 0.0),
            ("second calls", 10.0, 0.03),
            ("product", 5.0, 0.02),
        )
    }
    return fanout._result(compute, hedged, {"quick": True}, seed=0)


def test_ratios_are_of_99th_percentiles_and_of_second_calls() -> None:
    assert result().ratios == {
        "p99_vs_single_process": 1.05, "hedging_p99_cut": 10.0, "hedging_extra_calls": 0.02,
    }  # fmt: skip


def test_every_way_is_told_with_its_percentiles_and_samples() -> None:
    told = json.loads(json_line(result()))["figures"]
    assert {told[f"{way}_p50_ms"] for way in (*WAYS, "plain", "second_calls", "product")} == {2.0}
    assert told["plain_extra_calls"] == 0
    assert (told["second_calls_alone_p99_cut"], told["second_calls_alone_extra_calls"]) == (5, 0.03)
    assert len(result().samples["requests"].rows) == 5 * 3 * 100
