"""What the bench of fan-out makes of its rounds."""

from __future__ import annotations

import json

import numpy as np

from bench import fanout
from bench.fanout import Round
from bench.report import json_line


def rounds(p99_ms: float, extra_calls: float) -> list[Round]:
    latencies = np.concatenate([np.full(95, 2.0), np.full(5, p99_ms)])
    return [Round(latencies_ms=latencies, extra_calls=extra_calls, behind_ms=0.5) for _ in range(3)]


def test_the_cut_is_the_plain_p99_over_the_hedged_one() -> None:
    outcomes = {"plain": rounds(50.0, 0.0), "hedged": rounds(5.0, 0.02)}
    result = fanout._result(outcomes, {"quick": True}, seed=0)
    assert result.ratios == {"hedging_p99_cut": 10.0, "hedging_extra_calls": 0.02}
    told = json.loads(json_line(result))
    assert told["figures"]["plain_p50_ms"] == told["figures"]["hedged_p50_ms"] == 2.0
    assert told["figures"]["plain_extra_calls"] == 0
    assert len(result.samples["requests"].rows) == 2 * 3 * 100
