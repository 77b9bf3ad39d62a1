r"""Recorded requests: named tensors for a signature, one after the other in a file.

The file of warm-up requests in a bundle and the files that a request log writes are this::

    "shardserve requests\n" | schema u32 | zeros up to 64 bytes
    then, for each request:
    header bytes u32 | body bytes u32 | CRC-32 of both u32 | 0 u32
    header: msgpack, positional | zeros up to a multiple of 64
    body: the tensors, as on the wire | zeros up to a multiple of 64

all little endian. Headers are read like those of the wire: a later version may append fields that
have a default. Decides which bytes are such a file and how many there may be. Whatever bytes come
in, a reader answers with requests or with a typed error; nothing is unpickled or evaluated. Does
not know signatures, stores, or who replays.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Final

import msgspec
import numpy as np
import numpy.typing as npt

from batching.errors import InvalidArgument
from shards._headers import Buffer, TensorHeader
from shards._tensors import ALIGNMENT, decode_tensors, encode_tensors
from shards.errors import BundleCorrupt, BundleForeign, FrameCorrupt

__all__ = [
    "BYTES_MAX",
    "FILE_HEAD",
    "REQUESTS_MAX",
    "Recorded",
    "encode_request",
    "encode_requests",
    "read_requests",
    "salvage_requests",
]

#: Requests of a file; as many as TensorFlow Serving replays.
REQUESTS_MAX: Final = 1000
#: Bytes of a file.
BYTES_MAX: Final = 64 << 20

_HEADER_BYTES_MAX: Final = 64 << 10
_MAGIC: Final = b"shardserve requests\n"
_SCHEMA: Final = 1
_SCHEMA_NUMBER: Final = struct.Struct("<I")
_PREFIX: Final = struct.Struct("<IIII")
_ZEROS: Final = bytes(ALIGNMENT)

#: What a file begins with.
FILE_HEAD: Final = (_MAGIC + _SCHEMA_NUMBER.pack(_SCHEMA)).ljust(ALIGNMENT, b"\0")

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recorded:
    """One request.

    Attributes:
        signature: its name.
        inputs: by name; read-only views of the file where it was read from one, texts apart.
        version: that was asked, 0 where that is not known.
    """

    signature: str
    inputs: dict[str, Array] = field(default_factory=dict)
    version: int = 0


class _Header(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What precedes the tensors of one request."""

    signature: str
    names: list[str]
    tensors: list[TensorHeader]
    version: Annotated[int, msgspec.Meta(ge=0)] = 0


_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(_Header).decode


def encode_request(request: Recorded) -> list[Buffer]:
    """What is appended to a file for a request; a multiple of 64 bytes in all.

    Raises:
        SpecMismatch: a tensor's dtype does not travel.
        InvalidArgument: it is larger than any file may be.
    """
    tensors, body = encode_tensors(tuple(request.inputs.values()))
    header = _encode(_Header(request.signature, list(request.inputs), tensors, request.version))
    nbytes = sum(len(buffer) for buffer in body)
    if len(header) > _HEADER_BYTES_MAX or nbytes > BYTES_MAX:
        raise InvalidArgument(
            f"a request of {len(header)} + {nbytes} bytes cannot be recorded: at most "
            f"{_HEADER_BYTES_MAX} of names and shapes, {BYTES_MAX} of values"
        )
    check = zlib.crc32(header)
    for buffer in body:
        check = zlib.crc32(buffer, check)
    prefix = _PREFIX.pack(len(header), nbytes, check, 0)
    return [prefix, header, _gap(len(prefix) + len(header)), *body, _gap(nbytes)]


def encode_requests(requests: Iterable[Recorded], where: str) -> list[Buffer]:
    """A whole file, as buffers to be written in this order.

    Raises:
        SpecMismatch: a tensor's dtype does not travel.
        InvalidArgument: there are more requests, or bytes, than a file may have.
    """
    found: list[Buffer] = [FILE_HEAD]
    size = len(FILE_HEAD)
    for count, request in enumerate(requests, start=1):
        if count > REQUESTS_MAX:
            raise _too_many(where)
        buffers = encode_request(request)
        size += sum(len(buffer) for buffer in buffers)
        if size > BYTES_MAX:
            raise _too_large(where, size)
        found += buffers
    return found


