"""Bags of different length in JSON, against the same bags filled by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching.errors import InvalidArgument
from cluster.api import bags
from cluster.api.predict import PredictCodec
from shards.manifest import Node, Signature
from shards.specs import Spec

IDS, WEIGHTS = Spec(("b", "t"), "int32"), Spec(("b", "t"))


def codec(
    inputs: Mapping[str, Spec], *nodes: Node, returns: Mapping[str, str] | None = None
) -> PredictCodec:
    outputs = {"y": Spec(("b", 2))}
    return PredictCodec(
        Signature(
            method="predict", inputs=dict(inputs), outputs=outputs, nodes=nodes,
            returns=dict(returns or {"y": "0:rows"}),
        )
    )  # fmt: skip


def pooled(**inputs: str) -> Node:
    return Node(
        unit="t", inputs={name: f"in:{value}" for name, value in inputs.items()}, pool="sum"
    )


def parsed(of: PredictCodec, **body: Any) -> dict[str, Any]:
    arrays = of.parse(json.dumps(body).encode()).arrays
    return {name: array.tolist() for name, array in arrays.items()}


WEIGHTED = codec({"ids": IDS, "weights": WEIGHTS}, pooled(ids="ids", weights="weights"))
ALONE = codec({"ids": IDS}, pooled(ids="ids"))


@given(st.lists(st.lists(st.integers(-1, 99), max_size=5), min_size=1, max_size=6))
def test_rows_and_columns_of_any_bags_are_as_if_filled_by_hand(ids: list[list[int]]) -> None:
    weights = [[0.5 * each for each in bag] for bag in ids]
    width = max(map(len, ids))
    wanted = {
        "ids": [bag + [-1] * (width - len(bag)) for bag in ids],
        "weights": [bag + [0.0] * (width - len(bag)) for bag in weights],
    }
    rows = [{"ids": a, "weights": b} for a, b in zip(ids, weights, strict=True)]
    assert parsed(WEIGHTED, inputs={"ids": ids, "weights": weights}) == wanted
    assert parsed(WEIGHTED, instances=rows) == wanted
    assert parsed(ALONE, inputs=ids) == {"ids": wanted["ids"]}
    assert parsed(ALONE, instances=ids) == {"ids": wanted["ids"]}
    assert parsed(ALONE, inputs={"ids": ids}) == {"ids": wanted["ids"]}


def test_bags_of_a_declared_size_are_filled_up_to_it_and_longer_ones_are_refused() -> None:
    of = codec({"ids": Spec(("b", 3), "int32")}, pooled(ids="ids"))
    assert parsed(of, instances=[[1], [2, 3]]) == {"ids": [[1, -1, -1], [2, 3, -1]]}
    assert parsed(of, instances=[[1, 2], [2, 3]]) == {"ids": [[1, 2, -1], [2, 3, -1]]}
    with pytest.raises(InvalidArgument, match="input 'ids': a bag of 4, at most 3 are declared"):
        parsed(of, instances=[[1], [2, 3, 4, 5]])


def test_inputs_that_share_a_size_are_filled_up_to_the_longest_of_all() -> None:
    of = codec({"a": IDS, "b": IDS}, pooled(ids="a"), pooled(ids="b"))
    found = parsed(of, inputs={"a": [[1], [2, 3]], "b": [[4, 5, 6], []]})
    assert found == {"a": [[1, -1, -1], [2, 3, -1]], "b": [[4, 5, 6], [-1, -1, -1]]}


def test_deeper_bags_and_text_are_filled_too() -> None:
    of = codec({"ids": Spec(("b", 2, "t"), "string")}, pooled(ids="ids"))
    found = of.parse(json.dumps({"inputs": [[["a"], ["b", "c"]]]}).encode()).arrays["ids"]
    assert found.tolist() == [[[b"a", b""], [b"b", b"c"]]]


def test_bags_of_a_whole_request_are_filled_in_its_context() -> None:
    of = codec(
        {"items": IDS, "user": Spec(("b", "u"), "int32", per="request")},
        pooled(ids="items"), pooled(ids="user"),
    )  # fmt: skip
    told = parsed(of, instances=[{"items": [1]}, {"items": [2, 3]}], context={"user": [7, 8]})
    assert told == {"items": [[1, -1], [2, 3]], "user": [[7, 8]]}


@pytest.mark.parametrize(
    "of",
    [
        pytest.param(codec({"ids": IDS}, Node(unit="t", inputs={"ids": "in:ids"})), id="rows"),
        pytest.param(
            codec({"ids": IDS}, pooled(ids="ids"), Node(unit="u", inputs={"x": "in:ids"})),
            id="pooled and used otherwise",
        ),
        pytest.param(
            codec({"ids": IDS}, pooled(ids="ids"), returns={"y": "0:rows", "z": "in:ids"}),
            id="returned",
        ),
        pytest.param(
            codec({"ids": Spec(("b", "t"), "uint32")}, pooled(ids="ids")), id="no number for none"
        ),
    ],
)
def test_what_is_not_only_pooled_must_be_even(of: PredictCodec) -> None:
    with pytest.raises(InvalidArgument):
        parsed(of, instances=[[1], [2, 3]])


@pytest.mark.parametrize(
    "weights", [[[1, 1], [1]], [[1, 1], [1, 1]], [[1]], [1, 1], 3, [["a"], ["b", "c"]]]
)
def test_bags_with_other_weights_than_ids_are_refused(weights: Any) -> None:
    with pytest.raises(InvalidArgument):
        parsed(WEIGHTED, inputs={"ids": [[1], [2, 3]], "weights": weights})


def test_a_long_bag_does_not_make_a_small_body_huge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bags, "_PLACES_MAX", 8)
    assert parsed(ALONE, inputs=[[1, 2, 3, 4], []])["ids"][1] == [-1] * 4
    with pytest.raises(InvalidArgument, match="3 bags filled up to 4 are more than 8 places"):
        parsed(ALONE, inputs=[[1, 2, 3, 4], [], [1]])


def test_a_body_that_a_loop_may_read_is_filled_up_to_few_places() -> None:
    few = [[1] * 1000, *[[]] * 65]
    with pytest.raises(InvalidArgument, match="66 bags filled up to 1000 are more than 65536"):
        parsed(ALONE, inputs=few)
    assert np.shape(parsed(ALONE, inputs=few[:-1])["ids"]) == (65, 1000)
    many = [*few, [1] * 1000, *[[1] * 100] * 30]
    assert np.shape(parsed(ALONE, inputs=many)["ids"]) == (97, 1000)


def test_bags_that_are_even_are_read_as_always() -> None:
    found = ALONE.parse(b'{"inputs": [[1, 2], [3, 4]]}').arrays["ids"]
    assert found.dtype == np.int32
    assert found.tolist() == [[1, 2], [3, 4]]
