"""What the bench of pooled look-ups makes of its rounds, and that answers are held together."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import lookup
from bench.errors import AnswersDiffer, ToolMissing
from bench.lookup import OURS, SHAPES, Told, Turn
from bench.report import json_line


def test_a_ratio_is_torchs_time_over_ours_in_the_same_round() -> None:
    outcomes = {(label, shape): [2.0, 4.0, 6.0] for label in OURS for shape in SHAPES}
    outcomes |= {("torch", shape): [3.0, 6.0, 9.0] for shape in SHAPES}
    result = lookup._result(outcomes, {}, seed=0)
    told = json.loads(json_line(result))
    assert told["ratios"] == {f"shard_vs_torch_{shape}": 1.5 for shape in SHAPES}
    assert told["figures"]["int32 ids_vs_torch_64x520"] == [1.5, 1.5, 1.5]


def test_another_sum_than_torchs_is_no_answer() -> None:
    lookup._check({"torch": Told([], 1.0), "shard": Told([], 1.0)})
    with pytest.raises(AnswersDiffer, match="shard sums up to 2"):
        lookup._check({"torch": Told([], 1.0), "shard": Told([], 2.0)})


@pytest.mark.parametrize("label", OURS)
def test_every_layout_gives_the_same_sums(tmp_path: Path, label: str) -> None:
    turn = Turn(bags=5, length=7, seed=1, calls=2)
    digests = set()
    for name in ("shard", label):
        dtype, ids, parts = OURS[name]
        lookup._write(tmp_path / dtype, 512, dtype, seed=0)
        shard = lookup._Shard(tmp_path / dtype, 512, dtype, ids, parts)
        told = shard.take(turn)
        assert len(told.seconds) == 2
        digests.add(told.digest)
    assert len(digests) == 1


def test_torch_that_cannot_be_installed_is_a_missing_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "_TORCH", "torch==not-a-version")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ToolMissing, match="cannot be installed"):
        lookup.torch_python(tmp_path / "environment")
