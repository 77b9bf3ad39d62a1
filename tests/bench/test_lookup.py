"""What the bench of pooled look-ups makes of its rounds, and that answers are held together."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from bench import lookup, lookup_naive, lookup_result, lookup_routed
from bench.errors import AnswersDiffer, ToolMissing
from bench.lookup import OURS, SHAPES, Told, Turn
from bench.lookup_routed import BATCHES, CONTENDERS, Case
from bench.registry import Options
from bench.report import json_line


def routed() -> dict[tuple[str, int], list[Case]]:
    """Each contender takes twice the processor time, and a third of the time, of the one before."""
    return {
        (who, batch): [Case(9.0 / 3**at, 2.0**at, 0.5, 2.0 ** (at + 1))] * 3
        for at, who in enumerate(CONTENDERS)
        for batch in BATCHES
    }


def test_what_is_behind_a_router_is_told_per_core_and_against_the_naive_way() -> None:
    ratios = lookup_result.ratios_of(routed(), seed=0)
    assert {name: each.value for name, each in ratios.items()} == {
        "router4_per_core_vs_in_process": 0.5,
        "router4_one_at_a_time_per_core_vs_in_process": 0.25,
        "router4_16_partitions_per_core_vs_in_process": 0.25,
        "vs_naive_ray_batch1": pytest.approx(1 / 9),
        "vs_naive_ray_batch256": pytest.approx(1 / 9),
        "vs_naive_ray_by_table_batch1": pytest.approx(1 / 27),
        "vs_naive_ray_by_table_batch256": pytest.approx(1 / 27),
    }
    assert [len(table.rows) for table in lookup_result.tables_of(routed(), seed=0)] == [5, 5]


@pytest.mark.timeout(120)
def test_tables_behind_a_router_add_up_to_what_they_do_in_process(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tables on one real shard; the bench itself holds every answer against the others'."""

    @contextlib.contextmanager
    def no_ray(shares: Any, dim: int) -> Iterator[Any]:
        tables = [lookup_naive.Tables(files, dim) for files in shares]
        yield lambda ids, by_table: {
            name: sums
            for share, files in zip(tables, shares, strict=True)
            for name, sums in share.pool({each: ids[each] for each in files}).items()
        }

    monkeypatch.setattr(lookup_routed, "naive_actors", no_ray)
    monkeypatch.setattr(lookup_routed, "SHARDS", 1)
    monkeypatch.setattr(lookup_routed, "TABLES", 2)
    monkeypatch.setattr(lookup_routed, "BATCHES", (3,))
    folder = tmp_path_factory.mktemp("r")
    options = Options(quick=True, rounds=1, own=argparse.Namespace())
    outcomes = uvloop.run(lookup_routed._rounds(folder, 64, 1, options))
    assert outcomes.keys() == {(who, 3) for who in CONTENDERS}
    assert outcomes["routed", 3][0].cpu_ms > outcomes["routed", 3][0].router_ms > 0


def test_a_ratio_is_torchs_time_over_ours_in_the_same_round() -> None:
    outcomes = {(label, shape): [2.0, 4.0, 6.0] for label in OURS for shape in SHAPES}
    outcomes |= {("torch", shape): [3.0, 6.0, 9.0] for shape in SHAPES}
    result = lookup._result(outcomes, routed(), {}, seed=0)
    told = json.loads(json_line(result))
    assert {told["ratios"][f"shard_vs_torch_{shape}"] for shape in SHAPES} == {1.5}
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
