"""Where things are in a store, and which names they may have.

    <store>/blobs/blake3/<digest>              a blob, whole or absent
    <store>/<name>/<version>/servable.json     a manifest, written last
    <store>/_cluster/<cluster>/...             a controller's declared state (`shards.states`)

Decides names only; the same in a directory and in a bucket.
"""

from __future__ import annotations

import re
from typing import Final

import numpy as np
import numpy.typing as npt

from batching.errors import InvalidArgument
from shards.manifest import BlobRef

__all__ = [
    "BLOBS",
    "MANIFEST",
    "Buffer",
    "blob_path",
    "check_name",
    "is_name",
    "manifest_path",
    "version_of",
]

#: What a blob maps to: read-only bytes.
Buffer = npt.NDArray[np.uint8]

MANIFEST: Final = "servable.json"
BLOBS: Final = "blobs"

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION_DIGITS_MAX: Final = 19


def check_name(name: str) -> str:
    """The name, if it may be a servable's.

    Raises:
        InvalidArgument: it may not.
    """
    if not is_name(name):
        raise InvalidArgument(
            f"{name!r} is not a servable name: letters, digits, '.', '_' and '-', beginning with "
            f"a letter or digit, at most 128, and not {BLOBS!r}"
        )
    return name


def is_name(name: str) -> bool:
    """Whether the name may be a servable's."""
    return name != BLOBS and _NAME.fullmatch(name) is not None


def version_of(folder: str) -> int | None:
    """The version that a folder is named as; leading zeros are allowed. None for other names."""
    if not (folder.isascii() and folder.isdigit() and len(folder) <= _VERSION_DIGITS_MAX):
        return None
    return int(folder) or None


def blob_path(ref: BlobRef) -> str:
    """Where a blob is, under the store's root."""
    return f"{BLOBS}/blake3/{ref.digest}"


def manifest_path(name: str, version: int) -> str:
    """Where a manifest is written, under the store's root."""
    return f"{name}/{version}/{MANIFEST}"
