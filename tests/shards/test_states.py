"""A controller's durable state."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import pytest

from batching.errors import FailedPrecondition, InvalidArgument
from shards.local import LocalStore
from shards.store import Store
from tests.buckets import Bucket

#: Opens the store as another process would.
Opener: TypeAlias = Callable[[], Store]


@pytest.fixture(params=["directory", "bucket"])
def again(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    if request.param == "directory":
        return lambda: LocalStore(tmp_path / "store")
    bucket: Bucket = request.getfixturevalue("bucket")
    return lambda: bucket.store(tmp_path)


@pytest.fixture
def store(again: Opener) -> Store:
    return again()


def names(store: Store) -> set[str]:
    found, _ = store.shelf.list("_cluster/main")
    return {each.path.removeprefix("_cluster/main/") for each in found}


def test_a_cluster_without_state_has_none(store: Store) -> None:
    assert store.latest_state("main") is None


def test_the_highest_term_then_seq_wins(store: Store) -> None:
    for term, seq in ((1, 1), (1, 2), (1, 10), (2, 1), (10, 0)):
        store.put_state("main", term, seq, f"{term}.{seq}".encode())
        assert store.latest_state("main") == (term, seq, f"{term}.{seq}".encode())
    assert store.latest_state("other") is None


@pytest.mark.parametrize(("term", "seq"), [(1, 9), (2, 2), (2, 3), (0, 0)])
def test_an_earlier_or_other_state_is_refused(store: Store, term: int, seq: int) -> None:
    store.put_state("main", 2, 3, b"newest")
    with pytest.raises(FailedPrecondition, match=rf"{term}-{seq}.*2-3"):
        store.put_state("main", term, seq, b"late")
    assert store.latest_state("main") == (2, 3, b"newest")


def test_repeating_a_write_does_nothing(store: Store) -> None:
    store.put_state("main", 1, 1, b"same")
    store.put_state("main", 1, 1, b"same")
    assert store.latest_state("main") == (1, 1, b"same")


def test_of_controllers_that_write_one_number_at_most_one_succeeds(
    store: Store, again: Opener
) -> None:
    """In a directory one does; in a bucket all may give way, and another number comes next."""

    def write(writer: int) -> bool:
        try:
            again().put_state("main", 1, 1, str(writer).encode())
        except FailedPrecondition:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    if sum(won) or isinstance(store, LocalStore):
        assert sum(won) == 1
        assert store.latest_state("main") == (1, 1, str(won.index(True)).encode())
    store.put_state("main", 1, 2, b"next")
    assert store.latest_state("main") == (1, 2, b"next")


def test_the_last_eight_are_kept(store: Store) -> None:
    for seq in range(12):
        store.put_state("main", 3, seq, b"{}")
    assert names(store) == {f"3-{seq}.json" for seq in range(4, 12)}


def test_terms_grow_and_are_never_given_twice(store: Store, again: Opener) -> None:
    assert [store.next_term("main") for _ in range(3)] == [1, 2, 3]
    store.put_state("main", 40, 1, b"{}")
    assert store.next_term("main") == 41
    with ThreadPoolExecutor(4) as pool:
        terms = list(pool.map(lambda _: again().next_term("main"), range(6)))
    assert len(set(terms)) == 6
    assert min(terms) > 41


def test_who_died_over_a_claim_has_used_up_the_term(store: Store) -> None:
    store.shelf.write("_cluster/main/7.term.claim-0123456789abcdef", b"")
    assert store.next_term("main") == 8


def test_a_state_that_comes_after_a_higher_term_was_claimed_is_refused(
    store: Store, again: Opener
) -> None:
    first, second = again(), again()
    assert first.next_term("main") == 1
    first.put_state("main", 1, 0, b"first")
    assert second.next_term("main") == 2
    with pytest.raises(FailedPrecondition, match="claimed term 2"):
        first.put_state("main", 1, 1, b"late")
    second.put_state("main", 2, 0, b"second")
    assert store.latest_state("main") == (2, 0, b"second")


def test_foreign_files_are_not_states(store: Store) -> None:
    store.put_state("main", 1, 1, b"{}")
    for name in ("2-1.json.tmp", ".tmp-9-9.json", "03-1.json", "notes", "x-1.json"):
        store.shelf.write(f"_cluster/main/{name}", b"?")
    assert store.latest_state("main") == (1, 1, b"{}")


def test_names_and_numbers_are_checked(store: Store) -> None:
    with pytest.raises(InvalidArgument, match="name"):
        store.put_state("../main", 1, 1, b"")
    with pytest.raises(InvalidArgument, match="negative"):
        store.put_state("main", -1, 1, b"")
