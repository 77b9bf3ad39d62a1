"""Durable small states, one sequence for every cluster: what a controller must not forget.

    <root>/<cluster>/<term>-<seq>.json    a state; the highest (term, seq) wins
    <root>/<cluster>/<term>.term          a term that a controller has claimed

Decides which state is the latest and refuses to go back. Does not know what a state holds.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Final

from batching.errors import FailedPrecondition, InvalidArgument
from shards.files import write_atomically

__all__ = ["States"]

#: States and claimed terms that are kept; a person may want to look at the past.
_KEPT: Final = 8

_STATE: Final = re.compile(r"(\d+)-(\d+)\.json")
_TERM: Final = re.compile(r"(\d+)\.term")


class States:
    """The states of all clusters that share a directory.

    Args:
        root: the directory; made by the first write.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, cluster: str, term: int, seq: int, data: bytes) -> None:
        """Keep a state; it is on disk when this returns. Repeating the same call does nothing.

        Raises:
            FailedPrecondition: a later state, or another one of the same number, is there: some
                other controller has taken over.
        """
        if term < 0 or seq < 0:
            raise InvalidArgument(f"term {term} and seq {seq} must not be negative")
        directory = self._root / cluster
        found = self._states(directory)
        path = directory / f"{term}-{seq}.json"
        if (term, seq) in found and path.read_bytes() == data:
            return
        if found and max(found) >= (term, seq):
            raise FailedPrecondition(
                f"state {term}-{seq} of cluster {cluster!r} is not after {_text(max(found))}: "
                f"another controller has written"
            )
        try:
            write_atomically(path, (data,), exclusive=True)
        except FileExistsError:
            raise FailedPrecondition(
                f"state {term}-{seq} of cluster {cluster!r} was written by another controller"
            ) from None
        for old in sorted(found)[: 1 - _KEPT]:
            # Two controllers may tidy up at once.
            (directory / f"{_text(old)}.json").unlink(missing_ok=True)

    def latest(self, cluster: str) -> tuple[int, int, bytes] | None:
        """The state of the highest (term, seq), or None where there is none."""
        directory = self._root / cluster
        while found := self._states(directory):
            term, seq = max(found)
            # Gone means that a writer has tidied up after writing later ones: look again.
            with contextlib.suppress(FileNotFoundError):
                return term, seq, (directory / f"{term}-{seq}.json").read_bytes()
        return None

    def next_term(self, cluster: str) -> int:
        """Claim a term higher than any that was claimed or used. Two callers never get the same."""
        directory = self._root / cluster
        while True:
            claimed = _numbers(directory, _TERM)
            used = (term for term, _ in self._states(directory))
            term = max((0, *(number for (number,) in claimed), *used)) + 1
            try:
                write_atomically(directory / f"{term}.term", (b"",), exclusive=True)
            except FileExistsError:
                continue
            for (old,) in sorted(claimed)[: 1 - _KEPT]:
                (directory / f"{old}.term").unlink(missing_ok=True)
            return term

    def _states(self, directory: Path) -> set[tuple[int, int]]:
        return {(term, seq) for term, seq in _numbers(directory, _STATE)}


def _numbers(directory: Path, pattern: re.Pattern[str]) -> set[tuple[int, ...]]:
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return set()
    matches = (pattern.fullmatch(name) for name in names)
    # A name with leading zeros is not one of ours: it could not be read back by number.
    return {
        numbers
        for match in matches
        if match
        for numbers in [tuple(int(part) for part in match.groups())]
        if [str(number) for number in numbers] == list(match.groups())
    }


def _text(state: tuple[int, int]) -> str:
    return f"{state[0]}-{state[1]}"
