"""What a store may be called: a directory, ``file://``, or a URL of an object store.

Decides which URLs are understood, and that none holds a secret: access keys come from the
environment and the standard files of each provider, so that a URL can be printed, logged and kept
in a cluster's state. Does not connect to anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from batching.errors import InvalidArgument, Unimplemented

__all__ = ["Location", "is_url", "parse_location"]

_S3: Final = frozenset({"region", "endpoint_override", "scheme", "anonymous"})
_GS: Final = frozenset({"endpoint_override", "scheme", "anonymous", "project_id"})
_ABFS: Final = frozenset(
    {
        "account_name",
        "blob_storage_authority",
        "blob_storage_scheme",
        "dfs_storage_authority",
        "dfs_storage_scheme",
    }
)
_OPTIONS: Final[Mapping[str, frozenset[str]]] = {"s3": _S3, "gs": _GS, "abfs": _ABFS}
_ALIASES: Final = {"s3a": "s3", "gcs": "gs", "abfss": "abfs"}


@dataclass(frozen=True, slots=True)
class Location:
    """A prefix in a bucket.

    Attributes:
        scheme: ``s3``, ``gs`` or ``abfs``.
        bucket: its name; of Azure, the container's.
        prefix: without slashes at its ends; "" for the whole bucket.
        options: what else it takes to get there.
    """

    scheme: str
    bucket: str
    prefix: str = ""
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """What `parse_location` takes to make this again. Holds no secret."""
        path = f"/{self.prefix}" if self.prefix else ""
        query = f"?{urlencode(sorted(self.options.items()), safe=':/')}" if self.options else ""
        return f"{self.scheme}://{self.bucket}{path}{query}"

    @property
    def root(self) -> str:
        """Bucket and prefix, as `pyarrow.fs` names a path."""
        return f"{self.bucket}/{self.prefix}" if self.prefix else self.bucket


def is_url(store: str) -> bool:
    """Whether a store's name is a URL rather than a path."""
    return "://" in store


def parse_location(url: str) -> Location:
    """What a URL says.

    Raises:
        Unimplemented: a kind of store that is not known.
        InvalidArgument: no bucket, an unknown option, or an access key. The message repeats no
            part of the URL that may be secret.
    """
    parts = urlsplit(url)
    scheme = _ALIASES.get(parts.scheme, parts.scheme)
    known = _OPTIONS.get(scheme)
    if known is None:
        raise Unimplemented(
            f"stores of kind {parts.scheme!r} are not supported: use a directory, file://, "
            f"{', '.join(f'{each}://' for each in _OPTIONS)}"
        )
    if "@" in parts.netloc:
        raise InvalidArgument(
            f"a URL of a store ({scheme}://) must not hold a key: it is printed and kept; set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or what else the provider reads, or use "
            "its own files"
        )
    prefix = unquote(parts.path).strip("/")
    if not parts.netloc or parts.fragment or any(
        part in ("", ".", "..") for part in prefix.split("/") if prefix
    ):  # fmt: skip
        raise InvalidArgument(f"a store is {scheme}://BUCKET/PREFIX, without '..' or '#'")
    options = parse_qsl(parts.query, keep_blank_values=True)
    if unknown := sorted({name for name, _ in options} - known):
        # Only names are repeated: a value may be a key that does not belong here.
        raise InvalidArgument(
            f"unknown option {', '.join(unknown)} in a {scheme}:// URL; known are "
            f"{', '.join(sorted(known))}"
        )
    if len(dict(options)) != len(options):
        raise InvalidArgument(f"an option is given twice in a {scheme}:// URL")
    if scheme == "abfs" and "account_name" not in dict(options):
        raise InvalidArgument("a store at Azure is abfs://CONTAINER/PREFIX?account_name=NAME")
    return Location(scheme, parts.netloc, prefix, dict(options))
