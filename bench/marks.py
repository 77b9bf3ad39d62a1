"""The marks that benchmarks are held against: reading them, and the verdict on each.

A file of marks is JSON, ``{bench: {key: [comparison, value]}}``; names that begin with an
underscore are remarks. A key that a benchmark did not print is missed, not skipped.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import orjson

from bench.errors import MarksUnreadable

__all__ = ["Mark", "Marks", "Verdict", "judge", "read_marks"]

_COMPARISONS: Final[Mapping[str, Callable[[float, float], bool]]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "==": operator.eq,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """What a key must be held to.

    Attributes:
        comparison: ``<=``, ``>=``, ``<``, ``>`` or ``==``.
        value: what the measured value is compared with.
    """

    comparison: str
    value: float

    def __post_init__(self) -> None:
        if self.comparison not in _COMPARISONS:
            raise ValueError(f"{self.comparison!r} is not one of {', '.join(_COMPARISONS)}")

    def met_by(self, measured: float) -> bool:
        """Whether the measured value meets the mark; NaN meets none."""
        return not math.isnan(measured) and _COMPARISONS[self.comparison](measured, self.value)


Marks = Mapping[str, Mapping[str, Mark]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One key held against its mark.

    Attributes:
        key: the ratio's name.
        mark: what it must be.
        measured: what it was, or None where the benchmark did not print it.
    """

    key: str
    mark: Mark
    measured: float | None

    @property
    def met(self) -> bool:
        """Whether the mark is met."""
        return self.measured is not None and self.mark.met_by(self.measured)


def judge(ratios: Mapping[str, float], marks: Mapping[str, Mark]) -> tuple[Verdict, ...]:
    """The verdict on every mark of one benchmark, in the order of the marks."""
    return tuple(
        Verdict(key=key, mark=mark, measured=ratios.get(key)) for key, mark in marks.items()
    )


def read_marks(path: Path) -> Marks:
    """The marks in a file.

    Raises:
        MarksUnreadable: with the path, and the benchmark and key where one is to blame.
    """
    try:
        raw = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise MarksUnreadable(f"{path}: {error}") from error
    if not isinstance(raw, dict):
        raise MarksUnreadable(f"{path}: not an object of benchmarks")
    marks: dict[str, dict[str, Mark]] = {}
    for bench, keys in _public(raw).items():
        if not isinstance(keys, dict):
            raise MarksUnreadable(f"{path}: {bench}: not an object of marks")
        marks[bench] = {
            key: _mark(value, where=f"{path}: {bench}.{key}")
            for key, value in _public(keys).items()
        }
    return marks


def _public(entries: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in entries.items() if not key.startswith("_")}


def _mark(raw: object, *, where: str) -> Mark:
    match raw:
        case [str(comparison), int() | float() as value] if not isinstance(value, bool):
            try:
                return Mark(comparison=comparison, value=float(value))
            except ValueError as error:
                raise MarksUnreadable(f"{where}: {error}") from error
        case _:
            raise MarksUnreadable(f"{where}: not [comparison, value]: {raw!r}")
