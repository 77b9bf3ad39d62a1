"""How an actor's engine answers over a link that may be closing."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from shards.errors import LinkClosed, LinkFull
from shards.transport import Link
from shards.wire import Buffer, CallHeader, FrameKind, ItemError, ReplyHeader

__all__ = ["STALE", "refuse", "refuse_all", "send_reply"]

logger = logging.getLogger(__name__)

#: Code of the refusal for a unit that is not hosted here: the sender's epoch is out of date.
STALE = "STALE_EPOCH"


def send_reply(link: Link, header: ReplyHeader, buffers: Sequence[Buffer] = ()) -> None:
    """Send an answer; a peer that is gone or does not read loses its link, nobody else anything."""
    try:
        link.send(FrameKind.REPLY, header, buffers)
    except LinkFull:
        logger.warning("%s does not read its answers; closing its link", link.peer.name)
        link.close("answers are not read")
    except LinkClosed:
        logger.debug("an answer for %s came too late: its link is closed", link.peer.name)


def refuse(link: Link, unit: str, errors: list[ItemError], generation: int) -> None:
    """Answer requests with errors."""
    send_reply(link, ReplyHeader(unit, generation, [], [], errors))


def refuse_all(link: Link, header: CallHeader, code: str, message: str, generation: int) -> None:
    """Answer every item of a call with the same error."""
    errors = [ItemError(item.request, code, message) for item in header.items]
    refuse(link, header.unit, errors, generation)
