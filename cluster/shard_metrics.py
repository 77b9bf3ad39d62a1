"""What shard actors count of tables in the NVMe tier, as Prometheus reads it.

`FAMILIES` is the whole list; the README's table is held against it. The rows of an actor are
bounded where they are made (`shards.shard_figures`), so the number of series is, too. Of an actor
that does not answer nothing is told but that it is down: old numbers would look like news.

Does not know how actors are asked, nor who reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

from shards.shard_figures import ShardStatistics

__all__ = ["FAMILIES", "ShardFamily", "ShardReport", "shard_text"]

#: So much of a unit's id tells it apart.
_UNIT_CHARS: Final = 12


class ShardReport(NamedTuple):
    """What is known of an actor; None while it does not answer."""

    actor: str
    statistics: ShardStatistics | None


class ShardFamily(NamedTuple):
    """One metric.

    Attributes:
        field: of `shards.orders.CacheFigures`; None for whether the actor answers.
    """

    name: str
    kind: Literal["counter", "gauge"]
    text: str
    field: str | None

    @property
    def labels(self) -> tuple[str, ...]:
        """After ``shard``, which every family has."""
        return () if self.field is None else ("unit",)


_UP: Final = "shardserve_shard_up"
_CACHE: Final = "shardserve_shard_cache"
FAMILIES: Final = (
    ShardFamily(_UP, "gauge", "Whether the actor answers.", None),
    ShardFamily(f"{_CACHE}_budget_bytes", "gauge", "Memory that a table may take.", "budget"),
    ShardFamily(f"{_CACHE}_bytes", "gauge",
                "Of it, what its cache, indices and buffers take once the cache is full.",
                "nbytes"),
    ShardFamily(f"{_CACHE}_used_bytes", "gauge", "Rows that are cached now.", "used"),
    ShardFamily(f"{_CACHE}_hits_total", "counter", "Rows that were cached.", "hits"),
    ShardFamily(f"{_CACHE}_misses_total", "counter", "Rows that were not.", "misses"),
    ShardFamily(f"{_CACHE}_reads_total", "counter", "Calls that read these from disk.", "reads"),
    ShardFamily(f"{_CACHE}_read_bytes_total", "counter", "Bytes that these have read.",
                "read_bytes"),
    ShardFamily(f"{_CACHE}_wait_seconds_total", "counter",
                "Time that look-ups have waited for these.", "wait_s"),
)  # fmt: skip


def shard_text(reports: Sequence[ShardReport]) -> str:
    """What Prometheus reads of some actors; "" of none."""
    lines: list[str] = []
    for family in FAMILIES:
        found = [line for report in reports for line in _lines(family, report)]
        if found:
            lines.append(f"# HELP {family.name} {family.text}\n")
            lines.append(f"# TYPE {family.name} {family.kind}\n")
            lines += found
    return "".join(lines)


def _lines(family: ShardFamily, report: ShardReport) -> list[str]:
    actor, statistics = report
    if family.field is None:
        return [f'{family.name}{{shard="{actor}"}} {int(statistics is not None)}\n']
    if statistics is None:
        return []
    return [
        f'{family.name}{{shard="{actor}",unit="{unit[:_UNIT_CHARS]}"}} '
        f"{getattr(figures, family.field)}\n"
        for unit, figures in statistics.caches.items()
    ]
