"""Large bodies through shared memory, both ways of one link: what is lent, placed and given back.

Joins a `Lender` and a `Borrower`, and is the whole of what two ends say to each other about shared
memory. A body is lent when there is room for it, and otherwise left to the caller: nothing here
waits for memory. The segment is offered when the first body comes that could use it; until the peer
has answered, and for good where it says no, all bodies are the caller's.

A large body is copied into its place step by step, so that nobody else on the loop waits for all
of it; bodies that are being placed take turns. This file knows no clock and no socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Final

from shards.errors import FrameCorrupt
from shards.transport.memory import LOAN_BYTES, Borrower, Lender, Loan
from shards.wire import Buffer, Frame, FrameFlag, FrameKind, Header, encode_prefix, requests_of

__all__ = ["STEP_BYTES", "Sharing"]

logger = logging.getLogger(__name__)

#: Copied at once: some 50 us where the pages are warm, and 0.7 ms where they are fresh (measured).
STEP_BYTES: Final = 1 << 20

_YES: Final = b"\x01"
_NO: Final = b"\x00"


class _Placing:
    """A body on its way into its place."""

    __slots__ = ("_buffers", "_data", "kind", "left", "loan", "requests")

    def __init__(
        self, kind: FrameKind, header: Header, data: bytes, loan: Loan, buffers: Sequence[Buffer]
    ) -> None:
        views = [memoryview(buffer) for buffer in buffers]
        self.kind = kind
        self.loan = loan
        self.left = loan.nbytes  # that are not there yet
        self.requests = requests_of(header)  # that somebody still waits for
        self._data = data
        self._buffers = deque([view.cast("B") for view in views if view.nbytes])

    def step(self, nbytes: int) -> None:
        """Copy so much more of it."""
        nbytes = min(nbytes, self.left)
        self.left -= nbytes
        buffers = self._buffers
        while nbytes:
            first = buffers[0]
            if len(first) > nbytes:
                self.loan.write(first[:nbytes])
                buffers[0] = first[nbytes:]
                return
            self.loan.write(first)
            nbytes -= len(first)
            buffers.popleft()

    def frame(self) -> bytes:
        """What the peer is told once all of it is there."""
        assert not self.left
        flag = FrameFlag.SHARED_MEMORY
        prefix = encode_prefix(self.kind, flag, 0, len(self._data), LOAN_BYTES)
        return prefix + self._data + self.loan.reference


class Sharing:
    """See the module.

    Args:
        pid: of the peer, on this node.
        segment_bytes: of our segment, and the most of the peer's. With 0, what the peer offers is
            refused, and nothing may be offered to it.
        loop: whose thread this is; large bodies are placed on it, step by step.
        send: takes an encoded frame for the peer.
        flush: called on the loop's thread when `take_returns` has something to give.

    Attributes:
        borrow: gives the body that lies in the peer's memory, see `Borrower.borrow`.
        due: true if `take_returns` has something to give.
    """

    __slots__ = (
        "_borrower",
        "_flush",
        "_lender",
        "_loop",
        "_offered",
        "_placing",
        "_send",
        "_stepping",
        "_thread",
        "borrow",
        "due",
    )

    def __init__(
        self,
        pid: int,
        segment_bytes: int,
        *,
        loop: asyncio.AbstractEventLoop,
        send: Callable[[bytes], None],
        flush: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._thread = threading.get_ident()
        self._send = send
        self._flush = flush
        self._stepping = False  # a step is to come
        self._lender = Lender(max(segment_bytes, 1))
        self._borrower = Borrower(pid, self._lender.size if segment_bytes else 0, self._on_return)
        self._offered = False
        self._placing: deque[_Placing] = deque()
        self.borrow = self._borrower.borrow
        self.due = self._borrower.due

    @property
    def is_placing(self) -> bool:
        """Whether a body is on its way into its place."""
        return bool(self._placing)

    @property
    def waiting_bytes(self) -> int:
        """Of bodies that are being placed."""
        return sum(placing.left for placing in self._placing)

    def offer(
        self,
        kind: FrameKind,
        header: Header,
        data: bytes,
        buffers: Sequence[Buffer],
        nbytes: int,
    ) -> bool:
        """Send a frame with this body, if it can be lent; else it is left to the caller.

        Args:
            kind: CALL or REPLY.
            header: as a value, for who wants to cancel the frame; bytes if that is not known.
            data: the header as it travels.
            buffers: of the body. They must not change until `is_placing` is false.
            nbytes: of the body.
        """
        loan = self._lender.lend(nbytes)
        if loan is None:
            if not self._offered:
                self._offer()
            return False
        placing = _Placing(kind, header, data, loan, buffers)
        self._place(placing)
        return True

    def cancel(self, kind: FrameKind, requests: Collection[int]) -> None:
        """Nobody waits for these requests: drop the frames of this kind that are about no others.

        Those of which the peer has been told are its own to drop.
        """
        for placing in tuple(self._placing):
            if placing.kind is kind and placing.requests:
                placing.requests.difference_update(requests)
                if not placing.requests:
                    self._placing.remove(placing)
                    self._lender.take_back(placing.loan)

    def receive(self, frame: Frame) -> bool:
        """Take a frame about shared memory; False if it is about something else.

        Raises:
            FrameCorrupt: a peer that behaves would not say this.
        """
        data = frame.header
        assert isinstance(data, bytes)
        match frame.kind:
            case FrameKind.OFFER:
                answer = _YES if self._borrower.take_up(data) else _NO
                self._send(_control(FrameKind.TAKEN, answer))
            case FrameKind.TAKEN:
                if not self._offered or self._lender.is_taken_up is not None:
                    raise FrameCorrupt("an answer to no offer of shared memory")
                self._lender.answered(data == _YES)
            case FrameKind.RETURN:
                self._lender.returned(data)
            case _:
                return False
        return True

    def take_returns(self) -> bytes:
        """A frame that gives places back. To be sent before all else: the peer may need them."""
        return _control(FrameKind.RETURN, self._borrower.returned())

    def trim(self) -> None:
        """Give memory back to the system, if nothing is lent: step by step, too."""
        if self._lender.trim(STEP_BYTES):
            self._loop.call_soon(self.trim)

    def close(self) -> None:
        """The link is over."""
        self._placing.clear()
        self._lender.close()
        self._borrower.close()

    def _place(self, placing: _Placing) -> None:
        placing.step(STEP_BYTES)
        if placing.left:
            self._placing.append(placing)
        else:
            self._send(placing.frame())
        if self._placing and not self._stepping:
            self._stepping = True
            self._loop.call_soon(self._step)

    def _step(self) -> None:
        """Place some more of one body."""
        self._stepping = False
        if self._placing:  # else they were all cancelled
            self._place(self._placing.popleft())

    def _on_return(self) -> None:
        """The last view of a body has died, on whatever thread that was."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and the link with it
            if threading.get_ident() == self._thread:
                self._flush()
            else:
                self._loop.call_soon_threadsafe(self._flush)

    def _offer(self) -> None:
        self._offered = True
        try:
            self._send(_control(FrameKind.OFFER, self._lender.offer()))
        except OSError as error:
            logger.info("no shared memory to offer: %s", error)
            self._lender.answered(False)


def _control(kind: FrameKind, header: bytes) -> bytes:
    return encode_prefix(kind, 0, 0, len(header), 0) + header
