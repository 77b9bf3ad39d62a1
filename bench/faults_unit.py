"""The host unit of the model that ``faults`` serves. Imported by host actors, so it is light."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

__all__ = ["GROUPS", "GROUP_ROWS", "ids_of", "load"]

Arrays = Mapping[str, npt.NDArray[np.generic]]

#: The table's rows lie in so many groups, which are its partitions; each request asks every one.
GROUPS = 4
GROUP_ROWS = 16
#: A whole number below this is exact as float32.
_EXACT = 1 << 24


def ids_of(number: int) -> list[int]:
    """The rows that a request's number asks for: one of every group."""
    return [group * GROUP_ROWS + (number >> (4 * group)) % GROUP_ROWS for group in range(GROUPS)]


def load(
    files: Mapping[str, bytes], options: Mapping[str, str | int | float | bool]
) -> Callable[[Arrays], Arrays]:
    """Make the reader of numbers; ``version`` is the bundle's.

    It draws a number for its life, so that an answer tells which process has given it.
    """
    version = float(options["version"])
    life = float(secrets.randbelow(_EXACT - 1) + 1)

    def read(inputs: Arrays) -> Arrays:
        numbers = [int(text) for text in inputs["number"]]
        stamp = [[float(number), life, version] for number in numbers]
        return {
            "ids": np.asarray([ids_of(number) for number in numbers], np.int32),
            "stamp": np.asarray(stamp, np.float32),
        }

    return read
