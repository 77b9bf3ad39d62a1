"""Removes blobs that nothing refers to, beside saves and clusters that run on.

Marks what every manifest refers to, and what was written or touched within the grace; the rest
goes. Where anything cannot be read that may refer to something, nothing goes. How a save that
begins to rely on a blob at this very moment is kept from losing it is told in `shards.touching`;
the other half of that is here: a blob is condemned first, looked at again, and removed last.

A save must not take longer than the grace from its first blob to its manifest: what it wrote at
the beginning looks abandoned from then on. Manifests are never removed here.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from batching.errors import FailedPrecondition, ServingError
from shards.checking import blobs_of
from shards.errors import BundleNotFound
from shards.folding import folded
from shards.shelves import Object, Shelf
from shards.store import Store
from shards.touching import BLOBS, CONDEMNED, DISREGARDED_S, TOUCHED, clock_of

__all__ = ["GRACE_S", "References", "Swept", "references_of", "sweep", "unreferenced"]

logger = logging.getLogger(__name__)

GRACE_S: Final = 24 * 3600.0

#: Blobs that are condemned together: their references are looked up once.
_BATCH: Final = 64

#: Name and version to the digests that its manifest refers to.
References: TypeAlias = Mapping[tuple[str, int], frozenset[str]]


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep found.

    Attributes:
        blobs: that are in the store.
        bytes: of them.
        removed: digests that were removed, or would be.
        removed_bytes: of them.
        young: unreferenced blobs that were kept because of the grace.
        spared: blobs that were about to be removed when somebody began to rely on them.
    """

    blobs: int
    bytes: int
    removed: tuple[str, ...]
    removed_bytes: int
    young: int
    spared: int


def unreferenced(
    blobs: Mapping[str, float],
    touched: Mapping[str, float],
    referenced: frozenset[str],
    now: float,
    grace_s: float,
) -> tuple[list[str], int]:
    """Which blobs may go.

    Args:
        blobs: digest to when it was written.
        touched: digest to when it was last relied upon.
        referenced: by manifests.
        now: by the same clock.
        grace_s: what is younger stays.

    Returns:
        Digests, and how many others stay for their youth alone.
    """
    loose = sorted(blobs.keys() - referenced)
    old = [
        digest
        for digest in loose
        if now - max(blobs[digest], touched.get(digest, blobs[digest])) >= grace_s
    ]
    return old, len(loose) - len(old)


def references_of(
    store: Store, known: References | None = None
) -> dict[tuple[str, int], frozenset[str]]:
    """What every manifest of a store refers to, and what was folded of it (`shards.folding`).

    Args:
        store: whose.
        known: what was found before; those versions are not read again.

    Raises:
        FailedPrecondition: a manifest cannot be read, so what it refers to is not known.
        Unavailable: the store does not answer.
    """
    found: dict[tuple[str, int], frozenset[str]] = dict(known or {})
    folds = [fold for fold in folded(store.shelf).values() if fold is not None]
    for name in store.servables():
        for version in store.versions(name):
            if (name, version) in found:
                continue
            try:
                refs = frozenset(blobs_of(store.read_manifest(name, version)))
            except BundleNotFound:
                continue  # deleted meanwhile
            except FailedPrecondition as error:
                raise _unknown(name, version, error) from None
            except ServingError as error:
                if error.code == "UNAVAILABLE":
                    raise
                raise _unknown(name, version, error) from None
            kept = {fold.blob.digest for fold in folds if fold.sources <= refs}
            found[name, version] = refs | kept
    return found


