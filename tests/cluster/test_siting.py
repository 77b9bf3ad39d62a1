"""Where actors are started, by example."""

from __future__ import annotations

import pytest

from cluster.siting import emptiest
from shards.orders import ActorKind


def sited(kinds: list[ActorKind], nodes: list[str]) -> dict[str, list[str]]:
    """Start actors one after the other; node to the kinds on it."""
    actors: list[tuple[ActorKind, str]] = []
    for kind in kinds:
        actors.append((kind, emptiest(nodes, kind, actors)))
    return {node: [kind for kind, where in actors if where == node] for node in nodes}


def test_two_shards_take_two_nodes_whatever_else_is_started() -> None:
    assert sited(["device", "host", "shard", "shard"], ["a", "b"]) == {
        "a": ["device", "shard"],
        "b": ["host", "shard"],
    }


def test_four_shards_lie_evenly_over_three_nodes() -> None:
    found = sited(["shard"] * 4, ["a", "b", "c"])
    assert sorted(len(kinds) for kinds in found.values()) == [1, 1, 2]


def test_actors_of_nodes_that_are_gone_do_not_count() -> None:
    assert emptiest(["b"], "shard", [("shard", "a"), ("shard", "b")]) == "b"


def test_equal_nodes_are_taken_by_name() -> None:
    assert emptiest(["c", "a", "b"], "shard", []) == "a"


def test_there_must_be_a_node() -> None:
    with pytest.raises(AssertionError):
        emptiest([], "shard", [])
