"""What simulated clusters serve, and where they keep what must not be forgotten."""

from __future__ import annotations

from msgspec import structs

from batching.errors import FailedPrecondition
from shards.identity import table_identity
from shards.manifest import BlobRef, Manifest, Overlay, TableUnit, Warmups
from tests.cluster.control_fakes import manifest, map_unit, table_unit

__all__ = ["BAD", "DELTA", "KILLER", "MUTE", "Key", "Memory", "model"]

Key = tuple[str, int]

#: A version that no actor can load.
BAD: Key = ("ranker", 3)
#: A version that kills whoever loads it.
KILLER: Key = ("encoder", 3)
#: A version that answers no warm-up request.
MUTE: Key = ("encoder", 4)

#: A servable of which every version after the first is the first with a few rows replaced.
DELTA = "delta"

WARMUPS = Warmups(requests=3, blob=BlobRef(digest="00", size=64))


class Memory:
    """The durable states of one cluster."""

    def __init__(self) -> None:
        self.states: dict[tuple[int, int], bytes] = {}
        self.terms = 0

    def put_state(self, cluster: str, term: int, seq: int, data: bytes) -> None:
        if self.states and (term, seq) <= max(self.states):
            raise FailedPrecondition("another controller reigns")
        self.states[term, seq] = data

    def latest_state(self, cluster: str) -> tuple[int, int, bytes] | None:
        return (*max(self.states), self.states[max(self.states)]) if self.states else None

    def next_term(self, cluster: str) -> int:
        self.terms += 1
        return self.terms


def model(key: Key) -> Manifest:
    """Half of a version's parts are those of the version before it."""
    name, version = key
    if name == DELTA:
        return manifest(name, version, trunk=map_unit("delta-trunk", 40), words=_overlaid(version))
    found = manifest(
        name,
        version,
        trunk=map_unit(f"{name}-trunk-{version}", 40),
        words=table_unit(f"{name}-words-{version // 2}", [30, 20, 20, 10]),
    )
    return structs.replace(found, warmups=WARMUPS) if name == "encoder" else found


def _overlaid(version: int) -> TableUnit:
    """The same rows with, but for the first version, some replaced in every partition."""
    base = table_unit("", [30, 30, 30, 30])
    overlays = (Overlay(rows=1, blob=BlobRef(digest=f"{version:02x}", size=2)),)
    parts = tuple(
        structs.replace(part, overlays=overlays if version > 1 else ()) for part in base.partitions
    )
    identity = table_identity(base.dtype, base.dim, parts)
    return structs.replace(base, id=identity, partitions=parts)
