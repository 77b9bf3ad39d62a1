"""Tests on several hosts: a target of their own, since they need what not every machine has."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bench.hosts import available

_HERE = Path(__file__).parent
#: `ray up` copies with rsync; the rest is what the hosts themselves need.
_MISSING = available() or ("" if shutil.which("rsync") else "not installed: rsync")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(_HERE) and item.get_closest_marker("hosts") is not None:
            item.add_marker(pytest.mark.skipif(bool(_MISSING), reason=f"NO HOSTS: {_MISSING}"))
