"""Answers compressed for the clients that ask for it: which, where, and how long one may wait.

A small answer is compressed on the loop, in less time than a thread takes to wake; larger ones on
two threads, so that the largest hold up no others. Bytes that wait are bounded. One that is not
done in half of the time that its request has left goes out as it is: so does what would hardly
be smaller. What bytes come out is `cluster.forms.deflating`'s. All calls are on the loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

from batching.errors import DeadlineExceeded, ResourceExhausted, ServingError
from cluster.doors.response import Response
from cluster.forms.deflating import Packing, deflated, packing_asked

__all__ = ["Packer"]

logger = logging.getLogger(__name__)

Respond = Callable[[Response], None]

#: Up to here on the loop: 80 us with gzip at worst, 25 with zstd; a thread wakes no sooner.
_AT_ONCE_BYTES_MAX: Final = 8 << 10
#: Up to here answers do not wait behind larger ones.
_SMALL_BYTES: Final = 1 << 20
_WAITING_BYTES_MAX: Final = 64 << 20
#: For what is asked of a router itself.
_DESCRIBING_S: Final = 10.0
_ACCEPT_ENCODING: Final = b"accept-encoding"
_VARY: Final = b"vary: accept-encoding\r\n"


class Packer:
    """Compresses the answers of one door.

    Args:
        bytes_min: smaller ones are sent as they are, but to who refuses that.
        refusal: the response that says what is wrong, counted.
        clock: by which deadlines are meant.
        waiting_bytes_max: bytes of answers that may wait; one alone may be larger.
    """

    def __init__(
        self,
        bytes_min: int,
        refusal: Callable[[ServingError], Response],
        clock: Callable[[], float],
        waiting_bytes_max: int = _WAITING_BYTES_MAX,
    ) -> None:
        self._bytes_min = bytes_min
        self._refusal = refusal
        self._clock = clock
        self._waiting_bytes_max = waiting_bytes_max
        self._bytes = 0
        self._small = ThreadPoolExecutor(1, "compress-small")
        self._large = ThreadPoolExecutor(1, "compress-large")
        self._jobs: set[_Job] = set()

    def over(self, respond: Respond, packing: Packing, deadline: float) -> Respond:
        """What compresses an answer on its way to ``respond``, which is called once, by then."""
        return partial(self._send, respond, packing, deadline)

    def describing(self, respond: Respond, headers: Mapping[bytes, bytes], now: float) -> Respond:
        """The same for an answer that caches may keep, and so says what it depends on.

        Raises:
            NotAcceptable: no answer can be given so that the client takes it.
        """
        packing = packing_asked(headers.get(_ACCEPT_ENCODING, b""))
        if packing is None:
            return partial(self._send_plain, respond)
        return self.over(respond, packing, now + _DESCRIBING_S)

    def close(self) -> None:
        """End the threads; answers that wait for them are sent as they are."""
        for job in list(self._jobs):
            job.give_up(self._refusal)
        self._small.shutdown(wait=False, cancel_futures=True)
        self._large.shutdown(wait=False, cancel_futures=True)

    def _send_plain(self, respond: Respond, response: Response) -> None:
        if response.status == 200 and len(response.body) >= self._bytes_min:
            response = response._replace(headers=response.headers + _VARY)
        respond(response)

    def _send(
        self, respond: Respond, packing: Packing, deadline: float, response: Response
    ) -> None:
        size = len(response.body)
        if response.status != 200 or (size < self._bytes_min and not packing.is_required):
            respond(response)
        elif size <= _AT_ONCE_BYTES_MAX:
            respond(_packed(response, packing, deflated(response.body, packing)))
        elif self._bytes and self._bytes + size > self._waiting_bytes_max:
            if packing.is_required:
                respond(self._refusal(ResourceExhausted("too many answers wait", 1000)))
            else:
                respond(_packed(response, packing, None))
        else:
            self._begin(_Job(respond, packing, response, self._left), deadline)

    def _begin(self, job: _Job, deadline: float) -> None:
        size = len(job.response.body)
        self._bytes += size
        self._jobs.add(job)
        loop = asyncio.get_running_loop()
        patience_s = max(deadline - self._clock(), 0.0) / 2
        job.timer = loop.call_later(patience_s, job.give_up, self._refusal)
        pool = self._small if size <= _SMALL_BYTES else self._large
        working = loop.run_in_executor(
            pool, deflated, job.response.body, job.packing, job.is_given_up
        )
        working.add_done_callback(job.done)

    def _left(self, job: _Job) -> None:
        self._jobs.discard(job)
        self._bytes -= len(job.response.body)


class _Job:
    """One answer that is compressed on a thread. It is sent once."""

    __slots__ = ("_is_sent", "_left", "_respond", "packing", "response", "timer")

    def __init__(
        self,
        respond: Respond,
        packing: Packing,
        response: Response,
        left: Callable[[_Job], None],
    ) -> None:
        self._respond = respond
        self._left = left
        self._is_sent = False
        self.packing = packing
        self.response = response
        self.timer: asyncio.TimerHandle | None = None

    def is_given_up(self) -> bool:
        """Asked by the thread, between two pieces."""
        return self._is_sent

    def give_up(self, refusal: Callable[[ServingError], Response]) -> None:
        """It takes too long."""
        if self._is_sent:
            return
        if self.packing.is_required:
            self._send(refusal(DeadlineExceeded("the answer was not compressed in time")))
        else:
            self._send(_packed(self.response, self.packing, None))

    def done(self, working: asyncio.Future[bytes | None]) -> None:
        """The thread is done with it, whether or not anybody still waits."""
        self._left(self)
        if self.timer is not None:
            self.timer.cancel()
        if self._is_sent:
            return
        packed: bytes | None = None
        if working.cancelled():
            return
        error = working.exception()
        if error is not None:
            logger.error("an answer could not be compressed: %r", error)
        else:
            packed = working.result()
        self._send(_packed(self.response, self.packing, packed))

    def _send(self, response: Response) -> None:
        self._is_sent = True
        self._respond(response)


def _packed(response: Response, packing: Packing, body: bytes | None) -> Response:
    """The response with its body compressed, or as it is."""
    if body is None:
        return response._replace(headers=response.headers + _VARY)
    said = b"content-encoding: %b\r\n" % packing.encoding.encode()
    return response._replace(headers=response.headers + _VARY + said, body=body)
