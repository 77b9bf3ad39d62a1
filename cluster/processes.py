"""Processes by mark: find those that carry an environment variable, and end them.

A process that renames itself, as Ray's workers do, overwrites its own environment as others see
it; so the children of a marked process count as marked too. A process is known by its id and its
start time together, so an id that the system has given to somebody else is never signalled. Linux
only: reads /proc.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

__all__ = ["Process", "end_all", "marked", "process"]

#: A process in an uninterruptible wait outlives even SIGKILL.
_GIVE_UP_S = 20.0


class Process(NamedTuple):
    """A process, told from any later one of the same id."""

    pid: int
    started: int


def process(pid: int) -> Process | None:
    """The running process of an id, or None; a zombie runs no more."""
    fields = _stat(pid)
    return None if fields is None else Process(pid, int(fields[19]))


def marked(name: str, value: str) -> list[Process]:
    """Every running process that was started with ``name=value``, and all that descend from it."""
    wanted = f"{name}={value}".encode()
    parents: dict[int, int] = {}
    found: set[int] = set()
    for pid in _pids():
        fields = _stat(pid)
        if fields is None:
            continue
        parents[pid] = int(fields[1])
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        if wanted in environment.split(b"\0"):
            found.add(pid)
    grew = True
    while grew:
        children = {pid for pid, parent in parents.items() if parent in found} - found
        found |= children
        grew = bool(children)
    found.discard(os.getpid())
    return [one for one in map(process, sorted(found)) if one is not None]


def end_all(name: str, value: str, grace_s: float = 3.0) -> int:
    """End every marked process: first asked, then, after the grace, forced.

    Returns:
        How many there were. One that cannot even be forced is given up after a while.
    """
    deadline = time.monotonic() + grace_s
    signalled: set[Process] = set()
    while True:
        # Those that were found before count even if their marked parent is gone by now.
        left = {one for one in signalled if process(one.pid) == one}
        found = left | set(marked(name, value))
        if not found or time.monotonic() > deadline + _GIVE_UP_S:
            return len(signalled)
        force = time.monotonic() > deadline
        for one in found:
            if force or one not in signalled:
                _signal(one, signal.SIGKILL if force else signal.SIGTERM)
        signalled |= found
        time.sleep(0.05)


def _signal(one: Process, number: signal.Signals) -> None:
    if process(one.pid) == one:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one.pid, number)


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the name, from the state on; None if it does not run."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name may contain spaces and brackets; the fields after it do not.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else fields
