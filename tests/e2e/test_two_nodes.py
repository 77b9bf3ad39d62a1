"""Two raylets: shards are spread over both, and what is apart speaks TCP, here within TLS."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cluster.environment import MARK
from cluster.processes import end_all
from tests.e2e import models
from tests.e2e.models import TEXTS
from tests.e2e.running import ROOT, Cluster
from tests.shards.certificates import Authority

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


def test_shards_sit_on_both_nodes_and_both_routers_reach_all_of_them(tmp_path: Path) -> None:
    """Every actor is on another node than one of the two routers, which reaches it over TCP."""
    files = Authority().files("node")
    tls = {"certificate": files.certificate, "key": files.key, "ca": files.ca}
    cluster = Cluster(tmp_path, "two", shards=2, allow_entry_points=["tests.e2e.*"], tls=tls)
    cluster.store.mkdir()
    cluster.declare({"name": "words", "shards": 2})
    mark = secrets.token_hex(8)
    with tempfile.TemporaryDirectory(prefix="ssv-", dir="/tmp", ignore_cleanup_errors=True) as ray:
        try:
            told = subprocess.run(
                [sys.executable, "-m", "tests.e2e.two_nodes", str(tmp_path), ray, mark],
                cwd=ROOT,
                env=cluster.environment,
                capture_output=True,
                text=True,
                timeout=350.0,
            )
        finally:
            end_all(MARK, mark)
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout.splitlines()[-1])
    nodes = found["nodes"]
    assert nodes["shard-0"] != nodes["shard-1"]
    assert found["connections"] == dict.fromkeys(nodes, 1)
    assert found["answers"].keys() == {nodes["shard-0"], nodes["shard-1"]}
    for answer in found["answers"].values():
        assert answer == {"predictions": models.words_answer(TEXTS)}
    drained = found["drained"]
    assert drained["statuses"] == [200]
    assert drained["actors"].keys() != nodes.keys()
    assert set(drained["actors"].values()) == set(nodes.values()) - {drained["node"]}
    assert found["left"] == [], "ended by us on a Ray that is not ours"
