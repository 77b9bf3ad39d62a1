"""What a frame's header says: the kinds of frames and the values they carry.

Public as `shards.wire`, whose docstring holds the rules. This file does not know bytes.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Annotated, Final, TypeAlias

import msgspec

from batching.allowance import CRITICAL
from shards.orders import Endpoint

Buffer: TypeAlias = bytes | bytearray | memoryview

#: In a tensor of slots (uint16): no part holds this row, it is all zeros.
NO_SLOT: Final = 0xFFFF

_Natural: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]


class FrameKind(IntEnum):
    """What a frame is. Numbers are never reused."""

    HELLO = 1
    CHALLENGE = 2
    PROOF = 3
    WELCOME = 4
    REFUSED = 5
    CALL = 16
    REPLY = 17
    CANCEL = 18
    PING = 32
    PONG = 33
    GOODBYE = 34
    #: So many more bytes of a stream may be sent; the header is that number, u32.
    CREDIT = 48
    #: A piece of the body of a frame that began with `FrameFlag.MORE`.
    CHUNK = 49
    #: The sender of a stream drops what it has not sent: nobody waits for it.
    RESET = 50
    #: The receiver of a stream wants no more of it; the header says why, or is empty where nobody
    #: waits for it any more.
    STOP = 51
    #: The sender's shared memory: its descriptor and size (`shards.transport.memory`).
    OFFER = 56
    #: Whether it has been mapped: one byte, 1 or 0.
    TAKEN = 57
    #: Places in the peer's shared memory that nobody views any more.
    RETURN = 58


class FrameFlag(IntFlag):
    """Bits of a prefix."""

    #: The body follows in `FrameKind.CHUNK` frames of the same stream.
    MORE = 1
    #: The body says where in the sender's shared memory the bytes are.
    SHARED_MEMORY = 2


class TensorHeader(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One tensor of a body.

    Attributes:
        dtype: a key of `shards.specs.DTYPES`. A `STRING` tensor of n elements travels as n + 1
            offsets (uint32) followed by the bytes.
        nbytes: its size in the body, padding not counted.
    """

    dtype: str
    shape: tuple[_Natural, ...]
    nbytes: _Natural


class Continuation(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where an answer goes, if not back over the link.

    Attributes:
        reply_to: name of the actor that waits for it.
        request: the id under which it waits.
        slot: which of the partials it waits for this is.
        combine: how the partials become one.
    """

    reply_to: str
    request: _Natural
    slot: _Natural
    combine: str


class Awaited(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One of the parts that a join waits for; its place in `Join.parts` is its slot.

    Attributes:
        actor: who sends it.
        generation: of that actor's process; no other may answer for it.
        rows: how many rows it has.
        plan: hash of the sharding plan by which it is cut.
        tensor: which of the call's tensors it is for. That tensor holds, for each row, the slot of
            the part in which the row comes, or `NO_SLOT` for one that is all zeros.
    """

    actor: str
    generation: _Natural
    rows: _Natural
    plan: str
    tensor: _Natural


class Join(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Inputs of an item that others send in parts: the call itself says where the rows belong.

    Attributes:
        request: the id under which parts come; `Continuation.request` of each.
        parts: what is waited for, at least one.
    """

    request: _Natural
    parts: list[Awaited]


class Item(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The part of a call that belongs to one request.

    Attributes:
        request: chosen by the caller, distinct among its unanswered ones on this link.
        rows: how many rows of the tensors are its own.
        remaining_us: what is left until its deadline, counted when the frame was made. Machines
            do not share a clock, so a deadline never travels as an instant.
        trace: id for tracing, opaque.
        bags: of a call of several tables: how many of its rows are bags of each.
    """

    request: _Natural
    rows: _Natural
    remaining_us: int
    trace: bytes = b""
    continuation: Continuation | None = None
    join: Join | None = None
    bags: tuple[_Natural, ...] = ()


class TableRef(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One of several tables that a call asks at once.

    Attributes:
        unit: its id.
        plan: hash of how it is cut.
    """

    unit: str
    plan: str


#: The op of a call of rows for which a device has worked before: see `CallHeader.op`.
LATER: Final = "later"


class CallHeader(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Run ``op`` of ``unit`` on the rows of these items.

    Attributes:
        epoch: the routing epoch the requests are pinned to.
        op: ``run``; ``later``, the same for rows of requests for which a device has worked before,
            so that refusing them would waste that; ``rows`` of a table, or ``sum`` and ``max`` of
            bags of them (`shards.bags`); ``join`` and ``part`` of rows that come in parts; or a
            question (`shards.questions`).
        plan: hash of the sharding plan that the caller assumes, or "".
        reply_to: where the actor listens that the items' continuations name.
        owner: whose share of a device the rows use: the name of the servable that was asked.
        criticality: the most that the rows may have (`batching.allowance`); what the owner is
            allowed may be less.
        also: other calls in the same frame, each of another unit, op or shape, and none with any in
            its turn. The body is the tensors of this one and then theirs. Of look-ups alone.
        tables: of bags in several tables; the unit is then what `shards.bags.set_id` calls them.
    """

    epoch: _Natural
    unit: str
    op: str
    items: list[Item]
    tensors: list[TensorHeader]
    plan: str = ""
    reply_to: Endpoint | None = None
    owner: str = ""
    criticality: int = CRITICAL
    also: tuple[CallHeader, ...] = ()
    tables: tuple[TableRef, ...] = ()


class ItemError(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Why one request of a call has no rows in the reply; ``code`` as in `batching.errors.Code`."""

    request: _Natural
    code: str
    message: str
    retry_after_ms: _Natural = 0


class ReplyHeader(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Answers to requests of one or several calls.

    Attributes:
        generation: of the process that answers.
        items: ``(request, rows)`` in the order of the rows.
        errors: requests that failed; they are not in ``items``.
        plan: hash of the sharding plan that the answer was made by, or "".
        wait_us: for how long a row would wait that came now, of the servable of the first of
            ``items`` and as critical as that one's.
        row_us: by how much each row more puts that off; 0 where nothing is known of either.
        also: answers to other calls in the same frame, as in `CallHeader`.
    """

    unit: str
    generation: _Natural
    items: list[tuple[_Natural, _Natural]]
    tensors: list[TensorHeader]
    errors: list[ItemError] = []
    plan: str = ""
    wait_us: _Natural = 0
    row_us: _Natural = 0
    also: tuple[ReplyHeader, ...] = ()


class CancelHeader(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Nobody waits for these requests any more."""

    requests: list[_Natural]


def requests_of(header: object) -> set[int]:
    """The requests that a frame is about; none where its header does not say."""
    found: set[int] = set()
    if isinstance(header, CallHeader):
        for call in (header, *header.also):
            found.update([item.request for item in call.items])
    elif isinstance(header, ReplyHeader):
        for reply in (header, *header.also):
            found.update([request for request, _ in reply.items])
            found.update([error.request for error in reply.errors])
    return found
