"""Small manifests and bundles that several tests use; no JAX."""

from __future__ import annotations

import numpy as np

from shards.identity import host_identity, map_identity, table_identity
from shards.leaves import put_leaves
from shards.manifest import (
    SCHEMA,
    Created,
    HostUnit,
    Manifest,
    MapUnit,
    Node,
    Partition,
    Program,
    Signature,
    TableUnit,
)
from shards.specs import Spec
from shards.store import Store

ROWS = np.arange(20, dtype=np.float32).reshape(10, 2)


def full_manifest(store: Store, name: str = "ranker", version: int = 1) -> Manifest:
    """A manifest with a unit of every kind, whose blobs are in the store."""
    parts = [ROWS[:6], ROWS[6:]]
    partitions = [
        Partition(first_row=first, rows=len(part), blob=store.put(part))
        for first, part in zip((0, 6), parts, strict=True)
    ]
    words = TableUnit(
        id=table_identity("float32", 2, partitions),
        dtype="float32",
        dim=2,
        rows=10,
        partitions=tuple(partitions),
    )
    file = store.put(b"vocabulary")
    text, ids = Spec(("b",), "string"), Spec(("b", "t"), "int32")
    tokenize = HostUnit(
        id=host_identity("some.module:load", {"limit": 8}, {"vocabulary": file}),
        entry_point="some.module:load",
        inputs={"text": text},
        outputs={"ids": ids},
        files={"vocabulary": file},
        options={"limit": 8},
    )
    x, y = Spec(("b", "t", 2)), Spec(("b", 2))
    trunk = MapUnit(
        id=map_identity(["program"], [x], [y], [], []),
        inputs={"x": x},
        outputs={"y": y},
        programs=(Program(blob=store.put(b"program"), platforms=("cpu",)),),
        params=put_leaves(store, [np.ones((2, 2), np.float32), np.zeros(2, np.float32)]),
        batch_buckets=(1, 8),
        length_buckets={"t": (8, 16)},
    )
    serving_default = Signature(
        method="predict",
        inputs={"text": text},
        outputs={"y": y},
        nodes=(
            Node(unit="tokenize", inputs={"text": "in:text"}),
            Node(unit="words", inputs={"ids": "0:ids"}),
            Node(unit="trunk", inputs={"x": "1:rows"}),
        ),
        returns={"y": "2:y"},
    )
    return Manifest(
        schema=SCHEMA,
        name=name,
        version=version,
        units={"words": words, "tokenize": tokenize, "trunk": trunk},
        signatures={"serving_default": serving_default},
        created=Created(shardserve="0.1.0", jax="0.10.2", at="2026-11-22T12:00:00+00:00"),
    )
