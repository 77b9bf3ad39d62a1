"""Look-ups in several tables in one frame: what is asked of one actor in one turn, and its answers.

To wake a process costs as much as to look some thousand rows up, so what goes to one actor at the
same time goes at once. Each call keeps its header: unit, plan, epoch, items and errors are its own,
and nothing that is wrong with one is another's concern. Decides how several bodies become one and
are told apart again, and which calls may be put together. Does not know links, tables or time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from shards.bags import POOL_OPS
from shards.wire import ALIGNMENT, Buffer, CallHeader, ReplyHeader, decode_tensors

__all__ = ["SHAREABLE_OPS", "TOGETHER_BYTES_MAX", "TOGETHER_MAX", "joined", "parted"]

Array = npt.NDArray[np.generic]
_Header = TypeVar("_Header", CallHeader, ReplyHeader)

#: What may share a frame with other calls: a table's actor alone is asked for it.
SHAREABLE_OPS: Final = POOL_OPS | {"rows"}
#: Bodies are put together up to this size: then the first answers have waited for long enough.
TOGETHER_BYTES_MAX: Final = 1 << 20
#: Calls of one frame: their headers stay far below the bound of one.
TOGETHER_MAX: Final = 256

_PADDING: Final = bytes(ALIGNMENT)


def joined(parts: Sequence[tuple[_Header, Sequence[Buffer]]]) -> tuple[_Header, list[Buffer]]:
    """Header and body of the one frame that says all of these.

    Args:
        parts: header and body of each; at least one.
    """
    (first, buffers), *rest = parts
    if not rest:
        return first, list(buffers)
    body: list[Buffer] = []
    at = 0
    for _, each in parts:
        if each and at % ALIGNMENT:
            gap = ALIGNMENT - at % ALIGNMENT
            body.append(_PADDING[:gap])
            at += gap
        for buffer in each:
            body.append(buffer)
            at += buffer.nbytes if isinstance(buffer, memoryview) else len(buffer)
    return msgspec.structs.replace(first, also=tuple([header for header, _ in rest])), body


def parted(header: _Header, body: memoryview) -> list[tuple[_Header, list[Array]]]:
    """Every call, or answer, of a frame with its own tensors, which are views of the body.

    Raises:
        FrameCorrupt: the headers do not describe this body.
    """
    headers = (header, *header.also)
    tensors = decode_tensors([tensor for each in headers for tensor in each.tensors], body)
    found: list[tuple[_Header, list[Array]]] = []
    at = 0
    for each in headers:
        start, at = at, at + len(each.tensors)
        found.append((each, tensors[start:at]))
    return found
