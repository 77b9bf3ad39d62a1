"""The rules that `conftest` sets are in force."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import pytest
import ray


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
