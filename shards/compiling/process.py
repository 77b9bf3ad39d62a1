"""The compile process, as its parent sees it: started, asked, given up on, ended.

Decides how long the child may be silent, and what its death means. One trial at a time; every
method may block.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import msgspec

from batching.errors import DataLoss, ResourceExhausted, ServingError, error_of
from shards.compiling.channel import Channel
from shards.compiling.messages import (
    KEY_BYTES,
    Compiled,
    Doing,
    Done,
    FromChild,
    Refused,
    Settings,
    Trial,
)
from shards.errors import BundleCorrupt, ProgramRefused

__all__ = ["ChildDied", "ChildStarved", "CompileProcess"]

logger = logging.getLogger(__name__)

_REAP_S: Final = 10.0
#: A child that gets less of a processor than this is starved.
_SHARE_MIN: Final = 0.1

#: The kernel ends a child when the thread that started it ends, so that thread is one that lives as
#: long as this process.
_SPAWNER: Final = ThreadPoolExecutor(1, thread_name_prefix="spawner")

#: Errors of the child's that have a name of their own here.
_KINDS: Final = {kind.code: kind for kind in (BundleCorrupt, ProgramRefused)}


class ChildDied(Exception):
    """The compile process ended, or was given up, in the middle of a trial.

    Args:
        step: what it had said that it was about to do.
        how: how it ended.
        may_retry: it may not have been the program's doing.
        was_killed: somebody else ended it; the kernel does so where memory is short.
    """

    def __init__(self, step: str, how: str, may_retry: bool, was_killed: bool) -> None:
        super().__init__(step, how, may_retry, was_killed)
        self.step = step
        self.how = how
        self.may_retry = may_retry
        self.was_killed = was_killed

    def __str__(self) -> str:
        return f"the compile process {self.how} while {self.step}"

    def refusal(self) -> ServingError:
        """What it means for who wanted the program."""
        kind = ResourceExhausted if self.was_killed else ProgramRefused
        return kind(str(self))


class ChildStarved(Exception):
    """The compile process was given no processor; the next one is less patient."""


class _Child:
    """A process and our end of its channel."""

    def __init__(self, settings: Settings) -> None:
        self.is_ready = False
        #: it was killed, and may not have ended yet
        self.is_doomed = False
        ours, theirs = socket.socketpair()
        key = secrets.token_bytes(KEY_BYTES)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "shards.compiling.child",
                 str(theirs.fileno()), str(os.getpid())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # In a session of its own it would be in a group of its own for the scheduler, too,
                # and its last place would be the last of that group (`sched_autogroup_enabled`).
                process_group=0,
                env=_environment(),
            )  # fmt: skip
        self.channel = Channel(ours, key, is_parent=True)
        try:
            ours.sendall(key)
            self.channel.send(settings)
        except OSError:
            logger.debug("the compile process ended as it began")

    def cpu_s(self) -> float:
        """Seconds of processor time that it has used.

        Raises:
            EOFError: it has ended.
        """
        # What comes after the name, which may hold anything, in clock ticks: utime and stime.
        try:
            status = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except FileNotFoundError:  # it ended, and was reaped by who would have killed it
            raise EOFError from None
        return (int(status[11]) + int(status[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> int:
        """Kill it if it lives, reap it, and return its status; below 0 is a signal's number."""
        self.channel.close()
        self.process.kill()
        return self.process.wait(_REAP_S)


