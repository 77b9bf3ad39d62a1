"""Durable small states, one sequence for every cluster: what a controller must not forget.

    _cluster/<cluster>/<term>-<seq>.json    a state; the highest (term, seq) wins
    _cluster/<cluster>/<term>.term          a term that a controller has claimed

Decides which state is the latest and refuses to go back. Does not know what a state holds, nor
whether it lies in a directory or in a bucket.
"""

from __future__ import annotations

import contextlib
import random
import re
import time
from typing import Final

from batching.errors import FailedPrecondition, InvalidArgument, Unavailable
from shards.shelves import Shelf

__all__ = ["FOLDER", "States"]

#: Where states are, under a store's root.
FOLDER: Final = "_cluster"

#: States and claimed terms that are kept; a person may want to look at the past.
_KEPT: Final = 8
_SIZE_MAX: Final = 64 << 20
_CLAIMS_MAX: Final = 100
_PAUSE_S_MAX: Final = 0.2

_STATE: Final = re.compile(r"(\d+)-(\d+)\.json")
#: Somebody who died over a claim has used up the term.
_TERM: Final = re.compile(r"(\d+)\.term(?:\.claim-[0-9a-f]+)?")


class States:
    """The states of all clusters that share a store.

    Args:
        shelf: the store's files.
    """

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    def clusters(self) -> tuple[str, ...]:
        """Clusters that have kept something here."""
        _, folders = self._shelf.list(FOLDER, recursive=False)
        return tuple(folder.rpartition("/")[2] for folder in folders)

    def put(self, cluster: str, term: int, seq: int, data: bytes) -> None:
        """Keep a state; it is durable when this returns. Repeating the same call does nothing.

        Raises:
            FailedPrecondition: a later state, or another one of the same number, is there, or a
                higher term was claimed: some other controller has taken over.
            Unavailable: the store does not answer; the state may be there or not.
        """
        if term < 0 or seq < 0:
            raise InvalidArgument(f"term {term} and seq {seq} must not be negative")
        found = self._numbers(cluster, _STATE)
        path = _path(cluster, f"{term}-{seq}.json")
        if (term, seq) not in found or self._shelf.read(path, _SIZE_MAX) != data:
            if found and max(found) >= (term, seq):
                raise FailedPrecondition(
                    f"state {term}-{seq} of cluster {cluster!r} is not after "
                    f"{_text(max(found))}: another controller has written"
                )
            try:
                self._shelf.create_exclusively(path, data)
            except FileExistsError:
                raise FailedPrecondition(
                    f"state {term}-{seq} of cluster {cluster!r} was written by another controller"
                ) from None
        # Looked at after the state is there: who claims a term later than this finds the state,
        # and whose claim is here already may not have.
        claimed = max(self._numbers(cluster, _TERM), default=(term,))
        if claimed > (term,):
            raise FailedPrecondition(
                f"state {term}-{seq} of cluster {cluster!r} comes late: another controller has "
                f"claimed term {claimed[0]}"
            )
        for old in sorted(found)[: 1 - _KEPT]:
            # Two controllers may tidy up at once.
            self._shelf.delete(_path(cluster, f"{_text(old)}.json"))

    def latest(self, cluster: str) -> tuple[int, int, bytes] | None:
        """The state of the highest (term, seq), or None where there is none.

        Raises:
            Unavailable: the store does not answer, which is not the same.
        """
        while found := self._numbers(cluster, _STATE):
            term, seq = max(found)
            # Gone means that a writer has tidied up after writing later ones: look again.
            with contextlib.suppress(FileNotFoundError):
                path = _path(cluster, f"{term}-{seq}.json")
                return term, seq, self._shelf.read(path, _SIZE_MAX)
        return None

    def next_term(self, cluster: str) -> int:
        """Claim a term higher than any that was claimed or used. Two callers never get the same.

        Raises:
            Unavailable: the store does not answer, or too many claim at once.
        """
        for _ in range(_CLAIMS_MAX):
            claimed = self._numbers(cluster, _TERM)
            used = (term for term, _ in self._numbers(cluster, _STATE))
            term = max((0, *(number for (number,) in claimed), *used)) + 1
            try:
                self._shelf.create_exclusively(_path(cluster, f"{term}.term"), b"")
            except FileExistsError:
                # In a bucket all who claim at once give way; not all of them again.
                time.sleep(random.SystemRandom().uniform(0.0, _PAUSE_S_MAX))
                continue
            for (old,) in sorted(claimed)[: 1 - _KEPT]:
                self._shelf.delete(_path(cluster, f"{old}.term"))
            return term
        raise Unavailable(f"no term of cluster {cluster!r} could be claimed")

    def _numbers(self, cluster: str, pattern: re.Pattern[str]) -> set[tuple[int, ...]]:
        found, _ = self._shelf.list(f"{FOLDER}/{cluster}", recursive=False)
        matches = (pattern.fullmatch(each.path.rpartition("/")[2]) for each in found)
        # A name with leading zeros is not one of ours: it could not be read back by number.
        return {
            numbers
            for match in matches
            if match
            for numbers in [tuple(int(part) for part in match.groups())]
            if [str(number) for number in numbers] == list(match.groups())
        }


def _path(cluster: str, name: str) -> str:
    return f"{FOLDER}/{cluster}/{name}"


def _text(state: tuple[int, ...]) -> str:
    return f"{state[0]}-{state[1]}"
