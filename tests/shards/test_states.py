"""A controller's durable state."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from batching.errors import FailedPrecondition, InvalidArgument
from shards.store import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def names(store: LocalStore) -> set[str]:
    return set(os.listdir(store.path / "_cluster" / "main"))


def test_a_cluster_without_state_has_none(store: LocalStore) -> None:
    assert store.latest_state("main") is None


def test_the_highest_term_then_seq_wins(store: LocalStore) -> None:
    for term, seq in ((1, 1), (1, 2), (1, 10), (2, 1), (10, 0)):
        store.put_state("main", term, seq, f"{term}.{seq}".encode())
        assert store.latest_state("main") == (term, seq, f"{term}.{seq}".encode())
    assert store.latest_state("other") is None


@pytest.mark.parametrize(("term", "seq"), [(1, 9), (2, 2), (2, 3), (0, 0)])
def test_an_earlier_or_other_state_is_refused(store: LocalStore, term: int, seq: int) -> None:
    store.put_state("main", 2, 3, b"newest")
    with pytest.raises(FailedPrecondition, match=rf"{term}-{seq}.*2-3"):
        store.put_state("main", term, seq, b"late")
    assert store.latest_state("main") == (2, 3, b"newest")


def test_repeating_a_write_does_nothing(store: LocalStore) -> None:
    store.put_state("main", 1, 1, b"same")
    store.put_state("main", 1, 1, b"same")
    assert store.latest_state("main") == (1, 1, b"same")


def test_of_two_controllers_that_write_one_number_one_is_refused(store: LocalStore) -> None:
    def write(writer: int) -> bool:
        try:
            LocalStore(store.path).put_state("main", 1, 1, str(writer).encode())
        except FailedPrecondition:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    assert sum(won) == 1
    assert store.latest_state("main") == (1, 1, str(won.index(True)).encode())


def test_the_last_eight_are_kept(store: LocalStore) -> None:
    for seq in range(12):
        store.put_state("main", 3, seq, b"{}")
    assert names(store) == {f"3-{seq}.json" for seq in range(4, 12)}


def test_terms_grow_and_are_never_given_twice(store: LocalStore) -> None:
    assert [store.next_term("main") for _ in range(3)] == [1, 2, 3]
    store.put_state("main", 40, 1, b"{}")
    assert store.next_term("main") == 41
    with ThreadPoolExecutor(8) as pool:
        terms = list(pool.map(lambda _: LocalStore(store.path).next_term("main"), range(12)))
    assert sorted(terms) == list(range(42, 54))


def test_foreign_files_are_not_states(store: LocalStore) -> None:
    store.put_state("main", 1, 1, b"{}")
    for name in ("2-1.json.tmp", ".tmp-9-9.json", "03-1.json", "notes", "x-1.json"):
        (store.path / "_cluster" / "main" / name).write_bytes(b"?")
    assert store.latest_state("main") == (1, 1, b"{}")


def test_names_and_numbers_are_checked(store: LocalStore) -> None:
    with pytest.raises(InvalidArgument, match="name"):
        store.put_state("../main", 1, 1, b"")
    with pytest.raises(InvalidArgument, match="negative"):
        store.put_state("main", -1, 1, b"")
