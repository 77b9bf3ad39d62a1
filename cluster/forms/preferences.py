"""Lists of preferences in headers: ``gzip;q=0.5, zstd``, as ``accept`` and ``accept-encoding``."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["media_type", "preferences"]

#: What comes after so many names, or parameters of one, is not looked at: a head may have 32 KB.
_NAMES_MAX: Final = 64
_PARAMETERS_MAX: Final = 8

#: The standard's weights: 0 to 1 with three decimals at most.
_WEIGHT: Final = re.compile(rb"0(\.[0-9]{0,3})?|1(\.0{0,3})?")


def preferences(text: bytes) -> list[tuple[bytes, float]]:
    """Names in small letters and their weights, in the order of the list.

    A name without a weight has 1; one whose weight is none has 0, as if it were refused.
    """
    names = text.split(b",", _NAMES_MAX)[:_NAMES_MAX]
    return [(media_type(each), _weight(each)) for each in names]


def media_type(text: bytes) -> bytes:
    """A name without its parameters, in small letters."""
    return text.partition(b";")[0].strip().lower()


def _weight(text: bytes) -> float:
    for parameter in text.split(b";", _PARAMETERS_MAX)[1:_PARAMETERS_MAX]:
        name, _, value = parameter.partition(b"=")
        if name.strip().lower() == b"q":
            value = value.strip()
            return float(value) if _WEIGHT.fullmatch(value) else 0.0
    return 1.0
