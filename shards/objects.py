"""Objects of a bucket behind `pyarrow.fs`: every call bounded in time, every error typed.

Decides what counts as missing and what as an outage. A bucket that is not there, a server that
refuses, hangs or trickles are outages; only a bucket that was seen and says that there is no such
key makes something missing. There is no rename, and no partial write: an object appears whole when
its upload ends. Does not know what the objects mean.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, Final, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from batching.errors import InvalidArgument, Unavailable
from shards.calls import Call, Calls
from shards.files import Bytes, flat_view
from shards.locations import Location
from shards.shelves import Object

__all__ = ["CHUNK", "Objects", "Reading", "connect"]

T = TypeVar("T")

#: Bytes of one ranged read and of one piece of an upload.
CHUNK: Final = 8 << 20

_CALLS_MAX: Final = 64
_CONNECT_S: Final = 3.0
_SILENCE_S: Final = 5.0
_ATTEMPTS: Final = 3
_SECRETS: Final = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_KEY")


def connect(location: Location) -> Callable[[], pafs.FileSystem]:
    """How to reach a location's bucket. Nothing is asked of a network before the call."""
    options = dict(location.options)
    anonymous = options.pop("anonymous", "") == "true"

    def s3() -> pafs.FileSystem:
        return pafs.S3FileSystem(
            anonymous=anonymous,
            # Small objects are one request; a larger one waits for its parts, so that what is
            # not sent yet is not gathered in memory.
            allow_delayed_open=True,
            background_writes=False,
            connect_timeout=_CONNECT_S,
            request_timeout=_SILENCE_S,
            retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
            **options,
        )

    def gs() -> pafs.FileSystem:
        return pafs.GcsFileSystem(
            anonymous=anonymous,
            retry_time_limit=timedelta(seconds=_SILENCE_S * _ATTEMPTS),
            **options,
        )

    def abfs() -> pafs.FileSystem:
        # Without a key, Azure's own chain of credentials: environment, managed identity, its tools.
        return pafs.AzureFileSystem(account_key=os.environ.get("AZURE_STORAGE_KEY"), **options)

    return {"s3": s3, "gs": gs, "abfs": abfs}[location.scheme]


class Reading:
    """An object that was opened; reads of it may run at the same time."""

    def __init__(self, objects: Objects, what: str, file: Any, size: int) -> None:
        self._objects = objects
        self._what = what
        self._file = file
        self.size = size

    def start(self, offset: int, size: int, then: Callable[[Bytes], T]) -> Call[T]:
        """Begin to read a range and to do something with it, on another thread."""
        return self._objects.start(self._what, lambda: then(self._file.read_at(size, offset)))


