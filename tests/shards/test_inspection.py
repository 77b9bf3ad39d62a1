"""Bundles described for people and scripts."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from shards.errors import BundleCorrupt
from shards.inspection import describe, render, verify
from shards.manifest import Manifest
from shards.store import LocalStore
from tests.shards.bundles import full_manifest


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


@pytest.fixture
def manifest(store: LocalStore) -> Manifest:
    manifest = full_manifest(store)
    store.write_manifest(manifest)
    return manifest


def test_a_description_is_plain_values(store: LocalStore, manifest: Manifest) -> None:
    described = describe(manifest, store)
    assert msgspec.json.decode(msgspec.json.encode(described)) == described
    assert (described["name"], described["version"]) == ("ranker", 1)
    assert described["store"] == store.url
    assert described["signatures"]["serving_default"] == {
        "method": "predict",
        "inputs": {"text": "string[b]"},
        "outputs": {"y": "float32[b,2] = 2:y"},
        "calls": ["0 = tokenize(text=in:text)", "1 = words(ids=0:ids)", "2 = trunk(x=1:rows)"],
        "labels": [],
    }


def test_units_are_described_with_identity_sizes_and_what_they_are(manifest: Manifest) -> None:
    units = describe(manifest)["units"]
    assert {name: unit["kind"] for name, unit in units.items()} == {
        "words": "table",
        "tokenize": "host",
        "trunk": "map",
    }
    assert {name: unit["id"] for name, unit in units.items()} == {
        name: unit.id for name, unit in manifest.units.items()
    }
    assert (units["words"]["rows"], units["words"]["partitions"]) == (10, [6, 4])
    assert units["words"]["bytes"] == 80
    assert units["tokenize"]["files"] == {"vocabulary": 10}
    assert units["trunk"]["parameter_bytes"] == 24
    assert units["trunk"]["platforms"] == ["cpu"]
    assert units["trunk"]["length_buckets"] == {"t": [8, 16]}


def test_shared_blobs_are_counted_once(manifest: Manifest) -> None:
    twice = msgspec.structs.replace(
        manifest, units={**manifest.units, "again": manifest.units["words"]}
    )
    assert describe(twice)["bytes"] == describe(manifest)["bytes"]


def test_the_text_names_everything_that_matters(store: LocalStore, manifest: Manifest) -> None:
    text = render(describe(manifest, store))
    for part in (
        "ranker version 1",
        store.url,
        "jax 0.10.2",
        "signature serving_default (predict)",
        "2 = trunk(x=1:rows)",
        f"unit words (table)  80 B  id {manifest.units['words'].id[:16]}",
        "partitions: 6, 4",
        "platforms: cpu",
        "batch buckets: 1, 8",
        "length buckets: t 8, 16",
        "entry point: some.module:load",
    ):
        assert part in text
    assert "donate" not in text  # nothing is donated


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 40, "1.0 TiB")]
)
def test_sizes_are_readable(manifest: Manifest, size: int, text: str) -> None:
    assert f"  {text} in " in render({**describe(manifest), "bytes": size})


def test_verify_says_how_much_was_sound(store: LocalStore, manifest: Manifest) -> None:
    described = describe(manifest)
    assert verify(store, "ranker", 1) == {
        "name": "ranker", "version": 1, "blobs": 5, "bytes": described["bytes"],
    }  # fmt: skip
    path = next((store.path / "blobs" / "blake3").iterdir())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    path.write_bytes(data)
    with pytest.raises(BundleCorrupt, match=path.name):
        verify(store, "ranker", 1)
