"""What a session writes to, the states of its life, and what a listener tells of refused ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol

from shards.errors import FrameCorrupt, HandshakeRefused
from shards.transport._link import Counters
from shards.wire import Buffer

logger = logging.getLogger(__name__)


class Pipe(Protocol):
    """Where a session writes; an asyncio transport is one.

    When its buffer was above a session's mark and is below it again, `Session.resume_writing` must
    be called.
    """

    def write(self, data: Buffer) -> None: ...
    def writelines(self, list_of_data: Sequence[Buffer]) -> None: ...
    def get_write_buffer_size(self) -> int: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...


class State(StrEnum):
    """Where a session is in its life; its docstring draws the ways between."""

    HANDSHAKE = "HANDSHAKE"
    OPEN = "OPEN"
    DRAINING = "DRAINING"
    CLOSING = "CLOSING"
    CLOSED = "CLOSED"


def log_refusal(counters: Counters, name: str, error: Exception | None) -> None:
    """What a listener tells of a link that did not open, without filling the log."""
    count = counters.handshakes_refused
    if isinstance(error, HandshakeRefused | FrameCorrupt) and count & (count - 1) == 0:
        logger.warning("%s refused a handshake, its %d. by now: %s", name, count, error)
