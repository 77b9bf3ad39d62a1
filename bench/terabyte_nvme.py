"""The second half of ``terabyte``: rows of four times the memory that a servable may take for them.

A dense table is loaded in the NVMe tier and asked for rows at random, all over it, until its cache
has been full for long. Every row is held against what was written, and what the actors' memory has
grown by against the budget: as the kernel counts it, or as they say, whichever is more.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import yaml

from bench.errors import ContenderFailed
from bench.product import apply, status
from bench.report import Figure, Table
from bench.terabyte_memory import disk_bytes, memory_of
from bench.terabyte_model import DIM, ROW_BYTES, rows_of, save_dense
from cluster.client import Client

__all__ = ["SERVABLE", "Cold", "ColdSizes", "measure"]

SERVABLE: Final = "cold"
_CALL_IDS: Final = 4096
_TIMES: Final = 4
_GB: Final = 1e9
#: Actors tell what they have counted every second or two.
_REPORT_S: Final = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdSizes:
    """How large everything is.

    Attributes:
        budget: bytes of memory.
        asked: rows that are asked for.
    """

    budget: int
    asked: int

    @classmethod
    def of(cls, *, quick: bool) -> ColdSizes:
        """Those of a full or a quick run."""
        if quick:
            return cls(budget=224_000_000, asked=450_000)
        return cls(budget=2_000_000_000, asked=4_500_000)

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return self.budget * _TIMES // ROW_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Cold:
    """What was found.

    Attributes:
        seconds: of each step.
        asked: rows that were asked for.
        wrong: rows that were not what was written.
        calls_ms: what each call took, in turn.
        grown: bytes by which the actors' own memory has grown from the load to the end.
        held: bytes that they say they hold.
        hits: rows that were cached.
        misses: rows that were not.
        reads: calls to the disk.
        read_bytes: that these have read.
        direct: whether past the page cache.
        disk: bytes that the store takes.
        budget: as declared.
    """

    seconds: dict[str, float]
    asked: int
    wrong: int
    calls_ms: tuple[float, ...]
    grown: int
    held: int
    hits: int
    misses: int
    reads: int
    read_bytes: int
    direct: bool
    disk: int
    budget: int

    @property
    def ratios(self) -> dict[str, float]:
        """What is held against marks."""
        return {
            "nvme_rows_wrong": float(self.wrong),
            "nvme_budget_used": max(self.grown, self.held) / self.budget,
        }

    @property
    def late_ms(self) -> tuple[float, ...]:
        """Of the second half of the calls, in which the cache is full."""
        return self.calls_ms[len(self.calls_ms) // 2 :]

    @property
    def figures(self) -> dict[str, Figure]:
        """The rest."""
        return {
            "nvme_budget_gb": self.budget / _GB,
            "nvme_grown_gb": self.grown / _GB,
            "nvme_held_gb": self.held / _GB,
            "nvme_rows_asked": self.asked,
            "nvme_hit_rate": self.hits / max(self.hits + self.misses, 1),
            "nvme_reads": self.reads,
            "nvme_read_gb": self.read_bytes / _GB,
            "nvme_direct": self.direct,
            "nvme_p50_ms": float(np.percentile(self.late_ms, 50)),
            "nvme_p99_ms": float(np.percentile(self.late_ms, 99)),
            "nvme_rows_a_second": _CALL_IDS * len(self.late_ms) / (sum(self.late_ms) / 1e3),
            "nvme_seconds": dict(self.seconds),
        }

    @property
    def table(self) -> Table:
        """For people."""
        keys = ("budget_gb", "grown_gb", "held_gb", "hit_rate", "p50_ms", "p99_ms",
                "rows_a_second")  # fmt: skip
        return Table(
            title=f"Rows of {_TIMES} times the budget of the NVMe tier, {_CALL_IDS} a call",
            columns=("", "value"),
            rows=(
                *((key.replace("_", " "), _number(self.figures[f"nvme_{key}"])) for key in keys),
                ("rows asked for", self.asked),
                ("wrong", self.wrong),
                *((f"{name}, s", took) for name, took in self.seconds.items()),
            ),
        )


def measure(
    store: Path,
    url: str,
    config: Path,
    pids: Sequence[int],
    sizes: ColdSizes,
    *,
    partitions: int,
    seed: int,
) -> Cold:
    """Save the table, load it and ask for its rows.

    Args:
        store: of the cluster.
        url: of its door.
        config: its declaration, which gets the servable.
        pids: of its shard actors.
        sizes: how large everything is.
        partitions: of the table.
        seed: of the ids that are asked for.

    Raises:
        ContenderFailed: the table did not become available, or is not in this tier.
    """
    seconds: dict[str, float] = {}
    before_disk = disk_bytes(store)
    began = time.monotonic()
    save_dense(store, SERVABLE, rows=sizes.rows, partitions=partitions)
    seconds["save"] = time.monotonic() - began
    began = time.monotonic()
    # Only now: `up` refuses what is declared and not in the store.
    declared = yaml.safe_load(config.read_text())
    declared["servables"] = [{"name": SERVABLE, "tier": "nvme", "budget": sizes.budget}]
    config.write_text(yaml.safe_dump(declared))
    apply(config)
    seconds["load"] = time.monotonic() - began
    before = memory_of(pids).own
    drawn = np.random.default_rng(seed)
    calls_ms: list[float] = []
    wrong = 0
    began = time.monotonic()
    with Client(url, timeout_s=60.0) as client:
        for _ in range(sizes.asked // _CALL_IDS):
            ids = drawn.integers(sizes.rows, size=_CALL_IDS)
            called = time.monotonic()
            rows = client.predict(SERVABLE, {"ids": ids})["rows"]
            calls_ms.append((time.monotonic() - called) * 1e3)
            assert rows.shape == (_CALL_IDS, DIM)
            wrong += int((rows != rows_of(ids, 1)).any(axis=1).sum())
    seconds["ask"] = time.monotonic() - began
    grown = memory_of(pids).own - before
    caches = _counted(config, len(calls_ms) * _CALL_IDS)
    return Cold(
        seconds=seconds,
        asked=len(calls_ms) * _CALL_IDS,
        wrong=wrong,
        calls_ms=tuple(calls_ms),
        grown=grown,
        held=sum(each["nbytes"] for each in caches),
        hits=sum(each["hits"] for each in caches),
        misses=sum(each["misses"] for each in caches),
        reads=sum(each["reads"] for each in caches),
        read_bytes=sum(each["read_bytes"] for each in caches),
        direct=all(each["direct"] for each in caches),
        disk=disk_bytes(store) - before_disk,
        budget=sizes.budget,
    )


def _counted(config: Path, rows: int) -> list[dict[str, Any]]:
    """The caches of the actors, once these have told of all rows that were asked for.

    Raises:
        ContenderFailed: they do not; the rows came from elsewhere.
    """
    deadline = time.monotonic() + _REPORT_S
    while True:
        caches = _caches(status(config))
        if sum(each["hits"] + each["misses"] for each in caches) >= rows:
            return caches
        if time.monotonic() > deadline:
            raise ContenderFailed("the table is not in the NVMe tier")
        time.sleep(0.2)


def _caches(found: dict[str, Any]) -> list[dict[str, Any]]:
    units = [unit for actor in found["actors"].values() for unit in actor["units"]]
    return [unit["cache"] for unit in units if unit["cache"] is not None]


def _number(figure: Figure) -> float:
    assert isinstance(figure, float)
    return figure
