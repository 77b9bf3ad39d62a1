"""What actors are started with follows from what is declared."""

from __future__ import annotations

import pytest

from cluster.actor_specs import actor_spec
from cluster.config import parse
from cluster.specs import ControllerSpec
from shards.orders import ActorKind

CONTROLLER = ControllerSpec(cluster="c", store="s", directory="/run", cache_directory="/cache")


@pytest.mark.parametrize(("kind", "mebibytes"), [("device", 1), ("shard", 2), ("host", 3)])
def test_every_kind_has_the_memory_that_is_declared_for_it(kind: ActorKind, mebibytes: int) -> None:
    text = "{device_memory: 1MiB, shard_memory: 2MiB, host_memory: 3MiB}"
    spec = actor_spec(parse(f"store: s\ncluster: {text}").cluster, CONTROLLER, "a-0", kind)
    assert (spec.name, spec.kind, spec.capacity_bytes) == ("a-0", kind, mebibytes << 20)


def test_how_batches_are_chosen_reaches_the_actor_in_seconds() -> None:
    text = "store: s\ncluster: {batching: {policy: effsafe, guard_ms: 20, credit_ms: 50}}"
    spec = actor_spec(parse(text).cluster, CONTROLLER, "device-0", "device")
    assert (spec.policy, spec.guard_s, spec.credit_s) == ("effsafe", 0.02, 0.05)


def test_what_is_not_declared_is_left_to_the_policy() -> None:
    spec = actor_spec(parse("store: s").cluster, CONTROLLER, "device-0", "device")
    assert (spec.policy, spec.guard_s, spec.credit_s) == ("effsafe", None, None)
    assert spec.blob_cache == "/cache/blobs"


def test_what_the_process_is_told_reaches_the_actor() -> None:
    cluster = parse("store: s").cluster
    spec = actor_spec(cluster, CONTROLLER, "device-0", "device", platforms="", log="DEBUG")
    assert (spec.platforms, spec.log) == ("", "DEBUG")
