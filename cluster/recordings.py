"""Recorded requests in files that people name: a request log's, or a body of :predict as JSON.

Decides how a file is read, and which of many requests are taken. Does not know bundles or stores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from batching.errors import InvalidArgument, ServingError
from cluster.api import RequestParser
from shards.manifest import Signature
from shards.recorded import BYTES_MAX, Recorded, salvage_requests

__all__ = ["recorded_in", "spread"]


def recorded_in(file: Path, signatures: Mapping[str, Signature]) -> tuple[list[Recorded], str]:
    """The requests of a file, and what is wrong with the first that is broken.

    Args:
        file: of a request log, or, where its name ends in ``.json``, a body of ``:predict``.
        signatures: that a body is read by.

    Raises:
        InvalidArgument: the file cannot be read, is too large, or is a body that does not fit.
        BundleForeign: it is no file of recorded requests.
    """
    try:
        if file.stat().st_size > BYTES_MAX:
            raise InvalidArgument(f"{file} is larger than {BYTES_MAX} bytes")
        data = file.read_bytes()
    except OSError as error:
        raise InvalidArgument(f"{file} cannot be read: {error.strerror}") from None
    if file.suffix != ".json":
        return salvage_requests(data, str(file))
    try:
        parsed = RequestParser(signatures).parse(data)
    except ServingError as error:
        raise InvalidArgument(f"{file}: {error.message}") from None
    return [Recorded(signature=parsed.signature_name, inputs=dict(parsed.arrays))], ""


def spread(requests: Sequence[Recorded], count: int) -> list[Recorded]:
    """At most so many of these, evenly spread and in order.

    Raises:
        InvalidArgument: the number is negative.
    """
    if count < 0:
        raise InvalidArgument(f"--count {count} is negative")
    total = len(requests)
    if total <= count:
        return list(requests)
    return [requests[index * total // count] for index in range(count)]
