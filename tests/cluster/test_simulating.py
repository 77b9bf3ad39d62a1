"""`shardserve simulate`: scenarios in, a report out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from batching import POLICIES
from batching.errors import InvalidArgument, NotFound
from cluster.cli import app
from cluster.measured import CostFile, MeasuredUnit, costs_of, from_status, save
from cluster.scenarios import Scenario
from cluster.simulating import run_scenario, summary


def reports(*words: str) -> dict[str, Any]:
    found = CliRunner().invoke(app, ["simulate", "--json", "--seconds", "1", *words])
    assert found.exit_code == 0, found.output
    told: dict[str, Any] = json.loads(found.stdout)
    return told


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_serves_a_light_load_in_time(policy: str) -> None:
    [report] = reports("--policy", policy, "--rate", "100").values()
    assert report["servables"]["model-0"]["attainment"] == 1.0


def test_policies_are_compared_on_the_same_requests() -> None:
    found = reports(
        "--policy", "effsafe", "--policy", "round-robin", "--models", "4", "--flood", "20"
    )
    offered = [
        {owner: each["offered"] for owner, each in report["servables"].items()}
        for report in found.values()
    ]
    assert offered[0] == offered[1]
    assert offered[0]["model-3"] > 10 * offered[0]["model-0"]


def test_criticalities_are_told_apart() -> None:
    [report] = reports("--criticality", "critical=10%,sheddable=0.3").values()
    found = report["criticalities"]
    assert list(found) == ["critical", "default", "sheddable"]
    assert (
        sum(each["offered"] for each in found.values())
        == (report["servables"]["model-0"]["offered"])
    )


@pytest.mark.parametrize("text", ["critical", "critical=much", "urgent=0.1"])
def test_shares_of_criticalities_that_are_none_are_refused(text: str) -> None:
    found = CliRunner().invoke(app, ["simulate", "--seconds", "0.2", "--criticality", text])
    assert found.exit_code != 0


def test_a_table_is_printed_for_people() -> None:
    told = CliRunner().invoke(app, ["simulate", "--seconds", "0.2"], env={"COLUMNS": "200"})
    assert "effsafe" in told.stdout
    assert "model-0" in told.stdout


def test_costs_may_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    file.write_text('{"a": {"1": 0.5, "4": 0.5}}')
    found = run_scenario(Scenario(rate=1.0, seconds=5.0, slo_ms=0, seed=1), costs_of(file))
    assert summary(found)["servables"]["model-0"]["p50_ms"] >= 500.0


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"a": {}}', '{"a": {"0": 1.0}}', '{"a": {"1": 0.0}}']
)
def test_a_table_of_costs_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "costs.json"
    file.write_text(text)
    with pytest.raises(InvalidArgument, match=r"costs\.json"):
        costs_of(file)


def test_requests_may_come_from_a_trace(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("at,owner,rows,budget_ms\n0.0,model-0,3,100\n0.1,model-0,1,\n")
    found = run_scenario(Scenario(trace=str(file)))
    assert (found.owners["model-0"].offered, found.rows) == (2, 4)


def test_scenarios_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="no policy 'best': effsafe, round-robin"):
        run_scenario(Scenario(policy="best"))
    with pytest.raises(InvalidArgument, match="needs a model"):
        run_scenario(Scenario(models=0))
    with pytest.raises(InvalidArgument, match="cannot be read"):
        run_scenario(Scenario(trace="/nowhere/trace.csv"))


# Clusters, costs and loads


def test_devices_routers_and_chains_are_simulated() -> None:
    words = ["--devices", "3", "--replicas", "2", "--routers", "2", "--chain", "2", "--shared"]
    words += ["--models", "4", "--rate", "200", "--delay-ms", "0.1", "--delay-cv", "1"]
    words += ["--router-us", "30", "--host-us", "15", "--batch-us", "50"]
    [report] = reports(*words).values()
    assert len(report["devices"]) == 3
    assert all(device["batches"] for device in report["devices"])
    assert all(device["host"] > 0 for device in report["devices"])
    assert all(told["attainment"] == 1.0 for told in report["servables"].values())


def test_lengths_go_to_the_buckets_that_hold_them() -> None:
    learned = reports("--lengths", "--rate", "2500")["effsafe"]
    one = reports("--lengths", "--buckets", "330", "--rate", "2500")["effsafe"]
    assert learned["goodput"] > 1.5 * one["goodput"]


def test_policies_are_drawn_over_loads(tmp_path: Path) -> None:
    file = tmp_path / "plots" / "loads.png"
    words = ["--policy", "effsafe", "--policy", "fifo-late", "--loads", "0.5,1.5"]
    found = reports(*words, "--rate", "3000", "--plot", str(file))
    assert found["effsafe"]["0.5"]["attainment"] > 0.99
    assert found["effsafe"]["1.5"]["goodput"] > 2 * found["fifo-late"]["1.5"]["goodput"]
    assert file.read_bytes().startswith(b"\x89PNG")
    told = CliRunner().invoke(app, ["simulate", "--seconds", "0.1", "--loads", "0.5,1"])
    assert "a second in time" in told.stdout


def test_saved_costs_are_what_the_devices_told(tmp_path: Path) -> None:
    sizes = [[1, 0.004, 0.006, 9], [8, 0.005, 0.007, 30]]
    status = {
        "actors": {
            "device-0": {
                "costs": [{"unit": "u", "shape": [16], "sizes": sizes}],
                "holds": {"m:3": 1},
            },
            "shard-0": {"costs": [], "holds": {"table:1": 1}},
        }
    }
    file = tmp_path / "costs.json"
    save(from_status(status), file)
    [(key, found)] = costs_of(file).items()
    assert (key, found[8]) == (("u", (16,)), (0.005, 0.007, 30))
    assert json.loads(file.read_text())["servables"] == ["m:3"]
    with pytest.raises(NotFound, match="nothing is loaded"):
        from_status({"actors": {}})
    with pytest.raises(InvalidArgument, match="cannot be written"):
        save(from_status(status), tmp_path / "nowhere" / "costs.json")


def test_of_two_devices_that_measured_a_unit_the_one_that_ran_more_counts(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    measured = tuple(
        MeasuredUnit(device=f"device-{count}", unit="u", sizes=((1, count / 100, 1.0, count),))
        for count in (3, 9, 5)
    )
    save(CostFile(measured=measured), file)
    [sizes] = costs_of(file).values()
    assert sizes[1].batches == 9


def test_batches_vary_as_was_measured_unless_told_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    save(
        CostFile(measured=(MeasuredUnit(device="d", unit="u", sizes=((1, 0.01, 0.02, 9),)),)), file
    )
    words = ["--costs", str(file), "--rate", "20", "--slo-ms", "0"]
    [varied] = reports(*words).values()
    [fixed] = reports(*words, "--noise", "0").values()
    assert fixed["servables"]["model-0"]["p50_ms"] == pytest.approx(10.0, abs=0.1)
    assert varied["servables"]["model-0"]["p99_ms"] > fixed["servables"]["model-0"]["p99_ms"]


def test_a_trace_may_name_its_own_models(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("time,model,length\n0,ranker,12\n0.1,encoder,300\n")
    found = run_scenario(Scenario(trace=str(file), lengths=True, slo_ms=0))
    assert {owner: outcome.good for owner, outcome in found.owners.items()} == {
        "ranker": 1,
        "encoder": 1,
    }


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--loads", "much"], "no list of numbers"),
        (["--loads", "0"], "loads are positive"),
        (["--replicas", "2"], "replicas are as many"),
        (["--alpha-ms", "0", "--beta-ms", "0"], "takes some time"),
        (["--plot", "/dev/null/x.png"], "cannot be drawn"),
    ],
)
def test_words_that_cannot_be_meant_are_refused(words: list[str], why: str) -> None:
    found = CliRunner().invoke(app, ["simulate", "--seconds", "0.05", *words])
    assert isinstance(found.exception, InvalidArgument)
    assert why in str(found.exception)
