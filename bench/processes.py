"""Child processes of a benchmark: started with a log, awaited until ready, ended as a group.

A server under test may start processes of its own, so each child leads a session and the whole
of it is ended. This file does not know what the children do.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

from bench.errors import ContenderFailed
from bench.report import ROOT

__all__ = ["apart", "child", "ending_when_told", "first_in_line", "python", "tail"]

_AUTOGROUP: Final = Path("/proc/self/autogroup")
#: A session of this niceness has nine times the weight of another.
_FIRST: Final = -10
_POLL_S: Final = 0.02
_GRACE_S: Final = 5.0
_TAIL_LINES: Final = 15


@contextlib.contextmanager
def first_in_line() -> Iterator[bool]:
    """Let this session's processes begin before those of others, as if on a machine of their own.

    For a load generator on the machine that it measures. Where the kernel makes groups by session
    (`sched_autogroup_enabled`), how soon a thread runs that has been woken hangs on what other
    sessions do, and not on the class or niceness of who does it: a generator would wait for a
    process of the idle class in the cluster's session, which a client elsewhere would not.

    Yields:
        Whether it is so: without such groups there is no need, without the right there is no way.
    """
    try:
        before = _AUTOGROUP.read_text().rpartition(" ")[2].strip()
        _AUTOGROUP.write_text(str(_FIRST))
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        _AUTOGROUP.write_text(before)


@contextlib.contextmanager
def apart(pid: int, others: Iterable[int]) -> Iterator[bool]:
    """Give one process the upper half of the processors, and others the lower half.

    For as long as the context lasts. For a device under a load that costs processor time by itself:
    a program shared out over threads waits for the last of them, so it loses far more than the time
    that generator and router take from one of its processors.

    Args:
        pid: of the process; all its threads, and those that they start.
        others: that keep off.

    Yields:
        Whether it is so; one processor cannot be halved.
    """
    processors = sorted(os.sched_getaffinity(0))
    middle = len(processors) // 2
    if not middle:
        yield False
        return
    lower, upper = processors[:middle], processors[middle:]
    halves = {pid: upper, **dict.fromkeys(others, lower)}
    before = [each for owner, half in halves.items() for each in _confine(owner, half)]
    try:
        yield True
    finally:
        for thread, given in before:
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(thread, given)


def _confine(pid: int, processors: Iterable[int]) -> Iterator[tuple[int, set[int]]]:
    """Keep every thread of a process on these; tells each with those that it had before."""
    for name in os.listdir(f"/proc/{pid}/task"):
        thread = int(name)
        with contextlib.suppress(ProcessLookupError):
            before = os.sched_getaffinity(thread)
            os.sched_setaffinity(thread, processors)
            yield thread, before


@contextlib.contextmanager
def ending_when_told() -> Iterator[None]:
    """Have SIGTERM raise SystemExit, so that what was started is ended as it is at any end.

    Left to itself it ends a process at once, and the cluster that it started stays. Does nothing
    outside the main thread, since others cannot take signals.
    """

    def end(number: int, frame: FrameType | None) -> NoReturn:
        # Whoever repeats it must not interrupt the ending. Not ignored, as children inherit that.
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs one of our modules under this interpreter."""
    return [sys.executable, "-m", module, *arguments]


@contextlib.contextmanager
def child(
    command: Sequence[str],
    *,
    log: Path,
    ready: str,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> Iterator[str]:
    """Run a child for as long as the context lasts.

    Args:
        command: program and arguments; it runs in the checkout.
        log: takes its standard output and error.
        ready: the beginning of the line with which it says that it is.
        timeout_s: how long it may take to say so.
        environment: added to ours.
        pass_fds: descriptors that the child keeps, under the same numbers.

    Yields:
        The rest of the line that said ready.

    Raises:
        ContenderFailed: it ended or stayed silent; with the end of its log.
    """
    name = " ".join(command[1:3])
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
            start_new_session=True,
            pass_fds=pass_fds,
        )
    try:
        yield _await_ready(process, name=name, log=log, ready=ready, timeout_s=timeout_s)
        if process.poll() is not None:
            raise ContenderFailed(f"{name} ended with {process.returncode}:\n{tail(log)}")
    finally:
        _end(process)


def tail(log: Path) -> str:
    """The last lines of a log, for an error message."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])


def _await_ready(
    process: subprocess.Popen[bytes], *, name: str, log: Path, ready: str, timeout_s: float
) -> str:
    deadline = time.monotonic() + timeout_s
    while True:
        # Asked before the log is read, so that the last words of a child that ended are heard.
        ended = process.poll()
        for line in log.read_text(errors="replace").splitlines(keepends=True):
            if line.startswith(ready) and line.endswith("\n"):
                return line.removeprefix(ready).strip()
        if ended is not None:
            raise ContenderFailed(f"{name} ended with {ended}:\n{tail(log)}")
        if time.monotonic() > deadline:
            raise ContenderFailed(f"{name} was not ready in {timeout_s:g} s:\n{tail(log)}")
        time.sleep(_POLL_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the whole session to end, then make it."""
    for number, grace_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, None)):
        # The group outlives its leader while any member lives, so the leader's exit is no reason
        # to leave the others alone.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
