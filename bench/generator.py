"""Our own load generator: connections on the running event loop, one request at a time on each.

It decides when a request leaves: at once after the last (closed loop), or at an instant drawn
beforehand (open loop). Instants come from a kernel timer, since the timers of event loops have
millisecond steps. There is no pipelining, and a connection that is lost is counted and replaced.
This file does not know what the bytes that it sends mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, cast

import httptools
import numpy as np
import numpy.typing as npt

from bench.errors import LoadFailed

__all__ = ["ERRORS", "Check", "Drive"]

#: Whether the body that answers the request of this index is right.
Check = Callable[[int, bytes], bool]

ERRORS: Final = ("connect", "read", "write", "timeout", "status", "wrong")

_SWEEP_S: Final = 0.05
_RECONNECT_S: Final = 0.05
_BAD_STATUS: Final = 400


class Drive:
    """One load from its first request to its last answer.

    Args:
        address: host and port.
        wires: requests as bytes, sent in turn.
        connections: how many are held open.
        duration_s: how long a closed loop goes on.
        arrivals_s: instants of an open loop, ascending, or None for a closed loop.
        timeout_s: after how long a request is given up, from its intended arrival.
        check: of each answer.

    Attributes:
        latencies_ns: of every good answer, from the intended arrival.
        lags_ns: of every request that found a free connection: how late it left.
        errors: kind to number.
    """

    def __init__(
        self,
        address: tuple[str, int],
        wires: Sequence[bytes],
        *,
        connections: int,
        duration_s: float,
        arrivals_s: npt.NDArray[np.float64] | None,
        timeout_s: float,
        check: Check | None,
    ) -> None:
        self.latencies_ns: list[int] = []
        self.lags_ns: list[int] = []
        self.errors = dict.fromkeys(ERRORS, 0)
        self._address = address
        self._wires = wires
        self._check = check
        self._connections = connections
        self._duration_ns = int(duration_s * 1e9)
        self._timeout_ns = int(timeout_s * 1e9)
        self._offsets_ns = (
            None if arrivals_s is None else (arrivals_s * 1e9).astype(np.int64).tolist()
        )
        self._turn = 0
        self._next_arrival = 0
        #: Arrived and not yet sent; bounded by the schedule, and by the timeout.
        self._due: deque[int] = deque()
        self._free: list[_Connection] = []
        self._live: set[_Connection] = set()
        self._reconnecting: set[asyncio.Task[None]] = set()
        self._start_ns = 0
        self._stopping = False

    async def run(self) -> float:
        """Carry the load out.

        Returns:
            Seconds from the start to the end of a closed loop, or to an open loop's last answer.

        Raises:
            LoadFailed: a connection could not be made at the start.
        """
        loop = asyncio.get_running_loop()
        self._ended = loop.create_future()
        try:
            for _ in range(self._connections):
                await self._connect()
        except OSError as error:
            self._hang_up()
            raise LoadFailed(f"cannot connect to {self._address}: {error}") from error
        sweep = asyncio.create_task(self._sweep())
        self._start_ns = time.monotonic_ns()
        try:
            if self._offsets_ns is None:
                return await self._run_closed()
            return await self._run_open()
        finally:
            self._stopping = True
            for task in (sweep, *self._reconnecting):
                task.cancel()
            await asyncio.gather(sweep, *self._reconnecting, return_exceptions=True)
            self._hang_up()

    async def _run_closed(self) -> float:
        for connection in self._take_free():
            self.ready(connection)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended, self._duration_ns / 1e9)
        # What is under way now is neither an answer nor an error; it did not get its time.
        self._stopping = True
        return (time.monotonic_ns() - self._start_ns) / 1e9

    async def _run_open(self) -> float:
        assert self._offsets_ns is not None
        timer = _KernelTimer()
        loop = asyncio.get_running_loop()

        def fire() -> None:
            timer.acknowledge()
            self._arrive(timer)

        loop.add_reader(timer.fileno(), fire)
        try:
            timer.set(self._start_ns + self._offsets_ns[0])
            await self._ended
        finally:
            loop.remove_reader(timer.fileno())
            timer.close()
        return (time.monotonic_ns() - self._start_ns) / 1e9

    def finish(self) -> None:
        """End an open loop before its schedule does: no more leave, all under way get their time.

        On the thread of the loop.
        """
        if self._offsets_ns is not None:
            self._next_arrival = len(self._offsets_ns)
            self._end_if_done()

    def _arrive(self, timer: _KernelTimer) -> None:
        """Send or queue all whose instant has come, and set the timer for the next."""
        assert self._offsets_ns is not None
        now_ns = time.monotonic_ns()
        while self._next_arrival < len(self._offsets_ns):
            intended_ns = self._start_ns + self._offsets_ns[self._next_arrival]
            if intended_ns > now_ns:
                timer.set(intended_ns)
                return
            self._next_arrival += 1
            if self._free:
                self._send(self._free.pop(), intended_ns)
                self.lags_ns.append(time.monotonic_ns() - intended_ns)
            else:
                self._due.append(intended_ns)

    def ready(self, connection: _Connection) -> None:
        """A connection has nothing under way: give it what is next."""
        if self._stopping:
            return
        if self._offsets_ns is None:
            if self._start_ns == 0:
                self._free.append(connection)
            else:
                self._send(connection, time.monotonic_ns())
        elif self._due:
            self._send(connection, self._due.popleft())
        else:
            self._free.append(connection)
            self._end_if_done()

    def answered(self, connection: _Connection, status: int, body: bytes) -> None:
        """An answer has come whole."""
        took_ns = time.monotonic_ns() - connection.intended_ns
        if self._stopping:
            return
        if status >= _BAD_STATUS:
            self.errors["status"] += 1
        elif self._check is not None and not self._check(connection.index, body):
            self.errors["wrong"] += 1
        else:
            self.latencies_ns.append(took_ns)

    def lost(self, connection: _Connection, *, busy: bool) -> None:
        """A connection is gone; with a request on it, that request is an error."""
        self._live.discard(connection)
        with contextlib.suppress(ValueError):
            self._free.remove(connection)
        if self._stopping:
            return
        if busy:
            self.errors["timeout" if connection.timed_out else "read"] += 1
        task = asyncio.ensure_future(self._reconnect())
        self._reconnecting.add(task)
        task.add_done_callback(self._reconnecting.discard)
        self._end_if_done()

    def _send(self, connection: _Connection, intended_ns: int) -> None:
        index = self._turn
        self._turn = (index + 1) % len(self._wires)
        connection.send(index, self._wires[index], intended_ns)

    def _end_if_done(self) -> None:
        if (
            self._offsets_ns is not None
            and self._next_arrival == len(self._offsets_ns)
            and not self._due
            and not any(connection.busy for connection in self._live)
            and not self._ended.done()
        ):
            self._ended.set_result(None)

    async def _sweep(self) -> None:
        """Give up what has waited too long, queued or under way."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            oldest_ns = time.monotonic_ns() - self._timeout_ns
            while self._due and self._due[0] < oldest_ns:
                self._due.popleft()
                self.errors["timeout"] += 1
            for connection in tuple(self._live):
                if connection.busy and connection.intended_ns < oldest_ns:
                    connection.give_up()
            self._end_if_done()

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: _Connection(self), *self._address)
        self._live.add(connection)
        self.ready(connection)

    async def _reconnect(self) -> None:
        while not self._stopping:
            try:
                await self._connect()
            except OSError:
                self.errors["connect"] += 1
                await asyncio.sleep(_RECONNECT_S)
            else:
                return

    def _take_free(self) -> list[_Connection]:
        taken, self._free = self._free, []
        return taken

    def _hang_up(self) -> None:
        self._stopping = True
        for connection in tuple(self._live):
            connection.hang_up()


