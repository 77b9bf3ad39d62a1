"""The hash-map servable: installed by pip, saved, hosted on shard actors, asked over HTTP."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import shards
from cluster.config import parse
from cluster.registered import listed
from cluster.versions import aspired
from shards.store import LocalStore
from tests.cluster.serving import Cluster
from tests.plugins import EXAMPLES, importable, install

VALUES = {f"key-{n}": [float(n), -float(n)] for n in range(200)}


@pytest.fixture(scope="module")
def hashmap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The installed module, which is where its entry points say it is."""
    target = install(EXAMPLES / "hashmap", tmp_path_factory.mktemp("hashmap"))
    with importable(target, "hashmap_servable"):
        yield importlib.import_module("hashmap_servable")


@pytest.fixture(scope="module")
def cluster(hashmap: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    hashmap.save_map(folder / "store", "map", VALUES, partitions=5)
    hashmap.save_map(folder / "store", "strict", VALUES, partitions=3, missing="error")
    hashmap.save_map(folder / "store", "whole", VALUES)
    cluster = Cluster(folder / "store", folder, shards=2)
    try:
        for name in ("map", "strict", "whole"):
            cluster.load(name, 1)
        cluster.publish()
        yield cluster
    finally:
        cluster.close()


def predict(cluster: Cluster, servable: str, *keys: str) -> Any:
    return cluster.ask(f"/v1/models/{servable}:predict", json.dumps({"instances": list(keys)}))


@pytest.mark.parametrize("servable", ["map", "strict", "whole"])
def test_every_key_is_answered_with_its_own_vector(cluster: Cluster, servable: str) -> None:
    answer = predict(cluster, servable, *VALUES)
    assert answer.status == 200, answer.body
    expected = [{"values": vector, "found": True} for vector in VALUES.values()]
    assert answer.json["predictions"] == expected


@pytest.mark.parametrize("servable", ["map", "whole"])
def test_a_key_that_no_partition_has_is_said_to_be_missing(cluster: Cluster, servable: str) -> None:
    answer = predict(cluster, servable, "nobody", "key-7")
    assert answer.json["predictions"] == [
        {"values": [0.0, 0.0], "found": False},
        {"values": [7.0, -7.0], "found": True},
    ]


def test_the_error_of_one_partition_is_the_answer(cluster: Cluster) -> None:
    answer = predict(cluster, "strict", "key-1", "nobody")
    assert answer.status == 400
    assert answer.error == "no such key: b'nobody'"


def test_a_map_says_what_it_is(hashmap: Any, tmp_path: Path) -> None:
    manifest = hashmap.save_map(tmp_path, "map", VALUES, partitions=5)
    described = shards.describe(manifest)
    unit = described["units"]["map"]
    assert (unit["kind"], unit["combine"], len(unit["partitions"])) == (
        "hashmap", "whoever-knows", 5,
    )  # fmt: skip


def test_the_same_values_are_the_same_unit(hashmap: Any, tmp_path: Path) -> None:
    ids = {
        hashmap.save_map(tmp_path / str(n), "map", VALUES, partitions=n % 2 + 1).units["map"].id
        for n in range(4)
    }
    assert len(ids) == 2


def test_a_policy_of_the_package_chooses_versions(hashmap: Any) -> None:
    config = parse(
        "store: s\nservables:\n- name: map\n"
        "  policy: {registered: {name: at-most, options: {version: 5}}}\n"
    )
    assert aspired(config.servables[0].policy, [1, 4, 7]) == (4,)


def test_a_source_of_the_package_names_versions(hashmap: Any, tmp_path: Path) -> None:
    (tmp_path / "released").write_text("map 3\nother 9\n\nmap 5\n")
    config = parse(
        "store: s\nservables:\n- name: map\n"
        f"  source: {{name: released, options: {{file: {tmp_path / 'released'}}}}}\n"
    )
    assert listed("map", config.servables[0].source, LocalStore(tmp_path)) == (3, 5)


def test_the_example_is_as_small_as_its_how_to_says() -> None:
    files = [EXAMPLES / "hashmap" / name for name in ("hashmap_servable.py", "pyproject.toml")]
    assert sum(len(file.read_text().splitlines()) for file in files) < 200
