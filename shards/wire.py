"""Frames: the bytes that cross the data plane, as values, without any I/O.

A frame is a 16-byte prefix, a msgpack header and a raw body::

    kind u8 | flags u8 | reserved u16 | stream u32 | header bytes u32 | body bytes u32

all little endian. Headers are positional arrays. A later version may only append fields that have a
default; an older reader skips what it does not know. The body is the tensors of the header, one
after the other, each at a multiple of `ALIGNMENT`. Rows of all items of a frame are concatenated
along axis 0 of each tensor, so that one frame carries many requests. Of an input that is per
request an item has one row, whatever number of rows it has of the others; which inputs these are
the unit knows. Look-ups in several tables share a frame, too: its header is that of the first, and
holds those of the others (`CallHeader.also`, `shards.together`).

A frame whose body is larger than `CHUNK_BYTES` travels in pieces: a head, which has the flag MORE,
the header, and the size of a body that is not there; then CHUNK frames of the same stream, each
with a piece of it. Between them other frames may come. The sender numbers such streams from 1;
anything else is on stream 0. Who puts the pieces together, and how many bytes may come, is for
`Chunks` to say.

A frame with the flag SHARED_MEMORY has, in the place of its body, what says where the body lies in
memory that both ends see; `shards.transport.memory` knows how to read it.

Whatever bytes come in, a reader answers with frames or with `FrameCorrupt`, never with another
error, and never holds more than its bounds allow. This file does not know sockets, who the peer is
or what a unit is, and it does not import JAX: routers read frames too.
"""

from __future__ import annotations

import contextlib
import mmap
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol, TypeAlias

import msgspec
import numpy as np

from batching.errors import InvalidArgument
from shards._headers import (
    LATER,
    NO_SLOT,
    Awaited,
    Buffer,
    CallHeader,
    CancelHeader,
    Continuation,
    FrameFlag,
    FrameKind,
    Item,
    ItemError,
    Join,
    ReplyHeader,
    TableRef,
    TensorHeader,
    requests_of,
)
from shards._tensors import ALIGNMENT, decode_tensors, encode_tensors
from shards.errors import FrameCorrupt

__all__ = [
    "ALIGNMENT",
    "Awaited",
    "BODY_BYTES_MAX",
    "Buffer",
    "CHUNK_BYTES",
    "CallHeader",
    "CancelHeader",
    "Chunks",
    "Continuation",
    "Frame",
    "FrameFlag",
    "FrameKind",
    "FrameOversize",
    "FrameReader",
    "HEADER_BYTES_MAX",
    "Header",
    "Item",
    "ItemError",
    "Join",
    "LATER",
    "NO_SLOT",
    "PREFIX_BYTES",
    "SLAB_BYTES",
    "ReplyHeader",
    "TableRef",
    "TensorHeader",
    "decode_tensors",
    "encode_frame",
    "aligned",
    "encode_header",
    "encode_prefix",
    "encode_tensors",
    "requests_of",
]

PREFIX_BYTES: Final = 16
HEADER_BYTES_MAX: Final = 1 << 20
#: 256 MiB of tensors, and room for the padding between them.
BODY_BYTES_MAX: Final = (256 << 20) + (1 << 20)
#: A larger body travels in pieces of at most this size, so that what is small can pass between.
CHUNK_BYTES: Final = 256 << 10

#: NumPy asks for huge pages for arrays of this size or more.
_HUGE_PAGES_FROM: Final = 4 << 20
_PREFIX: Final = struct.Struct("<BBHIII")
#: A body of this size or more is received into memory of its own, aligned; a smaller one is copied,
#: which costs less than memory that is aligned.
_ARENA_BYTES_MIN: Final = 16 << 10
#: Receive buffer of a link. Large bodies bypass it, so it needs to hold only a burst of small ones.
SLAB_BYTES: Final = 64 << 10
#: What says where a body lies in shared memory is no longer.
_REFERENCE_BYTES_MAX: Final = 64
#: Buffers below this are joined with their header: copying them costs less than another iovec.
_JOIN_BYTES_MAX: Final = 16 << 10

Header: TypeAlias = CallHeader | ReplyHeader | CancelHeader | bytes


class FrameOversize(FrameCorrupt):
    """A prefix announces more bytes than this reader takes."""


class Frame(msgspec.Struct, frozen=True, eq=False, gc=False):
    """One received frame.

    Attributes:
        stream: that it came on in pieces, 0 if it came in one.
        header: decoded for CALL, REPLY and CANCEL, raw bytes for the others.
        body: read-only, never written again by a peer that behaves, alive as long as a view of it
            is.
    """

    kind: FrameKind
    stream: int
    header: Header
    body: memoryview


#: Not a frame: says inside a reader that a piece was taken and the next cut can be made.
_AGAIN: Final = Frame(FrameKind.CHUNK, 0, b"", memoryview(b""))