def sweep(
    shelf: Shelf,
    references: Callable[[References], References],
    *,
    grace_s: float = GRACE_S,
    placed: Iterable[tuple[str, int]] = (),
    dry_run: bool = False,
    monotonic: Callable[[], float] = time.monotonic,
) -> Swept:
    """Remove what nothing refers to.

    Args:
        shelf: the store's files.
        references: what manifests refer to; is given what it said before, for which it needs not
            look again.
        grace_s: what was written or touched within it stays.
        placed: versions that clusters hold. Where the manifest of one is gone, its blobs are not
            known.
        dry_run: only say what would go.
        monotonic: seconds of this process.

    Raises:
        FailedPrecondition: it is not known what something refers to; nothing was removed.
        Unavailable: the store does not answer; what was not removed yet stays.
    """
    now = clock_of(shelf)
    # Blobs before manifests: a blob that is written after this is not seen at all, and the
    # manifest of one that is seen may come at any time.
    blobs, touched, marks = _inventory(shelf)
    known = references({})
    if missing := sorted(set(placed) - known.keys()):
        names = ", ".join(f"{name}:{version}" for name, version in missing)
        raise FailedPrecondition(
            f"a cluster holds {names}, whose manifest is gone, so that its blobs are not known: "
            "nothing is swept until the cluster has let go of it (or say --force)"
        )
    victims, young = unreferenced(
        {digest: each.mtime_s for digest, each in blobs.items()},
        touched, _all(known), now, grace_s,
    )  # fmt: skip
    removed: list[str] = []
    if not dry_run:
        for mark in marks:
            if now - mark.mtime_s > DISREGARDED_S:  # of a sweep that died
                shelf.delete(mark.path)
        for at in range(0, len(victims), _BATCH):
            batch = _Batch(shelf, victims[at : at + _BATCH], monotonic)
            try:
                known = references(known)
                removed += batch.remove(_all(known), now, grace_s)
            finally:
                batch.release()
        for path, fold in folded(shelf).items():
            if fold is None or fold.blob.digest in removed:
                shelf.delete(path)
    gone = victims if dry_run else removed
    return Swept(
        blobs=len(blobs),
        bytes=sum(each.size for each in blobs.values()),
        removed=tuple(gone),
        removed_bytes=sum(blobs[digest].size for digest in gone),
        young=young,
        spared=len(victims) - len(gone),
    )


class _Batch:
    """Some blobs from being condemned to being removed, or not."""

    def __init__(
        self, shelf: Shelf, digests: Sequence[str], monotonic: Callable[[], float]
    ) -> None:
        self._shelf = shelf
        self._monotonic = monotonic
        # Of this sweep alone: no other sweep takes it away or makes it look younger.
        name = secrets.token_hex(8)
        self._marks = {digest: f"{CONDEMNED}/{digest}.{name}" for digest in digests}
        self._until = monotonic() + DISREGARDED_S / 2
        for mark in self._marks.values():
            shelf.write(mark, b"")

    def remove(self, referenced: frozenset[str], now: float, grace_s: float) -> list[str]:
        """Remove what still nobody relies on.

        Args:
            referenced: what was found after the blobs were condemned.
            now: when the sweep began, by the store's clock; earlier than in truth only spares.
            grace_s: what is younger stays.
        """
        removed = []
        for digest in self._marks:
            blob = self._shelf.stat(f"{BLOBS}/{digest}")
            touch = self._shelf.stat(f"{TOUCHED}/{digest}")
            last = max((each.mtime_s for each in (blob, touch) if each is not None), default=now)
            if blob is None or digest in referenced or now - last < grace_s:
                continue
            if self._monotonic() > self._until:
                logger.warning("the store is too slow to sweep safely: the rest stays")
                break
            self._shelf.delete(f"{BLOBS}/{digest}")
            self._shelf.delete(f"{TOUCHED}/{digest}")
            removed.append(digest)
        return removed

    def release(self) -> None:
        """Take the marks back."""
        for mark in self._marks.values():
            self._shelf.delete(mark)


def _inventory(shelf: Shelf) -> tuple[dict[str, Object], dict[str, float], list[Object]]:
    """Blobs and touches by digest, and the marks of sweeps."""
    found, _ = shelf.list("blobs")
    blobs = {each.path.rpartition("/")[2]: each for each in found if _is_in(BLOBS, each)}
    touched = {
        each.path.rpartition("/")[2]: each.mtime_s for each in found if _is_in(TOUCHED, each)
    }
    return blobs, touched, [each for each in found if _is_in(CONDEMNED, each)]


def _is_in(folder: str, each: Object) -> bool:
    return each.path.startswith(f"{folder}/")


def _all(references: References) -> frozenset[str]:
    return frozenset().union(*references.values())


def _unknown(name: str, version: int, error: ServingError) -> FailedPrecondition:
    return FailedPrecondition(
        f"it is not known what {name}:{version} refers to, so nothing is swept: {error.message}"
    )
