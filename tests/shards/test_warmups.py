"""Warm-up requests of bundles: written, added, kept, read back, and refused where they misfit."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from batching.errors import InvalidArgument
from shards.bundle import Bundle
from shards.checking import blobs_of, check_manifest
from shards.errors import BundleCorrupt, BundleForeign, BundleIncomplete
from shards.inspection import describe, render
from shards.local import LocalStore
from shards.manifest import BlobRef, Manifest, Warmups
from shards.recorded import BYTES_MAX, REQUESTS_MAX, Recorded, encode_requests
from shards.specs import Spec
from shards.warmups import add_warmups, read_warmups
from tests.shards.bundles import full_manifest

TEXT = Spec(("b",), "string")


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def add_echo(bundle: Bundle) -> None:
    """A host unit, which needs no JAX, and a signature over it."""
    unit = bundle.host("echo", "some.module:load", inputs={"text": TEXT}, outputs={"text": TEXT})
    bundle.signature("echo", inputs={"text": TEXT})(lambda text: {"text": unit(text)})


def saved(store: LocalStore, *texts: list[str]) -> Manifest:
    with Bundle.create(store, "echo") as bundle:
        add_echo(bundle)
        for text in texts:
            bundle.warmup("echo", {"text": text})
    return bundle.manifest


def texts_of(requests: list[Recorded]) -> list[list[bytes]]:
    return [each.inputs["text"].tolist() for each in requests]


def asked(*texts: bytes) -> Recorded:
    return Recorded(signature="echo", inputs={"text": np.array(texts, object)})


def test_a_bundle_carries_its_warmups_in_order(store: LocalStore) -> None:
    manifest = saved(store, ["a"], ["b", "c"])
    assert manifest.warmups is not None
    assert manifest.warmups.requests == 2
    assert texts_of(read_warmups(store, store.read_manifest("echo", 1))) == [[b"a"], [b"b", b"c"]]
    assert manifest.warmups.blob.digest in blobs_of(manifest)
    assert "2 warm-up requests" in render(describe(manifest, store))


def test_a_bundle_without_warmups_has_no_file(store: LocalStore) -> None:
    manifest = saved(store)
    assert manifest.warmups is None
    assert read_warmups(store, manifest) == []
    assert "warm-up" not in render(describe(manifest))


def test_a_request_is_copied_when_it_is_added(store: LocalStore) -> None:
    values = np.array([b"before"], object)
    with Bundle.create(store, "echo") as bundle:
        add_echo(bundle)
        bundle.warmup("echo", {"text": values})
        values[0] = b"after"
    assert texts_of(read_warmups(store, bundle.manifest)) == [[b"before"]]


@pytest.mark.parametrize(
    ("signature", "text", "problem"),
    [
        ("other", ["a"], "no signature 'other'"),
        ("echo", [], "at least one row"),
        ("echo", [["a"]], "must have shape"),
        ("echo", [1], "must be text"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused_at_once(
    store: LocalStore, signature: str, text: list[object], problem: str
) -> None:
    bundle = Bundle.create(store, "echo")
    add_echo(bundle)
    with pytest.raises(InvalidArgument, match=problem):
        bundle.warmup(signature, {"text": text})


def test_a_delta_keeps_the_warmups_of_its_base_and_adds_to_them(store: LocalStore) -> None:
    base = saved(store, ["a"])
    with Bundle.delta(store, "echo") as same:
        pass
    assert same.manifest.warmups == base.warmups
    with Bundle.delta(store, "echo") as more:
        more.warmup("echo", {"text": ["b"]})
    assert texts_of(read_warmups(store, more.manifest)) == [[b"a"], [b"b"]]


def test_warmups_can_be_added_to_a_version_replaced_and_removed(store: LocalStore) -> None:
    saved(store, ["a"])
    add_warmups(store, "echo", 1, [asked(b"b")])
    found = store.read_manifest("echo", 1)
    assert texts_of(read_warmups(store, found)) == [[b"a"], [b"b"]]
    replaced = add_warmups(store, "echo", 1, [asked(b"c")], replace=True)
    assert texts_of(read_warmups(store, replaced)) == [[b"c"]]
    assert add_warmups(store, "echo", 1, [], replace=True).warmups is None
    assert store.verify("echo", 1).units == found.units


def test_requests_that_misfit_a_version_are_not_added_to_it(store: LocalStore) -> None:
    before = saved(store, ["a"])
    for request, problem in (
        (Recorded(signature="other"), r"request 1 is for signature 'other', which echo/1"),
        (Recorded(signature="echo", inputs={"text": np.zeros(1)}), r"request 1 \(echo\): .*string"),
        (asked(), "no rows"),
    ):
        with pytest.raises(InvalidArgument, match=problem):
            add_warmups(store, "echo", 1, [request])
    with pytest.raises(InvalidArgument, match="more than 1000"):
        add_warmups(store, "echo", 1, [asked(b"b")] * REQUESTS_MAX)
    assert store.read_manifest("echo", 1) == before


def with_file(store: LocalStore, data: bytes, requests: int = 1) -> Manifest:
    manifest = saved(store)
    return msgspec.structs.replace(
        manifest, warmups=Warmups(requests=requests, blob=store.put(data))
    )


def test_a_file_that_is_not_what_the_manifest_says_is_refused_by_type(store: LocalStore) -> None:
    good = b"".join(encode_requests([asked(b"a")], "file"))
    misfit = b"".join(encode_requests([Recorded(signature="other")], "file"))
    assert len(read_warmups(store, with_file(store, good))) == 1
    for data, requests, kind, problem in (
        (good, 2, BundleCorrupt, "1, the manifest says 2"),
        (good[:-1], 1, BundleCorrupt, "request 1"),
        (misfit, 1, BundleCorrupt, "signature 'other'"),
        (b"something else", 1, BundleForeign, "not a file of recorded requests"),
        (b"", 1, BundleForeign, "not a file of recorded requests"),
    ):
        with pytest.raises(kind, match=problem):
            read_warmups(store, with_file(store, data, requests))
    gone = with_file(store, good + b"never put")
    assert gone.warmups is not None
    (store.path / "blobs" / "blake3" / gone.warmups.blob.digest).unlink()
    with pytest.raises(BundleIncomplete, match="is missing"):
        read_warmups(store, gone)


@pytest.mark.parametrize(
    "warmups",
    [
        Warmups(requests=0, blob=BlobRef(digest="0" * 64, size=64)),
        Warmups(requests=REQUESTS_MAX + 1, blob=BlobRef(digest="0" * 64, size=64)),
        Warmups(requests=1, blob=BlobRef(digest="0" * 64, size=BYTES_MAX + 1)),
        Warmups(requests=1, blob=BlobRef(digest="../../etc/passwd", size=64)),
    ],
)
def test_a_manifest_whose_warmups_cannot_be_is_corrupt(store: LocalStore, warmups: Warmups) -> None:
    manifest = msgspec.structs.replace(full_manifest(store), warmups=warmups)
    with pytest.raises(BundleCorrupt, match="warm-up requests"):
        check_manifest(manifest, "ranker/1")
