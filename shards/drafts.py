"""Blobs that are written in any order, and named when they are whole.

A stream cannot say that most of a terabyte is nothing; a file can. Decides nothing but what a draft
is. Only stores in directories have drafts: an object in a bucket has no holes.
"""

from __future__ import annotations

from collections.abc import Callable

from batching.errors import FailedPrecondition
from shards.manifest import BlobRef

__all__ = ["Draft", "refuse_sparse"]


class Draft:
    """A file that becomes a sparse blob.

    Args:
        descriptor: of the file, which is as large as the blob, and a hole to begin with.
        keep: names what is in it.
    """

    __slots__ = ("_keep", "descriptor")

    def __init__(self, descriptor: int, keep: Callable[[], BlobRef]) -> None:
        self.descriptor = descriptor
        self._keep = keep

    def keep(self) -> BlobRef:
        """Keep what was written, under its digest; nothing may be written any more."""
        return self._keep()


def refuse_sparse(ref: BlobRef, where: str) -> None:
    """Refuse a sparse blob where every byte would be written.

    Raises:
        FailedPrecondition: the blob is sparse.
    """
    if ref.data is not None:
        raise FailedPrecondition(
            f"blob {ref.digest} has {ref.data} bytes of data in {ref.size}: {where} has no holes; "
            f"keep it in a directory"
        )
