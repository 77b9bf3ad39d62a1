"""What others took of the processors while something was measured.

Another process, or the hypervisor (which Linux counts as stolen), takes time from a run that
neither the product nor its peer is to blame for. Linux only: read from /proc.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["Reading", "await_calm", "read", "share_taken"]

_TICK_S: Final = 1.0 / os.sysconf("SC_CLK_TCK")


class Reading(NamedTuple):
    """Seconds since the machine's start.

    Attributes:
        at_s: when.
        busy_s: that all processors were not idle, those stolen from them among these.
        own_s: of these, what this process and those it started took.
    """

    at_s: float
    busy_s: float
    own_s: float


def read() -> Reading:
    """What was taken until now."""
    [first, *_] = Path("/proc/stat").read_text().splitlines()
    user, nice, system, _idle, _waits, hard, soft, stolen, *_ = map(int, first.split()[1:])
    return Reading(
        time.monotonic(), (user + nice + system + hard + soft + stolen) * _TICK_S, _own_s()
    )


def share_taken(before: Reading, after: Reading) -> float:
    """Processors that others had between two readings; 0.05 is a twentieth of one."""
    others_s = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)
    return max(0.0, others_s / (after.at_s - before.at_s))


def await_calm(share: float = 0.15, timeout_s: float = 20.0, look_s: float = 0.5) -> bool:
    """Wait until servers that were started have done what they do once.

    Args:
        share: processors that all together may take.
        timeout_s: the longest wait.
        look_s: over how long that is seen.

    Returns:
        Whether it became calm in time.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        before = read()
        time.sleep(look_s)
        after = read()
        if after.busy_s - before.busy_s <= share * (after.at_s - before.at_s):
            return True
    return False


def _own_s() -> float:
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:  # it has ended
            continue
        # The name in brackets may have blanks and brackets of its own.
        fields = text[text.rindex(")") + 2 :].split()
        pid = int(path.parent.name)
        parents[pid] = int(fields[1])
        # Time of its own, and of its children that have ended.
        ticks[pid] = sum(map(int, fields[11:15]))
    return _TICK_S * sum(ticks[pid] for pid in ticks if _descends(pid, os.getpid(), parents))


def _descends(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    while pid and pid != ancestor:
        pid = parents.get(pid, 0)
    return pid == ancestor
