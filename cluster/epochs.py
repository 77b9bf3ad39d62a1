"""The routing epoch: everything a router needs to send a request, as one immutable value.

A controller publishes epochs with growing numbers; a router pins each request to the epoch that
was current when the request came. This file holds the values and their encoding, no decision.
"""

from __future__ import annotations

import msgspec

from cluster.doors.settings import RequestLog
from shards.manifest import Manifest
from shards.orders import Endpoint

__all__ = [
    "Copies",
    "Epoch",
    "Rehearsal",
    "ServableVersion",
    "Share",
    "VersionStatus",
    "decode_epoch",
    "encode_epoch",
]


class _Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the epoch's values."""


class VersionStatus(_Value, frozen=True):
    """State of one version as users see it.

    Attributes:
        state: START, LOADING, AVAILABLE, UNLOADING or END.
        error_code: "OK", or a canonical code.
    """

    servable: str
    version: int
    state: str
    error_code: str = "OK"
    error_message: str = ""


class ServableVersion(_Value, frozen=True):
    """An available version and where its units are.

    Attributes:
        manifest: signatures, graph and units.
        placement: local unit name to, for each partition (one for map and host units), the names
            of the actors that hold a copy of it.
        deadline_ms: of requests that bring no deadline of their own.
    """

    manifest: Manifest
    placement: dict[str, tuple[tuple[str, ...], ...]]
    deadline_ms: int = 10_000


class Share(_Value, frozen=True):
    """A part of the requests that name neither version nor label.

    Attributes:
        target: as it was declared: a label, or a version in digits.
        version: that it means now.
        weight: against those of the servable's other shares.
    """

    target: str
    version: int
    weight: int


class Copies(_Value, frozen=True):
    """Shadow copies of a servable's requests, see `cluster.traffic.Shadow`.

    Attributes:
        version: the candidate.
        percent: of the requests that other versions answer.
        tolerance: of the comparison.
    """

    version: int
    percent: float
    tolerance: float


class Epoch(_Value, frozen=True):
    """One routing table.

    Attributes:
        term: the controller's reign.
        number: grows within and across terms.
        servables: name to version to what serves it; only available versions.
        labels: name to label to version; only available versions.
        pending: name to declared labels that have no version yet, with the one that they wait for.
        splits: name to shares; only available versions, and one weight at least is above 0.
        copies: name to shadow copies for an available version.
        logs: name to which of its requests are kept.
        endpoints: actor name to where it listens; every actor named in a placement is here.
        statuses: state of every known version, available or not.
        continuation_bytes_min: rows of look-ups that are for one unit alone go from the shards
            straight to its device where they have so many bytes or more; None for never.
        hot_rows_bytes: of rows that every router may keep (`cluster.hot_rows`); 0 for none.
    """

    term: int
    number: int
    servables: dict[str, dict[int, ServableVersion]] = {}
    labels: dict[str, dict[str, int]] = {}
    pending: dict[str, dict[str, int]] = {}
    splits: dict[str, tuple[Share, ...]] = {}
    copies: dict[str, Copies] = {}
    logs: dict[str, RequestLog] = {}
    endpoints: dict[str, Endpoint] = {}
    statuses: tuple[VersionStatus, ...] = ()
    continuation_bytes_min: int | None = None
    hot_rows_bytes: int = 0


class Rehearsal(_Value, frozen=True):
    """A version whose warm-up requests a router replays before any epoch names it.

    Attributes:
        store: that has the version.
        served: the version, and where its units are.
        endpoints: actor name to where it listens; every actor that holds a unit.
        timeout_s: for all requests together, once they have been read.
        continuation_bytes_min: as of an epoch.
    """

    store: str
    served: ServableVersion
    endpoints: dict[str, Endpoint]
    timeout_s: float
    continuation_bytes_min: int | None = None


def encode_epoch(epoch: Epoch) -> bytes:
    """The epoch as msgpack."""
    return msgspec.msgpack.encode(epoch)


def decode_epoch(data: bytes) -> Epoch:
    """The epoch back; refuses what does not fit."""
    return msgspec.msgpack.decode(data, type=Epoch)
