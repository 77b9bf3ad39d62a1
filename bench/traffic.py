"""An open loop of checked requests beside whatever else a benchmark does, with a book of them all.

It runs on a thread of its own while the benchmark changes things; the book says of every request
when it was meant to leave, how long it took, and what its answer said. Windows of time can be
compared afterwards. This file does not know what was changed in them.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Final, NamedTuple, Self
from urllib.parse import urlsplit

import numpy as np
import uvloop

from bench.errors import LoadFailed
from bench.generator import Drive
from bench.load import Request, poisson_arrivals
from bench.report import Samples, Series

__all__ = [
    "Asked",
    "Attempt",
    "Span",
    "Traffic",
    "WRONG",
    "latencies_ms",
    "samples_of",
    "series_of",
]

_OK: Final = 200
#: What `Attempt.told` is for an answer that is not one, or for none.
WRONG: Final = ()
#: No run of a benchmark is longer.
_LONGEST_S: Final = 900.0


class Asked(NamedTuple):
    """One kind of request.

    Attributes:
        owner: in the book.
        request: its bytes.
        read: what a body says, as the versions of its parts; raises ValueError if it is none.
    """

    owner: str
    request: Request
    read: Callable[[bytes], tuple[int, ...]]


class Attempt(NamedTuple):
    """A request that ended with an answer.

    Attributes:
        owner: of its kind.
        due: when it was meant to leave, in seconds of the monotonic clock.
        took_s: from then to its answer.
        status: of HTTP.
        told: versions of the parts of the answer; `WRONG` if it was none.
    """

    owner: str
    due: float
    took_s: float
    status: int
    told: tuple[int, ...]

    @property
    def is_right(self) -> bool:
        """Whether it is an answer, whatever version it is of."""
        return self.status == _OK and bool(self.told)

    @property
    def is_mixed(self) -> bool:
        """Whether its parts are of several versions."""
        return len(set(self.told)) > 1


class Span(NamedTuple):
    """A part of the run: from when to when, in seconds of the monotonic clock."""

    began: float
    ended: float


def latencies_ms(attempts: Sequence[Attempt], owners: Sequence[str], span: Span) -> list[float]:
    """Milliseconds of the right answers to requests of some owners that were due in a span."""
    return [
        1e3 * each.took_s
        for each in attempts
        if each.is_right and each.owner in owners and span.began <= each.due < span.ended
    ]


def samples_of(attempts: Sequence[Attempt], span: Span) -> Samples:
    """The whole book, with times from the beginning of a span."""
    return Samples(
        columns=("owner", "due_s", "took_ms", "status", "told"),
        rows=[
            (
                *(each.owner, each.due - span.began, 1e3 * each.took_s, each.status),
                " ".join(map(str, each.told)),
            )
            for each in attempts
        ],
    )


def series_of(attempts: Sequence[Attempt], owner: str, span: Span) -> Series:
    """Milliseconds of every right answer of an owner, over the seconds of a span."""
    found = [each for each in attempts if each.owner == owner and each.is_right]
    found.sort(key=lambda each: each.due)
    return Series(
        label=owner,
        x=tuple(each.due - span.began for each in found),
        y=tuple(1e3 * each.took_s for each in found),
    )


class Traffic:
    """Requests at the instants of a Poisson process for as long as the context lasts.

    Args:
        url: scheme, host and port.
        kinds: asked in a drawn order, as often one as another.
        rate: requests a second.
        connections: the most that are open.
        timeout_s: after how long a request is given up.
        seed: of instants and order.
        network: entered by the thread, if it is to be on another network than ours.

    Attributes:
        attempts: every request that was answered somehow, in the order of their ends.
        errors: kind to number: those that ended without an answer, or with a bad one.
        behind_ms: 99th percentile of how late requests left; told after the context has ended.
    """

    def __init__(
        self,
        url: str,
        kinds: Sequence[Asked],
        *,
        rate: float,
        connections: int = 64,
        timeout_s: float = 5.0,
        seed: int,
        network: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self.attempts: list[Attempt] = []
        self.errors: dict[str, int] = {}
        self.behind_ms = 0.0
        self._loop = uvloop.new_event_loop()
        self._failure: BaseException | None = None
        self._network = network
        self._drive = _Drive(
            self.attempts,
            url,
            _drawn(kinds, seed),
            rate=rate,
            connections=connections,
            timeout_s=timeout_s,
            seed=seed,
        )
        self._thread = threading.Thread(target=self._main, name="traffic", daemon=True)

    def __enter__(self) -> Self:
        # A collection walks what saving models has left, for a tenth of a second in which nothing
        # is sent or read; what the run itself leaves in cycles is little.
        gc.collect()
        gc.freeze()
        gc.disable()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._drive.finish)
        self._thread.join()
        gc.enable()
        gc.unfreeze()
        self._loop.close()
        self.errors = {name: count for name, count in self._drive.errors.items() if count}
        if self._drive.lags_ns:
            self.behind_ms = float(np.percentile(self._drive.lags_ns, 99)) / 1e6
        if self._failure is not None and error is None:
            raise LoadFailed(f"the load ended by itself: {self._failure!r}") from self._failure

    def _main(self) -> None:
        try:
            with self._network():
                self._loop.run_until_complete(self._drive.run())
        except BaseException as error:
            self._failure = error


class _Drive(Drive):
    """Books what comes back."""

    def __init__(
        self,
        book: list[Attempt],
        url: str,
        kinds: Sequence[Asked],
        *,
        rate: float,
        connections: int,
        timeout_s: float,
        seed: int,
    ) -> None:
        address = urlsplit(url)
        super().__init__(
            (address.hostname or "127.0.0.1", address.port or 80),
            [kind.request.wire(address.netloc) for kind in kinds],
            connections=connections,
            duration_s=_LONGEST_S,
            arrivals_s=poisson_arrivals(rate, _LONGEST_S, seed=seed),
            timeout_s=timeout_s,
            check=self._reads,
        )
        self._book = book
        self._kinds = kinds
        self._told: tuple[int, ...] = WRONG

    def answered(self, connection: Any, status: int, body: bytes) -> None:
        """An answer has come whole."""
        took_ns = time.monotonic_ns() - connection.intended_ns
        self._told = WRONG
        super().answered(connection, status, body)
        kind = self._kinds[connection.index]
        self._book.append(
            Attempt(kind.owner, connection.intended_ns / 1e9, took_ns / 1e9, status, self._told)
        )

    def _reads(self, index: int, body: bytes) -> bool:
        try:
            self._told = self._kinds[index].read(body)
        except ValueError:
            return False
        return bool(self._told)


def _drawn(kinds: Sequence[Asked], seed: int) -> list[Asked]:
    """Each kind as often as the others, in an order in which none follows another always."""
    generator = np.random.default_rng(seed)
    return [kinds[at] for _ in range(16) for at in generator.permutation(len(kinds))]
