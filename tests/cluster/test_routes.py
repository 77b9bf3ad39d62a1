"""Names resolved and graphs flattened: what an epoch means for a request."""

from __future__ import annotations

import pytest

from batching.errors import InvalidArgument, NotFound, Unavailable
from cluster.epochs import Epoch
from cluster.routes import REQUEST, PlannedNode, Routes
from shards.specs import Spec
from tests.cluster.routing_fakes import (
    AB,
    epoch,
    host_unit,
    look_up,
    manifest,
    map_unit,
    plain,
    sentence_model,
    table_unit,
)

LABELS = {"model": {"stable": 2, "gone": 9}}


@pytest.fixture
def routes() -> Routes:
    versions = [(plain(version=number), AB) for number in (2, 10, 3)]
    return Routes(epoch(4, *versions, labels=LABELS))


def test_no_version_means_the_highest_number(routes: Routes) -> None:
    assert routes.find("model").version == 10


def test_a_version_is_found_by_number_and_by_label(routes: Routes) -> None:
    assert routes.find("model", 3).version == 3
    assert routes.find("model", label="stable").version == 2


@pytest.mark.parametrize(
    ("asked", "error", "text"),
    [
        (("other", None, None), NotFound, "Servable not found for request: Latest(other)"),
        (("other", 1, None), NotFound, "Servable not found for request: Specific(other, 1)"),
        (("model", 4, None), NotFound, "Servable not found for request: Specific(model, 4)"),
        (("model", None, "x"), InvalidArgument, "Unrecognized servable version label: x"),
        (("model", None, "gone"), NotFound, "Servable not found for request: Specific(model, 9)"),
        (("other", None, "stable"), NotFound, "Servable not found for request: Latest(other)"),
    ],
)
def test_what_is_not_served_is_refused_in_tensorflow_servings_words(
    routes: Routes,
    asked: tuple[str, int | None, str | None],
    error: type[Exception],
    text: str,
) -> None:
    with pytest.raises(error) as caught:
        routes.find(*asked)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    "asked", [("model", None, None), ("model", 1, None), ("model", None, "stable")]
)
def test_before_the_first_epoch_nothing_is_said_to_be_missing(
    asked: tuple[str, int | None, str | None],
) -> None:
    with pytest.raises(Unavailable, match="no routing table yet"):
        Routes(Epoch(term=0, number=0)).find(*asked)


def test_it_knows_what_it_has(routes: Routes) -> None:
    assert routes.has("model", 3)
    assert not routes.has("model", 4)
    assert not routes.has("other", 3)


def test_one_map_unit_fed_by_the_request_is_a_direct_plan(routes: Routes) -> None:
    plan = routes.find("model").plans["serving_default"]
    assert plan.direct is plan.nodes[0]
    assert (plan.epoch, plan.servable, plan.version) == (4, "model", 10)
    assert plan.nodes[0].holders == (("a", "b"),)


def test_a_plan_that_also_returns_an_input_is_not_direct() -> None:
    x = {"x": Spec(("b",))}
    outputs = {"y": Spec(("b",)), "x": Spec(("b",))}
    nodes = [("unit", {"x": "in:x"})]
    found = manifest({"unit": map_unit()}, nodes, x, outputs, {"y": "0:y", "x": "in:x"})
    plan = Routes(epoch(1, (found, AB))).find("model").plans["serving_default"]
    assert plan.direct is None
    assert plan.returns == (("y", (0, "y")), ("x", (REQUEST, "x")))


def test_a_table_alone_is_not_direct_and_knows_its_partitions() -> None:
    found = look_up(table_unit(sizes=(4, 3, 5)))
    plan = Routes(epoch(1, (found, {"unit": [["a"], ["b"], ["a", "b"]]}))).find("model").plans
    [node] = plan["serving_default"].nodes
    assert plan["serving_default"].direct is None
    assert node.first_rows is not None
    assert node.first_rows.tolist() == [0, 4, 7]
    assert node.holders == (("a",), ("b",), ("a", "b"))


def nodes_of_sentence() -> tuple[PlannedNode, ...]:
    served = Routes(epoch(1, sentence_model())).find("model")
    return served.plans["serving_default"].nodes


def test_a_graphs_edges_go_both_ways() -> None:
    host, table, trunk = nodes_of_sentence()
    assert (host.needs, table.needs, trunk.needs) == ((), (0,), (1,))
    assert (host.feeds, table.feeds, trunk.feeds) == ((1,), (2,), ())


def test_only_units_without_text_share_frames() -> None:
    host, table, trunk = nodes_of_sentence()
    assert (host.merge, table.merge, trunk.merge) == (False, True, True)


def test_a_unit_gets_its_inputs_in_its_own_order_whatever_order_the_call_named_them() -> None:
    specs = {"p": Spec(("b",)), "q": Spec(("b",))}
    nodes = [("unit", {"q": "in:q", "p": "in:p"})]
    found = manifest({"unit": map_unit(inputs=specs)}, nodes, specs, specs, {"p": "0:y"})
    plan = Routes(epoch(1, (found, AB))).find("model").plans["serving_default"]
    assert [name for name, _ in plan.nodes[0].inputs] == ["p", "q"]


def test_a_host_unit_gets_its_inputs_in_its_own_order_too() -> None:
    specs = {"p": Spec(("b",), "string"), "q": Spec(("b",), "string")}
    nodes = [("unit", {"q": "in:q", "p": "in:p"})]
    unit = host_unit(inputs=specs)
    found = manifest({"unit": unit}, nodes, specs, {"ids": Spec(("b",))}, {"ids": "0:ids"})
    plan = Routes(epoch(1, (found, AB))).find("model").plans["serving_default"]
    assert [name for name, _ in plan.nodes[0].inputs] == ["p", "q"]


def test_the_last_length_bucket_is_the_limit() -> None:
    specs = {"x": Spec(("b", "t"))}
    unit = map_unit(inputs=specs, lengths={"t": (8, 32)})
    found = manifest({"unit": unit}, [("unit", {"x": "in:x"})], specs, specs, {"x": "0:y"})
    plan = Routes(epoch(1, (found, AB))).find("model").plans["serving_default"]
    assert plan.nodes[0].limits == {"t": 32}


def test_a_servable_without_a_deadline_of_its_own_has_the_default(routes: Routes) -> None:
    assert routes.find("model").deadline_s == 10.0
