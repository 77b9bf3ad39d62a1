"""A shelf in memory whose every call a test may interleave with those of others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from shards.shelves import Object

__all__ = ["MemoryShelf", "Worker", "turn"]

_STEP_S: Final = 30.0


class MemoryShelf:
    """Files in a dictionary, with a clock that the test moves."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[bytes, float]] = {}
        self.now = 1_000_000.0

    def list(self, prefix: str, *, recursive: bool = True) -> tuple[list[Object], list[str]]:
        turn()
        return [
            Object(path, len(data), at)
            for path, (data, at) in sorted(self.files.items())
            if path.startswith(f"{prefix}/") and (recursive or "/" not in path[len(prefix) + 1 :])
        ], []

    def stat(self, path: str) -> Object | None:
        turn()
        found = self.files.get(path)
        return None if found is None else Object(path, len(found[0]), found[1])

    def read(self, path: str, size_max: int) -> bytes:
        turn()
        if path not in self.files:
            raise FileNotFoundError(path)
        return self.files[path][0]

    def write(self, path: str, data: bytes | bytearray | memoryview) -> None:
        turn()
        self.files[path] = (bytes(data), self.now)

    def create_exclusively(self, path: str, data: bytes | bytearray | memoryview) -> None:
        turn()
        if path in self.files:
            raise FileExistsError(path)
        self.files[path] = (bytes(data), self.now)

    def delete(self, path: str) -> None:
        turn()
        self.files.pop(path, None)


_here: Final = threading.local()


def turn() -> None:
    """Called before every step: waits until the test gives this worker its next one."""
    worker: Worker | None = getattr(_here, "worker", None)
    if worker is not None:
        worker._wait()


class Worker:
    """A function that runs only when told to, one step at a time."""

    def __init__(self, name: str, work: Callable[[], object]) -> None:
        self.name = name
        self.error: BaseException | None = None
        self._work = work
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._ended = self._is_killed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._stopped.acquire(timeout=_STEP_S)

    @property
    def is_done(self) -> bool:
        return self._ended

    def step(self, steps: int = 1) -> None:
        """Let it take its next steps, as far as there are any."""
        for _ in range(steps):
            if self._ended:
                return
            self._go.release()
            assert self._stopped.acquire(timeout=_STEP_S)

    def kill(self) -> None:
        """It takes no further step, as a process that died."""
        self._is_killed = True
        self.step()
        self._thread.join(_STEP_S)

    def _run(self) -> None:
        _here.worker = self
        try:
            self._wait()
            self._work()
        except _KilledError:
            pass
        except BaseException as error:
            self.error = error
        self._ended = True
        self._stopped.release()

    def _wait(self) -> None:
        if self._is_killed:
            raise _KilledError  # also out of a `finally`: who died tidies up nothing
        self._stopped.release()
        self._go.acquire()
        if self._is_killed:
            raise _KilledError


class _KilledError(BaseException):
    pass