def read_requests(data: Buffer, where: str) -> list[Recorded]:
    """The requests of a file.

    Args:
        data: the whole file. Tensors are views of it, aligned where it is.
        where: how error messages name it.

    Raises:
        BundleForeign: not such a file, or of a newer schema.
        BundleCorrupt: a request is cut off or broken; says which.
        InvalidArgument: there are more requests, or bytes, than a file may have.
    """
    return list(_requests(data, where))


def salvage_requests(data: Buffer, where: str) -> tuple[list[Recorded], str]:
    """The requests before the first that is cut off or broken, and what is wrong with that one.

    For files of a log whose process was ended while it wrote; the text is empty where all is well.

    Raises:
        BundleForeign: as `read_requests`.
        InvalidArgument: likewise.
    """
    found: list[Recorded] = []
    try:
        # Not `extend`: what was read before the error must be there after it.
        for request in _requests(data, where):
            found.append(request)  # noqa: PERF402
    except BundleCorrupt as error:
        return found, error.message
    return found, ""


def _requests(data: Buffer, where: str) -> Iterator[Recorded]:
    view = memoryview(data)
    # What is empty cannot be cast, and is no file of ours.
    view = view.cast("B").toreadonly() if view.nbytes else memoryview(b"")
    _check_head(view, where)
    if len(view) > BYTES_MAX:
        raise _too_large(where, len(view))
    at, count = len(FILE_HEAD), 0
    while at < len(view):
        count += 1
        if count > REQUESTS_MAX:
            raise _too_many(where)
        try:
            request, at = _request(view, at)
        except (FrameCorrupt, msgspec.DecodeError, ValueError) as error:
            raise BundleCorrupt(f"{where}: request {count}, at byte {at}: {error}") from None
        yield request


def _check_head(view: memoryview, where: str) -> None:
    head = bytes(view[: len(FILE_HEAD)])
    if not head.startswith(_MAGIC) or len(head) < len(FILE_HEAD):
        raise BundleForeign(f"{where}: not a file of recorded requests")
    (schema,) = _SCHEMA_NUMBER.unpack_from(head, len(_MAGIC))
    if schema != _SCHEMA:
        raise BundleForeign(
            f"{where}: written with schema {schema} of recorded requests, this version of "
            f"shardserve reads {_SCHEMA}"
        )


def _request(view: memoryview, at: int) -> tuple[Recorded, int]:
    """The request that begins at a byte, and where the next one begins.

    Raises:
        ValueError, FrameCorrupt, msgspec.DecodeError: it is not one.
    """
    if at + _PREFIX.size > len(view):
        raise ValueError("cut off")
    header_bytes, body_bytes, check, reserved = _PREFIX.unpack_from(view, at)
    if header_bytes > _HEADER_BYTES_MAX or reserved:
        raise ValueError("not the beginning of a request")
    header_at = at + _PREFIX.size
    body_at = _aligned(header_at + header_bytes)
    end = _aligned(body_at + body_bytes)
    if end > len(view):
        raise ValueError(f"cut off: it would end at byte {end} of {len(view)}")
    header, body = view[header_at : header_at + header_bytes], view[body_at : body_at + body_bytes]
    if zlib.crc32(body, zlib.crc32(header)) != check:
        raise ValueError("its bytes are not those that were written")
    found = _decode(header)
    if len(found.names) != len(found.tensors) or len(set(found.names)) != len(found.names):
        raise ValueError(f"{len(found.tensors)} tensors with the names {found.names}")
    arrays = decode_tensors(found.tensors, body)
    inputs = dict(zip(found.names, arrays, strict=True))
    return Recorded(signature=found.signature, inputs=inputs, version=found.version), end


def _aligned(at: int) -> int:
    return at + -at % ALIGNMENT


def _gap(size: int) -> bytes:
    return _ZEROS[: -size % ALIGNMENT]


def _too_many(where: str) -> InvalidArgument:
    return InvalidArgument(f"{where}: more than {REQUESTS_MAX} recorded requests")


def _too_large(where: str, size: int) -> InvalidArgument:
    return InvalidArgument(
        f"{where}: recorded requests of {size} bytes are over the bound of {BYTES_MAX}"
    )
