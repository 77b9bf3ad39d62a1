"""What a process in the last place asks the kernel for, read back from it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

_READ = """
import ctypes, os, struct, sys
from shards.compiling.last_place import take_the_last_place
take_the_last_place(is_patient=sys.argv[1] == "patient")
found = ctypes.create_string_buffer(48)
assert ctypes.CDLL(None).syscall(315, 0, found, 48, 0) == 0
_, policy, _, nice, _, runtime, _, _ = struct.unpack("=IIQiIQQQ", found.raw)
print(os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0), runtime)
"""


def taken(how: str) -> list[int]:
    """Class, niceness and slice of a process that took it."""
    told = subprocess.run(
        [sys.executable, "-c", _READ, how], capture_output=True, text=True, check=True
    )
    return [int(word) for word in told.stdout.split()]


def nicer() -> int:
    """What ten more than ours is, up to the highest niceness."""
    return min(os.getpriority(os.PRIO_PROCESS, 0) + 10, 19)


_KERNEL = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])
knows_slices = pytest.mark.skipif(
    _KERNEL < (6, 12) or platform.machine() != "x86_64", reason="no slices to be read back"
)


@knows_slices
def test_a_patient_process_is_of_the_idle_class_and_asked_for_long_slices() -> None:
    assert taken("patient") == [os.SCHED_IDLE, nicer(), 100_000_000]


@knows_slices
def test_an_impatient_process_has_a_share_and_asked_for_long_slices() -> None:
    assert taken("impatient") == [os.SCHED_OTHER, nicer(), 100_000_000]
