"""The keys file: YAML on the node of a door, read into a `Keyring`.

    keys:
      - name: search-team                # shown in refusals and counters
        sha256: 2c26b46b68ffc68ff99b...  # of the secret; or `file: PATH`, or `env: VARIABLE`
        predict: ["search-*"]
        metadata: ["search-*"]
      - name: prometheus
        file: prometheus.key             # its first line is the secret; relative to this file
        metrics: true

Secrets are hashed as they are read. Nothing of a file's content gets into an error, but for names
of keys and of fields.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec
import yaml

from batching.errors import FailedPrecondition
from cluster.access import Key, Keyring, digest_of
from cluster.doors.settings import Auth
from cluster.doors.watched import Watched

__all__ = ["keys_of", "read_keys"]

_FILE_BYTES_MAX: Final = 1 << 20
_KEYS_MAX: Final = 1024
#: A shorter secret can be guessed from its digest, or over the network.
_SECRET_CHARS_MIN: Final = 16
_SECRET_CHARS_MAX: Final = 512


class _Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    sha256: str = ""
    file: str = ""
    env: str = ""
    predict: tuple[str, ...] = ()
    metadata: tuple[str, ...] = ()
    metrics: bool = False
    admin: bool = False


class _Keys(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    keys: tuple[_Entry, ...]


def read_keys(
    path: Path, *, open_metrics: bool = False, environ: Mapping[str, str] = os.environ
) -> tuple[Keyring, tuple[Path, ...]]:
    """The keyring of a keys file, and every file that it was made from.

    Raises:
        FailedPrecondition: it cannot be read or does not say what it may say. A file with one bad
            entry is refused whole: a ring without a key that was meant would refuse its user.
    """
    try:
        entries = msgspec.convert(yaml.safe_load(_text(path)), _Keys).keys
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        raise FailedPrecondition(f"keys file {path}{where}: not YAML") from None
    except msgspec.ValidationError as error:
        raise FailedPrecondition(f"keys file {path}: {error}") from None
    if len(entries) > _KEYS_MAX:
        raise FailedPrecondition(f"keys file {path}: more than {_KEYS_MAX} keys")
    files = [path]
    keys: list[Key] = []
    for entry in entries:
        try:
            digest = _digest(entry, path, environ, files)
        except FailedPrecondition as error:
            raise FailedPrecondition(f"keys file {path}, key {entry.name!r}: {error}") from None
        keys.append(
            Key(
                name=entry.name,
                digest=digest,
                predict=entry.predict,
                metadata=entry.metadata,
                metrics=entry.metrics,
                admin=entry.admin,
            )
        )
    for what, values in (("name", [k.name for k in keys]), ("secret", [k.digest for k in keys])):
        if len(set(values)) < len(values):
            raise FailedPrecondition(f"keys file {path}: two keys have the same {what}")
    return Keyring(keys, open_metrics=open_metrics), tuple(files)


def keys_of(auth: Auth) -> Watched[Keyring]:
    """The keyring of a declaration, to be followed.

    Raises:
        FailedPrecondition: the file is no good now, and there is no earlier reading to keep.
    """
    path = Path(auth.keys)
    return Watched(lambda: read_keys(path, open_metrics=auth.open_metrics))


def _digest(entry: _Entry, path: Path, environ: Mapping[str, str], files: list[Path]) -> bytes:
    if not entry.name:
        raise FailedPrecondition("a key needs a name")
    if bool(entry.sha256) + bool(entry.file) + bool(entry.env) != 1:
        raise FailedPrecondition("give exactly one of sha256, file, env")
    if entry.sha256:
        try:
            digest = bytes.fromhex(entry.sha256)
        except ValueError:
            digest = b""
        if len(digest) != 32:
            raise FailedPrecondition("sha256 must be 64 hexadecimal digits")
        return digest
    if entry.file:
        file = path.parent / entry.file
        files.append(file)
        secret = _text(file).partition("\n")[0].strip()
    else:
        secret = environ.get(entry.env, "").strip()
        if not secret:
            raise FailedPrecondition(f"environment variable {entry.env} is not set")
    if not _SECRET_CHARS_MIN <= len(secret) <= _SECRET_CHARS_MAX or not secret.isascii():
        raise FailedPrecondition(
            f"a secret is {_SECRET_CHARS_MIN} to {_SECRET_CHARS_MAX} ASCII characters"
        )
    return digest_of(secret)


def _text(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            data = opened.read(_FILE_BYTES_MAX + 1)
        if len(data) > _FILE_BYTES_MAX:
            raise FailedPrecondition(f"{file} is larger than {_FILE_BYTES_MAX} bytes")
        return data.decode()
    except OSError as error:
        raise FailedPrecondition(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise FailedPrecondition(f"{file} is not UTF-8 text") from None