class _Connection(asyncio.Protocol):
    """One connection; its parser's callbacks are this object's methods."""

    def __init__(self, drive: Drive) -> None:
        self.busy = False
        self.timed_out = False
        self.index = 0
        self.intended_ns = 0
        self._drive = drive
        self._body: list[bytes] = []
        self._parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def send(self, index: int, wire: bytes, intended_ns: int) -> None:
        self.busy, self.index, self.intended_ns = True, index, intended_ns
        # Where the server has just hung up, the request counts as lost with the connection.
        if not self._transport.is_closing():
            self._transport.write(wire)

    def give_up(self) -> None:
        self.timed_out = True
        self._transport.abort()

    def hang_up(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            # Counted as a read error when the connection is lost.
            self._transport.abort()

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        body = b"".join(self._body)
        self._body.clear()
        self.busy = False
        self._drive.answered(self, self._parser.get_status_code(), body)
        if self._parser.should_keep_alive():
            self._drive.ready(self)
        else:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        busy, self.busy = self.busy, False
        self._drive.lost(self, busy=busy)


class _KernelTimer:
    """A timerfd: readable at an instant of the monotonic clock.

    By way of the C library, since `os.timerfd_create` came with Python 3.13.
    """

    _CLOCK_MONOTONIC: Final = 1
    _ABSOLUTE: Final = 1

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.timerfd_create(self._CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")

    def fileno(self) -> int:
        return int(self._fd)

    def set(self, instant_ns: int) -> None:
        # Zero would disarm it; an instant that has passed makes it readable at once.
        seconds, nanoseconds = divmod(max(1, instant_ns), 1_000_000_000)
        # A struct itimerspec: no interval, then the instant.
        spec = struct.pack("@4l", 0, 0, seconds, nanoseconds)
        if self._libc.timerfd_settime(self._fd, self._ABSOLUTE, spec, None):
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def acknowledge(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._fd, 8)

    def close(self) -> None:
        os.close(self._fd)
