"""What runs once for a request, and what once for every row: traced, checked, planned alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

import shards
from batching.errors import InvalidArgument
from shards.checking import check_manifest, decode_manifest, encode_manifest
from shards.errors import BundleCorrupt, SpecMismatch
from shards.levels import node_levels
from shards.manifest import Manifest, MapUnit, Signature
from shards.specs import Spec, check
from shards.tracing import TableCall, UnitCall, trace
from tests.cluster.api_support import f32

USER, ITEM = Spec(("b", 2), per="request"), Spec(("b", 2))
HISTORY = Spec(("b", 3), "int32", per="request")
INPUTS = {"user": USER, "history": HISTORY, "item": ITEM}

tower = UnitCall("tower", {"x": Spec(("b", 2))}, {"y": Spec(("b", 2))})
both = UnitCall("both", {"user": USER, "item": ITEM}, {"outputs": Spec(("b",))})
plain = UnitCall("plain", {"user": Spec(("b", 2)), "item": ITEM}, {"outputs": Spec(("b",))})
table = TableCall("table", 2, "float32")


def traced(fn: Any) -> Signature:
    return trace(fn, INPUTS)


def test_what_is_given_nothing_but_values_of_the_request_is_of_the_request() -> None:
    seen = []

    def fn(user: Any, history: Any, item: Any) -> Any:
        seen.extend([tower(user), table.rows(history), tower(item), both(tower(user), item)])
        return seen[-1]

    signature = traced(fn)
    assert [value.spec.per for value in seen] == ["request", "request", "row", "row"]
    assert [node.unit for node in signature.nodes] == ["tower", "both"]
    assert signature.outputs == {"outputs": Spec(("b",))}


def test_a_unit_that_repeats_may_run_once_too() -> None:
    """Both of its inputs are then one row; nothing is left to repeat."""

    def fn(user: Any, history: Any, item: Any) -> Any:
        once = both(user, tower(user))
        assert once.spec.per == "request"
        return both(user, item)

    assert len(traced(fn).nodes) == 1


@pytest.mark.parametrize(
    ("fn", "error", "says"),
    [
        (
            lambda user, history, item: plain(user, item),
            SpecMismatch,
            "unit 'plain': input 'user'.*declare it with per=\"request\"",
        ),
        (
            lambda user, history, item: both(item, item),
            SpecMismatch,
            "unit 'both': input 'user' is per request, and is given a value for every row",
        ),
        (
            lambda user, history, item: {"a": tower(item), "b": tower(user)},
            InvalidArgument,
            r"output 'b' float32\[b,2\] per request has one row for the whole request",
        ),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_traced(fn: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        traced(fn)


def ranker(store: Path) -> Manifest:
    with shards.Bundle.create(store, "ranker", 1) as bundle:
        unit = bundle.unit(
            "rank", lambda p, user, item: (user * item).sum(-1), None,
            inputs={"user": USER, "item": ITEM}, platforms=("cpu",),
        )  # fmt: skip
        user = bundle.unit(
            "tower", lambda p, x: x + 1, None, inputs={"x": Spec(("b", 2))}, platforms=("cpu",)
        )

        @bundle.signature(inputs={"user": USER, "item": ITEM})
        def serving_default(user: Any, item: Any, tower: Any = user) -> Any:
            return unit(tower(user), item)

    return bundle.manifest


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return ranker(tmp_path_factory.mktemp("store"))


def test_a_manifest_says_it_all(manifest: Manifest) -> None:
    assert decode_manifest(encode_manifest(manifest), "here") == manifest
    rank = manifest.units["rank"]
    assert isinstance(rank, MapUnit)
    assert (rank.per_request, rank.request_buckets) == ((True, False), (1, 8))
    assert rank.program_inputs == (USER, ITEM, Spec(("b",), "int32"))
    assert [rank.requests_of(batch) for batch in (1, 8, 32)] == [(1,), (1, 8), (1, 8, 32)]
    signature = manifest.signatures["serving_default"]
    assert node_levels(signature, manifest.units) == ("request", "row")
    text = shards.render(shards.describe(manifest))
    assert "user float32[b,2] per request, item float32[b,2]" in text
    assert "request buckets: 1, 8" in text
    assert "call 0 = tower(x=in:user) once a request\n" in text
    assert "call 1 = rank(user=0:outputs, item=in:item)\n" in text


def test_an_older_manifest_has_no_such_words_and_means_rows(manifest: Manifest) -> None:
    """As schema 1 was written: specs of three, units without buckets of requests."""
    document = msgspec.json.decode(encode_manifest(manifest))
    document["schema"] = 1
    tower = document["units"]["tower"]
    del document["units"]["rank"], tower["request_buckets"]
    tower["inputs"]["x"] = tower["inputs"]["x"][:3]
    tower["outputs"] = {name: spec[:3] for name, spec in tower["outputs"].items()}
    document["signatures"] = {
        "serving_default": {
            "method": "predict",
            "inputs": {"x": [["b", 2], "float32", 0.0]},
            "outputs": {"y": [["b", 2], "float32", 0.0]},
            "nodes": [{"unit": "tower", "inputs": {"x": "in:x"}}],
            "returns": {"y": "0:outputs"},
        }
    }
    old = decode_manifest(msgspec.json.encode(document), "here")
    assert old.units["tower"] == manifest.units["tower"]
    assert node_levels(old.signatures["serving_default"], old.units) == ("row",)


def changed(manifest: Manifest, unit: str, **changes: Any) -> Manifest:
    units = {**manifest.units, unit: msgspec.structs.replace(manifest.units[unit], **changes)}
    return msgspec.structs.replace(manifest, units=units)


def told(manifest: Manifest, **changes: Any) -> Manifest:
    signature = msgspec.structs.replace(manifest.signatures["serving_default"], **changes)
    return msgspec.structs.replace(manifest, signatures={"serving_default": signature})


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            lambda m: changed(m, "rank", inputs={"user": USER, "item": USER}),
            "every input, or an output, is declared per request",
        ),
        (lambda m: changed(m, "rank", outputs={"outputs": USER}), "or an output, is declared"),
        (lambda m: changed(m, "rank", request_buckets=(8, 1)), "ascending"),
        (lambda m: changed(m, "rank", request_buckets=()), "ascending"),
        (lambda m: changed(m, "tower", request_buckets=(1,)), "no input per request"),
        (
            lambda m: told(m, inputs={"user": ITEM, "item": ITEM}),
            "unit 'rank': input 'user' is per request, and is given a value for every row",
        ),
        (
            lambda m: told(m, inputs={"user": USER, "item": USER}),
            "output 'outputs' has one row for the whole request",
        ),
    ],
)
def test_a_manifest_that_does_not_fit_itself_is_refused(
    manifest: Manifest, spoil: Any, says: str
) -> None:
    with pytest.raises(BundleCorrupt, match=says):
        check_manifest(spoil(manifest), "ranker/1")


def test_host_units_and_registered_kinds_take_values_of_one_level(tmp_path: Path) -> None:
    bundle = shards.Bundle.create(tmp_path, "model", 1)
    with pytest.raises(InvalidArgument, match="only units on a device take inputs per request"):
        bundle.host("host", "a:b", inputs={"user": USER}, outputs={"y": ITEM})
    with pytest.raises(InvalidArgument, match="only units on a device take inputs per request"):
        bundle.custom("custom", "kind", [{}], inputs={"user": USER}, outputs={"y": ITEM})


def test_a_request_has_one_row_of_it_whatever_it_has_of_the_others() -> None:
    specs = {"user": USER, "item": ITEM}
    for rows in (1, 3):
        assert check(specs, {"user": f32([[1, 2]]), "item": f32([[1, 2]] * rows)}) == {"b": rows}
    with pytest.raises(SpecMismatch, match=r"'user' is per request and must have one row, got \[2"):
        check(specs, {"user": f32([[1, 2]] * 2), "item": f32([[1, 2]] * 2)})


@pytest.mark.parametrize(
    ("shape", "per"), [((2,), "request"), ((), "request"), (("b", 2), "candidate")]
)
def test_a_spec_that_means_nothing_is_refused(shape: Any, per: Any) -> None:
    with pytest.raises(ValueError, match="per"):
        Spec(shape, per=per)