_DECODERS: Final[dict[int, Callable[[Buffer], CallHeader | ReplyHeader | CancelHeader]]] = {
    FrameKind.CALL: msgspec.msgpack.Decoder(CallHeader).decode,
    FrameKind.REPLY: msgspec.msgpack.Decoder(ReplyHeader).decode,
    FrameKind.CANCEL: msgspec.msgpack.Decoder(CancelHeader).decode,
}
_KINDS: Final[dict[int, FrameKind]] = {
    kind.value: kind for kind in FrameKind if kind is not FrameKind.CHUNK
}
#: Kinds whose body may come in pieces.
_STREAMED: Final = frozenset({FrameKind.CALL, FrameKind.REPLY})
_NO_BYTES: Final = memoryview(b"")

encode_header: Final[Callable[[msgspec.Struct], bytes]] = msgspec.msgpack.Encoder().encode


def encode_prefix(
    kind: FrameKind, flags: int, stream: int, header_bytes: int, body_bytes: int
) -> bytes:
    """The first `PREFIX_BYTES` of a frame."""
    return _PREFIX.pack(kind, flags, 0, stream, header_bytes, body_bytes)


def encode_frame(
    kind: FrameKind, stream: int, header: bytes, buffers: Sequence[Buffer] = ()
) -> list[Buffer]:
    """The frame as buffers to be written in this order.

    Small buffers are joined with what precedes them; large ones are returned as flat views of the
    caller's memory, which must not change until they have been written.

    Raises:
        InvalidArgument: the header or the body is larger than a prefix or any reader allows.
    """
    if len(header) > HEADER_BYTES_MAX:
        raise InvalidArgument(
            f"a header of {len(header)} bytes is over the bound of {HEADER_BYTES_MAX}: "
            "send fewer requests in one frame"
        )
    if not buffers:
        return [_PREFIX.pack(kind, 0, 0, stream, len(header), 0) + header]
    sizes = [b.nbytes if isinstance(b, memoryview) else len(b) for b in buffers]
    body_bytes = sum(sizes)
    if body_bytes > 0xFFFF_FFFF:
        raise InvalidArgument(f"a body of {body_bytes} bytes does not fit one frame")
    prefix = _PREFIX.pack(kind, 0, 0, stream, len(header), body_bytes)
    if max(sizes) < _JOIN_BYTES_MAX:
        return [b"".join((prefix, header, *buffers))]
    frame: list[Buffer] = []
    run: list[Buffer] = [prefix, header]
    for buffer, size in zip(buffers, sizes, strict=True):
        if size < _JOIN_BYTES_MAX:
            run.append(buffer)
            continue
        if run:
            frame.append(b"".join(run))
            run = []
        frame.append(memoryview(buffer).cast("B"))
    if run:
        frame.append(b"".join(run))
    return frame


class Chunks(Protocol):
    """Puts the pieces of bodies together. Whatever it is told comes from the peer, unchecked."""

    def open(self, kind: FrameKind, stream: int, header: Header, body_bytes: int) -> None:
        """The head of a frame came, whose body follows in pieces.

        Raises:
            FrameCorrupt: this peer may not begin such a stream.
        """
        ...

    def begin(self, stream: int, nbytes: int) -> memoryview:
        """A piece of so many bytes comes next.

        Returns:
            where it goes. If that is longer, what follows the piece may be received there too: it
            is copied from there before `end`.

        Raises:
            FrameCorrupt: this peer may not send such a piece.
        """
        ...

    def end(self) -> Frame | None:
        """The piece that was begun last is there; the frame, if it completes one."""
        ...


