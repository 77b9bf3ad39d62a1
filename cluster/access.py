"""Who may do what at a door: keys, their rights, and the decision.

A key is known by the SHA-256 of its secret; the secret itself is never kept. A `Keyring` is a
value: when the keys change there is a new one. This file knows headers and rights, and neither
files nor sockets; `cluster.keyfile` reads keyrings, doors ask them.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import translate
from typing import Final

from batching.errors import PermissionDenied, Unauthenticated

__all__ = ["AUTHORIZATION", "API_KEY", "Key", "Keyring", "Right", "digest_of", "secret_in"]

AUTHORIZATION: Final = b"authorization"
API_KEY: Final = b"x-api-key"
#: No key is longer. What a client sends is hashed only up to here, so that headers cost nothing.
_SECRET_BYTES_MAX: Final = 512
_BEARER: Final = re.compile(rb"bearer +([^\s]+)", re.IGNORECASE)


class Right(StrEnum):
    """What a request needs. The first two are for a servable, the others for the cluster."""

    PREDICT = "predict"
    METADATA = "metadata"
    METRICS = "metrics"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key and its rights. None implies another.

    Attributes:
        name: for people; shown in refusals, logs and counters.
        digest: SHA-256 of the secret.
        predict: patterns of servables that it may use for inference; ``*`` stands for any text.
        metadata: patterns of servables whose states and signatures it may see.
        metrics: whether it may read the counters.
        admin: whether it may change what is served.
    """

    name: str
    digest: bytes
    predict: tuple[str, ...] = ()
    metadata: tuple[str, ...] = ()
    metrics: bool = False
    admin: bool = False


class _Grants:
    """A key, ready to be asked."""

    __slots__ = ("_patterns", "key")

    def __init__(self, key: Key) -> None:
        self.key = key
        self._patterns = {
            Right.PREDICT: _compiled(key.predict),
            Right.METADATA: _compiled(key.metadata),
        }

    def holds(self, right: Right, servable: str) -> bool:
        if right is Right.METRICS:
            return self.key.metrics
        if right is Right.ADMIN:
            return self.key.admin
        return self._patterns[right].fullmatch(servable) is not None


class Keyring:
    """All keys of a door at one time. Immutable.

    Args:
        keys: of different names and digests.
        open_metrics: whether the counters need no key.
    """

    def __init__(self, keys: Iterable[Key], *, open_metrics: bool = False) -> None:
        self._grants = {key.digest: _Grants(key) for key in keys}
        self._open_metrics = open_metrics

    def __len__(self) -> int:
        return len(self._grants)

    def check(self, headers: Mapping[bytes, bytes], right: Right, servable: str = "") -> str:
        """The name of the key, if these headers give one that has this right.

        Returns:
            The key's name; empty where none is needed.

        Raises:
            Unauthenticated: no key, or one that is not on the ring.
            PermissionDenied: the key has no such right; names key and servable.
        """
        if right is Right.METRICS and self._open_metrics:
            return ""
        grants = self._find(secret_in(headers))
        name = grants.key.name
        if not grants.holds(right, servable):
            if right is Right.METRICS or right is Right.ADMIN:
                raise PermissionDenied(f"key {name!r} has no right {right.value!r}")
            raise PermissionDenied(f"key {name!r} has no right {right.value!r} on {servable!r}")
        return name

    def visible(self, headers: Mapping[bytes, bytes], servables: Iterable[str]) -> frozenset[str]:
        """Of these servables, those whose states the headers' key may see.

        Raises:
            Unauthenticated: no key, or one that is not on the ring.
        """
        grants = self._find(secret_in(headers))
        return frozenset(name for name in servables if grants.holds(Right.METADATA, name))

    def _find(self, secret: bytes) -> _Grants:
        digest = hashlib.sha256(secret).digest()
        grants = self._grants.get(digest)
        # Whoever times the look-up learns about digests, from which no key can be made; the
        # comparison is still one that takes the same time wherever the two differ.
        if grants is None or not hmac.compare_digest(grants.key.digest, digest):
            raise Unauthenticated("unknown key")
        return grants


def secret_in(headers: Mapping[bytes, bytes]) -> bytes:
    """The secret that a request brings, as bearer token or as ``x-api-key``.

    Raises:
        Unauthenticated: none, or in both places, or in a form that no key has.
    """
    given = headers.get(API_KEY)
    bearer = headers.get(AUTHORIZATION)
    if bearer is not None:
        if given is not None:
            raise Unauthenticated("a key is given twice: as bearer token and as x-api-key")
        match = _BEARER.fullmatch(bearer[: _SECRET_BYTES_MAX + 16].strip())
        if match is None:
            raise Unauthenticated("only bearer tokens are understood in authorization")
        given = match[1]
    if not given:
        raise Unauthenticated("a key is needed: authorization: Bearer KEY, or x-api-key: KEY")
    if len(given) > _SECRET_BYTES_MAX:
        raise Unauthenticated("unknown key")
    return given


def digest_of(secret: str) -> bytes:
    """The digest by which a ring knows a secret."""
    return hashlib.sha256(secret.encode()).digest()


def _compiled(patterns: tuple[str, ...]) -> re.Pattern[str]:
    if not patterns:
        return re.compile(r"(?!)")
    # Only `*` is special: names have no brackets or question marks.
    return re.compile("|".join(f"(?:{translate(pattern)})" for pattern in patterns))
