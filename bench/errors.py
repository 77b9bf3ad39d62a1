"""Why a benchmark could not be run.

    BenchError
    ├── ToolMissing         a program that the benchmark needs is not installed
    ├── ContenderFailed     a server under test did not start, or ended
    ├── AnswersDiffer       contenders that should answer alike do not: nothing to compare
    ├── LoadFailed          the load did not run, or too many of its requests failed
    └── MarksUnreadable     the file of marks does not parse

A benchmark that cannot measure says so and prints no ratio: a missing figure is better than one
that means something else.
"""

from __future__ import annotations

__all__ = [
    "AnswersDiffer",
    "BenchError",
    "ContenderFailed",
    "LoadFailed",
    "MarksUnreadable",
    "ToolMissing",
]


class BenchError(Exception):
    """A benchmark could not be run; the text is for its user."""


class ToolMissing(BenchError):
    """A program that the benchmark needs is not installed."""


class ContenderFailed(BenchError):
    """A server under test did not start, or ended before it should."""


class AnswersDiffer(BenchError):
    """Contenders that should give the same answer do not."""


class LoadFailed(BenchError):
    """The load did not run, or too many of its requests failed."""


class MarksUnreadable(BenchError):
    """The file of marks does not parse."""
