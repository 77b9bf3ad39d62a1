"""Versions come and go under a running cluster, and what is declared changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from shards.bundle import Bundle
from shards.folding import folded
from shards.manifest import MapUnit, TableUnit
from shards.overlays import rows_of_partition
from shards.store import LocalStore
from tests.e2e import models
from tests.e2e.running import Cluster, ask, until
from tests.e2e.shared.conftest import SERVABLES
from tests.e2e.traffic import Traffic

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

ROW = [[1.0, 2.0, 3.0, 4.0]]
SERVED_S = 120.0


def test_new_version_takes_over_and_the_old_one_goes_without_a_failed_request(
    cluster: Cluster,
) -> None:
    answers = [{"predictions": models.mlp_answer(ROW, version)} for version in (1, 2)]
    with Traffic(lambda: cluster.predict("rolling", ROW)) as traffic:
        models.save_mlp(cluster.store, 2, "rolling")
        until(
            "version 1 to be gone",
            lambda: cluster.states("rolling") in ({2: "AVAILABLE"}, {1: "END", 2: "AVAILABLE"}),
            SERVED_S,
            every_s=0.2,
        )
        until("an answer after that", traffic.answered_since_now(), SERVED_S)
    assert traffic.failures() == []
    got = [json.loads(outcome.text) for outcome in traffic.outcomes]
    assert got[-1] == answers[1]
    # Never back and forth: all answers of the old version come before all of the new one.
    assert sorted(got, key=answers.index) == got
    status = cluster.status()["actors"]["device-0"]
    assert status["holds"]["rolling:2"] == "LOADED"
    assert "rolling:1" not in status["holds"]
    assert status["compiles_after_available"] == 0


def test_a_label_comes_with_its_load_and_a_rollback_fails_no_request(cluster: Cluster) -> None:
    """Over HTTP and by the command line; the split by the newer version's label goes along."""
    if not (cluster.store / "rolling" / "2").exists():
        models.save_mlp(cluster.store, 2, "rolling")
    answers = [{"predictions": models.mlp_answer(ROW, version)} for version in (1, 2)]
    with Traffic(lambda: cluster.predict("rolling", ROW)) as traffic:
        for change, body in (
            ("load?wait_s=30", {"version": 2, "label": "new"}),
            ("load?wait_s=30", {"version": 1, "label": "old"}),
            ("split", {"weights": {"new": 1}}),
        ):
            made = ask(cluster.rest, f"/v1/admin/models/rolling:{change}", body)
            assert made.status == 200, made.body
        assert by_label(cluster, "old") == answers[0]
        assert by_label(cluster, "new") == answers[1]
        told = cluster.command("rollback", "rolling", "--config", str(cluster.config))
        assert "rolling.labels.new: 2 -> 1" in told
        assert by_label(cluster, "new") == answers[0]
        until("an answer after that", traffic.answered_since_now(), SERVED_S)
    assert traffic.failures() == []
    assert json.loads(traffic.outcomes[-1].text) == answers[0]


def test_a_delta_that_is_served_is_compacted_ahead_and_stays_what_it_is(cluster: Cluster) -> None:
    store = LocalStore(cluster.store)
    rows = next(rows_of_partition(store, table_of(store, 1), 0))
    with Bundle.delta(store, "words", base=1, version=2) as bundle:
        bundle.update_rows("table", [0], rows[:1])  # as it was: the answers of others stay, too
    until("a fold", lambda: folded(store.shelf), SERVED_S, every_s=0.1)
    until("version 2", lambda: cluster.states("words").get(2) == "AVAILABLE", SERVED_S)
    assert store.read_manifest("words", 2) == bundle.manifest
    with Bundle.delta(store, "words", version=3) as bundle:
        bundle.update_rows("table", [1], rows[1:2])
    assert len(table_of(store, 3).partitions[0].overlays) == 1
    until("version 3", lambda: cluster.states("words").get(3) == "AVAILABLE", SERVED_S)
    answer = cluster.predict("words", ["@A"])
    assert answer.json == {"predictions": models.words_answer(["@A"])}


def table_of(store: LocalStore, version: int) -> TableUnit:
    unit = store.read_manifest("words", version).units["table"]
    assert isinstance(unit, TableUnit)
    return unit


