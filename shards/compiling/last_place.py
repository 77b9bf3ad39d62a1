"""The last place on the machine, for a process that works beside those who serve.

Decides by which means of the kernel a process comes after everybody else. It knows neither what
the process does nor who serves.

A process's class counts within its group of the scheduler alone, and where groups are made by
session (`sched_autogroup_enabled`) a client or a proxy is in another one than the cluster. So a
process of the idle class gives way at once to what serves, but to them only when its slice is over:
measured on Linux 6.18, who wakes on its processor waits 3.6 ms at the 99th percentile. Hence it
asks for long slices: a kernel that knows of them (6.12) lets whoever asks for shorter ones, which
is everybody else, begin at once, in 0.1 ms. In a group of its own that weighs least it would be
starved wherever another session is busy.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
from pathlib import Path
from typing import Final

__all__ = ["take_the_last_place"]

#: A tenth of the weight of what serves: where the machine is never idle, a load still ends.
_NICENESS: Final = 10
#: The longest slice that can be asked for.
_SLICE_NS: Final = 100_000_000
#: The system call's number by machine: most C libraries have no function for it.
_SCHED_SETATTR: Final = {"x86_64": 314, "aarch64": 274}
#: size, policy, flags, nice, priority, runtime, deadline, period
_ATTRIBUTES: Final = struct.Struct("=IIQiIQQQ")


def take_the_last_place(is_patient: bool) -> None:
    """Run when nothing else wants to, be the first to go when memory is short, dump no core.

    Args:
        is_patient: one that is not takes a small share of a processor, however busy they are.
    """
    os.nice(_NICENESS)
    _ask_for_long_slices(os.getpriority(os.PRIO_PROCESS, 0))
    if is_patient:
        # The idle class keeps the slices of before.
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    Path("/proc/self/oom_score_adj").write_text("1000")


def _ask_for_long_slices(niceness: int) -> None:
    """Let whoever asks for shorter ones begin at once; an older kernel takes no notice."""
    number = _SCHED_SETATTR.get(platform.machine())
    if number is not None:
        wanted = (os.SCHED_OTHER, 0, niceness, 0, _SLICE_NS, 0, 0)
        ctypes.CDLL(None).syscall(number, 0, _ATTRIBUTES.pack(_ATTRIBUTES.size, *wanted), 0)
