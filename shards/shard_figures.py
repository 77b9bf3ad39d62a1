"""What a shard actor says of its tables in the NVMe tier: values.

All numbers count from when a table was opened; who wants rates looks twice. A cache that versions
share is told of once. Does not know how the numbers travel, nor who prints them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from shards.figures import OTHER
from shards.orders import CacheFigures

__all__ = ["ShardStatistics", "shard_statistics"]

#: Tables that are told apart; what is beyond is summed up.
_TABLES_MAX: Final = 64


class ShardStatistics(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One shard actor at one instant.

    Attributes:
        caches: by unit.
    """

    caches: dict[str, CacheFigures]


def shard_statistics(caches: Mapping[str, CacheFigures]) -> ShardStatistics:
    """Those of an actor with these caches, by unit; in as few rows as are read."""
    found = dict(list(caches.items())[:_TABLES_MAX])
    rest = list(caches.values())[_TABLES_MAX:]
    if rest:
        found[OTHER] = sum(rest, CacheFigures())
    return ShardStatistics(caches=found)
