"""What a status tells of units that several versions use: where, how much, by whom."""

from __future__ import annotations

from typing import Any

import msgspec

from cluster.config import VersionPolicy
from cluster.control import ActorUp
from shards.identity import table_identity
from shards.manifest import Manifest, Overlay
from shards.orders import UnitState
from tests.cluster.control_fakes import (
    Shell,
    begun,
    blob,
    config,
    host_unit,
    manifest,
    map_unit,
    report,
    table_unit,
)
from tests.cluster.test_references import STABLE, encoder, ranker, serving

ALL = VersionPolicy(all=True)


def shared(shell: Shell) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = shell.core.status()["shared"]
    return found


def two(*models: Manifest, **of_config: Any) -> Shell:
    """A shell that serves one version of several servables."""
    shell = begun(config(*dict.fromkeys(each.name for each in models), policy=ALL, **of_config))
    for each in models:
        shell.serve(each.name, each.version, each)
    return shell


def test_a_trunk_of_two_servables_is_told_once_with_both() -> None:
    shell = two(
        manifest("a", 1, trunk=map_unit("t", 40), head=map_unit("a-head")),
        manifest("b", 1, body=map_unit("t", 40), head=map_unit("b-head")),
    )
    assert shared(shell) == [
        {
            "where": "device-0", "kind": "device", "bytes": 40, "refs": 2,
            "users": ["a:1/trunk", "b:1/body"],
        }
    ]  # fmt: skip


def test_what_one_alone_has_is_not_told() -> None:
    assert shared(two(manifest("a", 1), manifest("b", 1))) == []


def test_a_user_counts_from_when_it_is_loaded_until_it_is_gone() -> None:
    shell = begun(config("a", "b"))
    trunk = map_unit("t", 40)
    shell.serve("a", 1, manifest("a", 1, trunk=trunk))
    assert shared(shell) == []
    shell.serve("b", 1, manifest("b", 1, trunk=trunk))
    assert [row["refs"] for row in shared(shell)] == [2]
    shell.lost("device-0")
    assert shared(shell) == []


def test_partitions_count_once_a_node_however_many_actors_have_them() -> None:
    table = table_unit("w", [8, 24])
    models = [manifest(name, 1, words=table) for name in ("a", "b")]
    shell = two(*models, devices=0, shards=2)
    assert shared(shell) == [
        {"where": "n1", "kind": "shard", "bytes": 32, "refs": 2,
         "users": ["a:1/words", "b:1/words"]}
    ]  # fmt: skip


def test_files_of_host_units_are_told_by_node() -> None:
    shell = two(
        *(manifest(name, 1, text=host_unit("h", 7)) for name in ("a", "b")), devices=0, hosts=1
    )
    assert [(row["where"], row["kind"], row["bytes"]) for row in shared(shell)] == [
        ("n1", "host", 7)
    ]


def test_versions_that_differ_in_overlays_share_the_base() -> None:
    base = table_unit("w", [40])
    over = msgspec.structs.replace(base.partitions[0], overlays=(Overlay(rows=1, blob=blob(9)),))
    base = msgspec.structs.replace(base, id=table_identity("float32", 1, base.partitions))
    changed = msgspec.structs.replace(base, id="changed", partitions=(over,))
    shell = two(manifest("a", 1, words=base), manifest("a", 2, words=changed), devices=0)
    assert [(row["bytes"], row["users"]) for row in shared(shell)] == [
        (40, ["a:1/words", "a:2/words"])
    ]


def test_who_refers_to_a_unit_uses_it() -> None:
    shell = serving([encoder(3), ranker(STABLE)], encoder={"stable": 3}, ranker={})
    assert [(row["refs"], row["users"]) for row in shared(shell)] == [
        (2, ["encoder:3/trunk", "ranker:1/trunk"])
    ]


def test_a_device_says_how_large_a_unit_really_is() -> None:
    trunk = map_unit("t", 40)
    shell = two(manifest("a", 1, trunk=trunk), manifest("b", 1, trunk=trunk))
    told = report("device-0", loaded=[("a", 1), ("b", 1)])
    state = UnitState(id="t", users=("a:1", "b:1"), nbytes=100, batch_max=1)
    shell.send(ActorUp(report=msgspec.structs.replace(told, units=(state,))))
    assert [row["bytes"] for row in shared(shell)] == [100]
