"""`shardserve bundle`: what people type, and what they are told."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from batching.errors import FailedPrecondition, InvalidArgument, NotFound, ServingError
from cluster.bundles import app, parse_age
from cluster.config import parse
from cluster.declared import DeclaredState, Placed, write
from shards.bundle import Bundle
from shards.local import LocalStore
from shards.manifest import TableUnit
from shards.recorded import Recorded, encode_requests
from shards.warmups import read_warmups
from tests.buckets import CREDENTIALS, Bucket
from tests.shards.bundles import full_manifest


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "store")
    for version in (1, 2):
        store.write_manifest(full_manifest(store, version=version))
    return store


def told(*words: str) -> Any:
    """The JSON that a command prints."""
    done = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])


def test_a_bundle_goes_into_a_file_to_a_bucket_and_back(
    store: LocalStore, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = str(tmp_path / "ranker.tar")
    assert told("pack", store.url, "ranker", file)["versions"] == ["ranker:2"]
    assert told("push", file, bucket.url) == {
        "versions": ["ranker:2"], "blobs": 5, "bytes": 169, "there": 0,
    }  # fmt: skip
    assert told("push", store.url, bucket.url)["there"] == 5
    back = LocalStore(tmp_path / "back")
    assert told("pull", bucket.url, back.url, "ranker:*")["versions"] == ["ranker:1", "ranker:2"]
    assert back.verify("ranker", 1) == store.read_manifest("ranker", 1)


def test_no_credential_is_printed(bucket: Bucket, store: LocalStore) -> None:
    done = CliRunner().invoke(app, ["push", store.url, bucket.url])
    assert done.exit_code == 0
    assert "ranker:1, ranker:2: 5 blobs copied" in done.output
    for secret in (CREDENTIALS["AWS_SECRET_ACCESS_KEY"], CREDENTIALS["AWS_ACCESS_KEY_ID"]):
        assert secret not in done.output


def test_gc_tells_what_it_removes_and_what_is_too_young(store: LocalStore) -> None:
    loose = store.put(b"loose")
    assert told("gc", store.url)["young"] == 1
    would = told("gc", store.url, "--grace", "0s", "--dry-run")
    assert (would["removed"], would["dry_run"]) == ([loose.digest], True)
    assert told("gc", store.url, "--grace", "0s")["removed"] == [loose.digest]
    done = CliRunner().invoke(app, ["gc", store.url])
    assert "0 of 5 blobs removed (0.0 MiB of 0.0 MiB); 0 unreferenced" in done.output
    store.verify("ranker", 2)


def test_gc_removes_what_a_save_that_died_has_left_half_written(store: LocalStore) -> None:
    half = store.path / "blobs" / "blake3" / ".tmp-1-abc"
    half.write_bytes(bytes(100))
    assert told("gc", store.url)["left_over_bytes"] == 0
    assert told("gc", store.url, "--grace", "0s")["left_over_bytes"] == 100
    assert not half.exists()


def test_gc_waits_for_a_cluster_that_holds_a_deleted_version(store: LocalStore) -> None:
    state = DeclaredState(
        term=1,
        seq=1,
        config=parse("store: x"),
        placements=(Placed(servable="ranker", version=1, available=True, units={}),),
    )
    write(store, "main", state)
    told("gc", store.url)
    os.unlink(store.path / "ranker" / "1" / "servable.json")
    loose = store.put(b"loose")
    with pytest.raises(FailedPrecondition, match="ranker:1"):
        told("gc", store.url, "--grace", "0s")
    assert told("gc", store.url, "--grace", "0s", "--force")["removed"] == [loose.digest]


def test_what_cannot_be_meant_is_refused(store: LocalStore, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        told("gc", str(tmp_path / "nowhere"))
    with pytest.raises(InvalidArgument, match="bundle push"):
        told("pack", store.url, "ranker", "s3://bucket/x")
    for text in ("24", "h", "-1h", "1w", ""):
        with pytest.raises(InvalidArgument):
            parse_age(text)
    assert [parse_age(text) for text in ("90s", "1.5m", "24h", "7d")] == [90, 90, 86400, 604800]


def test_a_version_is_compacted_into_the_next_one(store: LocalStore) -> None:
    with Bundle.delta(store, "ranker") as bundle:
        bundle.update_rows("words", [1, 7], np.full((2, 2), 9, np.float32))
    assert told("compact", store.url, "ranker") == {
        "name": "ranker", "base": 3, "version": 4, "tables": ["words"],
    }  # fmt: skip
    assert not any(part.overlays for part in table_of(store, 4).partitions)
    assert table_of(store, 4) != table_of(store, 2)
    done = CliRunner().invoke(app, ["compact", store.url, "ranker:3", "--as", "9"])
    assert "ranker:9 is ranker:3 without overlays: words" in done.output
    assert table_of(store, 9) == table_of(store, 4)


def test_a_version_is_folded_for_the_deltas_upon_it(store: LocalStore) -> None:
    with Bundle.delta(store, "ranker") as bundle:
        bundle.update_rows("words", [1], np.full((1, 2), 9, np.float32))
    expected = {"name": "ranker", "version": 3, "partitions": 1}
    assert told("compact", store.url, "ranker", "--ahead") == expected
    done = CliRunner().invoke(app, ["compact", store.url, "ranker:3", "--ahead"])
    assert "ranker:3: 0 partitions are folded for deltas upon it" in done.output
    assert store.versions("ranker") == (1, 2, 3)
    with Bundle.delta(store, "ranker") as bundle:
        bundle.update_rows("words", [1], np.full((1, 2), 8, np.float32))
    assert sorted(len(part.overlays) for part in table_of(store, 4).partitions)[-1] == 1
    done = CliRunner().invoke(app, ["compact", store.url, "ranker:3", "--ahead", "--as", "9"])
    assert "--as has nothing to name" in str(done.exception)


def test_a_version_without_overlays_is_not_saved_again(store: LocalStore) -> None:
    done = CliRunner().invoke(app, ["compact", store.url, "ranker:2"])
    assert "ranker:2 has no overlays" in str(done.exception)
    done = CliRunner().invoke(app, ["compact", store.url, "ranker:*"])
    assert "'ranker:*' names 2 versions, not one" in str(done.exception)
    assert store.versions("ranker") == (1, 2)


def table_of(store: LocalStore, version: int) -> TableUnit:
    unit = store.read_manifest("ranker", version).units["words"]
    assert isinstance(unit, TableUnit)
    return unit


def recorded(*texts: bytes) -> list[Recorded]:
    return [
        Recorded(signature="serving_default", inputs={"text": np.array([text], object)})
        for text in texts
    ]


def test_warmups_are_added_from_logs_and_from_bodies(store: LocalStore, tmp_path: Path) -> None:
    log = tmp_path / "some.requests"
    log.write_bytes(b"".join(encode_requests(recorded(b"a", b"b", b"c", b"d"), "log")))
    body = tmp_path / "body.json"
    body.write_text('{"instances": ["e", "f"]}')
    assert told("add-warmup", store.url, "ranker:1", str(log), str(body), "--count", "3") == {
        "name": "ranker", "version": 1, "added": 3, "warmups": 3,
    }  # fmt: skip
    found = read_warmups(store, store.read_manifest("ranker", 1))
    assert [each.inputs["text"].tolist() for each in found] == [[b"a"], [b"b"], [b"d"]]
    told("add-warmup", store.url, "ranker:1", str(body), "--replace")
    (only,) = read_warmups(store, store.read_manifest("ranker", 1))
    assert only.inputs["text"].tolist() == [b"e", b"f"]
    assert store.read_manifest("ranker", 2).warmups is None


def test_what_a_torn_log_has_is_added_and_the_rest_is_said(
    store: LocalStore, tmp_path: Path
) -> None:
    log = tmp_path / "some.requests"
    log.write_bytes(b"".join(encode_requests(recorded(b"a", b"b"), "log"))[:-1])
    done = CliRunner().invoke(app, ["add-warmup", store.url, "ranker", str(log)])
    assert done.exit_code == 0, done.output
    assert "request 2, at byte" in done.output
    assert "ranker:2: 1 of 1 added, 1 warm-up requests" in done.output


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.requests", b"no", "not a file of recorded requests"),
        ("a.json", b"{", "a.json: "),
        ("a.json", b'{"signature_name": "other", "instances": ["a"]}', "other"),
        ("a.requests", None, "cannot be read"),
    ],
)
def test_a_file_of_no_requests_is_refused(
    store: LocalStore, tmp_path: Path, name: str, data: bytes | None, problem: str
) -> None:
    file = tmp_path / name
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(ServingError, match=problem):
        CliRunner().invoke(
            app, ["add-warmup", store.url, "ranker", str(file)], catch_exceptions=False
        )
