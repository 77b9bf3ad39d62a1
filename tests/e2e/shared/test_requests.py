"""What a user gets from a cluster that runs: the same answers at every door."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request

import pytest

from tests.e2e import models
from tests.e2e.models import TEXTS
from tests.e2e.running import ROOT, Cluster, ask, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

ROWS = [[1.0, 2.0, 3.0, 4.0], [-1.5, 0.0, 0.25, 8.0]]


def test_unit_on_a_device_answers(cluster: Cluster) -> None:
    answer = cluster.predict("mlp", ROWS)
    assert (answer.status, answer.json) == (200, {"predictions": models.mlp_answer(ROWS, 1)})


def test_text_goes_through_host_table_on_two_shards_and_device(cluster: Cluster) -> None:
    answer = cluster.predict("words", TEXTS)
    assert (answer.status, answer.json) == (200, {"predictions": models.words_answer(TEXTS)})


def test_rows_of_a_look_up_go_from_the_shards_straight_to_the_device(cluster: Cluster) -> None:
    before = joined(cluster)

    def went_straight() -> bool:
        answer = cluster.predict("words", TEXTS)
        assert answer.json == {"predictions": models.words_answer(TEXTS)}
        return joined(cluster) > before  # what is scraped may be a moment old

    until("rows that pass no router", went_straight, 60.0, every_s=0.2)
    text = metrics(cluster)
    assert 'shardserve_device_up{device="device-0"} 1\n' in text
    assert re.search(r'requests_total{.*servable="words".*outcome="in_time"} [1-9]', text)


def test_what_a_servable_is_allowed_changes_without_a_load(cluster: Cluster) -> None:
    def allow(**batching: object) -> None:
        declared = ask(cluster.rest, "/v1/admin/config").json["config"]["servables"]
        for servable in declared:
            if servable["name"] == "mlp":
                servable["batching"] = batching
        body = {"servables": declared}
        answer = ask(cluster.rest, "/v1/admin/config", body, method="PUT")
        assert answer.status == 200, answer.body

    def status_is(status: int) -> bool:
        return cluster.predict("mlp", ROWS).status == status

    allow(rows_max=1, weight=2.0, criticality="critical")
    try:
        until("a bound of one row", lambda: status_is(400), 60.0)
        assert cluster.states("mlp") == {1: "AVAILABLE"}
    finally:
        allow()
    until("the bound as it was", lambda: status_is(200), 60.0)


def joined(cluster: Cluster) -> float:
    """How often the direct port's router had rows of look-ups go straight to a device."""
    lines = metrics(cluster).splitlines()
    [line] = [line for line in lines if line.startswith("serving_router_joined_total")]
    return float(line.split()[1])


def metrics(cluster: Cluster) -> str:
    """What the direct port's router tells."""
    with urllib.request.urlopen(f"{cluster.rest}/metrics", timeout=20) as answer:
        text: str = answer.read().decode()
    return text


def test_a_unit_of_an_installed_package_answers_from_all_its_partitions(cluster: Cluster) -> None:
    answer = cluster.predict("map", [*models.MAP, "nobody"])
    expected = [{"values": vector, "found": True} for vector in models.MAP.values()]
    expected.append({"values": [0.0, 0.0], "found": False})
    assert (answer.status, answer.json) == (200, {"predictions": expected})


@pytest.mark.parametrize(("servable", "instances"), [("mlp", ROWS), ("words", TEXTS)])
def test_both_doors_answer_with_equal_bytes(
    cluster: Cluster, servable: str, instances: list[object]
) -> None:
    direct = cluster.predict(servable, instances, url=cluster.rest)
    through_serve = cluster.predict(servable, instances, url=cluster.serve)
    assert direct.status == 200
    assert (through_serve.status, through_serve.body) == (direct.status, direct.body)


def test_both_doors_refuse_with_equal_bytes(cluster: Cluster) -> None:
    direct = cluster.predict("mlp", [[1.0]], url=cluster.rest)
    through_serve = cluster.predict("mlp", [[1.0]], url=cluster.serve)
    assert direct.status == 400
    assert (through_serve.status, through_serve.body) == (direct.status, direct.body)


def test_command_line_predicts(cluster: Cluster) -> None:
    body = json.dumps({"instances": ROWS})
    printed = cluster.command("predict", "mlp", "--data", body, "--url", cluster.rest)
    assert json.loads(printed) == {"predictions": models.mlp_answer(ROWS, 1)}


def test_handle_answers_an_async_driver_and_raises_typed_errors(cluster: Cluster) -> None:
    """A program of its own, since a process that has joined Ray cannot quite leave it."""
    told = subprocess.run(
        [sys.executable, "-m", "tests.e2e.shared.handle_driver", cluster.ray, cluster.name],
        cwd=ROOT,
        env=cluster.driver_environment(),
        capture_output=True,
        text=True,
        timeout=120.0,
    )
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout.splitlines()[-1])
    assert found["rows"] == models.mlp_answer(ROWS, 1)
    assert found["texts"] == models.words_answer(TEXTS)
    assert found["models"]["mlp"] == [1]
    assert found["error"] == "NotFound"


def test_nothing_is_compiled_once_available(cluster: Cluster) -> None:
    """Batches of every size up to twice the largest bucket, so that all of them are used."""
    for rows in range(1, 2 * max(models.BUCKETS) + 1):
        assert cluster.predict("mlp", ROWS[:1] * rows).status == 200
        assert cluster.predict("words", TEXTS[:1] * rows).status == 200
    actors = cluster.status()["actors"]
    assert {
        name: actor["compiles_after_available"] for name, actor in actors.items()
    } == dict.fromkeys(["device-0", "host-0", "shard-0", "shard-1"], 0)
    # What batches took is saved, and simulated.
    told = cluster.command("costs", "costs.json", "--config", str(cluster.config))
    assert "mlp:1" in told
    words = ["--costs", "costs.json", "--rate", "50", "--seconds", "1", "--json"]
    report = json.loads(cluster.command("simulate", *words))["effsafe"]
    # How many of them are in time is the machine's affair: it may be busy with something else.
    assert 0.0 <= report["servables"]["model-0"]["attainment"] <= 1.0
