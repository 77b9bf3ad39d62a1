"""`shardserve simulate`: scenarios in, a report out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from batching import POLICIES
from batching.errors import InvalidArgument
from cluster.cli import app
from cluster.simulating import Scenario, costs_of, run_scenario, summary


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
