"""What a client gets: answers as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "Changed", "Classes", "Numbers", "Outputs", "VersionState"]

Array = npt.NDArray[Any]


class Outputs(dict[str, Array]):
    """The outputs of a prediction by name. Strings are arrays of ``bytes`` objects.

    Attributes:
        version: which version of the servable answered.
    """

    def __init__(self, outputs: dict[str, Array], version: int) -> None:
        super().__init__(outputs)
        self.version = version


@dataclass(frozen=True, slots=True)
class Classes:
    """Classes and scores of each example.

    Attributes:
        labels: [b, k], ``str`` objects.
        scores: [b, k].
        version: which version of the servable answered.
    """

    labels: npt.NDArray[np.object_]
    scores: Array
    version: int


@dataclass(frozen=True, slots=True)
class Numbers:
    """A number for each example.

    Attributes:
        values: [b].
        version: which version of the servable answered.
    """

    values: Array
    version: int


@dataclass(frozen=True, slots=True)
class VersionState:
    """What became of a version.

    Attributes:
        version: its number.
        state: START, LOADING, AVAILABLE, UNLOADING or END.
        error_code: OK where it did not fail.
        error_message: why it failed.
    """

    version: int
    state: str
    error_code: str = "OK"
    error_message: str = ""


@dataclass(frozen=True, slots=True)
class Changed:
    """What an admin request changed.

    Attributes:
        changes: in words; empty where all was so already.
        digest: of the declaration that is now in effect.
    """

    changes: tuple[str, ...]
    digest: str
