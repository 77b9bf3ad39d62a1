"""The process that compacts in the background: it folds one version's overlays, and ends.

Started as ``python -m shards.compacting ORDER PARENT``. Whoever starts it is of the control plane,
which must go on answering: so the work is done here, at a priority below everything else on the
machine, and ends with its parent. It may be ended at any time; `shards.folding` says why.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import msgspec

from batching.errors import ServingError
from shards.cache import NodeCache
from shards.compiling.child import end_with
from shards.compiling.last_place import take_the_last_place
from shards.folding import fold
from shards.store import open_store

__all__ = ["CompactOrder", "main"]


class CompactOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What to compact.

    Attributes:
        store: URL of the store.
        servable: its name there.
        version: of it.
        overlays: partitions with fewer stay as they are.
        cache: where blobs of a bucket are kept on this node.
        cache_bytes: the most that they may take there.
    """

    store: str
    servable: str
    version: int
    overlays: int
    cache: str
    cache_bytes: int


def main(arguments: Sequence[str]) -> int:
    """Fold, and say how many partitions there were.

    Args:
        arguments: a `CompactOrder` as JSON, and the parent's process id.

    Returns:
        The exit status: 1 where it failed; standard error says why.
    """
    order = msgspec.json.decode(arguments[0], type=CompactOrder)
    end_with(int(arguments[1]))
    take_the_last_place(is_patient=True)
    try:
        store = open_store(order.store, NodeCache(order.cache, order.cache_bytes))
        manifest = store.read_manifest(order.servable, order.version)
        count = fold(store, manifest, order.overlays)
    except ServingError as error:
        sys.stderr.write(f"{order.servable}:{order.version}: {error.message}\n")
        return 1
    sys.stdout.write(f"{count}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
