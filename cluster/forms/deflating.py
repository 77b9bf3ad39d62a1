"""Answers that are compressed on their way: what `accept-encoding` asks for, and the bytes. Pure.

Fast levels only: higher ones take several times as long for a few hundredths of the bytes. A body
that would hardly be smaller is left as it is, and a large one is not even tried where a sample of
it says so. Takes 1 to 30 ms a megabyte with gzip, 1 to 4 with zstd.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from backports import zstd

from batching.errors import InvalidArgument
from cluster.forms.inflating import GZIP, GZIP_WINDOW, ZSTD
from cluster.forms.preferences import preferences

__all__ = ["NotAcceptable", "Packing", "deflated", "packing_asked"]

_LEVEL: Final = 1
#: A body that keeps more than this share of its bytes is not worth the client's work.
_WORTH: Final = 0.9
#: Between two pieces it may be given up.
_PIECE_BYTES: Final = 256 << 10
#: Of larger bodies so many bytes from the middle are tried first.
_SAMPLED_BYTES_MIN: Final = 64 << 10
_SAMPLE_BYTES: Final = 4 << 10
_SHOWN: Final = 64
_IDENTITY: Final = b"identity"
_ANYTHING: Final = b"*"


class NotAcceptable(InvalidArgument):
    """The client takes an answer neither as it is nor compressed as it could be: status 406."""


class Packing(NamedTuple):
    """How a client wants its answer compressed.

    Attributes:
        encoding: with what; one of `ENCODINGS`.
        is_required: whether it refuses the answer as it is.
    """

    encoding: str
    is_required: bool = False


def packing_asked(text: bytes) -> Packing | None:
    """What `accept-encoding` asks for; None where the answer is to come as it is.

    The encoding with the greatest weight, zstd where both have it, unless the client would rather
    have none. ``*`` stands for what is not named, gzip first.

    Raises:
        NotAcceptable: it refuses everything that there is.
    """
    weights = dict(preferences(text))
    if b"x-gzip" in weights:
        weights.setdefault(b"gzip", weights[b"x-gzip"])
    rest = weights.get(_ANYTHING, 0.0)
    as_it_is = weights.get(_IDENTITY, rest if _ANYTHING in weights else -1.0)
    choices = [(weights.get(name.encode(), 0.0), name) for name in (ZSTD, GZIP)]
    choices += [(rest, name) for name in (GZIP, ZSTD) if name.encode() not in weights]
    weight, best = max(choices, key=lambda choice: choice[0])
    is_refused = as_it_is == 0.0
    if weight > 0.0 and weight >= as_it_is:
        return Packing(best, is_refused)
    if is_refused:
        shown = text[:_SHOWN].decode("latin-1")
        raise NotAcceptable(
            f"accept-encoding {shown!r} takes none of {GZIP}, {ZSTD} and refuses identity"
        )
    return None


def deflated(
    body: bytes, packing: Packing, is_over: Callable[[], bool] = lambda: False
) -> bytes | None:
    """The body compressed; None where it is better sent as it is, or nobody waits any more.

    Args:
        body: all of it.
        packing: how, and whether it must be.
        is_over: asked now and then whether to give up.
    """
    must = packing.is_required
    if not must and len(body) > _SAMPLED_BYTES_MIN:
        middle = len(body) // 2
        sample = body[middle : middle + _SAMPLE_BYTES]
        if len(zlib.compress(sample, _LEVEL)) > _WORTH * len(sample):
            return None
    found: list[bytes] = []
    for piece in _pieces(body, packing.encoding):
        if is_over():
            return None
        found.append(piece)
    packed = b"".join(found)
    return packed if must or len(packed) <= _WORTH * len(body) else None


def _pieces(body: bytes, encoding: str) -> Iterator[bytes]:
    packer = (
        zlib.compressobj(_LEVEL, zlib.DEFLATED, GZIP_WINDOW)
        if encoding == GZIP
        else zstd.ZstdCompressor(_LEVEL)
    )
    view = memoryview(body)
    for at in range(0, len(body), _PIECE_BYTES):
        yield packer.compress(view[at : at + _PIECE_BYTES])
    yield packer.flush()
