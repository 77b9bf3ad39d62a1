"""Lines of jobs, each with a thread that does them in their order, and who is in which line.

Most units share one line. A unit that waits for a disk by its nature has one of its own. A mapped
table waits only now and then, for a page that is not in memory: then it keeps the line whose thread
it holds up, and everybody else gets another, with the jobs that were waiting behind it. It comes
back to the others once it has held up nothing for a while.

Decides who is in which line. Does not know what a job is, nor what comes of it.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Final, Generic, Protocol, TypeVar

__all__ = ["Job", "Line", "Lines", "waits_for_disk"]

#: How long a job is at work before somebody looks whether it waits for a disk; and then again.
_LOOK_S: Final = 0.002
#: A table that held up others keeps its line for so long after the last time.
_KEEP_S: Final = 1.0
#: Lines that were kept, at most: each is a thread.
_KEPT_MAX: Final = 16
_STAT_BYTES: Final = 1024


class Job(Protocol):
    """What is done in a line."""

    @property
    def of(self) -> str:
        """The unit, or set of tables, that it is for."""

    @property
    def own_line(self) -> bool:
        """Whether that is always to have a line of its own."""

    @property
    def may_wait(self) -> bool:
        """Whether that may keep a line that it holds up, and run beside others."""


J = TypeVar("J", bound=Job)
#: What comes of one.
D = TypeVar("D")


class Line(Generic[J, D]):
    """Jobs, and the thread that does them in their order.

    Args:
        work: does what is in `todo`, on the thread: takes each from the left.
        name: of the thread.

    Attributes:
        todo: those of the frame that the thread is at, which others may take away.
        done: what has come of jobs and is not handed over.
        at: what the thread is at; written there, read on the loop thread.
        since: when it began with that.
    """

    def __init__(self, work: Callable[[Line[J, D]], None], name: str) -> None:
        #: those of each frame; None ends the thread
        self._jobs: SimpleQueue[Sequence[J] | None] = SimpleQueue()
        #: frames that were given to the thread and that it has finished, each counted by one side
        self._given = self._finished = 0
        self.todo: deque[J] = deque()
        self.done: deque[D] = deque()
        self.at: J | None = None
        self.since = 0.0
        self._work = work
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return self._given == self._finished

    @property
    def is_awaited(self) -> bool:
        """Whether anything waits for what the thread is at."""
        return bool(self.todo) or self._given - self._finished > 1

    def put(self, jobs: Sequence[J]) -> None:
        """Have the jobs of a frame done after all others. On the loop thread, as what follows."""
        self._given += 1
        self._jobs.put(jobs)

    def close(self) -> None:
        """End the thread after what is queued."""
        self._jobs.put(None)

    def join(self) -> None:
        """Wait for that, not for ever."""
        self.thread.join(5.0)

    def left(self) -> Iterator[list[J]]:
        """Take away what the thread has not begun, frame by frame."""
        frame: list[J] = []
        while self.todo:
            try:
                frame.append(self.todo.popleft())
            except IndexError:  # the thread was quicker
                break
        if frame:
            yield frame
        while True:
            try:
                found = self._jobs.get_nowait()
            except Empty:
                return
            if found is None:
                self._jobs.put(None)
                return
            self._given -= 1
            yield list(found)

    def _run(self) -> None:
        while (jobs := self._jobs.get()) is not None:
            self.todo.extend(jobs)
            del jobs
            self._work(self)
            # An idle thread keeps neither a call's tensors nor a removed unit alive.
            self.at = None
            self._finished += 1


def waits_for_disk(thread: threading.Thread) -> bool:
    """Whether a thread of this process sleeps in the kernel and cannot be interrupted."""
    try:
        file = os.open(f"/proc/self/task/{thread.native_id}/stat", os.O_RDONLY)
    except OSError:
        return False  # it has ended
    try:
        return os.read(file, _STAT_BYTES).rpartition(b")")[2][:2] == b" D"
    finally:
        os.close(file)


class Lines(Generic[J, D]):
    """All lines of an engine. Called on the loop thread.

    Args:
        loop: whose thread that is.
        work: does what a line has `todo`, on the line's thread.
        hand_over: called where a line is kept by who holds it up, for what it has done before.
        clock: seconds; that of `Line.since`.
        waits: whether a thread is held up.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        work: Callable[[Line[J, D]], None],
        hand_over: Callable[[Line[J, D]], None],
        clock: Callable[[], float],
        waits: Callable[[threading.Thread], bool] = waits_for_disk,
    ) -> None:
        self._loop = loop
        self._work = work
        self._hand_over = hand_over
        self._clock = clock
        self._waits = waits
        self._shared: Line[J, D] = Line(work, "worker")
        #: by the unit, or set of tables, whose own they are
        self._own: dict[str, Line[J, D]] = {}
        #: of those, the ones that were kept, with when
        self._kept: dict[str, float] = {}
        self._look: asyncio.TimerHandle | None = None

    def __iter__(self) -> Iterator[Line[J, D]]:
        yield self._shared
        yield from self._own.values()

    def own(self, name: str) -> Line[J, D]:
        """The line of its own that a unit has from now on."""
        line = self._own.get(name)
        if line is None:
            line = self._own[name] = Line(self._work, f"worker {name[:12]}")
        return line

    def put(self, jobs: Sequence[J]) -> None:
        """Give the jobs of a frame to the lines that are to do them."""
        if not self._kept and not any([job.own_line for job in jobs]):
            self._put_shared(jobs)
            return
        apart: dict[Line[J, D], list[J]] = {}
        for job in jobs:
            apart.setdefault(self._line_of(job), []).append(job)
        for line, mine in apart.items():
            if line is self._shared:
                self._put_shared(mine)
            else:
                line.put(mine)

    def end_all_but(self, served: Container[str]) -> None:
        """End the own lines of what is not served any more."""
        for name in [name for name in self._own if name not in served]:
            self._end(name)

    def close(self) -> None:
        """End all threads after what is queued."""
        if self._look is not None:
            self._look.cancel()
        lines = list(self)
        for line in lines:
            line.close()
        for line in lines:
            line.join()

    def _end(self, name: str) -> None:
        self._own.pop(name).close()
        self._kept.pop(name, None)

    def _line_of(self, job: J) -> Line[J, D]:
        if job.own_line:
            return self.own(job.of)
        last = self._kept.get(job.of)
        if last is None:
            return self._shared
        if self._own[job.of].is_idle and self._clock() - last > _KEEP_S:
            self._end(job.of)
            return self._shared
        return self._own[job.of]

    def _put_shared(self, jobs: Sequence[J]) -> None:
        line = self._shared
        if (len(jobs) > 1 or not line.is_idle) and self._look is None:
            self._look = self._loop.call_later(_LOOK_S, self._look_after)
        line.put(jobs)

    def _look_after(self) -> None:
        """Whether the shared line is held up; looked at while others wait there."""
        self._look = None
        line = self._shared
        job = line.at
        if not line.is_awaited:
            return
        if (
            job is not None
            and self._clock() - line.since >= _LOOK_S
            and job.may_wait
            and len(self._kept) < _KEPT_MAX
            and job.of not in self._own
            and self._waits(line.thread)
            and line.at is job
        ):
            self._keep(job.of)
        else:
            self._look = self._loop.call_later(_LOOK_S, self._look_after)

    def _keep(self, name: str) -> None:
        """Leave the shared line to who holds it up, and go on in another."""
        line, self._shared = self._shared, Line(self._work, "worker")
        self._own[name] = line
        self._kept[name] = self._clock()
        line.thread.name = f"worker {name[:12]}"
        self._hand_over(line)
        for jobs in list(line.left()):
            mine = [job for job in jobs if job.of == name]
            others = [job for job in jobs if job.of != name]
            if mine:
                line.put(mine)
            if others:
                self._put_shared(others)
