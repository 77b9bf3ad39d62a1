"""Identities of units: equal for equal computations over equal weights, whoever saved them.

Decides what makes two units the same, so that rows of different models share a lane and a batch,
and their weights a copy. Names of files, functions, arguments and units have no part in it. Does
not know where programs come from: it takes their normalised text (`shards.canonical`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

from shards.files import digest_of
from shards.manifest import BlobRef, Partition, Stored
from shards.specs import Spec

__all__ = ["custom_identity", "host_identity", "map_identity", "table_identity"]

#: Part of every identity; raise it where what goes into one changes its meaning.
_RULES: Final = 1


def map_identity(
    texts: Sequence[str],
    inputs: Iterable[Spec],
    outputs: Iterable[Spec],
    donate: Sequence[int],
    leaves: Sequence[tuple[str, tuple[int, ...], str]],
) -> str:
    """The identity of a map unit.

    Args:
        texts: the normalised text of every program.
        inputs: in the order in which the program takes them; their padding values count, since
            they are among what the program computes on. So does which of them are per request.
        outputs: in the order in which the program returns them.
        donate: indices of donated inputs.
        leaves: dtype, shape and digest of every parameter, in the order in which the program
            takes them.
    """
    return _digest("map", [digest_of(text.encode()) for text in texts],
                   [_plain(spec) for spec in inputs], [_plain(spec) for spec in outputs],
                   list(donate), list(leaves))  # fmt: skip


def table_identity(
    dtype: str, dim: int, partitions: Sequence[Partition], stored: Stored | None = None
) -> str:
    """The identity of a table: its rows, how they are cut, and what lies over what.

    A table without overlays has the identity that it had before there were any, and one whose rows
    lie as they are used that of before there were others.
    """
    return _digest("table", dtype, dim, [
        (part.rows, *(blob.digest for blob in part.blobs))
        for part in partitions
    ], *([stored] if stored is not None else []))  # fmt: skip


def host_identity(
    entry_point: str,
    options: Mapping[str, str | int | float | bool],
    files: Mapping[str, BlobRef],
) -> str:
    """The identity of a host unit: what runs, with which options and files."""
    return _digest("host", entry_point, sorted(options.items()),
                   sorted((name, ref.digest) for name, ref in files.items()))  # fmt: skip


def custom_identity(
    kind: str,
    combine: str,
    options: Mapping[str, str | int | float | bool],
    partitions: Sequence[Mapping[str, BlobRef]],
) -> str:
    """The identity of a unit of a registered kind: what it is made of, and how it is cut."""
    return _digest("custom", kind, combine, sorted(options.items()),
                   [sorted((name, ref.digest) for name, ref in files.items())
                    for files in partitions])  # fmt: skip


def _plain(spec: Spec) -> list[object]:
    """A spec as identities have always had it; what is newer is there where it matters alone."""
    return [spec.shape, spec.dtype, spec.pad, *([spec.per] if spec.per_request else [])]


def _digest(kind: str, *parts: object) -> str:
    # JSON is unambiguous: no two lists of parts have one encoding.
    return digest_of(msgspec.json.encode([_RULES, kind, *parts]))
