"""Processes of a running cluster die without warning. What the clients see, and who is touched."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.processes import process
from tests.e2e.models import TEXTS, words_answer
from tests.e2e.running import Answer, Cluster, processes_of, until
from tests.e2e.shared.conftest import generations
from tests.e2e.traffic import TYPED, Outcome, Traffic

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

ROW = [[1.0, 2.0, 3.0, 4.0]]
BACK_S = 120.0
DEADLINE_MS = 3000


def rows(cluster: Cluster) -> Callable[[], Answer]:
    return lambda: cluster.predict("mlp", ROW, deadline_ms=DEADLINE_MS)


def texts(cluster: Cluster) -> Callable[[], Answer]:
    # Its ids lie in all partitions, so every shard is asked.
    return lambda: cluster.predict("words", ["@PX`hpx~"], deadline_ms=DEADLINE_MS)


def late(outcomes: list[Outcome]) -> list[Outcome]:
    """Requests that ended well after their deadline; the constant is for a busy machine."""
    return [outcome for outcome in outcomes if outcome.took_s > DEADLINE_MS / 1000 + 10.0]


def test_device_killed_gives_typed_errors_and_comes_back(
    cluster: Cluster, kill: Callable[[int], None]
) -> None:
    before = cluster.settled()
    with Traffic(rows(cluster)) as traffic:
        kill(before["actors"]["device-0"]["pid"])
        until("an error", lambda: traffic.failures(), BACK_S)
        until("the device to be back", traffic.answered_since_now(), BACK_S)
    assert traffic.failures(allowed=TYPED) == []
    assert late(list(traffic.outcomes)) == []
    after = cluster.settled()
    assert changed(generations(before), generations(after)) == {"device-0"}
    assert after["actors"]["device-0"]["compiles_after_available"] == 0


def test_compile_process_ends_with_its_device_and_is_not_missed_when_killed_alone(
    cluster: Cluster, kill: Callable[[int], None]
) -> None:
    old = cluster.settled()["actors"]["device-0"]["pid"]
    kill(old)
    # One that comes back starts with a compile process at its side.
    device, child = until("a new device", lambda: compiling(cluster, but_of=old), BACK_S)
    kill(device)
    until("its compile process to end", lambda: process(child) is None, BACK_S)
    device, child = until("another", lambda: compiling(cluster, but_of=device), BACK_S)
    kill(child)
    until("an answer", lambda: cluster.answers("mlp", ROW), BACK_S)
    after = cluster.settled()["actors"]["device-0"]
    assert after["pid"] == device
    assert after["compiles_after_available"] == 0


def compiling(cluster: Cluster, but_of: int) -> tuple[int, int] | None:
    """A device actor's process other than this, and its compile process."""
    for pid, _ in processes_of(cluster.ray_file()):
        directory = Path(f"/proc/{pid}")
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
            is_compiling = b"shards.compiling.child" in (directory / "cmdline").read_bytes()
            # Only then has it said with whom it ends. One that replaces another that a busy machine
            # starved is of the usual class.
            is_idle = os.sched_getscheduler(pid) == os.SCHED_IDLE
            has_begun = is_idle or niceness(pid) > niceness(parent)
            if is_compiling and has_begun and parent not in (but_of, 1):
                return parent, pid
    return None


def niceness(pid: int) -> int:
    return os.getpriority(os.PRIO_PROCESS, pid)


def test_shard_killed_gives_typed_errors_and_comes_back(
    cluster: Cluster, kill: Callable[[int], None]
) -> None:
    before = cluster.settled()
    with Traffic(texts(cluster)) as traffic:
        kill(before["actors"]["shard-1"]["pid"])
        until("an error", lambda: traffic.failures(), BACK_S)
        assert cluster.predict("mlp", ROW).status == 200, "others are not concerned"
        until("the shard to be back", traffic.answered_since_now(), BACK_S)
    assert traffic.failures(allowed=TYPED) == []
    assert late(list(traffic.outcomes)) == []
    answer = cluster.predict("words", TEXTS)
    assert answer.json == {"predictions": words_answer(TEXTS)}
    assert changed(generations(before), generations(cluster.settled())) == {"shard-1"}


def test_shard_that_is_stopped_and_not_dead_is_replaced_and_its_process_ends(
    cluster: Cluster, stop: Callable[[int], None]
) -> None:
    before = cluster.settled()
    pid = before["actors"]["shard-0"]["pid"]
    with Traffic(texts(cluster)) as traffic:
        stop(pid)
        until("an error", lambda: traffic.failures(), BACK_S)
        until("another shard", traffic.answered_since_now(), BACK_S)
    assert traffic.failures(allowed=TYPED) == []
    assert late(list(traffic.outcomes)) == []
    assert changed(generations(before), generations(cluster.settled())) == {"shard-0"}
    until("the old process to be gone", lambda: not Path(f"/proc/{pid}").exists(), BACK_S)


