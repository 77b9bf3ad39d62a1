"""Bodies that are read in a process of their own, as the router sees it.

Decides which body is read next, how long one may take, and what the end of the process means. What
is in a body is `cluster.doors.reader`'s. Everything happens on the loop's thread; the process is
started when it is first needed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from typing import Final

import msgspec
import numpy as np

from batching.errors import (
    DeadlineExceeded,
    Internal,
    ResourceExhausted,
    ServingError,
    Unavailable,
    error_of,
)
from cluster.api import Parsed
from cluster.doors.reader import LENGTH, Answer, Method, Question
from cluster.doors.settings import BODY_BYTES_MAX
from cluster.forms import BodyTooLarge, Forms
from shards.wire import decode_tensors

__all__ = ["Reading", "ReadingRoom"]

logger = logging.getLogger(__name__)

#: Bodies up to this size do not wait behind larger ones: they have a reader of their own.
_SMALL_BYTES: Final = 1 << 20
#: No body within the door's limit takes so long but one that is made to.
_READ_S_MAX: Final = 15.0
_WAITING_BYTES_MAX: Final = 256 << 20
_PIECE_BYTES: Final = 256 << 10

Done = Callable[[Parsed | ServingError], None]


class Reading:
    """One body that is read, or waits. It ends once: with its request, an error, or in silence.

    Attributes:
        is_over: nobody waits for it any more.
    """

    __slots__ = ("body", "deadline", "done", "is_over", "question")

    def __init__(
        self, question: Question, body: bytes | bytearray, deadline: float, done: Done
    ) -> None:
        self.question = question
        self.body = body
        self.deadline = deadline
        self.done = done
        self.is_over = False

    def end(self, outcome: Parsed | ServingError) -> None:
        """Tell whoever waits, if anybody still does."""
        if not self.is_over:
            self.is_over = True
            self.done(outcome)

    def cancel(self) -> None:
        """The client has gone."""
        self.is_over = True


class ReadingRoom:
    """All bodies of a door that are read apart.

    Args:
        waiting_bytes_max: bytes of bodies that may wait; one alone may be larger.
        read_s_max: how long one body may take.
        inflated_bytes_max: what a compressed body may hold.
    """

    def __init__(
        self,
        waiting_bytes_max: int = _WAITING_BYTES_MAX,
        read_s_max: float = _READ_S_MAX,
        inflated_bytes_max: int = BODY_BYTES_MAX,
    ) -> None:
        self._inflated_bytes_max = inflated_bytes_max
        self._waiting_bytes_max = waiting_bytes_max
        self._bytes = 0
        self._small = _Reader(read_s_max, self._left)
        self._large = _Reader(read_s_max, self._left)

    def read(
        self,
        method: Method,
        signatures: bytes,
        body: bytes | bytearray,
        deadline: float,
        done: Done,
        forms: Forms | None = None,
    ) -> Reading:
        """Have a body read; `done` is called once, later, unless the reading is cancelled.

        Args:
            method: which API's body it is.
            signatures: of the version, by name, as msgpack.
            body: its bytes.
            deadline: on the loop's clock.
            done: gets the request in it, or the error.
            forms: of the request; None where it is JSON.

        Raises:
            ResourceExhausted: too much waits already.
        """
        if self._bytes and self._bytes + len(body) > self._waiting_bytes_max:
            raise ResourceExhausted("too many large bodies wait to be read", 1000)
        self._bytes += len(body)
        question = Question(method, signatures, len(body))
        if forms is not None:
            question.form, question.head_bytes = forms.request.value, forms.head_bytes
            question.encoding = forms.encoding
            question.inflated_bytes_max = self._inflated_bytes_max
        reading = Reading(question, body, deadline, done)
        # How large a compressed body is shows only as it is read.
        is_small = len(body) <= _SMALL_BYTES and not question.encoding
        (self._small if is_small else self._large).add(reading)
        return reading

    def _left(self, nbytes: int) -> None:
        self._bytes -= nbytes

    def close(self) -> None:
        """End the processes; what waits ends with them."""
        self._small.close()
        self._large.close()


class _Reader:
    """One process, and the bodies that wait for it."""

    def __init__(self, read_s_max: float, left: Callable[[int], None]) -> None:
        self._read_s_max = read_s_max
        self._left = left
        self._waiting: deque[Reading] = deque()
        self._working: asyncio.Task[None] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    def add(self, reading: Reading) -> None:
        self._waiting.append(reading)
        if self._working is None:
            self._working = asyncio.get_running_loop().create_task(self._work())

    def close(self) -> None:
        if self._working is not None:
            self._working.cancel()
            self._working = None
        while self._waiting:
            reading = self._waiting.popleft()
            self._left(len(reading.body))
            reading.end(Unavailable("the router is shutting down"))
        process = self._end_process()
        if process is not None:
            process.wait()

    async def _work(self) -> None:
        """Until nothing waits."""
        try:
            while self._waiting:
                reading = self._waiting.popleft()
                try:
                    if not reading.is_over:
                        reading.end(await self._outcome(reading))
                finally:
                    self._left(len(reading.body))
        finally:
            self._working = None

    async def _outcome(self, reading: Reading) -> Parsed | ServingError:
        loop = asyncio.get_running_loop()
        left_s = reading.deadline - loop.time()
        if left_s <= 0:
            return _too_late()
        try:
            async with asyncio.timeout(min(left_s, self._read_s_max)):
                if self._process is None:
                    await loop.run_in_executor(None, self._start)
                return await self._ask(reading)
        except TimeoutError:
            self._give_up()  # it is busy with this one, or did not get that far
            if left_s > self._read_s_max:
                return ResourceExhausted("the body takes too long to read")
            return _too_late()
        except asyncio.CancelledError:
            reading.end(Unavailable("the router is shutting down"))
            raise
        except Exception as error:
            logger.error("the process that reads bodies was lost: %r", error)
            self._give_up()
            return Internal("the body could not be read")

    async def _ask(self, reading: Reading) -> Parsed | ServingError:
        loop = asyncio.get_running_loop()
        channel = self._channel
        assert channel is not None
        head = msgspec.msgpack.encode(reading.question)
        await loop.sock_sendall(channel, LENGTH.pack(len(head)) + head)
        body = memoryview(reading.body)
        for at in range(0, len(body), _PIECE_BYTES):
            await loop.sock_sendall(channel, body[at : at + _PIECE_BYTES])
        [length] = LENGTH.unpack(await _received(channel, LENGTH.size))
        answer = msgspec.msgpack.decode(await _received(channel, length), type=Answer)
        if answer.is_too_large:
            return BodyTooLarge(answer.message)
        if answer.code:
            return error_of(answer.code, answer.message)
        tensors = decode_tensors(answer.tensors, await _received(channel, answer.nbytes))
        return Parsed(
            signature_name=answer.signature_name,
            arrays=dict(zip(answer.names, tensors, strict=True)),
            rows=answer.rows,
            columnar=answer.columnar,
        )

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        # Where this process finds our packages, that one does, and nowhere else.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "cluster.doors.reader", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment,
            )
        ours.setblocking(False)
        self._channel = ours

    def _give_up(self) -> None:
        process = self._end_process()
        if process is not None:  # reaped beside the loop: a large process takes its time to go
            asyncio.get_running_loop().run_in_executor(None, process.wait)

    def _end_process(self) -> subprocess.Popen[bytes] | None:
        process, self._process = self._process, None
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()
        if process is not None:
            process.kill()
        return process


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("the deadline passed before the body was read")


async def _received(channel: socket.socket, nbytes: int) -> memoryview:
    """So many bytes, in memory of their own.

    Raises:
        EOFError: the process ended before they came.
    """
    loop = asyncio.get_running_loop()
    data = np.empty(nbytes, np.uint8).data
    view = data
    while view:
        count = await loop.sock_recv_into(channel, view[:_PIECE_BYTES])
        if not count:
            raise EOFError("it ended in the middle of an answer")
        view = view[count:]
    return data
