"""Bodies that were compressed on their way: what `content-encoding` may say, and their bytes.

Output is counted as it comes and given up at its bound, so that what a few bytes claim to be is
never set apart. Inflating takes a time that grows with what comes out: never on an event loop.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from typing import Final

from backports import zstd

from batching.errors import InvalidArgument
from cluster.forms.values import Buffer

__all__ = [
    "ENCODINGS",
    "GZIP",
    "GZIP_WINDOW",
    "ZSTD",
    "BodyTooLarge",
    "UnknownEncoding",
    "encoding_of",
    "inflated",
]

GZIP: Final = "gzip"
ZSTD: Final = "zstd"
#: What a body may be compressed with, besides nothing.
ENCODINGS: Final = (GZIP, ZSTD)
_BY_NAME: Final = {
    b"": "", b"identity": "", b"gzip": GZIP, b"x-gzip": GZIP, b"zstd": ZSTD,
}  # fmt: skip
_PIECE_BYTES: Final = 256 << 10
#: Each begins a window of its own, and may hold nothing.
_MEMBERS_MAX: Final = 1024
#: For zlib: gzip with its head and checksum, and the largest window.
GZIP_WINDOW: Final = 31
#: A frame may ask for a window of gigabytes; 8 MB is what every decoder has to have.
_ZSTD_OPTIONS: Final = {int(zstd.DecompressionParameter.window_log_max): 23}
_SHOWN: Final = 64


class UnknownEncoding(InvalidArgument):
    """The body is compressed with something that is not known here: status 415."""


class BodyTooLarge(InvalidArgument):
    """The body holds more than is taken: status 413."""


def encoding_of(text: bytes) -> str:
    """What `content-encoding` says: one of `ENCODINGS`, or nothing where it is the body itself.

    Raises:
        UnknownEncoding: it is another, or several, one over the other.
    """
    found = _BY_NAME.get(text.strip().lower())
    if found is None:
        shown = text[:_SHOWN].decode("latin-1")
        raise UnknownEncoding(
            f"content-encoding {shown!r} is none of {', '.join(ENCODINGS)}, identity"
        )
    return found


def inflated(body: Buffer, encoding: str, nbytes_max: int) -> bytearray:
    """The bytes that were compressed.

    Args:
        body: all of it.
        encoding: one of `ENCODINGS`.
        nbytes_max: the most bytes that may come out.

    Raises:
        InvalidArgument: it is not so compressed, not whole, or goes on after its end.
        BodyTooLarge: it holds more.
    """
    pieces = _gunzipped(body) if encoding == GZIP else _unzstd(body)
    found = bytearray()
    for piece in pieces:
        found += piece
        if len(found) > nbytes_max:
            raise BodyTooLarge(
                f"the {encoding} body holds more than the limit of {nbytes_max} bytes"
            )
    return found


def _gunzipped(body: Buffer) -> Iterator[bytes]:
    """What comes out, in pieces. The standard lets one body be several files in a row."""
    source = io.BytesIO(body)
    members = 0
    rest = source.read(_PIECE_BYTES)
    while rest or not members:
        members += 1
        if members > _MEMBERS_MAX:
            raise InvalidArgument(f"the gzip body has more than {_MEMBERS_MAX} members")
        inflater = zlib.decompressobj(GZIP_WINDOW)
        while not inflater.eof:
            try:
                piece = inflater.decompress(rest, _PIECE_BYTES)
            except zlib.error as error:
                raise InvalidArgument(f"not a gzip body: {error}") from None
            rest = inflater.unconsumed_tail or (b"" if inflater.eof else source.read(_PIECE_BYTES))
            if not (piece or rest or inflater.eof):
                raise InvalidArgument("the gzip body ends too early")
            yield piece
        rest = inflater.unused_data or source.read(_PIECE_BYTES)


def _unzstd(body: Buffer) -> Iterator[bytes]:
    """What comes out, in pieces; one body may be several frames here, too."""
    source = io.BytesIO(body)
    frames = 0
    rest = source.read(_PIECE_BYTES)
    while rest or not frames:
        frames += 1
        if frames > _MEMBERS_MAX:
            raise InvalidArgument(f"the zstd body has more than {_MEMBERS_MAX} frames")
        inflater = zstd.ZstdDecompressor(options=_ZSTD_OPTIONS)
        while not inflater.eof:
            try:
                piece = inflater.decompress(rest, _PIECE_BYTES)
            except zstd.ZstdError as error:
                raise InvalidArgument(f"not a zstd body: {error}") from None
            rest = b""
            if inflater.needs_input:
                rest = source.read(_PIECE_BYTES)
                if not (piece or rest):
                    raise InvalidArgument("the zstd body ends too early")
            yield piece
        rest = inflater.unused_data or source.read(_PIECE_BYTES)