def test_controller_killed_is_not_noticed_by_requests(
    cluster: Cluster, kill: Callable[[int], None]
) -> None:
    before = cluster.settled()
    with Traffic(lambda: cluster.predict("mlp", ROW)) as traffic:
        kill(before["pid"])
        after = until("a new reign", lambda: reigning_since(cluster, before), BACK_S)
        until("requests under the new reign", traffic.answered_since_now(), BACK_S)
    assert traffic.failures() == []
    assert generations(after) == generations(before)
    assert after["epoch"] > before["epoch"]


def test_device_killed_while_the_controller_is_away_comes_back_at_both_doors(
    cluster: Cluster, kill: Callable[[int], None]
) -> None:
    """The next reign starts it anew, and both routers hear of its new address."""
    before = cluster.settled()
    kill(before["pid"])
    kill(before["actors"]["device-0"]["pid"])
    until("the device to be gone", lambda: not cluster.answers("mlp", ROW), BACK_S)
    for url in (cluster.rest, cluster.serve):
        until(
            f"{url} to answer again",
            lambda url=url: cluster.answers("mlp", ROW, url=url),  # type: ignore[misc]
            BACK_S,
        )
    after = until("a new reign", lambda: reigning_since(cluster, before), BACK_S)
    assert changed(generations(before), generations(after)) == {"device-0"}


def test_router_killed_resets_connections_and_its_port_answers_again(
    cluster: Cluster, kill: Callable[[int], None]
) -> None:
    before = cluster.settled()
    [door] = before["doors"]
    with Traffic(rows(cluster)) as traffic:
        kill(door["pid"])
        until("a broken connection", lambda: traffic.statuses[0], BACK_S)
        until("the port to answer", traffic.answered_since_now(), BACK_S)

    def known() -> dict[str, Any] | None:
        """The port may answer before the controller has heard whose it is now."""
        found = cluster.settled()
        return found if door["pid"] not in [each["pid"] for each in found["doors"]] else None

    after = until("the controller to know the new router", known, BACK_S)
    [again] = after["doors"]
    assert (again["port"], again["error"]) == (door["port"], "")
    assert generations(after) == generations(before)


def test_serve_replica_killed_comes_back_and_loads_nothing(
    cluster: Cluster, kill: Callable[[int], None]
) -> None:
    before = cluster.settled()
    pid = the_replica(cluster)
    kill(pid)
    until("another replica", lambda: [p for p in replicas(cluster) if p != pid], BACK_S)
    until(
        "the Serve door to answer",
        lambda: cluster.answers("mlp", ROW, url=cluster.serve),
        BACK_S,
    )
    assert generations(cluster.settled()) == generations(before)


def test_deploying_again_under_load_loses_no_request_and_loads_nothing(cluster: Cluster) -> None:
    """Ray Serve replaces the replica; weights and the direct port are not its business."""
    before = cluster.settled()
    old = the_replica(cluster)
    with (
        Traffic(lambda: cluster.predict("mlp", ROW)) as direct,
        Traffic(lambda: cluster.predict("mlp", ROW, url=cluster.serve)) as through_serve,
    ):
        cluster.command("deploy", "--config", str(cluster.config))
        until("another replica", lambda: [p for p in replicas(cluster) if p != old], BACK_S)
        for traffic in (direct, through_serve):
            until("answers", traffic.answered_since_now(), BACK_S)
    assert direct.failures() == []
    assert through_serve.failures() == []
    after = cluster.settled()
    assert generations(after) == generations(before)
    assert [door["pid"] for door in after["doors"]] == [door["pid"] for door in before["doors"]]


def changed(before: dict[str, int], after: dict[str, int]) -> set[str]:
    """Actors of which another process runs."""
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def reigning_since(cluster: Cluster, before: dict[str, Any]) -> dict[str, Any] | None:
    """The status, once another reign than that of before knows its cluster."""
    status = cluster.settled()
    return status if status["term"] > before["term"] else None


def the_replica(cluster: Cluster) -> int:
    """The only replica, once one that was replaced is gone."""
    return until(
        "one replica", lambda: [*found] if len(found := replicas(cluster)) == 1 else None, BACK_S
    )[0]


def replicas(cluster: Cluster) -> list[int]:
    """Processes of the Serve deployment; they are in no status of ours."""
    return [
        process.pid
        for process in processes_of(cluster.ray_file())
        if b"ServeReplica:shardserve" in read(Path(f"/proc/{process.pid}/cmdline"))
    ]


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
