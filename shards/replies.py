"""How an actor's engine answers over a link that may be closing, or not take what is sent.

Decides how answers and refusals are cut into frames. Does not know where rows come from.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from batching.errors import InvalidArgument, ServingError
from shards.errors import LinkClosed, LinkFull, NotHosted
from shards.together import joined
from shards.transport import Link
from shards.wire import (
    Buffer,
    FrameKind,
    Item,
    ItemError,
    ReplyHeader,
    TensorHeader,
    encode_tensors,
)

__all__ = [
    "STALE",
    "UNJOINED",
    "Answer",
    "UnitAnswer",
    "answers",
    "code_of",
    "refuse",
    "refuse_all",
    "refuse_answer",
    "send_answers",
    "send_together",
]

logger = logging.getLogger(__name__)

#: Code of the refusal for a unit that is not hosted here: the sender's epoch is out of date.
STALE: Final = "STALE_EPOCH"
#: Code of the refusal for an item whose parts cannot be brought together at a device. Nothing is
#: wrong with the request: whoever asked may bring them together himself.
UNJOINED: Final = "UNJOINED"

Array: TypeAlias = npt.NDArray[np.generic]
#: One frame of answers: ``(request, rows)`` in the order of the rows, and the rows.
Answer: TypeAlias = tuple[list[tuple[int, int]], list[TensorHeader], list[Buffer]]

#: Rows of several requests share a frame up to this size. One request's are never cut.
_SHARED_BYTES_MAX: Final = 32 << 20
#: These keep a frame of refusals far below the bound of a header, whatever the messages.
_ERRORS_PER_FRAME: Final = 128
_MESSAGE_CHARS_MAX: Final = 1024


def code_of(error: ServingError) -> str:
    """What the error is called between actors and routers."""
    return STALE if isinstance(error, NotHosted) else error.code


def answers(items: list[tuple[int, int]], outputs: Sequence[Array]) -> list[Answer]:
    """Outputs of a unit as frames.

    Args:
        items: ``(request, rows)`` in the order of the rows.
        outputs: their rows add up to those of the items.

    Raises:
        SpecMismatch: an output holds what cannot be sent.
    """
    if len(items) == 1 or sum([output.nbytes for output in outputs]) <= _SHARED_BYTES_MAX:
        return [(items, *encode_tensors(outputs))]
    frames: list[Answer] = []
    at = 0
    for item in items:
        start, at = at, at + item[1]
        frames.append(([item], *encode_tensors([output[start:at] for output in outputs])))
    return frames


def send_answers(
    link: Link,
    unit: str,
    generation: int,
    frames: Sequence[Answer],
    plan: str = "",
    news: tuple[int, int] = (0, 0),
) -> None:
    """Send answers; one that is larger than any frame becomes a refusal.

    Args:
        link: to whom.
        unit: the unit's id.
        generation: of this process.
        frames: the answers.
        plan: hash of how the unit is cut.
        news: ``wait_us`` and ``row_us`` of the header.
    """
    for items, headers, buffers in frames:
        try:
            header = ReplyHeader(unit, generation, items, headers, [], plan, *news)
            _send(link, header, buffers)
        except InvalidArgument as error:
            text = f"the answer cannot be sent: {error}"
            errors = [ItemError(request, error.code, text) for request, _ in items]
            refuse(link, unit, errors, generation)


class UnitAnswer(NamedTuple):
    """An answer to a call.

    Attributes:
        unit: that was asked.
        plan: hash of how it is cut.
        answer: the rows.
    """

    unit: str
    plan: str
    answer: Answer


def send_together(link: Link, generation: int, found: Sequence[UnitAnswer]) -> None:
    """Send answers to several calls, in one frame as far as they fit; as `send_answers`."""
    some: list[UnitAnswer] = []
    nbytes = 0
    for each in found:
        size = sum([tensor.nbytes for tensor in each.answer[1]])
        if some and nbytes + size > _SHARED_BYTES_MAX:
            _send_some(link, generation, some)
            some, nbytes = [], 0
        some.append(each)
        nbytes += size
    _send_some(link, generation, some)


def _send_some(link: Link, generation: int, found: Sequence[UnitAnswer]) -> None:
    if len(found) > 1:
        parts: list[tuple[ReplyHeader, list[Buffer]]] = []
        for unit, plan, (items, tensors, buffers) in found:
            parts.append((ReplyHeader(unit, generation, items, tensors, [], plan), buffers))
        try:
            _send(link, *joined(parts))
            return
        except InvalidArgument:
            logger.debug("%d answers are too much for one frame", len(found))
    for unit, plan, answer in found:
        send_answers(link, unit, generation, [answer], plan)


def refuse(link: Link, unit: str, errors: Sequence[ItemError], generation: int) -> None:
    """Answer requests with errors."""
    for at in range(0, len(errors), _ERRORS_PER_FRAME):
        some = [_clipped(error) for error in errors[at : at + _ERRORS_PER_FRAME]]
        _send(link, ReplyHeader(unit, generation, [], [], some))


def refuse_answer(link: Link, header: ReplyHeader, error: ServingError) -> None:
    """Answer with this error the requests of an answer that did not reach its router."""
    for each in (header, *header.also):
        errors = [ItemError(request, error.code, str(error)) for request, _ in each.items]
        refuse(link, each.unit, errors, each.generation)


def refuse_all(
    link: Link,
    unit: str,
    items: Sequence[Item],
    code: str,
    message: str,
    generation: int,
    retry_ms: int = 0,
) -> None:
    """Answer every item of a call with the same error."""
    errors = [ItemError(item.request, code, message, retry_ms) for item in items]
    refuse(link, unit, errors, generation)


def _send(link: Link, header: ReplyHeader, buffers: Sequence[Buffer] = ()) -> None:
    """A peer that is gone or does not read loses its link, nobody else anything."""
    try:
        link.send(FrameKind.REPLY, header, buffers)
        link.flush()
    except LinkFull:
        logger.warning("%s does not read its answers; closing its link", link.peer.name)
        link.close("answers are not read")
    except LinkClosed:
        logger.debug("an answer for %s came too late: its link is closed", link.peer.name)


def _clipped(error: ItemError) -> ItemError:
    if len(error.message) <= _MESSAGE_CHARS_MAX:
        return error
    message = error.message[: _MESSAGE_CHARS_MAX - 3] + "..."
    return ItemError(error.request, error.code, message, error.retry_after_ms)
