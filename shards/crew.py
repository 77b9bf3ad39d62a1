"""Threads that share out a work of many pieces among themselves, and whoever asks for it.

Whoever asks does what nobody else has begun: where all threads are busy with what others have
asked for, it does everything itself, and waits for none of them. Does not know what the work is.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

__all__ = ["Crew"]


class Crew:
    """Some threads of a process.

    Args:
        threads: the asker's included.
        name: of the threads.
    """

    def __init__(self, threads: int, name: str = "look-up") -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(max(threads - 1, 1), thread_name_prefix=name)

    @property
    def threads(self) -> int:
        """How many there are, the asker's included."""
        return self._threads

    def run(self, work: Callable[[], int]) -> int:
        """Have everybody do a work that they share out themselves; a result that is not negative.

        Who is late finds nothing left to do, and is not waited for. What fails is raised when
        everybody has ended.
        """
        others = [self._pool.submit(work) for _ in range(self._threads - 1)]
        try:
            found = work()
        finally:
            # Whatever happens to one, nobody else may go on writing into what the caller gives up,
            # nor begin when the next work has.
            begun = [other for other in others if not other.cancel()]
            wait(begun)
        rest = [other.result() for other in begun]
        return max(found, *rest) if rest else found
