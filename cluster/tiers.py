"""Where the rows of a servable's tables are, and what they may take of memory.

In the NVMe tier a servable declares a budget: of memory, for one copy of all its tables. Every
partition gets of it by the bytes of its base, so that each actor's share goes by what it holds, and
an actor can be told its share without being told the whole. Decides what a budget is to a
partition. Does not know how rows are kept within it (`shards.cold_rows`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias

import msgspec

from cluster.fields import FieldError
from shards.manifest import Manifest, TableUnit
from shards.orders import HostedUnit, Residency

__all__ = ["Tier", "Tiered", "cached_part", "check_tier", "with_tier"]

#: ``memory``: mapped, as `resident` says. ``nvme``: on disk, with a cache of bounded size.
Tier: TypeAlias = Literal["memory", "nvme"]


class Tiered(Protocol):
    """What a servable declares of its tables."""

    @property
    def tier(self) -> Tier:
        """Where their rows are."""

    @property
    def budget(self) -> int | None:
        """Bytes of memory for one copy of them, in the NVMe tier."""

    @property
    def resident(self) -> Residency:
        """How they are in memory, in the other."""


def check_tier(declared: Tiered) -> None:
    """Refuse what cannot be meant.

    Raises:
        FieldError: names the field.
    """
    if declared.tier == "memory":
        if declared.budget is not None:
            raise FieldError("budget", "is for tier: nvme; set that, or leave it out")
        return
    if declared.budget is None:
        raise FieldError("budget", "tier: nvme needs one, e.g. 2GiB: of memory, for all its tables")
    if declared.budget < 1:
        raise FieldError("budget", f"must be at least 1, got {declared.budget}")
    if declared.resident != "mapped":
        raise FieldError("resident", f"{declared.resident} holds whole tables, tier: nvme does not")


def cached_part(declared: Tiered, manifest: Manifest) -> float | None:
    """Bytes of memory for each byte of tables on disk; None where they are in memory."""
    if declared.tier == "memory" or declared.budget is None:
        return None
    total = sum(
        part.blob.stored
        for unit in manifest.units.values()
        if isinstance(unit, TableUnit)
        for part in unit.partitions
    )
    return declared.budget / max(total, 1)


def with_tier(
    order: Sequence[HostedUnit], manifest: Manifest, cached: float | None
) -> tuple[HostedUnit, ...]:
    """What an actor is told to host, with the share that its tables get."""
    if cached is None:
        return tuple(order)
    return tuple(
        msgspec.structs.replace(each, cached=cached)
        if isinstance(manifest.units[each.name], TableUnit)
        else each
        for each in order
    )