class Objects:
    """The objects under a root.

    Args:
        url: how messages name the root; holds no secret.
        connect: makes the file system; called once, when first needed.
        root: bucket and prefix.
        timeout_s: the longest that any call may take; of an upload, any piece.
    """

    def __init__(
        self, url: str, connect: Callable[[], pafs.FileSystem], root: str, timeout_s: float = 20.0
    ) -> None:
        self.url = url
        self.timeout_s = timeout_s
        self._connect = connect
        self._root = root
        self._calls = Calls(_CALLS_MAX)
        self._files: pafs.FileSystem | None = None

    def create(self) -> None:
        """Make sure that the bucket is there. Buckets are made by their owners, not here."""
        self._must_exist()

    def list(self, prefix: str, *, recursive: bool = True) -> tuple[list[Object], list[str]]:
        """Objects and names of folders under a prefix, by path.

        Raises:
            Unavailable: there was no complete answer, or the bucket is not there.
        """
        path = self._path(prefix) if prefix else self._root
        selector = pafs.FileSelector(path, recursive=recursive, allow_not_found=True)
        infos = self._ask("listing", lambda files: files.get_file_info(selector))
        if not infos:
            # An absent prefix is an empty one, but an absent bucket says the same.
            self._must_exist()
        skip = len(self._root) + 1
        found = [
            _object(info, info.path[skip:]) for info in infos if info.type == pafs.FileType.File
        ]
        folders = [info.path[skip:] for info in infos if info.type == pafs.FileType.Directory]
        return sorted(found), sorted(folders)

    def stat(self, path: str) -> Object | None:
        """An object, or None where there is none.

        Raises:
            Unavailable: nobody said so.
        """
        info = self._ask("looking", lambda files: files.get_file_info(self._path(path)))
        if info.type == pafs.FileType.File:
            return _object(info, path)
        self._must_exist()
        return None

    def open(self, path: str) -> Reading:
        """An object for reading.

        Raises:
            FileNotFoundError: there is none.
            Unavailable: nobody said so.
        """

        def opened(files: pafs.FileSystem) -> Reading:
            file = files.open_input_file(self._path(path))
            return Reading(self, self._what(path), file, file.size())

        try:
            return self._ask("opening", opened)
        except FileNotFoundError:
            self._must_exist()
            raise

    def read(self, path: str, size_max: int) -> bytes:
        """A small object, whole.

        Raises:
            FileNotFoundError: there is none.
            InvalidArgument: it is larger than that.
            Unavailable: it cannot be read.
        """
        reading = self.open(path)
        if reading.size > size_max:
            raise InvalidArgument(
                f"{self._what(path)} has {reading.size} bytes, expected at most {size_max}"
            )
        data = reading.start(0, reading.size, bytes).result(self.timeout_s)
        if len(data) != reading.size:
            raise Unavailable(f"{self._what(path)}: {len(data)} of {reading.size} bytes came")
        return data

    def write(self, path: str, data: Bytes, wrote: Callable[[int], None] | None = None) -> None:
        """Write an object; it appears when this returns, or not at all.

        Args:
            path: under the root.
            data: the content.
            wrote: told how many bytes were sent so far.

        Raises:
            Unavailable: it cannot be written. After a timeout it may still appear, whole or, if
                it is longer than a piece, cut off: whoever reads holds its size against the name.
        """
        key = self._path(path)
        with flat_view(data) as view:
            writing = f"writing {self._what(path)}"
            stream = self._ask("writing", lambda files: _open_output(files, key))
            for at in range(0, len(view), CHUNK):
                piece = view[at : at + CHUNK]
                self.start(writing, partial(stream.write, piece)).result(self.timeout_s)
                if wrote is not None:
                    wrote(at + len(piece))
            self.start(writing, stream.close).result(self.timeout_s)

    def create_exclusively(self, path: str, data: Bytes) -> None:
        """Write an object that nobody else writes; at most one of several callers succeeds.

        Object stores have no lock and, through `pyarrow.fs`, no conditional write. Each caller
        first writes a claim of its own beside the object, then looks. Who sees another claim, or
        the object, gives way. Claims are looked for before the object is: a claim is taken back
        only once the object is there, so who comes too late for the one finds the other. All of
        several callers may give way.

        Raises:
            FileExistsError: the object is there, or somebody else claims it, or did and died.
            Unavailable: there was no answer. A claim may be left over.
        """
        claim = f"{path}.claim-{secrets.token_hex(8)}"
        self.write(claim, b"")
        folder = path.rpartition("/")[0]
        found, _ = self.list(folder, recursive=False)
        others = [each for each in found if each.path.startswith(f"{path}.claim-")]
        taken = {each.path for each in others} != {claim} or self.stat(path) is not None
        if not taken:
            self.write(path, data)
        self.delete(claim)
        if taken:
            raise FileExistsError(f"{self._what(path)} is taken")

    def delete(self, path: str) -> None:
        """Remove an object; one that is not there is fine.

        Raises:
            Unavailable: it may still be there.
        """
        try:
            self._ask("deleting", lambda files: files.delete_file(self._path(path)))
        except FileNotFoundError:
            self._must_exist()

    def start(self, what: str, fn: Callable[[], T]) -> Call[T]:
        """Begin a call whose errors are typed."""

        def typed() -> T:
            try:
                return fn()
            except (OSError, pa.ArrowException) as error:
                raise self._typed(what, error) from None

        return self._calls.start(what, typed, self.timeout_s)

    def _ask(self, doing: str, fn: Callable[[pafs.FileSystem], T]) -> T:
        def asked() -> T:
            if self._files is None:
                self._files = self._connect()
            return fn(self._files)

        what = f"{doing} in {self.url}"
        return self.start(what, asked).result(self.timeout_s)

    def _typed(self, what: str, error: BaseException) -> BaseException:
        if isinstance(error, FileNotFoundError):
            return error
        if isinstance(error, pa.ArrowInvalid):
            return InvalidArgument(f"{what}: {_told(error)}")
        return Unavailable(f"{what}: {_told(error)}")

    def _must_exist(self) -> None:
        bucket = self._root.partition("/")[0]
        info = self._ask("looking", lambda files: files.get_file_info(bucket or "/"))
        if info.type != pafs.FileType.Directory:
            raise Unavailable(f"{self.url}: there is no bucket {bucket!r}")

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _what(self, path: str) -> str:
        return f"{path} in {self.url}"


def _open_output(files: pafs.FileSystem, key: str) -> Any:
    if isinstance(files, pafs.LocalFileSystem):
        files.create_dir(key.rpartition("/")[0])
    return files.open_output_stream(key)


def _object(info: pafs.FileInfo, path: str) -> Object:
    return Object(path, int(info.size or 0), (info.mtime_ns or 0) / 1e9)


def _told(error: BaseException) -> str:
    """The first line of what a client library says, without a secret."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    for name in _SECRETS:
        value = os.environ.get(name)
        if value:
            text = text.replace(value, "***")
    return text