def test_corrupt_version_leaves_the_old_one_serving_and_says_why(
    cluster: Cluster, tmp_path: Path
) -> None:
    """The blob of its parameters has other bytes than its name promises, as after a bad copy."""
    with Traffic(lambda: cluster.predict("careful", ROW)) as traffic:
        bring_corrupt_version(cluster.store, tmp_path / "elsewhere", 3)
        problem = until("a refusal", lambda: trouble(cluster, "careful", 3), SERVED_S, every_s=0.5)
        until("an answer after that", traffic.answered_since_now(), SERVED_S)
    assert "corrupt" in problem
    assert traffic.failures() == []
    got = {json.dumps(json.loads(outcome.text)) for outcome in traffic.outcomes}
    assert got == {json.dumps({"predictions": models.mlp_answer(ROW, 1)})}
    assert cluster.states("careful")[1] == "AVAILABLE"


def test_half_written_version_does_not_exist(cluster: Cluster) -> None:
    folder = cluster.store / "careful" / "9"
    folder.mkdir()
    (folder / "servable.json.tmp").write_text('{"schema":')
    found = cluster.status()["servables"]["careful"]
    assert 9 not in found["complete"]
    assert cluster.predict("careful", ROW).status == 200


def test_apply_adds_a_servable_and_leaves_the_others(cluster: Cluster) -> None:
    models.save_mlp(cluster.store, 5, "late")
    assert cluster.predict("late", ROW).status == 404
    cluster.declare(*({"name": name} for name in (*SERVABLES, "late")))
    with Traffic(lambda: cluster.predict("mlp", ROW)) as traffic:
        cluster.command("apply", "--config", str(cluster.config))
        answer = cluster.predict("late", ROW)
    assert answer.json == {"predictions": models.mlp_answer(ROW, 5)}
    assert traffic.failures() == []


def test_apply_takes_a_servable_away(cluster: Cluster) -> None:
    models.save_mlp(cluster.store, 1, "brief")
    cluster.declare(*({"name": name} for name in (*SERVABLES, "brief")))
    cluster.command("apply", "--config", str(cluster.config))
    assert cluster.predict("brief", ROW).status == 200
    cluster.declare(*({"name": name} for name in SERVABLES))
    cluster.command("apply", "--config", str(cluster.config))
    until("it to be unknown", lambda: cluster.predict("brief", ROW).status == 404, SERVED_S)


def test_apply_refuses_what_a_running_cluster_cannot_change(cluster: Cluster) -> None:
    text = cluster.config.read_text()
    try:
        cluster.config.write_text(text.replace("cluster:\n", "cluster:\n  host_memory: 1MiB\n"))
        told = cluster.run("apply", "--config", str(cluster.config))
    finally:
        cluster.config.write_text(text)
    assert told.returncode == 1
    assert "cluster.host_memory cannot change" in told.stderr


def bring_corrupt_version(store: Path, elsewhere: Path, version: int) -> None:
    """Copy a version from another store, a blob of which is damaged on the way; manifest last."""
    models.save_mlp(elsewhere, version, "careful")
    unit = LocalStore(elsewhere).read_manifest("careful", version).units["model"]
    assert isinstance(unit, MapUnit)
    damaged = unit.params[0].blob
    blobs = Path("blobs", "blake3")
    for source in (elsewhere / blobs).iterdir():
        target = store / blobs / source.name
        if source.name == damaged.digest:
            target.write_bytes(bytes(damaged.size))
        elif not target.exists():
            shutil.copy2(source, target)
    folder = Path("careful", str(version))
    (store / folder).mkdir()
    incoming = store / folder / "incoming"
    shutil.copy2(elsewhere / folder / "servable.json", incoming)
    incoming.rename(store / folder / "servable.json")


def by_label(cluster: Cluster, label: str) -> object:
    """What the version with a label answers."""
    return ask(cluster.rest, f"/v1/models/rolling/labels/{label}:predict", {"instances": ROW}).json


def trouble(cluster: Cluster, servable: str, version: int) -> str:
    """Why a version failed, once it has."""
    for row in cluster.status()["servables"][servable]["versions"]:
        if row["version"] == version:
            return str(row["error_message"])
    return ""