class CompileProcess:
    """A child that tries units; started when it is needed, and again after it died.

    Args:
        settings: for every child.
        silence_s_max: wall seconds that a child may take for one step. It runs when nothing else
            wants to, so this is long; `Settings.step_cpu_s_max` bounds what it uses.
        patience_s: wall seconds of a step after which a child that was hardly let run is starved.
    """

    def __init__(
        self, settings: Settings, silence_s_max: float = 900.0, patience_s: float = 5.0
    ) -> None:
        self._settings = settings
        self._silence_s_max = silence_s_max
        self._patience_s = patience_s
        self._is_patient = True
        self._child: _Child | None = None
        self._finalizer: weakref.finalize[..., CompileProcess] | None = None

    @property
    def pid(self) -> int | None:
        """Of the child, if there is one. May be read on any thread."""
        child = self._child
        return None if child is None else child.process.pid

    def start(self) -> None:
        """Have a child. Returns before it is ready."""
        child = self._child
        if child is not None and (child.is_doomed or child.process.poll() is not None):
            self.end()
        if self._child is None:
            settings = msgspec.structs.replace(self._settings, is_patient=self._is_patient)
            self._child = _SPAWNER.submit(_Child, settings).result()
            self._finalizer = weakref.finalize(self, self._child.end)

    def end(self) -> int:
        """Have no child any more; returns the status of the one that was. The next is patient."""
        self._is_patient = True
        child, self._child = self._child, None
        if child is None:
            return 0
        assert self._finalizer is not None
        self._finalizer.detach()
        return child.end()

    def kill(self) -> None:
        """End the child in the middle of its trial, which raises `ChildDied`. On any thread."""
        child = self._child
        if child is not None:
            child.is_doomed = True
            child.process.kill()

    def try_unit(self, trial: Trial) -> Iterator[Compiled]:
        """Have a unit tried; yields each bucket when it is ready.

        Raises:
            ChildDied: the child did not survive it; the next trial gets another one.
            ChildStarved: the machine is so busy that the child does not get on; the next trial
                gets one that takes its share.
            ServingError: the child refused the unit, and why.
        """
        self.start()
        assert self._child is not None
        step = "starting"
        is_over = False
        try:
            if not self._child.is_ready:
                self._receive(step)
                self._child.is_ready = True
            self._child.channel.send(trial, self._silence_s_max)
            while True:
                match message := self._receive(step):
                    case Doing():
                        step = message.step
                    case Compiled():
                        yield message
                    case Done():
                        is_over = True
                        return
                    case Refused():
                        is_over = True
                        raise _error(message)
        except TimeoutError:
            self.end()
            how = f"said nothing for {self._silence_s_max:g} s and was ended"
            raise ChildDied(step, how, may_retry=False, was_killed=False) from None
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise self._died(step) from None
        except DataLoss as error:
            if is_over:
                raise
            self.end()
            how = f"said what cannot be ({error})"
            raise ChildDied(step, how, may_retry=False, was_killed=False) from None
        finally:
            # Who stops listening in the middle of a trial leaves a channel that cannot be used.
            if not is_over:
                self.end()

    def hurry(self) -> None:
        """Let the next child take a share of the processors, however busy they are."""
        self.end()
        self._is_patient = False

    def _receive(self, step: str) -> FromChild:
        """The next word, for which a patient child is waited for as long as it is let run."""
        assert self._child is not None
        child = self._child
        if self._is_patient:
            waited_s, used_s = 0.0, child.cpu_s()
            piece_s = min(self._patience_s, self._silence_s_max)
            while not child.channel.is_readable(piece_s):
                waited_s += piece_s
                if waited_s >= self._silence_s_max:
                    raise TimeoutError
                if child.cpu_s() - used_s < waited_s * _SHARE_MIN:
                    raise ChildStarved(f"the compile process is starved while {step}")
        return child.channel.receive(FromChild, self._silence_s_max)  # type: ignore[arg-type]

    def _died(self, step: str) -> ChildDied:
        assert self._child is not None
        # It closed the channel by ending, so its status is its own and not that of our signal.
        try:
            self._child.process.wait(_REAP_S)
        except subprocess.TimeoutExpired:
            logger.warning("the compile process closed its channel and lives on")
        status = self.end()
        if status == -signal.SIGXCPU:
            cpu_s = self._settings.step_cpu_s_max
            return ChildDied(step, f"used more than {cpu_s} s of processor time", False, False)
        how = f"ended with status {status}"
        if status < 0:
            how = f"was ended by {signal.Signals(-status).name}"
        return ChildDied(step, how, may_retry=True, was_killed=status == -signal.SIGKILL)


def _error(refused: Refused) -> ServingError:
    for code, kind in _KINDS.items():
        if refused.code == code:
            return kind(refused.message)
    return error_of(refused.code, refused.message)


def _environment() -> dict[str, str]:
    # The child finds this very package, wherever its parent found it.
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)}
