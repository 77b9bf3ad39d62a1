"""Import the three packages from where the wheel put them, and save and read a bundle.

Usage: smoke.py SITE_PACKAGES
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import numpy as np

import batching
import cluster
import shards
from cluster.ownership import check_ownership


def main(packages: str) -> None:
    """Do it, or fail."""
    for module in (batching, cluster, shards):
        assert module.__file__ is not None
        home = Path(module.__file__).parent
        assert home.parent == Path(packages), f"{module.__name__} came from {home}"
        assert (home / "py.typed").is_file(), f"{home} has no py.typed"
    assert importlib.metadata.version("shardserve") == cluster.__version__
    check_ownership()
    for name in ("bench", "tests"):
        assert not (Path(packages) / name).exists(), f"the wheel carries {name}"

    inputs = {"x": shards.Spec(("b", 4))}
    weights = np.eye(4, dtype=np.float32)
    shards.save(lambda params, x: x @ params, weights, "store", "mlp", inputs=inputs)
    manifest = shards.read("store", "mlp")
    assert (manifest.name, manifest.version) == ("mlp", 1)


main(sys.argv[1])
