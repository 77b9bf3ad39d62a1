"""The real registry."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bench.registry import MODULES, find
from bench.report import ROOT


@pytest.mark.parametrize("name", MODULES)
def test_every_registered_benchmark_is_found_under_its_name(name: str) -> None:
    assert find(name).name == name
    assert find(name).summary


def test_command_line_does_not_wait_for_jax_or_ray() -> None:
    code = (
        "import sys, bench; bench.main(['--list']); "
        "sys.exit(any(name in sys.modules for name in ('jax', 'ray', 'matplotlib')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=50)
    assert done.returncode == 0, done.stderr.decode()
