"""Asking an actor about itself, over the data plane: the question, and how it is answered.

The question is a call of the op `STATISTICS` for no unit, so that it is answered while the
controller is away. The answer is a reply whose one tensor is msgpack. Does not know when somebody
asks.
"""

from __future__ import annotations

from typing import Final, TypeVar

import msgspec
import numpy as np

from batching.errors import Internal
from shards.replies import answers, send_answers
from shards.transport import Link
from shards.wire import CallHeader, Frame, Item, ReplyHeader, decode_tensors

__all__ = ["STATISTICS", "answer", "answered", "question"]

_Told = TypeVar("_Told", bound=msgspec.Struct)

#: The op of a call that asks an actor, not one of its units.
STATISTICS: Final = "statistics"
#: An answer is a few kilobytes; a peer that sends more is confused.
_BYTES_MAX: Final = 4 << 20


def question() -> CallHeader:
    """The call that asks for statistics. It has no rows and is for no unit."""
    return CallHeader(0, "", STATISTICS, [Item(0, 0, 0)], [])


def answer(link: Link, header: CallHeader, generation: int, statistics: bytes) -> None:
    """Answer a question with statistics in msgpack."""
    data = np.frombuffer(statistics, np.uint8)
    for item in header.items:
        frames = answers([(item.request, len(data))], [data])
        send_answers(link, "", generation, frames)


def answered(frame: Frame, kind: type[_Told]) -> _Told | None:
    """What a reply for no unit says; None if whoever was asked has no statistics.

    Args:
        frame: the reply.
        kind: the statistics of such an actor.

    Raises:
        Internal: it is not such an answer.
    """
    header = frame.header
    assert isinstance(header, ReplyHeader)
    if header.errors:
        return None
    if len(frame.body) > _BYTES_MAX:
        raise Internal(f"statistics of {len(frame.body)} bytes")
    [data] = decode_tensors(header.tensors, frame.body)
    try:
        return msgspec.msgpack.decode(data.tobytes(), type=kind)
    except (ValueError, RecursionError) as error:
        raise Internal(f"statistics that cannot be read: {error}") from None
