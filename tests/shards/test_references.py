"""Bundles that refer to units of other servables: what is written, checked, bound and refused."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

import shards
from batching.errors import InvalidArgument, NotFound
from shards.checking import blobs_of, check_manifest, decode_manifest, encode_manifest
from shards.errors import BundleCorrupt, SpecMismatch
from shards.manifest import Manifest, MapUnit, Reference, TableUnit
from shards.references import bound, check_fit, named, reference_to, units_called
from shards.specs import Spec
from shards.store import LocalStore

replace = msgspec.structs.replace

H = {"h": Spec(("b", 4))}


def trunk_of(params: Any, x: Any) -> Any:
    return {"h": x @ params["w"]}


def head_of(params: Any, h: Any) -> Any:
    return {"y": h @ params["w"]}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    """Two versions of an encoder, and a ranker that refers to one of them and has a head."""
    path = tmp_path_factory.mktemp("store")
    for version in (1, 2):
        with shards.Bundle.create(path, "encoder", version) as bundle:
            weights = {"w": np.full((2, 4), version, np.float32)}
            trunk = bundle.unit("trunk", trunk_of, weights, inputs={"x": Spec(("b", 2))},
                                batch_buckets=(1, 4), platforms=("cpu",))  # fmt: skip
            bundle.table("words", np.ones((8, 2), np.float32), partitions=2)
            bundle.signature(inputs={"x": Spec(("b", 2))})(lambda x, trunk=trunk: trunk(x))
    with shards.Bundle.create(path, "ranker", 1) as bundle:
        trunk = bundle.refer("trunk", servable="encoder", unit="trunk", label="stable")
        words = bundle.refer("words", servable="encoder", unit="words", version=1)
        head = bundle.unit("head", head_of, {"w": np.ones((4, 1), np.float32)}, inputs=H,
                           batch_buckets=(1, 4), platforms=("cpu",))  # fmt: skip

        @bundle.signature("serving_default", inputs={"ids": Spec(("b",), "int32")})
        def score(ids: Any) -> Any:
            return head(trunk(words.rows(ids)))

    return LocalStore(path)


@pytest.fixture
def ranker(store: LocalStore) -> Manifest:
    return store.read_manifest("ranker", 1)


def with_reference(manifest: Manifest, name: str = "trunk", **changes: object) -> Manifest:
    one = replace(manifest.references[name], **changes)
    return replace(manifest, references={**manifest.references, name: one})


def test_what_is_referred_to_is_described_and_nothing_of_it_is_copied(
    store: LocalStore, ranker: Manifest
) -> None:
    encoder = store.read_manifest("encoder", 2)
    assert list(ranker.units) == ["head"]
    trunk, words = ranker.references["trunk"], ranker.references["words"]
    assert named(trunk) == "encoder@stable/trunk"
    assert named(words) == "encoder:1/words"
    assert (trunk.kind, trunk.outputs) == ("map", encoder.units["trunk"].outputs)  # type: ignore[union-attr]
    assert (words.kind, words.dtype, words.dim) == ("table", "float32", 2)
    assert blobs_of(ranker).keys().isdisjoint(blobs_of(encoder))
    assert decode_manifest(encode_manifest(ranker), "here") == ranker


def test_a_bound_manifest_has_the_units_in_their_places(
    store: LocalStore, ranker: Manifest
) -> None:
    encoder = store.read_manifest("encoder", 2)
    found = bound(ranker, {name: encoder.units[name] for name in ("trunk", "words")})
    assert found.units["trunk"] is encoder.units["trunk"]
    assert list(found.units) == ["head", "trunk", "words"]
    assert found.references == {}
    check_manifest(found, "here")


def test_people_are_told_what_is_referred_to(ranker: Manifest) -> None:
    described = shards.describe(ranker)
    assert described["references"]["trunk"]["to"] == "encoder@stable/trunk"
    assert described["references"]["words"]["row"] == "float32[2]"
    assert "unit trunk (map)  is encoder@stable/trunk" in shards.render(described)


def test_a_delta_refers_to_what_its_base_does(store: LocalStore, ranker: Manifest) -> None:
    with shards.Bundle.delta(store, "ranker", base=1) as bundle:
        pass
    assert bundle.manifest.references == ranker.references


def test_one_may_refer_to_what_another_refers_to(store: LocalStore, ranker: Manifest) -> None:
    again = reference_to(ranker, "trunk", 1, "")
    assert named(again) == "ranker:1/trunk"
    assert again.outputs == ranker.references["trunk"].outputs
    check_fit(again, ranker.references["trunk"])


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"servable": "encoder", "unit": "trunk"}, "give one"),
        ({"servable": "encoder", "unit": "trunk", "version": 1, "label": "a"}, "give one"),
        ({"servable": "other", "unit": "trunk", "version": 1}, "cannot refer to itself"),
        (
            {"servable": "encoder", "unit": "trunk", "version": 1, "like": 2},
            "refers to version 1, not to 2",
        ),
        ({"servable": "../x", "unit": "trunk", "version": 1}, "x"),
    ],
)
def test_a_reference_that_means_nothing_is_not_written(
    store: LocalStore, wrong: dict[str, Any], text: str
) -> None:
    bundle = shards.Bundle.create(store, "other")
    with pytest.raises(InvalidArgument, match=text):
        bundle.refer("trunk", **wrong)
    with pytest.raises(NotFound):
        bundle.refer("trunk", servable="encoder", unit="tail", version=1)
    with pytest.raises(NotFound):
        bundle.refer("trunk", servable="encoder", unit="trunk", version=9)


def test_a_name_is_that_of_one_unit_or_one_reference(store: LocalStore) -> None:
    bundle = shards.Bundle.create(store, "other")
    bundle.refer("trunk", servable="encoder", unit="trunk", label="stable", like=1)
    with pytest.raises(InvalidArgument, match="has a unit 'trunk' already"):
        bundle.table("trunk", np.ones((2, 2), np.float32))
    bundle.table("words", np.ones((2, 2), np.float32))
    with pytest.raises(InvalidArgument, match="has a unit 'words' already"):
        bundle.refer("words", servable="encoder", unit="words", version=1)


@pytest.mark.parametrize(
    "changes",
    [
        {"servable": "ranker"},
        {"servable": ""},
        {"unit": ""},
        {"version": 1},
        {"label": ""},
        {"version": 0, "label": ""},
        {"inputs": {}},
        {"kind": "table"},
    ],
)
def test_a_manifest_with_a_broken_reference_is_refused(
    ranker: Manifest, changes: dict[str, Any]
) -> None:
    with pytest.raises(BundleCorrupt, match="reference 'trunk'"):
        check_manifest(with_reference(ranker, **changes), "here")


def test_a_graph_is_held_against_what_references_take_and_yield(ranker: Manifest) -> None:
    other = with_reference(ranker, outputs={"other": Spec(("b", 4))})
    with pytest.raises(BundleCorrupt, match="'1:h', which is not there"):
        check_manifest(other, "here")
    with pytest.raises(BundleCorrupt, match="calls 'words', which is no unit"):
        check_manifest(replace(ranker, references={}), "here")
    twice = replace(ranker, units={**ranker.units, "trunk": ranker.units["head"]})
    with pytest.raises(BundleCorrupt, match="has the name of a unit"):
        check_manifest(twice, "here")
    assert [*units_called(ranker)] == ["head", "trunk", "words"]


def unit(store: LocalStore, name: str) -> Any:
    return store.read_manifest("encoder", 1).units[name]


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("trunk", {"outputs": {"h": Spec(("b", 5))}}, "outputs"),
        ("trunk", {"inputs": {"x": Spec(("b", 2), "int32")}}, "inputs"),
        ("trunk", {"inputs": {"x": Spec(("b", 2)), "y": Spec(("b", 2))}}, "inputs"),
        ("words", {"dim": 3}, "dim 2, it has 3"),
        ("words", {"dtype": "float16"}, "dtype float32, it has float16"),
        ("words", {"keys": "hashed"}, "keys rows, it has hashed"),
    ],
)
def test_a_unit_that_takes_or_yields_something_else_does_not_fit(
    store: LocalStore, ranker: Manifest, name: str, changes: dict[str, Any], text: str
) -> None:
    reference = ranker.references[name]
    check_fit(reference, unit(store, name))
    with pytest.raises(SpecMismatch, match=text):
        check_fit(reference, replace(unit(store, name), **changes))


def test_kinds_and_the_order_of_inputs_count_and_rows_of_tables_do_not(
    store: LocalStore, ranker: Manifest
) -> None:
    with pytest.raises(SpecMismatch, match="kind map, it has table"):
        check_fit(ranker.references["trunk"], unit(store, "words"))
    words: TableUnit = unit(store, "words")
    check_fit(ranker.references["words"], replace(words, rows=1 << 30))
    two = {"x": Spec(("b", 2)), "y": Spec(("b", 2))}
    reference = replace(ranker.references["trunk"], inputs=two)
    turned = replace(unit(store, "trunk"), inputs=dict(reversed(two.items())))
    with pytest.raises(SpecMismatch, match="inputs"):
        check_fit(reference, turned)


@pytest.mark.parametrize(("longest", "fits"), [(16, False), (32, True), (64, True)])
def test_a_unit_takes_inputs_as_long_as_are_relied_on(longest: int, fits: bool) -> None:
    inputs, outputs = {"x": Spec(("b", "t"))}, {"h": Spec(("b", 4))}
    reference = Reference(servable="e", unit="u", version=1, inputs=inputs, outputs=outputs,
                          lengths={"t": 32})  # fmt: skip
    found = MapUnit(id="i", inputs=inputs, outputs=outputs, programs=(), params=(),
                    batch_buckets=(1,), length_buckets={"t": (8, longest)})  # fmt: skip
    if fits:
        check_fit(reference, found)
        return
    with pytest.raises(SpecMismatch, match="to take t up to 32, it takes up to 16"):
        check_fit(reference, found)


def test_what_is_relied_on_may_be_what_no_unit_has(ranker: Manifest, store: LocalStore) -> None:
    odd = replace(ranker.references["trunk"], lengths={"nowhere": 3})
    with pytest.raises(SpecMismatch, match="to take nowhere up to 3, it takes up to 0"):
        check_fit(odd, unit(store, "trunk"))
