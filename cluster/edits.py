"""Changes of what is declared, one at a time: load, unload, label, split, roll back, replace.

Values and their encoding alone: an edit says what a person wants, an `Edited` what came of it.
What it means is decided by `cluster.editing`, in the controller. Imports no pydantic: a router only
hands them on.
"""

from __future__ import annotations

from typing import Final, NamedTuple, TypeAlias

import msgspec

__all__ = [
    "AskBehind",
    "DrainNode",
    "Edit",
    "Edited",
    "LoadVersion",
    "LookAgain",
    "OfServable",
    "Rebalance",
    "ReplaceConfig",
    "RollBack",
    "SetLabel",
    "SetSplit",
    "Show",
    "UnloadVersion",
    "View",
    "decode_edit",
    "decode_edited",
    "encode_edit",
    "encode_edited",
]


class _Edit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Base of the edits."""


class OfServable(_Edit, frozen=True):
    """An edit of one servable."""

    servable: str


class LoadVersion(OfServable, frozen=True):
    """Load a version beside those that are loaded; declare the servable if need be.

    Attributes:
        version: None for the newest, now and whenever there is a newer one.
        only: unload the others, once it is available.
        label: given to it in the epoch that makes it available; "" for none.
    """

    version: int | None = None
    only: bool = False
    label: str = ""


class UnloadVersion(OfServable, frozen=True):
    """Unload a version, or the servable where it is None."""

    version: int | None = None


class SetLabel(OfServable, frozen=True):
    """Give a label to a version, or take it away where the version is None.

    Attributes:
        when_available: a version that is not available yet gets the label when it is; until then
            the label stays where it is.
    """

    label: str
    version: int | None = None
    when_available: bool = False


class SetSplit(OfServable, frozen=True):
    """Send requests without version or label by these weights; empty for all to the newest."""

    weights: dict[str, int]


class RollBack(OfServable, frozen=True):
    """Give the newest version up for an older one, with its labels and its share of requests.

    Attributes:
        to: None for the newest that is older.
    """

    to: int | None = None


class LookAgain(OfServable, frozen=True):
    """Look into the store now, and try again what has failed. Declares nothing."""


class ReplaceConfig(_Edit, frozen=True):
    """Declare all anew.

    Attributes:
        config: JSON, see `cluster.config.dump`; ``store`` and ``cluster`` may be left out.
        expected: digest of the declaration that this was made from; refused if it has changed
            since. "" for whatever there is.
    """

    config: bytes
    expected: str = ""


class Show(_Edit, frozen=True):
    """Only say what is declared."""


class AskBehind(_Edit, frozen=True):
    """Only say which routers still answer by an epoch before this one."""

    epoch: int


class DrainNode(_Edit, frozen=True):
    """Move what actors of a node hold to other nodes, and start none there. Declares nothing.

    Attributes:
        node: its id, or the beginning of it.
        undo: let actors be started there again; what has moved stays where it is.
    """

    node: str
    undo: bool = False


class Rebalance(_Edit, frozen=True):
    """Move parts of tables between shard actors until load is even. Declares nothing.

    Attributes:
        dry_run: only say what would be moved, and what it is good for.
    """

    dry_run: bool = False


Edit: TypeAlias = (
    LoadVersion
    | UnloadVersion
    | SetLabel
    | SetSplit
    | RollBack
    | LookAgain
    | ReplaceConfig
    | Show
    | AskBehind
    | DrainNode
    | Rebalance
)


class Edited(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What came of an edit.

    Attributes:
        code: "OK", or a canonical code; then nothing has changed.
        message: why it was refused.
        changes: what changed, a line each.
        config: what is declared now, as JSON; empty before anything is.
        digest: of that.
        epoch: number of the latest epoch; routers that have it follow what needs no load.
        behind: answer to `AskBehind`.
        balance: answer to `Rebalance`, `cluster.rebalancing.Rebalancing.explained` as JSON.
    """

    code: str = "OK"
    message: str = ""
    changes: tuple[str, ...] = ()
    config: bytes = b""
    digest: str = ""
    epoch: int = 0
    behind: tuple[str, ...] = ()
    balance: bytes = b""


class View(NamedTuple):
    """What an edit may know of a servable.

    Attributes:
        aspired: versions that should be loaded now, highest first.
        complete: versions of the latest listing.
        available: versions that answer.
    """

    aspired: tuple[int, ...] = ()
    complete: tuple[int, ...] = ()
    available: frozenset[int] = frozenset()


_EDITS: Final = msgspec.msgpack.Decoder(Edit)
_EDITED: Final = msgspec.msgpack.Decoder(Edited)


def encode_edit(edit: Edit) -> bytes:
    """An edit, for the controller."""
    return msgspec.msgpack.encode(edit)


def decode_edit(data: bytes) -> Edit:
    """The edit back; refuses what is none."""
    found: Edit = _EDITS.decode(data)
    return found


def encode_edited(edited: Edited) -> bytes:
    """What came of an edit, for who asked."""
    return msgspec.msgpack.encode(edited)


def decode_edited(data: bytes) -> Edited:
    """The answer back; refuses what is none."""
    return _EDITED.decode(data)
