"""`shardserve plan`: tables and nodes in words, a plan out; and that the model is what is sent."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from typer.testing import CliRunner

from batching.errors import InvalidArgument, NotFound, ResourceExhausted
from cluster import asked_rows, plans
from cluster.cli import app
from cluster.layout_costs import RESOURCES, Host, Pace, Traffic, loads_of, shape_of
from cluster.layouts import STRATEGIES, TooLarge
from cluster.pooled import Pool
from cluster.tables import Gather
from shards.manifest import Node, Signature
from shards.specs import Spec
from shards.store import open_store, read
from tests.cluster.control_fakes import manifest, table_unit
from tests.cluster.test_pooled import bunch_of, save
from tests.cluster.test_tables import node_of

ONE = "{tables: [{name: a, rows: 1, dim: 1}],"
README = Path(__file__).resolve().parents[2] / "README.md"


def told(*words: str) -> dict[str, Any]:
    found = CliRunner().invoke(app, ["plan", "--json", *words])
    assert found.exit_code == 0, found.output

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    document: dict[str, Any] = json.loads(found.stdout, parse_constant=refuse)
    return document


def refused(*words: str) -> BaseException:
    found = CliRunner().invoke(app, ["plan", *words])
    assert found.exit_code == 1
    assert found.exception is not None
    return found.exception


@pytest.mark.parametrize("example", plans.EXAMPLES)
def test_the_examples_are_planned_for_128_nodes_with_what_limits_them(example: str) -> None:
    plan = told(example, "--hosts", "128", "--memory", "64GiB")
    assert len(plan["nodes"]) == 128
    assert sum(node["bytes"] for node in plan["nodes"]) == sum(
        table["bytes"] for table in plan["tables"].values()
    )
    limits = {name: each["requests_s"] for name, each in plan["limits"].items()}
    assert set(limits) == set(RESOURCES)
    assert plan["limit"]["requests_s"] == min(limits.values())
    assert limits[plan["limit"]["resource"]] == min(limits.values())
    assert set(plan["strategies"]) == set(STRATEGIES)
    assert plan["strategies"]["load"]["requests_s"] == plan["limit"]["requests_s"]
    assert plan["strategies"]["messages"]["messages"] < plan["messages"]


def test_a_plan_is_told_in_words() -> None:
    found = CliRunner().invoke(app, ["plan", "dlrm-v3", "--hosts", "128", "--memory", "64GiB"])
    assert found.exit_code == 0, found.output
    assert "2 tables of 1.03 TB on 128 nodes" in found.output
    assert re.search(r"nic +718,000 +node-000 +1.39 µs +4.6% ", found.output)
    assert re.search(r"memory bandwidth +1,970,000 +node-000 +507 ns +1.7% ", found.output)
    assert re.search(r"shard loop +32,900 +node-000 .* 100.0% ", found.output)
    assert "the shard loop of node-000 is used up" in found.output
    assert "…" not in found.output


def shown(*words: str) -> str:
    found = CliRunner().invoke(app, ["plan", *words])
    assert found.exit_code == 0, found.output
    return " ".join(found.output.split())


def test_a_plan_tells_what_its_limiting_node_is_taken_to_have() -> None:
    words = "68.7 GB for tables, a network of 3 GB/s each way, memory of 80 GB/s at random rows"
    found = shown("dlrm-v2", "--memory", "64GiB", "--nic", "3GB", "--bandwidth", "80GB")
    assert f"Each node is taken to have {words}, and 32 cores" in found
    assert "ids spread evenly over the rows" in found


def test_of_unequal_nodes_the_one_that_is_the_limit_is_told(tmp_path: Path) -> None:
    file = tmp_path / "tables.yaml"
    sizes = "memory: 1GB, bandwidth: 1GB, cores: 4"
    file.write_text(
        "tables: [{name: a, rows: 1000000, dim: 256, pool: false, ids: 2000}]\n"
        f"hosts: [{{nic: 90GB, {sizes}}}, {{nic: 1MB, {sizes}}}]\n"
    )
    assert "node-001 is taken to have 1 GB for tables, a network of 1 MB/s" in shown(str(file))


def test_more_nodes_are_no_way_out_only_where_messages_are_the_limit() -> None:
    words = ["dlrm-v3", "--hosts", "128", "--memory", "64GiB"]
    assert "raise this rate little" in shown(*words)
    assert "raise this rate little" not in shown(*words, "--nic", "10MB")
    assert "raise this rate little" not in shown("dlrm-v3", "--hosts", "16", "--memory", "128GiB")


def test_only_a_plan_with_copies_tells_how_they_are_taken_to_be_asked() -> None:
    assert "Of the copies of a part" in shown("dlrm-v2", "--copies", "2")
    assert "Of the copies of a part" not in shown("dlrm-v2")


def test_what_has_no_room_is_told_with_what_is_short() -> None:
    error = refused("dlrm-v3", "--hosts", "4", "--memory", "100GB", "--json")
    assert isinstance(error, TooLarge)
    assert (error.where, error.short_bytes) == ("", 1_034_240_000_000 - 400 * 10**9)


def test_too_many_requests_are_told_with_what_is_short_and_where() -> None:
    error = refused("dlrm-v3", "--hosts", "8", "--rate", "1e6", "--nic", "1.25GB")
    assert isinstance(error, ResourceExhausted)
    assert re.search(r"1,000,000 requests .* the nic of node-00\d can serve", str(error))


def test_tables_and_nodes_of_the_readme_are_planned(tmp_path: Path) -> None:
    blocks = re.findall(r"^```yaml\n(# tables.yaml.*?)^```", README.read_text(), re.S | re.M)
    file = tmp_path / "tables.yaml"
    file.write_text("".join(blocks))
    plan = told(str(file), "--copies", "2")
    assert [node["memory_bytes"] >> 30 for node in plan["nodes"]] == [256] * 4 + [64] * 2
    assert plan["tables"]["users"]["bytes"] == 10_000_000 * 68
    assert plan["tables"]["items"]["pooled"]
    assert all(len(homes) == 2 for homes in plan["tables"]["items"]["homes"])
    assert len(told(str(file), "--hosts", "3")["nodes"]) == 3


@pytest.mark.parametrize(
    "said",
    [
        "{}", "[", "tables: 3", "tables: [{name: a, rows: 1}]",
        "tables: [{name: a, rows: 1, dim: 1, pooled: true}]",
        "tables: [{name: a, rows: 1, dim: 1, dtype: text}]",
        "tables: [{name: a, rows: 0, dim: 1}]",
        ONE + " hosts: [{memory: much, nic: 1, bandwidth: 1, cores: 1}]}",
        ONE + " hosts: [{memory: 1, nic: 1, bandwidth: 1, cores: 1, count: 9999}]}",
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_meant_is_refused(said: str, tmp_path: Path) -> None:
    file = tmp_path / "tables.yaml"
    file.write_text(said)
    with pytest.raises(InvalidArgument):
        plans.read_file(file)


def test_a_file_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        plans.read_file(tmp_path / "none.yaml")


def test_tables_of_a_bundle_are_planned_as_they_are_cut(tmp_path: Path) -> None:
    save(tmp_path)
    words = ("bags:1", "--store", str(tmp_path), "--hosts", "2", "--ids", "users=7")
    plan = told(*words, "--strategy", "capacity")
    users, items = plan["tables"]["users"], plan["tables"]["items"]
    assert [part["bytes"] for part in users["parts"]] == [160] * 4
    assert (users["ids"], users["pooled"], users["rows"]) == (7, True, 40)
    assert items["bytes"] == 1_000 * 2 * 2
    assert items["ids"] == 1
    saved = read(open_store(str(tmp_path)), "bags", 1)
    with pytest.raises(NotFound):
        asked_rows.shapes_in(saved, "other")


def test_partitions_of_columns_are_tables_that_are_asked_for_the_same_ids() -> None:
    unit = structs.replace(table_unit("w", [8, 24]), rows=1, dim=8, columns=(2, 6))
    parts = tuple(structs.replace(part, first_row=0, rows=1) for part in unit.partitions)
    unit = structs.replace(unit, scheme="columns", partitions=parts)
    asked = Signature(
        method="predict",
        inputs={"ids": Spec(("b", 3), "int64")},
        outputs={},
        nodes=(Node(unit="words", inputs={"ids": "in:ids"}),),
        returns={},
    )
    found = asked_rows.shapes_in(structs.replace(manifest(words=unit), signatures={"only": asked}))
    assert [(s.name, s.nbytes, s.ids, s.answer_bytes) for s in found] == [
        ("words/0", 8, 3, 8),
        ("words/1", 24, 3, 24),
    ]


@pytest.mark.parametrize("word", ["users", "users=many", "nobody=3"])
def test_ids_of_no_table_are_refused(word: str) -> None:
    with pytest.raises(InvalidArgument):
        plans.with_ids([shape_of("users", 1, 1, "float32")], [word])


@pytest.mark.parametrize("words", [("--strategy", "best"), ("--memory", "much"), ("--hosts", "0")])
def test_words_that_mean_nothing_are_refused(words: tuple[str, ...]) -> None:
    assert isinstance(refused("dlrm-v2", *words), InvalidArgument)


def test_the_model_counts_the_bytes_that_routers_send_for_bags() -> None:
    """Bags of drawn ids, cut by the router's own code, against the formula."""
    per, holders, bags, ids = 500, ("a", "b", "c", "d"), 4_000, 6
    drawn = np.random.default_rng(5).integers(0, per * 4, (bags, ids))
    parts = Pool(bunch_of([per] * 4, "sum"), [(drawn, None)]).split(holders)
    sent = {p.holder: sum(a.nbytes for a in p.arrays) for p in parts}
    shape = shape_of("t", per * 4, 2, "float32", ids=ids)
    held = {name: {"t": (per, per * 8)} for name in holders}
    nodes = loads_of(
        [shape], _hosts(holders), held, copies=1, traffic=Traffic(rows=bags), pace=Pace()
    )
    answered = sum(len(part.bags) for part in parts) * 2 * 4
    asked = sum(sent.values())
    crossing = (asked + answered) * 3 / 4
    assert sum(node.sent_bytes for node in nodes) == pytest.approx(crossing, rel=0.01)


def test_the_model_counts_the_bytes_that_routers_send_for_rows() -> None:
    per, holders, count = 500, ("a", "b"), 8_000
    gather = Gather(node_of([per] * 2), np.arange(count) % (per * 2))
    positions = gather.split(holders)
    asked = {name: gather.ids_at(found).nbytes for name, found in positions.items()}
    shape = shape_of("t", per * 2, 2, "float32", ids=count, pooled=False)
    held = {name: {"t": (per, per * 8)} for name in holders}
    nodes = loads_of([shape], _hosts(holders), held, copies=1, traffic=Traffic(), pace=Pace())
    assert sum(node.sent_bytes for node in nodes) == (sum(asked.values()) + gather.nbytes) / 2


def _hosts(names: tuple[str, ...]) -> list[Host]:
    hosts = plans.hosts_of(len(names), 1 << 20, 1, 1, 1)
    return [replace(host, name=name) for name, host in zip(names, hosts, strict=True)]
