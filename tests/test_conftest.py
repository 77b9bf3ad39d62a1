"""The rules that `conftest` sets are in force."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import jax
import pytest
import ray

ROOT: Final = Path(__file__).resolve().parents[1]

#: Two files whose tests share what is made once a process, and one of other tests.
SHARING: Final = """
import os
from pathlib import Path
import pytest

@pytest.mark.parametrize("number", range(4))
def test_it(number):
    Path(f"{Path(__file__).stem}-{os.getpid()}").touch()
"""


def test_ray_cannot_be_started_outside_of_e2e_tests() -> None:
    with pytest.raises(AssertionError, match="not marked e2e"):
        ray.init()


def test_implicit_start_of_ray_is_refused_too() -> None:
    task = ray.remote(test_there_are_several_devices)
    with pytest.raises(AssertionError, match="not marked e2e"):
        task.remote()


def test_settings_of_other_clusters_do_not_reach_tests() -> None:
    script = "import os, tests.conftest; print('RAY_ADDRESS' in os.environ)"
    ours = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1", "SHARDSERVE_STATE": "/nowhere"}
    told = subprocess.run(
        [sys.executable, "-c", script], env=ours, capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == ["False"]


def test_there_are_several_devices() -> None:
    assert [device.platform for device in jax.devices()] == ["cpu"] * 4


def test_one_process_has_all_tests_of_the_shared_cluster(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "from tests.conftest import pytest_xdist_make_scheduler as pytest_xdist_make_scheduler"
    )
    files = ["e2e/shared/test_one.py", "e2e/shared/test_other.py", "e2e/test_own.py"]
    (tmp_path / "e2e" / "shared").mkdir(parents=True)
    for file in files:
        (tmp_path / file).write_text(SHARING)
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    ran = sorted(file.name.split("-") for file in tmp_path.glob("test_*-*"))
    assert [name for name, _ in ran] == ["test_one", "test_other", "test_own"]
    one, other, own = (process for _, process in ran)
    assert one == other != own
