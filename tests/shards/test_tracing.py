"""Signature functions, traced into graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import pytest

from batching.errors import InvalidArgument
from shards.errors import SpecMismatch
from shards.manifest import Node
from shards.specs import Spec
from shards.tracing import Method, TableCall, UnitCall, Value, trace

TEXT = {"text": Spec(("b",), "string")}
IDS, MASK = Spec(("b", "t"), "int32"), Spec(("b", "t"), "int32", 1.0)

tokenize = UnitCall("tokenize", TEXT, {"ids": IDS, "mask": MASK})
words = TableCall("words", 4, "float32")
trunk = UnitCall(
    "trunk",
    {"x": Spec(("n", "s", 4)), "mask": Spec(("n", "s"), "int32")},
    {"embedding": Spec(("n", 4))},
)
head = UnitCall("head", {"x": Spec(("b", 4))}, {"scores": Spec(("b", 3))})
regression = UnitCall("regression", {"x": Spec(("b", 4))}, {"outputs": Spec(("b", 1))})


def embed(text: Value) -> Any:
    tokens = tokenize(text)
    return trunk(words.rows(tokens["ids"]), tokens.mask)


def test_calls_become_nodes_and_symbols_flow_through_units() -> None:
    signature = trace(lambda text: {"embedding": embed(text)}, TEXT)
    assert signature.nodes == (
        Node(unit="tokenize", inputs={"text": "in:text"}),
        Node(unit="words", inputs={"ids": "0:ids"}),
        Node(unit="trunk", inputs={"x": "1:rows", "mask": "0:mask"}),
    )
    assert signature.returns == {"embedding": "2:embedding"}
    # The trunk calls its batch n; the signature's batch is b.
    assert signature.outputs == {"embedding": Spec(("b", 4))}


def test_inputs_may_be_given_by_place_and_by_name() -> None:
    def fn(text: Value) -> Any:
        tokens = tokenize(text=text)
        return trunk(mask=tokens["mask"], x=words.rows(tokens["ids"]))

    assert trace(fn, TEXT) == trace(embed, TEXT)


def test_the_same_call_twice_is_one_node() -> None:
    def fn(text: Value) -> Any:
        first, second = tokenize(text), tokenize(text)
        return {"ids": first["ids"], "mask": second["mask"]}

    assert len(trace(fn, TEXT).nodes) == 1


def test_nodes_that_nothing_depends_on_are_dropped_and_the_rest_numbered_anew() -> None:
    def fn(text: Value, other: Value) -> Any:
        embed(other)
        return {"rows": words.rows(tokenize(text)["ids"])}

    signature = trace(fn, {**TEXT, "other": TEXT["text"]})
    assert signature.nodes == (
        Node(unit="tokenize", inputs={"text": "in:text"}),
        Node(unit="words", inputs={"ids": "0:ids"}),
    )
    assert signature.returns == {"rows": "1:rows"}


def test_lengths_made_by_two_calls_are_two_symbols() -> None:
    def fn(text: Value, other: Value) -> Any:
        return {"a": tokenize(text)["ids"], "b": tokenize(other)["ids"]}

    outputs = trace(fn, {**TEXT, "other": TEXT["text"]}).outputs
    assert outputs["a"].shape == ("b", "t")
    assert outputs["b"].shape == ("b", "t_2")

    def mixed(text: Value, other: Value) -> Any:
        return trunk(words.rows(tokenize(text)["ids"]), tokenize(other)["mask"])

    with pytest.raises(SpecMismatch, match=r"unit 'trunk', input 'mask'.*s is t, not t_2"):
        trace(mixed, {**TEXT, "other": TEXT["text"]})


def test_the_padding_of_an_output_is_kept() -> None:
    assert trace(lambda text: tokenize(text), TEXT).outputs["mask"].pad == 1.0


@pytest.mark.parametrize(("method", "names"), [("predict", ["outputs"]), ("classify", ["scores"])])
def test_a_bare_value_is_named_by_the_method(method: Method, names: list[str]) -> None:
    assert list(trace(lambda x: head(x), {"x": Spec(("b", 4))}, method).outputs) == names


def test_a_tuple_is_named_by_place_and_a_dict_by_its_keys_in_order() -> None:
    x = {"x": Spec(("b", 4))}
    assert list(trace(lambda x: (x, head(x)), x).outputs) == ["output_0", "output_1"]
    assert list(trace(lambda x: {"z": head(x), "a": x}, x).outputs) == ["z", "a"]


def test_an_input_may_be_returned_as_it_came() -> None:
    signature = trace(lambda x: x, {"x": Spec(("b", 4))})
    assert (signature.nodes, signature.returns) == ((), {"outputs": "in:x"})


X = {"x": Spec(("b", 4))}
UNFIT: list[tuple[Callable[..., Any], Mapping[str, Spec], type[Exception], str]] = [
    (lambda x: head(x), {"x": Spec(("b", 5))}, SpecMismatch, "'head', input 'x'.*4 is 4, not 5"),
    (lambda x: head(x), {"x": Spec(("b", "k"))}, SpecMismatch, "'head', input 'x'"),
    (lambda x: head(x), {"x": Spec(("b", 4, 1))}, SpecMismatch, "'head', input 'x'"),
    (lambda x: head(x), {"x": Spec(("b", 4), "int32")}, SpecMismatch, "needs float32, got int32"),
    (lambda x: words.rows(x), X, SpecMismatch, "'words', input 'ids': needs integers"),
    (lambda x: words.rows(cast(Any, 3)), X, InvalidArgument, "'words'"),
    (lambda x: head(cast(Any, 3)), X, InvalidArgument, "'head', input 'x': not a value.*int"),
    (lambda x: head(x, x), X, InvalidArgument, "takes 1 inputs"),
    (lambda x: head(x, x=x), X, InvalidArgument, "once"),
    (lambda x: head(), X, InvalidArgument, "once"),
    (lambda x: head(y=x), X, InvalidArgument, "once"),
    (lambda x: {}, X, InvalidArgument, "at least one output"),
    (lambda x: {"y": 3}, X, InvalidArgument, "output 'y' is not a value"),
    (lambda x: None, X, InvalidArgument, "output 'outputs' is not a value"),
    (lambda x: not x, X, InvalidArgument, "no truth"),
    (lambda x: x, {}, InvalidArgument, "at least one input"),
    (lambda x, y: x, {**X, "y": Spec(("c",))}, InvalidArgument, "one batch symbol"),
    (lambda x: x, {"x": Spec((4,))}, InvalidArgument, "one batch symbol"),
    (lambda text: tokenize(text)["none"], TEXT, InvalidArgument, "no output 'none'"),
    (lambda text: tokenize(text).none, TEXT, InvalidArgument, "no output 'none'"),
]


@pytest.mark.parametrize("case", range(len(UNFIT)))
def test_what_does_not_fit_is_refused_with_the_unit_and_input(case: int) -> None:
    fn, inputs, error, says = UNFIT[case]
    with pytest.raises(error, match=says):
        trace(fn, inputs)


def test_a_value_that_escaped_its_signature_is_refused() -> None:
    escaped: list[Value] = []
    trace(lambda x: escaped.append(x) or x, X)  # type: ignore[func-returns-value]
    with pytest.raises(InvalidArgument, match="not a value of this signature"):
        trace(lambda x: escaped[0], X)
    with pytest.raises(InvalidArgument, match="different signatures"):
        trace(lambda x: UnitCall("add", {"a": X["x"], "b": X["x"]}, X)(x, escaped[0]), X)


def scores(k: int | str) -> Callable[[Value], Any]:
    return UnitCall(
        "classifier", X, {"scores": Spec(("b", k)), "classes": Spec(("b", k), "string")}
    )


@pytest.mark.parametrize(
    ("method", "fn", "labels", "says"),
    [
        ("classify", lambda x: {"logits": head(x)}, (), "'scores'"),
        ("classify", lambda x: {"scores": x, "classes": x}, (), "'classes' must be strings"),
        ("classify", lambda x: {"scores": head(x)}, ("a", "b"), "2 labels for scores"),
        ("classify", lambda x: dict(scores(3)(x)), ("a", "b", "c"), "not both"),
        ("classify", lambda x: {"scores": regression(x), "y": x}, ("a", "b"), "2 labels"),
        ("regress", lambda x: {"outputs": head(x)}, (), r"'outputs' \[b\]"),
        ("regress", lambda x: {"y": regression(x)}, (), r"'outputs' \[b\]"),
        ("predict", lambda x: x, ("a",), "labels belong to classify"),
    ],
)
def test_a_method_that_is_not_kept_is_refused(
    method: Method, fn: Callable[..., Any], labels: tuple[str, ...], says: str
) -> None:
    with pytest.raises(InvalidArgument, match=says):
        trace(fn, X, method, labels)


def test_methods_that_are_kept_pass() -> None:
    assert trace(lambda x: head(x), X, "classify", ("a", "b", "c")).labels == ("a", "b", "c")
    assert trace(lambda x: scores("k")(x), X, "classify").method == "classify"
    assert trace(lambda x: regression(x), X, "regress").outputs == {"outputs": Spec(("b", 1))}
    assert trace(lambda y: y, {"y": Spec(("b",))}, "regress").outputs == {"outputs": Spec(("b",))}
