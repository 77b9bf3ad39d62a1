"""Bundles, units and the actors that host them.

The names below are imported when they are first used: a router imports `shards.manifest` and never
pays for JAX, and neither does ``import shards``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from shards.bundle import Bundle
    from shards.inspection import describe, render
    from shards.interchange import (
        from_safetensors,
        leaves_of_equinox,
        leaves_of_nnx,
        table_from_arrow,
        table_to_arrow,
        to_safetensors,
    )
    from shards.keys import hashed_rows
    from shards.manifest import Manifest
    from shards.saving import save
    from shards.sparse_rows import SparseRows
    from shards.specs import STRING, Spec
    from shards.store import LocalStore, open_store, read

#: Whose package this is; checked at start (`cluster.ownership`).
__distribution__ = "shardserve"

__all__ = [
    "STRING",
    "Bundle",
    "LocalStore",
    "Manifest",
    "SparseRows",
    "Spec",
    "describe",
    "from_safetensors",
    "hashed_rows",
    "leaves_of_equinox",
    "leaves_of_nnx",
    "open_store",
    "read",
    "render",
    "save",
    "table_from_arrow",
    "table_to_arrow",
    "to_safetensors",
]

_HOMES: Final = {
    "STRING": "specs",
    "Bundle": "bundle",
    "LocalStore": "store",
    "Manifest": "manifest",
    "SparseRows": "sparse_rows",
    "Spec": "specs",
    "describe": "inspection",
    "from_safetensors": "interchange",
    "hashed_rows": "keys",
    "leaves_of_equinox": "interchange",
    "leaves_of_nnx": "interchange",
    "open_store": "store",
    "read": "store",
    "render": "inspection",
    "save": "saving",
    "table_from_arrow": "interchange",
    "table_to_arrow": "interchange",
    "to_safetensors": "interchange",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
