"""A cluster that is fed from a bucket, and what happens when the bucket is away."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from shards.local import LocalStore
from shards.progress import Progress
from shards.transfer import transfer, versions_named
from tests.buckets import CREDENTIALS, Bucket, BucketServer
from tests.e2e import models
from tests.e2e.running import Cluster, until
from tests.e2e.traffic import Traffic

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

ROW = [[1.0, 2.0, 3.0, 4.0]]
SERVED_S = 120.0


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketServer]:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    server = BucketServer()
    server.start()
    try:
        yield server
    finally:
        server.stop()


def push_all(origin: Path, bucket: Bucket, cache: Path) -> None:
    store = LocalStore(origin)
    transfer(store, bucket.store(cache), versions_named(store, []), Progress(0))


def test_requests_are_answered_while_the_store_is_away_and_new_versions_come_after_that(
    server: BucketServer, tmp_path: Path
) -> None:
    origin, bucket = tmp_path / "origin", server.bucket()
    models.save_mlp(origin, 1)
    push_all(origin, bucket, tmp_path / "pushed")
    cluster = Cluster(tmp_path, "bucket", devices=1, shards=0, hosts=0)
    cluster.environment |= CREDENTIALS
    cluster.store_url = bucket.url
    cluster.declare({"name": "mlp"})
    answers = [{"predictions": models.mlp_answer(ROW, version)} for version in (1, 2)]
    try:
        cluster.up("--no-serve")
        assert cluster.predict("mlp", ROW).json == answers[0]
        with Traffic(lambda: cluster.predict("mlp", ROW)) as traffic:
            server.pause()  # the controller hears of it only when its calls time out
            until("an answer meanwhile", traffic.answered_since_now(), SERVED_S)
            server.stop()
            models.save_mlp(origin, 2)
            until("the outage to be seen", lambda: "UNAVAILABLE" in listing(cluster), SERVED_S)
            until("an answer after that", traffic.answered_since_now(), SERVED_S)
            server.start()
            bucket.make()
            push_all(origin, bucket, tmp_path / "pushed")
            until(
                "version 2 alone",
                lambda: (
                    cluster.states("mlp").get(2) == "AVAILABLE"
                    and cluster.states("mlp").get(1) in (None, "END")
                ),
                SERVED_S,
                every_s=0.2,
            )
            until("an answer after that", traffic.answered_since_now(), SERVED_S)
        assert traffic.failures() == []
        got = [json.loads(outcome.text) for outcome in traffic.outcomes]
        assert got[-1] == answers[1]
        assert sorted(got, key=answers.index) == got
        blobs = tmp_path / "cache" / "shardserve" / "blobs" / "blobs"
        assert len(list(blobs.iterdir())) >= 2
    finally:
        cluster.down()


def listing(cluster: Cluster) -> str:
    return str(cluster.status()["servables"]["mlp"]["listing"])
