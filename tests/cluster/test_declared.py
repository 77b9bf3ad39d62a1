"""Durable state: what is read is what was written, and only one controller writes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from batching.errors import DataLoss, FailedPrecondition
from cluster.config import parse
from cluster.declared import DeclaredState, Placed, StateStore, claim, decode, encode, write
from cluster.traffic import Rollout, Shadow
from shards.store import LocalStore

CONFIG = parse("store: s\nservables: [{name: m, policy: {specific: [1, 2]}}]")
STATE = DeclaredState(
    term=3,
    seq=4,
    config=CONFIG,
    placements=(
        Placed(
            servable="m",
            version=2,
            available=True,
            units={"trunk": (("device-0", "device-1"),), "words": (("shard-0",), ("shard-1",))},
        ),
    ),
    rollouts={"m": Rollout(labels={"a": 1}, split={"a": 9, "2": 1}, shadow=Shadow(to="2"))},
)


class Memory:
    """A store of states that behaves as `StateStore` says."""

    def __init__(self) -> None:
        self.states: dict[tuple[int, int], bytes] = {}
        self.term = 0

    def put_state(self, cluster: str, term: int, seq: int, data: bytes) -> None:
        if self.states and (term, seq) <= max(self.states):
            raise FailedPrecondition("a later state is there")
        self.states[term, seq] = data

    def latest_state(self, cluster: str) -> tuple[int, int, bytes] | None:
        return (*max(self.states), self.states[max(self.states)]) if self.states else None

    def next_term(self, cluster: str) -> int:
        self.term = max((self.term, *(term for term, _ in self.states))) + 1
        return self.term


@pytest.fixture(params=["memory", "local"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> StateStore:
    return Memory() if request.param == "memory" else LocalStore(tmp_path)


def test_what_is_read_is_what_was_written() -> None:
    assert decode(encode(STATE)) == STATE
    assert decode(encode(DeclaredState(term=1, seq=0))) == DeclaredState(term=1, seq=0)


def test_a_state_from_before_there_were_rollouts_has_none() -> None:
    document = {**json.loads(encode(STATE)), "schema": 1}
    del document["rollouts"]
    assert decode(json.dumps(document).encode()) == dataclasses.replace(STATE, rollouts={})


def test_a_state_from_before_tables_were_made_even_is_of_a_cluster_at_rest() -> None:
    document = {**json.loads(encode(STATE)), "schema": 3}
    del document["rebalancing"]
    for placed in document["placements"]:
        del placed["shift"]
    assert decode(json.dumps(document).encode()) == STATE


def test_equal_states_are_equal_bytes() -> None:
    assert encode(STATE) == encode(decode(encode(STATE)))


def test_a_person_can_read_it() -> None:
    document = json.loads(encode(STATE))
    assert document["config"]["servables"][0]["name"] == "m"
    assert document["placements"][0]["units"]["words"] == [["shard-0"], ["shard-1"]]


def test_a_newer_schema_is_refused_with_both_numbers() -> None:
    document = {**json.loads(encode(STATE)), "schema": 5}
    with pytest.raises(FailedPrecondition, match="has schema 5, this software reads up to 4"):
        decode(json.dumps(document).encode())


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"{}", b"null", b'{"schema": "1"}', b"\xff", encode(STATE)[:-40],
        encode(STATE).replace(b'"available"', b'"availible"'),
        encode(STATE).replace(b'"store"', b'"stre"'),
        encode(STATE).replace(b'"placements"', b'"placement"'),
    ],
)  # fmt: skip
def test_bytes_that_are_not_a_state_are_data_loss(data: bytes) -> None:
    with pytest.raises(DataLoss):
        decode(data)


def test_the_first_reign_begins_with_nothing(store: StateStore) -> None:
    assert claim(store, "c") == DeclaredState(term=1, seq=0)


def test_the_next_reign_inherits_the_highest_state(store: StateStore) -> None:
    first = claim(store, "c")
    for seq in (1, 2):
        write(store, "c", DeclaredState(term=first.term, seq=seq, config=CONFIG))
    write(store, "c", DeclaredState(term=first.term, seq=3, placements=STATE.placements))
    second = claim(store, "c")
    assert second == DeclaredState(term=2, seq=0, placements=STATE.placements)


def test_a_controller_of_a_lower_term_is_refused_once_another_has_begun(
    store: StateStore,
) -> None:
    first = claim(store, "c")
    second = claim(store, "c")
    with pytest.raises(FailedPrecondition):
        write(store, "c", DeclaredState(term=first.term, seq=99))
    write(store, "c", DeclaredState(term=second.term, seq=1))


def test_the_same_number_cannot_mean_two_things(store: StateStore) -> None:
    state = claim(store, "c")
    write(store, "c", DeclaredState(term=state.term, seq=1))
    with pytest.raises(FailedPrecondition):
        write(store, "c", DeclaredState(term=state.term, seq=1, config=CONFIG))


def test_a_reign_does_not_begin_on_a_state_that_cannot_be_read(store: StateStore) -> None:
    store.put_state("c", 1, 0, b"{}")
    with pytest.raises(DataLoss):
        claim(store, "c")


def test_a_state_under_another_number_is_not_believed(store: StateStore) -> None:
    store.put_state("c", 9, 9, encode(STATE))
    with pytest.raises(DataLoss, match="state 9-9 of cluster 'c' says that it is 3-4"):
        claim(store, "c")
