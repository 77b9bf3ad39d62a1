"""What the bench of loads makes of its rounds, and that its jobs do what they are named for."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import cast

import msgspec
import pytest

from batching.errors import DataLoss
from bench import loads
from bench.cycles import Cycles, Footprint
from bench.loads import Sizes
from bench.loads_actor import Do, Done, Job, _Jobs
from bench.loads_start import start
from bench.report import json_line
from shards.hosting import Hosting
from shards.orders import LoadOrder

SIZES = Sizes(table_bytes=1 << 20, bucket_bytes=1 << 18, model_bytes=1 << 16)
TABLE = ("table",)


def footprint(pss_bytes: int) -> Footprint:
    zeros = dict.fromkeys(Footprint.__struct_fields__, 0)
    return msgspec.convert(zeros | {"pss_bytes": pss_bytes, "load_s": 0.0}, Footprint)


def test_ratios_are_against_the_floor_of_the_same_round() -> None:
    seconds = {
        "read": 2.0, "load": 1.0, "digest": 4.0, "ingest": 5.0, "delta": 0.1, "copy": 1.0,
        "bring": 5.0, "sampled": 1.0, "dense": 1.0, "together": 1.0, "serial": 2.0,
    }  # fmt: skip
    outcomes = {
        key: [
            Done(seconds=each * slow, nbytes=1000, pss_bytes=10, peak_bytes=20) for slow in (1, 3)
        ]
        for key, each in seconds.items()
    }
    outcomes["sampled"] = outcomes["sampled"][:1]
    cycles = Cycles(tuple(map(footprint, (50, 100, 104, 104, 104, 104))))
    result = loads._result(outcomes, cycles, {"quick": True}, seed=0)
    assert result.ratios == pytest.approx({
        "warm_bandwidth_vs_read": 2.0,
        "ingest_vs_digest_speed": 0.8,
        "delta_1pct_time_vs_full": 0.02,
        "bucket_ingest_vs_digest_speed": 0.8,
        "bucket_ingest_vs_copy_and_digest": 1.0,
        "start_together_vs_serial": 0.5,
        "peak_pss_vs_bytes": 0.02,
        "dense_peak_pss_vs_bytes": 0.02,
        "dense_copies": 0.0,
        "delta_bytes_vs_full": 1.0,
        "delta_pss_vs_full": 1.0,
        "pss_after_50_cycles_vs_before": 1.04,
    })  # fmt: skip
    told = json.loads(json_line(result))
    assert told["figures"]["intervals"]["warm_bandwidth_vs_read"] == [2.0, 2.0]
    assert [len(table.rows) for table in result.tables] == [len(seconds), len(result.ratios)]


def test_every_job_is_done_with_real_books_over_a_real_store(tmp_path: Path) -> None:
    store = tmp_path / "store"
    loads._save_table(store, SIZES)
    jobs = _Jobs(store, tmp_path / "scratch", "shard")
    size = SIZES.table_bytes
    floors: tuple[Do, ...] = ("read", "digest", "load")
    for do in floors:
        assert jobs.do(Job(do=do, servables=TABLE)).nbytes == size
    # As many rows as were replaced, and where they go.
    delta = jobs.do(Job(do="delta", servables=TABLE, verified=False, touched=True)).nbytes
    assert 0.01 * size < delta < 0.02 * size
    copies: tuple[Do, ...] = ("copy", "bring")
    for do in copies:
        assert jobs.do(Job(do=do, servables=TABLE, bytes_max=1 << 18)).nbytes == 1 << 18
    assert not (tmp_path / "scratch").exists()
    assert (store / ".verified").exists()
    jobs.do(Job(do="load", servables=TABLE, verified=False, touched=True, sampled=True))


class Books:
    """Books of a device that loads nothing, and counts how many orders it has at once."""

    capacity_bytes = 1 << 30

    def __init__(self, bad: str = "") -> None:
        self.bad = bad
        self.now = self.most = 0
        self.loaded: list[str] = []

    async def load(self, order: LoadOrder) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0)
        self.now -= 1
        if order.servable == self.bad:
            raise DataLoss("it is broken")
        self.loaded.append(order.servable)


def test_a_start_loads_so_many_at_once_as_are_said_and_ends_when_all_are_there(
    tmp_path: Path,
) -> None:
    names = ["a", "b", "c"]
    for name in names:
        loads._save_dense(tmp_path, name, 4, count=1, buckets=(1,))
    for parallel in (1, 2):
        books = Books()
        asyncio.run(start(cast("Hosting", books), tmp_path, names, parallel))
        assert (sorted(books.loaded), books.most) == (names, parallel)
    with pytest.raises(DataLoss, match="broken"):
        asyncio.run(start(cast("Hosting", Books("c")), tmp_path, names, 3))
