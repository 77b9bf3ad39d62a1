"""An edit, from the bytes of a call to the bytes of its answer, over the controller's core.

Runs on the controller's loop thread, in one go: no other change comes between the declaration that
an edit reads and the one that it makes. Does not know Ray or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from batching.errors import InvalidArgument, ServingError
from cluster.config import dump
from cluster.control import ControlCore
from cluster.edits import Edit, Edited, LoadVersion, LookAgain, changes, digest_of, edited
from cluster.signals import Declared, Event, Look

__all__ = ["decode_edited", "encode_edit", "take_edit"]

_EDITS: Final = msgspec.msgpack.Decoder(Edit)
_EDITED: Final = msgspec.msgpack.Decoder(Edited)


def encode_edit(edit: Edit) -> bytes:
    """An edit, for the controller."""
    return msgspec.msgpack.encode(edit)


def decode_edited(data: bytes) -> Edited:
    """The controller's answer."""
    return _EDITED.decode(data)


def take_edit(core: ControlCore, request: bytes, feed: Callable[[Event], None]) -> bytes:
    """Change what is declared, or say why not.

    Args:
        core: whose declaration it is.
        request: an `Edit`.
        feed: hands an event to the core and carries out what follows.
    """
    before = core.config
    try:
        try:
            edit = _EDITS.decode(request)
        except msgspec.MsgspecError as error:
            raise InvalidArgument(f"not an edit: {error}") from None
        after = edited(before, edit, core.views())
        if after is not None and after != before:
            feed(Declared(config=after))
        if isinstance(edit, LoadVersion | LookAgain):
            # What is to be loaded may have been saved since the store was last looked into.
            feed(Look(servable=edit.servable))
    except ServingError as error:
        return msgspec.msgpack.encode(Edited(code=error.code, message=error.message))
    return msgspec.msgpack.encode(
        Edited(
            changes=changes(before, after),
            config=b"" if after is None else dump(after),
            digest="" if after is None else digest_of(after),
        )
    )
