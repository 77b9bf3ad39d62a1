"""A sweep takes what nothing needs, and never what something does."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from batching.errors import FailedPrecondition
from shards.checking import blobs_of
from shards.local import LocalStore
from shards.store import Store
from shards.sweeping import References, references_of, sweep, unreferenced
from shards.touching import BLOBS, CONDEMNED, DISREGARDED_S, TOUCHED, is_there
from tests.buckets import Bucket
from tests.shards.bundles import full_manifest
from tests.shards.shelf import MemoryShelf, Worker, turn

GRACE_S: Final = 1000.0


@pytest.mark.parametrize(
    ("blob", "touch", "referenced", "goes", "why"),
    [
        (0.0, None, False, True, "what nothing refers to goes"),
        (0.0, None, True, False, "what a manifest refers to stays"),
        (0.1, None, False, False, "what is young stays"),
        (0.0, 0.1, False, False, "what was touched lately stays"),
        (0.0, -1.0, False, True, "what was touched long ago goes"),
        (GRACE_S * 2, None, False, False, "what seems to come from the future stays"),
    ],
)
def test_what_may_go(
    blob: float, touch: float | None, referenced: bool, goes: bool, why: str
) -> None:
    touched = {} if touch is None else {"a": touch}
    old, young = unreferenced(
        {"a": blob}, touched, frozenset("a" if referenced else ""), GRACE_S, GRACE_S
    )
    assert (old == ["a"]) is goes, why
    assert young == (not goes and not referenced)


# --- a store -------------------------------------------------------------------------------------


@pytest.fixture(params=["directory", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "directory":
        return LocalStore(tmp_path / "store")
    bucket: Bucket = request.getfixturevalue("bucket")
    return bucket.store(tmp_path)


def blobs(store: Store) -> set[str]:
    return {each.path.rpartition("/")[2] for each in store.shelf.list(BLOBS)[0]}


def swept(store: Store, *, grace_s: float = -3600.0, **of: object) -> set[str]:
    """With a grace in the past nothing is young."""
    found = sweep(
        store.shelf,
        lambda known: references_of(store, known),
        grace_s=grace_s,
        **of,  # type: ignore[arg-type]
    )
    return set(found.removed)


def test_a_store_loses_what_no_manifest_refers_to_and_nothing_else(store: Store) -> None:
    manifest = full_manifest(store)
    store.write_manifest(manifest)
    loose = {store.put(data).digest for data in (b"loose", b"looser")}
    kept = set(blobs_of(manifest))
    assert swept(store, grace_s=3600.0) == set()
    assert swept(store, dry_run=True) == loose
    assert blobs(store) == kept | loose
    assert swept(store) == loose
    assert blobs(store) == kept
    assert store.shelf.list(CONDEMNED)[0] == []
    store.verify("ranker", 1)
    store.shelf.delete("ranker/1/servable.json")
    assert swept(store) == kept
    assert blobs(store) == set()


def test_a_blob_that_a_save_found_there_is_young_again(store: Store) -> None:
    ref = store.put(b"reused")
    assert store.shelf.stat(f"{TOUCHED}/{ref.digest}") is None
    if isinstance(store, LocalStore):
        os.utime(store.path / BLOBS / ref.digest, (0, 0))
    store.put(b"reused")
    assert store.shelf.stat(f"{TOUCHED}/{ref.digest}") is not None
    assert swept(store, grace_s=3600.0) == set()


@pytest.mark.parametrize("data", [b"{", b'{"schema": 999}', b"{}"])
def test_where_a_manifest_cannot_be_understood_nothing_goes(store: Store, data: bytes) -> None:
    store.put(b"loose")
    store.shelf.write("strange/1/servable.json", data)
    with pytest.raises(FailedPrecondition, match="strange:1"):
        swept(store)
    assert len(blobs(store)) == 1


def test_where_a_placed_version_has_lost_its_manifest_nothing_goes(store: Store) -> None:
    store.write_manifest(full_manifest(store))
    store.put(b"loose")
    with pytest.raises(FailedPrecondition, match="ranker:2"):
        swept(store, placed=[("ranker", 1), ("ranker", 2)])
    assert len(swept(store, placed=[("ranker", 1)])) == 1


def test_marks_of_a_sweep_that_died_are_cleared_and_meanwhile_disregarded() -> None:
    shelf = MemoryShelf()
    shelf.write(f"{BLOBS}/a", b"a")
    shelf.write(f"{CONDEMNED}/a.dead", b"")
    shelf.now += DISREGARDED_S + 1
    assert is_there(shelf, "a", lambda: True)
    sweep(shelf, lambda known: known, grace_s=GRACE_S)
    assert shelf.list(CONDEMNED)[0] == []


# --- everything at once --------------------------------------------------------------------------


class Scene:
    """A blob that was left over long ago, saves that rely on it, and sweeps."""

    def __init__(self) -> None:
        self.shelf = MemoryShelf()
        self.shelf.write(f"{BLOBS}/a", b"blob")
        self.shelf.now += GRACE_S
        self.workers: list[Worker] = []

    def save(self) -> Worker:
        return self._begin(lambda: save(self.shelf, "a", 1))

    def sweep(self) -> Worker:
        return self._begin(lambda: swept_in_memory(self.shelf))

    def _begin(self, work: Callable[[], object]) -> Worker:
        self.workers.append(Worker("", work))
        return self.workers[-1]

    def ends_well(self) -> bool:
        """Let everybody finish; whether what was saved is all there."""
        for _ in range(200):  # who waits for another makes no headway by itself
            for worker in self.workers:
                worker.step()
        assert all(worker.is_done and worker.error is None for worker in self.workers)
        return "m/1" in self.shelf.files and f"{BLOBS}/a" in self.shelf.files


def save(shelf: MemoryShelf, digests: Iterable[str], version: int) -> None:
    for digest in digests:
        path = f"{BLOBS}/{digest}"
        if not is_there(shelf, digest, lambda path=path: shelf.stat(path) is not None):  # type: ignore[misc]
            shelf.write(path, b"blob")
    shelf.create_exclusively(f"m/{version}", "".join(digests).encode())


def swept_in_memory(shelf: MemoryShelf, monotonic: Callable[[], float] | None = None) -> None:
    def references(known: References) -> References:
        found = dict(known)
        for each in shelf.list("m")[0]:
            try:
                digests = frozenset(shelf.read(each.path, 100).decode())
            except FileNotFoundError:
                continue
            found["m", int(each.path.rpartition("/")[2])] = digests
        return found

    sweep(shelf, references, grace_s=GRACE_S, monotonic=monotonic or (lambda: shelf.now))


@pytest.fixture
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.touching.pause", lambda _: turn())


#: More than a save or a sweep of one blob takes, unless it waits.
STEPS: Final = range(18)


@pytest.mark.usefixtures("_no_waiting")
@pytest.mark.parametrize("stall_s", [0.0, DISREGARDED_S * 0.9], ids=["brisk", "stalling"])
def test_a_save_beside_a_sweep_loses_nothing_wherever_they_cross(stall_s: float) -> None:
    """Every way in which they give way to each other up to three times."""
    for i, j, k in itertools.product(STEPS, STEPS, (0, 1, 4, 9)):
        scene = Scene()
        sweeping, saving = scene.sweep(), scene.save()
        sweeping.step(i)
        scene.shelf.now += stall_s
        saving.step(j)
        sweeping.step(k)
        assert scene.ends_well(), (i, j, k)


@pytest.mark.usefixtures("_no_waiting")
def test_a_sweep_that_stalls_for_longer_than_its_marks_count_removes_nothing_more() -> None:
    """But for the one removal before which it has looked at the clock already."""
    lost = []
    for i in STEPS:
        scene = Scene()
        sweeping, saving = scene.sweep(), scene.save()
        sweeping.step(i)
        scene.shelf.now += DISREGARDED_S + 1
        saving.step(100)
        assert saving.is_done, i
        lost += [] if scene.ends_well() else [i]
    assert len(lost) <= 1


@pytest.mark.usefixtures("_no_waiting")
def test_a_save_beside_two_sweeps_loses_nothing_wherever_they_cross() -> None:
    for i, j in itertools.product(STEPS, STEPS):
        scene = Scene()
        first, second, saving = scene.sweep(), scene.sweep(), scene.save()
        first.step(i)
        second.step(100)
        saving.step(j)
        assert scene.ends_well(), (i, j)


class Sweep(Worker):
    """A sweep, and when it looked at the clock, if that was in its last step."""

    def __init__(self, shelf: MemoryShelf) -> None:
        self.looked_at: float | None = None

        def now() -> float:
            self.looked_at = shelf.now
            return shelf.now

        super().__init__("sweep", lambda: swept_in_memory(shelf, now))

    def step(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.looked_at = None
            super().step()


class Beside(RuleBasedStateMachine):
    """Saves, sweeps and deletions of versions, interleaved at every look into the store.

    Saves of the same few blobs, of which any may be left over from earlier ones; sweeps several
    at a time; either may stand still for long, or die. A save lasts no longer than the grace, and
    between a look at the clock and the one removal after it no sweep stands still for longer than
    `shards.touching` allows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shelf = MemoryShelf()
        self.saves: list[Worker] = []
        self.sweeps: list[Sweep] = []
        self.versions = 0
        self.saved_since = 0.0
        # Left over from versions that were deleted long ago.
        for digest in "ab":
            self.shelf.write(f"{BLOBS}/{digest}", b"blob")
        self.shelf.now += GRACE_S

    @rule(digests=st.sets(st.sampled_from("abc"), min_size=1, max_size=2))
    @precondition(lambda self: len(self.saves) < 2)
    def begin_save(self, digests: set[str]) -> None:
        self.versions += 1
        version = self.versions
        if not self.saves:
            self.saved_since = self.shelf.now

        self.saves.append(
            Worker(f"save {version}", lambda: save(self.shelf, sorted(digests), version))
        )

    @rule()
    @precondition(lambda self: len(self.sweeps) < 2)
    def begin_sweep(self) -> None:
        self.sweeps.append(Sweep(self.shelf))

    @rule(turns=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), min_size=1, max_size=20))
    @precondition(lambda self: self.saves or self.sweeps)
    def go_on(self, turns: list[tuple[int, int]]) -> None:
        workers = [*self.saves, *self.sweeps]
        for which, steps in turns:
            for _ in range(steps):
                workers[which % len(workers)].step()
                self.nothing_is_lost()
        self._bury()

    @rule(which=st.integers(0, 3))
    @precondition(lambda self: self.saves or self.sweeps)
    def die(self, which: int) -> None:
        workers = [*self.saves, *self.sweeps]
        workers[which % len(workers)].kill()
        self._bury()

    @rule(which=st.integers(0, 9))
    @precondition(lambda self: self.shelf.list("m")[0])
    def delete_version(self, which: int) -> None:
        manifests = [each.path for each in self.shelf.list("m")[0]]
        self.shelf.delete(manifests[which % len(manifests)])

    @rule(seconds=st.sampled_from([1.0, 100.0, DISREGARDED_S, GRACE_S + 1]))
    def time_passes(self, seconds: float) -> None:
        then = self.shelf.now + seconds
        looked_at = [each.looked_at for each in self.sweeps if each.looked_at is not None]
        if self.saves and then - self.saved_since >= GRACE_S:
            return
        if all(then - at <= DISREGARDED_S / 2 for at in looked_at):
            self.shelf.now = then

    @invariant()
    def nothing_is_lost(self) -> None:
        files = self.shelf.files
        for path, (data, _) in files.items():
            if path.startswith("m/"):
                missing = [digest for digest in data.decode() if f"{BLOBS}/{digest}" not in files]
                assert not missing, (path, missing)

    def teardown(self) -> None:
        for worker in (*self.saves, *self.sweeps):
            worker.kill()

    def _bury(self) -> None:
        for worker in (*self.saves, *self.sweeps):
            assert worker.error is None, worker.error
        self.saves = [worker for worker in self.saves if not worker.is_done]
        self.sweeps = [worker for worker in self.sweeps if not worker.is_done]


Beside.TestCase.settings = settings(max_examples=200, stateful_step_count=12, deadline=None)


class TestBeside(Beside.TestCase):  # type: ignore[misc, valid-type]
    @pytest.fixture(autouse=True)
    def _no_waiting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("shards.touching.pause", lambda _: turn())
