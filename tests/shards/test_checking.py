"""A manifest held against itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from shards.checking import blobs_of, check_manifest, decode_manifest, encode_manifest
from shards.errors import BundleCorrupt
from shards.manifest import BlobRef, HostUnit, Leaf, Manifest, MapUnit, Node, TableUnit
from shards.specs import Spec
from shards.store import LocalStore
from tests.shards.bundles import full_manifest

replace = msgspec.structs.replace


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return full_manifest(LocalStore(tmp_path))


def with_trunk(manifest: Manifest, **changes: object) -> Manifest:
    trunk = manifest.units["trunk"]
    assert isinstance(trunk, MapUnit)
    return replace(manifest, units={**manifest.units, "trunk": replace(trunk, **changes)})


def with_words(manifest: Manifest, **changes: object) -> Manifest:
    words = manifest.units["words"]
    assert isinstance(words, TableUnit)
    return replace(manifest, units={**manifest.units, "words": replace(words, **changes)})


def with_leaf(manifest: Manifest, **changes: object) -> Manifest:
    trunk = manifest.units["trunk"]
    assert isinstance(trunk, MapUnit)
    return with_trunk(manifest, params=(replace(trunk.params[0], **changes), *trunk.params[1:]))


def with_signature(manifest: Manifest, **changes: object) -> Manifest:
    signature = replace(manifest.signatures["serving_default"], **changes)
    return replace(manifest, signatures={"serving_default": signature})


def with_partition(manifest: Manifest, index: int, **changes: object) -> Manifest:
    words = manifest.units["words"]
    assert isinstance(words, TableUnit)
    parts = list(words.partitions)
    parts[index] = replace(parts[index], **changes)
    return with_words(manifest, partitions=tuple(parts))


def with_entry_point(manifest: Manifest, entry_point: str) -> Manifest:
    host = manifest.units["tokenize"]
    assert isinstance(host, HostUnit)
    return replace(
        manifest, units={**manifest.units, "tokenize": replace(host, entry_point=entry_point)}
    )


def test_a_consistent_manifest_survives_the_way_through_json(manifest: Manifest) -> None:
    assert decode_manifest(encode_manifest(manifest), "here") == manifest


def test_every_blob_is_listed_once(manifest: Manifest) -> None:
    twice = replace(manifest, units={**manifest.units, "again": manifest.units["words"]})
    assert list(blobs_of(twice)) == list(blobs_of(manifest))
    assert len(blobs_of(manifest)) == 5


OUTSIDE = BlobRef(digest="../../../etc/passwd", size=8)

BREAKS: dict[str, tuple[Callable[[Manifest], Manifest], str]] = {
    "no signature": (lambda m: replace(m, signatures={}), "no signature"),
    "a digest that is a path": (lambda m: with_leaf(m, blob=OUTSIDE), "is not a blob"),
    "a negative size": (
        lambda m: with_leaf(m, blob=BlobRef(digest="0" * 64, size=-1)), "is not a blob"
    ),
    "a leaf past its blob": (lambda m: with_leaf(m, offset=64), "parameter 0 does not fit"),
    "a leaf off its grid": (lambda m: with_leaf(m, shape=(1,), offset=4), "does not fit"),
    "a leaf before its blob": (lambda m: with_leaf(m, offset=-64), "does not fit"),
    "a leaf of negative size": (lambda m: with_leaf(m, shape=(-2, -2)), "does not fit"),
    "a leaf of no dtype": (lambda m: with_leaf(m, dtype="float8"), "parameter 0"),
    "a leaf of strings": (lambda m: with_leaf(m, dtype="string", shape=(1,)), "does not fit"),
    "no program": (lambda m: with_trunk(m, programs=()), "no program"),
    "strings on a device": (
        lambda m: with_trunk(m, inputs={"x": Spec(("b",), "string")}), "strings"
    ),
    "buckets that fall": (lambda m: with_trunk(m, batch_buckets=(8, 1)), "ascending"),
    "no buckets": (lambda m: with_trunk(m, batch_buckets=()), "ascending"),
    "a bucket of nothing": (lambda m: with_trunk(m, length_buckets={"t": (0, 8)}), "ascending"),
    "a donated stranger": (lambda m: with_trunk(m, donate=(1,)), "donates"),
    "a program for another batch": (
        lambda m: with_trunk(m, programs=(replace(m.units["trunk"].programs[0], batch=8),)),  # type: ignore[union-attr]
        "not one for every bucket",
    ),
    "a gap between partitions": (lambda m: with_partition(m, 1, first_row=7), "row 6"),
    "a partition too short": (lambda m: with_partition(m, 1, rows=3), "3 rows of 8 bytes"),
    "rows that nobody holds": (lambda m: with_words(m, rows=11), "10 rows, not 11"),
    "a table of strings": (lambda m: with_words(m, dtype="string"), "row of a table"),
    "a table of nothing": (lambda m: with_words(m, dim=0), "row of a table"),
    "no partitions": (lambda m: with_words(m, partitions=(), rows=0), "row of a table"),
    "code for an entry point": (
        lambda m: with_entry_point(m, "os:system('x')"), "entry point"
    ),
    "a node of no unit": (
        lambda m: with_signature(m, nodes=(Node(unit="gone", inputs={}),)), "'gone'"
    ),
    "a node with wrong inputs": (
        lambda m: with_signature(m, nodes=(Node(unit="words", inputs={"x": "in:text"}),)),
        r"it takes \['ids'\]",
    ),
    "a node that reads a later one": (
        lambda m: with_signature(
            m, nodes=tuple(reversed(m.signatures["serving_default"].nodes))
        ),
        "reads '1:rows'",
    ),
    "an output of nothing": (
        lambda m: with_signature(m, returns={"y": "2:z"}), "output 'y' is '2:z'"
    ),
    "an undeclared output": (
        lambda m: with_signature(m, outputs={}), "do not match"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BREAKS)
def test_an_inconsistent_manifest_is_refused_with_place_and_reason(
    manifest: Manifest, what: str
) -> None:
    spoil, says = BREAKS[what]
    spoilt = spoil(manifest)
    with pytest.raises(BundleCorrupt, match=says) as caught:
        check_manifest(spoilt, "ranker/1")
    assert str(caught.value).startswith("ranker/1: ")
    with pytest.raises(BundleCorrupt, match=says):
        decode_manifest(encode_manifest(spoilt), "ranker/1")


def test_unknown_fields_are_refused(manifest: Manifest) -> None:
    data = encode_manifest(manifest).replace(b'"name":', b'"more": 1, "name":', 1)
    with pytest.raises(BundleCorrupt, match="more"):
        decode_manifest(data, "ranker/1")


def test_a_leaf_of_no_elements_fits_anywhere(manifest: Manifest) -> None:
    empty = Leaf(dtype="float32", shape=(0, 4), blob=BlobRef(digest="0" * 64, size=0))
    check_manifest(with_trunk(manifest, params=(empty,)), "ranker/1")


#: Threads that take turns at every instruction, as they may between any two.
_FOUR_AT_ONCE = """
import sys, threading
from shards.checking import decode_manifest
data, start = sys.stdin.buffer.read(), threading.Barrier(4)
sys.setswitchinterval(1e-6)
def decode():
    start.wait()
    decode_manifest(data, "here")
threads = [threading.Thread(target=decode) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


def test_the_first_manifests_of_a_process_may_be_read_by_several_threads(
    tmp_path: Path,
) -> None:
    data = encode_manifest(full_manifest(LocalStore(tmp_path)))
    done = subprocess.run([sys.executable, "-c", _FOUR_AT_ONCE], input=data, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert not done.stderr
