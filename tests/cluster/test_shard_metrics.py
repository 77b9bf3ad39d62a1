"""What shard actors count of tables in the NVMe tier, as Prometheus's own parser reads it."""

from __future__ import annotations

import re

import msgspec
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from cluster.device_reports import DeviceReports
from cluster.shard_metrics import FAMILIES, ShardReport, shard_text
from shards.orders import CacheFigures
from shards.questions import STATISTICS
from shards.shard_figures import ShardStatistics, shard_statistics
from tests.cluster.routing_fakes import (
    Bench,
    VirtualLoop,
    epoch,
    look_up,
    run_virtually,
    table_unit,
    turns,
)
from tests.test_tidy import ROOT

UNIT = "0123456789abcdef"
FIGURES = CacheFigures(
    budget=100, nbytes=90, used=60, hits=7, misses=3, reads=2, read_bytes=8192, wait_s=0.25
)


def test_prometheus_reads_every_figure_of_every_table_and_of_who_is_away_that_it_is_down() -> None:
    told = ShardReport("shard-0", ShardStatistics(caches={UNIT: FIGURES}))
    found: dict[tuple[str, ...], float] = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(
            shard_text([told, ShardReport("shard-1", None)])
        )
        for sample in family.samples
    }
    cache = "shardserve_shard_cache"
    expected: dict[str, float] = {
        "budget_bytes": 100, "bytes": 90, "used_bytes": 60, "hits_total": 7, "misses_total": 3,
        "reads_total": 2, "read_bytes_total": 8192, "wait_seconds_total": 0.25,
    }  # fmt: skip
    assert found == {
        ("shardserve_shard_up", "shard-0"): 1,
        ("shardserve_shard_up", "shard-1"): 0,
    } | {(f"{cache}_{name}", "shard-0", UNIT[:12]): value for name, value in expected.items()}


def test_of_many_tables_the_later_ones_are_summed_up() -> None:
    found = shard_statistics({f"{n}": FIGURES for n in range(70)}).caches
    assert len(found) == 65
    assert found["63"] == FIGURES
    assert (found["(other)"].hits, found["(other)"].budget) == (42, 600)


def test_shards_that_hold_tables_are_asked_when_somebody_reads() -> None:
    async def run(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        reports = DeviceReports(bench.router, "node", loop, loop.time)
        placement = {"unit": [["shard-0"], ["shard-1"], ["shard-0"]]}
        await bench.router.adopt(epoch(1, (look_up(table_unit()), placement)))
        told: list[str] = []
        reports.read(lambda text: told.append(text.decode()))
        await turns()
        for name, caches in (("shard-0", {UNIT: FIGURES}), ("shard-1", {})):
            [asked] = bench.actors[name].asked
            assert asked.header.op == STATISTICS
            data = msgspec.msgpack.encode(ShardStatistics(caches=caches))
            asked.link.reply([(0, len(data))], [np.frombuffer(data, np.uint8)], "")
        await turns(20)
        (text,) = told
        assert 'shardserve_shard_up{shard="shard-1"} 1' in text
        assert text.count("cache_hits_total{") == 1
        bench.router.close()

    run_virtually(run)


def test_the_readme_lists_every_metric_with_its_labels() -> None:
    rows = re.findall(
        r"^\| `(shardserve_shard_\w+)` \| (\w+) \| ([^|]*) \|",
        (ROOT / "README.md").read_text(),
        re.M,
    )
    listed = {name: (kind, tuple(re.findall(r"\w+", labels))) for name, kind, labels in rows}
    assert listed == {family.name: (family.kind, family.labels) for family in FAMILIES}