class FrameReader:
    """Cuts a stream of bytes into frames.

    Either `feed` it, or receive straight into its memory: write to `get_buffer`, tell
    `buffer_updated` how much, and take frames from `next_frame` until it gives None. A frame owns
    the memory of its body. Once `FrameCorrupt` was raised the stream is lost: discard the reader.

    Args:
        header_bytes_max: a longer header is refused; may be changed between frames.
        body_bytes_max: a longer body is refused; may be changed between frames.
        slab_bytes: of memory for what is not a large body; grows for a long header while that
            lasts. May be changed between frames.
        chunks: takes bodies that come in pieces; None refuses them. May be set between frames.
        borrow: gives the body that lies in shared memory, from what the frame says of it; raises
            `FrameCorrupt`. None refuses such frames. May be set between frames.
    """

    __slots__ = (
        "_arena",
        "_arena_bytes",
        "_arena_frame",
        "_end",
        "_filled",
        "_needed",
        "_slab",
        "_start",
        "body_bytes_max",
        "borrow",
        "chunks",
        "header_bytes_max",
        "slab_bytes",
    )

    def __init__(
        self,
        *,
        header_bytes_max: int = HEADER_BYTES_MAX,
        body_bytes_max: int = BODY_BYTES_MAX,
        slab_bytes: int = SLAB_BYTES,
        chunks: Chunks | None = None,
        borrow: Callable[[memoryview], memoryview] | None = None,
    ) -> None:
        self.chunks = chunks
        self.borrow = borrow
        self.header_bytes_max = header_bytes_max
        self.body_bytes_max = body_bytes_max
        self.slab_bytes = slab_bytes
        self._slab = memoryview(bytearray(slab_bytes))
        self._start = 0  # of the bytes not yet cut
        self._end = 0  # of the bytes received
        self._needed = PREFIX_BYTES  # bytes from _start that the next cut takes
        self._arena: memoryview | None = None  # of the large body, or piece, being received
        self._arena_bytes = 0  # of it that belong to that body or piece
        self._arena_frame: Frame | None = None  # that the body completes; None for a piece
        self._filled = 0

    def get_buffer(self, sizehint: int = -1) -> memoryview:
        """Where the next bytes go; never empty once `next_frame` has given None.

        Args:
            sizehint: ignored: a large body is read to its end, anything else into the slab.
        """
        if self._arena is not None:
            return self._arena[self._filled :]
        if self._start == self._end:
            self._start = self._end = 0
            if len(self._slab) != self.slab_bytes:
                self._slab = memoryview(bytearray(self.slab_bytes))
        # Whatever the slab's size, a read of less than this is not worth its system call.
        elif len(self._slab) - self._end < max(self._needed - self._end + self._start, 4096):
            self._make_room()
        return self._slab[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        """``nbytes`` were written to the start of what `get_buffer` gave."""
        if self._arena is not None:
            self._filled += nbytes
        else:
            self._end += nbytes

    def next_frame(self) -> Frame | None:
        """The next whole frame, or None until more bytes have come.

        Raises:
            FrameCorrupt: the bytes are not a frame.
            FrameOversize: they announce more than the bounds.
        """
        if self._arena is not None:
            frame = self._finish_arena()
            if frame is not _AGAIN:
                return frame
        while True:
            start = self._start
            have = self._end - start
            if have < self._needed:
                return None
            kind, flags, reserved, stream, header_bytes, body_bytes = _PREFIX.unpack_from(
                self._slab, start
            )
            known = _KINDS.get(kind)
            if known is None or flags or reserved:
                frame = self._piece(kind, flags, reserved, stream, header_bytes, body_bytes)
                if frame is _AGAIN:
                    continue
                return frame
            if header_bytes > self.header_bytes_max or body_bytes > self.body_bytes_max:
                raise self._oversize(known, header_bytes, body_bytes)
            in_arena = body_bytes >= _ARENA_BYTES_MIN
            needed = PREFIX_BYTES + header_bytes + (0 if in_arena else body_bytes)
            if have < needed:
                self._needed = needed
                return None
            self._needed = PREFIX_BYTES
            body_at = start + PREFIX_BYTES + header_bytes
            header = _decode_header(kind, self._slab[start + PREFIX_BYTES : body_at])
            self._start = start + needed
            if in_arena:
                arena = aligned(body_bytes)
                self._arena_frame = Frame(known, stream, header, arena.toreadonly())
                return self._begin_arena(arena, body_bytes)
            body = _NO_BYTES
            if body_bytes:
                body = memoryview(bytes(self._slab[body_at : body_at + body_bytes]))
            return Frame(known, stream, header, body)

    def feed(self, data: Buffer) -> Iterator[Frame]:
        """Take all of ``data`` and yield the frames it completes. Exhaust the iterator."""
        rest = memoryview(data)
        while rest:
            room = self.get_buffer()
            size = min(len(room), len(rest))
            room[:size] = rest[:size]
            self.buffer_updated(size)
            rest = rest[size:]
            while (frame := self.next_frame()) is not None:
                yield frame

    def _make_room(self) -> None:
        """Move the bytes not yet cut to the head of a slab that can hold the next cut."""
        have = self._end - self._start
        slab = self._slab
        if self._needed > len(slab):
            slab = memoryview(bytearray(self._needed))
        slab[:have] = bytes(self._slab[self._start : self._end])
        self._slab, self._start, self._end = slab, 0, have

    def _piece(
        self, kind: int, flags: int, reserved: int, stream: int, header_bytes: int, body_bytes: int
    ) -> Frame | None:
        """What has to do with a body in pieces; as `_finish_arena` answers."""
        chunks, borrow = self.chunks, self.borrow
        if borrow is not None and flags == FrameFlag.SHARED_MEMORY and not reserved:
            return self._borrowed(borrow, kind, stream, header_bytes, body_bytes)
        if chunks is not None and not reserved:
            if flags == FrameFlag.MORE and kind in _STREAMED:
                return self._head(chunks, FrameKind(kind), stream, header_bytes, body_bytes)
            if kind == FrameKind.CHUNK and not flags and not header_bytes:
                arena = chunks.begin(stream, body_bytes)
                self._start += PREFIX_BYTES
                # What follows is most often the prefix of the next piece. Received with this one,
                # that piece too goes where it belongs, not through the slab.
                return self._begin_arena(arena[: body_bytes + PREFIX_BYTES], body_bytes)
        raise FrameCorrupt(f"not a frame: kind {kind}, flags {flags}, reserved {reserved}")

    def _head(
        self, chunks: Chunks, kind: FrameKind, stream: int, header_bytes: int, body_bytes: int
    ) -> Frame | None:
        if header_bytes > self.header_bytes_max:
            raise self._oversize(kind, header_bytes, body_bytes)
        needed = PREFIX_BYTES + header_bytes
        if self._end - self._start < needed:
            self._needed = needed
            return None
        self._needed = PREFIX_BYTES
        header_at = self._start + PREFIX_BYTES
        self._start += needed
        header = _decode_header(kind, self._slab[header_at : self._start])
        chunks.open(kind, stream, header, body_bytes)
        return _AGAIN

    def _borrowed(
        self,
        borrow: Callable[[memoryview], memoryview],
        kind: int,
        stream: int,
        header_bytes: int,
        reference_bytes: int,
    ) -> Frame | None:
        if kind not in _STREAMED or reference_bytes > _REFERENCE_BYTES_MAX:
            raise FrameCorrupt(f"kind {kind} lends a body, in {reference_bytes} bytes of words")
        if header_bytes > self.header_bytes_max:
            raise self._oversize(FrameKind(kind), header_bytes, reference_bytes)
        needed = PREFIX_BYTES + header_bytes + reference_bytes
        if self._end - self._start < needed:
            self._needed = needed
            return None
        self._needed = PREFIX_BYTES
        header_at = self._start + PREFIX_BYTES
        body_at = header_at + header_bytes
        self._start += needed
        header = _decode_header(kind, self._slab[header_at:body_at])
        return Frame(FrameKind(kind), stream, header, borrow(self._slab[body_at : self._start]))

    def _oversize(self, kind: FrameKind, header_bytes: int, body_bytes: int) -> FrameOversize:
        return FrameOversize(
            f"a frame of kind {kind.name} announces {header_bytes} bytes of header and "
            f"{body_bytes} of body; the bounds are {self.header_bytes_max} and "
            f"{self.body_bytes_max}"
        )

    def _begin_arena(self, arena: memoryview, nbytes: int) -> Frame | None:
        taken = min(self._end - self._start, nbytes)
        arena[:taken] = self._slab[self._start : self._start + taken]
        self._start += taken
        self._arena, self._arena_bytes, self._filled = arena, nbytes, taken
        return self._finish_arena()

    def _finish_arena(self) -> Frame | None:
        """A frame, None until more bytes have come, or `_AGAIN` if the slab is to be looked at."""
        arena, nbytes = self._arena, self._arena_bytes
        assert arena is not None
        over = self._filled - nbytes
        if over < 0:
            return None
        frame, self._arena, self._arena_frame = self._arena_frame, None, None
        if frame is not None:
            return frame
        if over:  # then the slab is empty: all that it held went into the arena
            self._slab[:over] = arena[nbytes : self._filled]
            self._start, self._end = 0, over
        assert self.chunks is not None
        return self.chunks.end() or _AGAIN


def _decode_header(kind: int, data: memoryview) -> Header:
    decode = _DECODERS.get(kind)
    if decode is None:
        return bytes(data)
    try:
        return decode(data)
    except (ValueError, RecursionError) as error:  # msgspec's own errors are ValueErrors
        raise FrameCorrupt(f"a header of kind {FrameKind(kind).name}: {error}") from None


def aligned(nbytes: int) -> memoryview:
    """Memory that begins at a multiple of `ALIGNMENT`; what is in it is not said.

    Large memory comes in small pages. To touch a huge page for the first time may hold the loop
    for milliseconds, in which nothing small comes through (measured on a Unix socket beside 256 MB:
    p99 of a small round trip 0.6 ms, and 5 to 6 ms with the huge pages that NumPy asks for; that
    bodies of 64 MB in pieces take twice as long is the price).
    """
    if nbytes >= _HUGE_PAGES_FROM:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel that has none does not know the advice
            pages.madvise(mmap.MADV_NOHUGEPAGE)
        return np.frombuffer(pages, np.uint8).data
    raw = np.empty(nbytes + ALIGNMENT - 1, np.uint8)
    gap = -raw.__array_interface__["data"][0] % ALIGNMENT
    return raw[gap : gap + nbytes].data
