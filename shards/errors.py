"""Errors of bundles, stores, programs and the data plane.

ServingError (batching.errors)
├── InvalidArgument
│   └── SpecMismatch         an array does not fit its declared spec; names the tensor
├── NotFound
│   └── BundleNotFound
├── FailedPrecondition
│   ├── BundleIncomplete     half-written: no manifest, or a blob is missing
│   ├── BundleForeign        not ours, or of a schema newer than this code
│   ├── ExportFailed         a function could not be made into a portable program
│   └── ProgramRefused       a program calls what it must not, or failed its trial
├── DataLoss
│   ├── BundleCorrupt        bytes do not match their digest, or a manifest does not parse
│   └── FrameCorrupt         a peer sent bytes that are not a frame
├── Unavailable
│   ├── DeviceLost           the device answers nothing any more
│   ├── LinkClosed           the peer, or the way to it, is gone
│   └── NotHosted            asked of an actor that no longer has it, or has it otherwise
│       └── PartitionNotHeld
├── ResourceExhausted
│   ├── CacheFull            a blob does not fit into the node's cache or onto its disk
│   ├── LinkFull             more bytes wait for the peer than the bound allows
│   └── FrameRefused         the peer does not take a frame that was sent
└── Unauthenticated
    └── HandshakeRefused     wrong secret, protocol, version or generation
"""

from __future__ import annotations

from batching.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)

__all__ = [
    "BundleCorrupt",
    "BundleForeign",
    "BundleIncomplete",
    "BundleNotFound",
    "DeviceLost",
    "CacheFull",
    "ExportFailed",
    "FrameCorrupt",
    "FrameRefused",
    "HandshakeRefused",
    "LinkClosed",
    "LinkFull",
    "NotHosted",
    "PartitionNotHeld",
    "ProgramRefused",
    "SpecMismatch",
]


class SpecMismatch(InvalidArgument):
    """An array does not fit its declared spec; the message names the tensor."""


class BundleNotFound(NotFound):
    """The store has no such servable or version."""


class BundleIncomplete(FailedPrecondition):
    """Half-written: there is no manifest, or a blob it names is missing."""


class BundleForeign(FailedPrecondition):
    """Not a bundle of ours, or of a schema newer than this code reads."""


class ExportFailed(FailedPrecondition):
    """A function could not be made into a portable program."""


class ProgramRefused(FailedPrecondition):
    """A program calls what it must not, is not what its unit says, or failed its trial."""


class BundleCorrupt(DataLoss):
    """Bytes do not match their digest, or a manifest does not parse."""


class FrameCorrupt(DataLoss):
    """A peer sent bytes that are not a frame."""


class DeviceLost(Unavailable):
    """The device answers nothing any more; only another process can have it back."""


class LinkClosed(Unavailable):
    """The peer, or the way to it, is gone."""


class NotHosted(Unavailable):
    """Asked of an actor that does not host it so: the asker's epoch is out of date."""


class PartitionNotHeld(NotHosted):
    """Rows were asked of a shard that does not hold them."""


class LinkFull(ResourceExhausted):
    """More bytes wait for the peer than the bound allows."""


class CacheFull(ResourceExhausted):
    """A blob does not fit into the node's cache or onto its disk; says how much is short."""


class FrameRefused(ResourceExhausted):
    """The peer does not take a frame that was sent: its bounds are narrower."""


class HandshakeRefused(Unauthenticated):
    """Wrong secret, protocol, version or generation."""
