"""Names resolved and graphs flattened: what an epoch means for a request."""

from __future__ import annotations

import pytest
from msgspec import structs

from batching.errors import InvalidArgument, NotFound, Unavailable
from cluster.epochs import Epoch
from cluster.routes import REQUEST, LookUp, PlannedNode, Routes
from shards.manifest import Unit
from shards.specs import Spec
from shards.tables import plan_of
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
    """Rows of the table are for the trunk alone: it begins the look-up once the ids are there."""
    host, table, trunk = nodes_of_sentence()
    assert (host.needs, table.needs, trunk.needs) == ((), (0,), (0,))
    assert (host.feeds, table.feeds, trunk.feeds) == ((2,), (2,), ())
    assert (table.look_ups, trunk.look_ups) == ((), (LookUp(tensor=0, node=1),))


ROWS = Spec(("b", 2))
WIDE = Spec(("b", 3))
RANKER = [
    ("users", {"ids": "in:user"}),
    ("items", {"ids": "in:item"}),
    ("trunk", {"u": "0:rows", "i": "1:rows", "x": "in:x"}),
]


@pytest.mark.parametrize(
    ("nodes", "specs", "returned", "look_ups", "roots"),
    [
        pytest.param(RANKER, (ROWS, ROWS), "2:y", [0, 1], (2,), id="both tables feed the trunk"),
        pytest.param(
            RANKER, (ROWS, ROWS), "0:rows", [], (0, 1), id="what is returned comes back anyway"
        ),
        pytest.param(RANKER, (WIDE, ROWS), "2:y", [], (0, 1), id="rows of another width"),
        pytest.param(
            [RANKER[0], ("trunk", {"u": "0:rows", "i": "0:rows", "x": "in:x"})],
            (ROWS, ROWS), "1:y", [], (0,), id="rows that are wanted twice",
        ),
        pytest.param(
            [("host", {"text": "in:text"}), ("users", {"ids": "0:ids"}), RANKER[1],
             ("trunk", {"u": "1:rows", "i": "2:rows", "x": "in:x"})],
            (ROWS, ROWS), "3:y", [], (0, 2), id="one look-up could begin before the other",
        ),
        pytest.param(
            [("host", {"text": "in:text"}), ("users", {"ids": "0:ids"}),
             ("trunk", {"u": "1:rows", "i": "in:x", "x": "0:ids"})],
            (ROWS, Spec(("b",))), "2:y", [1], (0,), id="the unit needs what its look-up needs",
        ),
    ],
)  # fmt: skip
def test_a_unit_begins_the_look_ups_that_are_for_it_alone_and_none_of_them_later(
    nodes: list[tuple[str, dict[str, str]]],
    specs: tuple[Spec, Spec],
    returned: str,
    look_ups: list[int],
    roots: tuple[int, ...],
) -> None:
    given = {"u": specs[0], "i": specs[1], "x": Spec(("b",))}
    units: dict[str, Unit] = {
        "users": table_unit("users"), "items": table_unit("items"), "host": host_unit(),
        "trunk": map_unit("trunk", given),
    }  # fmt: skip
    inputs = {
        "user": Spec(("b",), "int64"), "item": Spec(("b",), "int64"), "x": Spec(("b",)),
        "text": Spec(("b",), "string"),
    }  # fmt: skip
    found = manifest(units, nodes, inputs, {"y": Spec(("b",))}, {"y": returned})
    placement = {"users": [["s"]] * 3, "items": [["t"]] * 3, "host": [["h"]], "trunk": [["d"]]}
    plan = Routes(epoch(1, (found, placement))).find("model").plans["serving_default"]
    assert [each.node for each in plan.nodes[-1].look_ups] == look_ups
    assert plan.roots == roots
    begun = [index for node in plan.nodes for index in node.feeds]
    assert sorted([*begun, *roots]).count(len(nodes) - 1) >= 1, "nobody begins the last unit"
    for index in look_ups:
        assert plan.nodes[index].feeds == (len(nodes) - 1,)
        assert begun.count(index) == 0, "a look-up would be begun twice"


def test_a_table_is_asked_by_the_hash_of_how_it_is_cut() -> None:
    one, same, other = (plan_of(table_unit(sizes=sizes)) for sizes in ((4, 3), (4, 3), (3, 4)))
    assert one == same != other
    _, table, trunk = nodes_of_sentence()
    assert table.table is not None
    assert (table.plan, trunk.plan) == (plan_of(table.table), "")


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


def test_plans_of_what_is_as_it_was_are_kept_but_for_the_epoch() -> None:
    first, second = plain("same"), plain("moved")
    before = Routes(epoch(4, (first, AB), (second, AB)))
    # Decoded anew in every epoch: equal, and other objects.
    after = Routes(epoch(5, (plain("same"), AB), (second, {"unit": [["b"]]})), before)
    old, new = (each.find("same").plans["serving_default"] for each in (before, after))
    assert (old.epoch, new.epoch) == (4, 5)
    assert new.nodes is old.nodes
    moved = after.find("moved").plans["serving_default"]
    assert (moved.epoch, moved.nodes[0].holders) == (5, (("b",),))


def test_plans_of_another_version_or_deadline_are_not_kept() -> None:
    before = Routes(epoch(4, (plain(version=1), AB)))
    after = Routes(epoch(5, (plain(version=2), AB)), before)
    assert after.find("model").version == 2
    with pytest.raises(NotFound):
        after.find("model", 1)
    value = epoch(6, (plain(version=2), AB))
    served = structs.replace(value.servables["model"][2], deadline_ms=7)
    last = Routes(structs.replace(value, servables={"model": {2: served}}), after)
    assert last.find("model").deadline_s == 0.007
