"""Packages installed for a test, as a user installs them: by pip, into a folder of their own."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from cluster.registered import POLICIES, SOURCES
from shards.combines import COMBINES
from shards.custom import UNIT_KINDS
from shards.registry import Registry

__all__ = ["EXAMPLES", "importable", "install"]

EXAMPLES: Final = Path(__file__).resolve().parents[1] / "examples"
REGISTRIES: Final[tuple[Registry[Any], ...]] = (UNIT_KINDS, COMBINES, POLICIES, SOURCES)


def install(package: Path, folder: Path) -> Path:
    """Install a package's source into a folder, without an index; returns where it is."""
    source, target = folder / "source", folder / "installed"
    shutil.copytree(package, source)  # a build writes beside its source
    subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
            "--no-index", "--no-deps", "--no-build-isolation", "--target", str(target), str(source),
        ],
        check=True,
        timeout=120,
    )  # fmt: skip
    return target


@contextmanager
def importable(target: Path, *modules: str) -> Iterator[None]:
    """Within, what was installed there is found; afterwards its modules and names are forgotten."""
    sys.path.insert(0, str(target))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(target))
        for module in modules:
            sys.modules.pop(module, None)
        for registry in REGISTRIES:
            registry._found.clear()
        importlib.invalidate_caches()
