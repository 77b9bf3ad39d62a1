"""What importing the package does not import."""

from __future__ import annotations

import subprocess
import sys

import pytest

import shards


def imported_by(code: str) -> set[str]:
    """Names of the modules that are loaded after running code in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    return {name.partition(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    "code",
    [
        "import shards, shards.store, shards.manifest, shards.specs, shards.orders",
        "import shards; shards.Spec, shards.LocalStore, shards.read, shards.Bundle, shards.save",
        "import shards.leaves, shards.inspection, shards.tracing, shards.bundle",
        "import shards.interchange",
    ],
)
def test_a_router_that_reads_bundles_pays_for_no_framework(code: str) -> None:
    heavy = {"jax", "jaxlib", "ray", "flax", "equinox", "pyarrow", "safetensors"}
    assert imported_by(code) & heavy == set()


def test_every_name_of_the_package_is_there_and_no_other() -> None:
    for name in shards.__all__:
        assert getattr(shards, name) is not None
        assert name in dir(shards)
    assert shards.__all__ == list(shards._HOMES)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = shards.nothing_like_it
