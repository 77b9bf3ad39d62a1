"""Objects of a bucket: what is missing, what is an outage, and who wins."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from batching.errors import InvalidArgument, Unavailable
from shards.locations import parse_location
from shards.objects import CHUNK, Objects, connect
from tests.buckets import CREDENTIALS, Bucket, BucketServer, hanging, paging, trickling

#: Everything that asks something of a bucket.
ASKING: list[Callable[[Objects], Any]] = [
    lambda objects: objects.list("a"),
    lambda objects: objects.stat("a"),
    lambda objects: objects.open("a"),
    lambda objects: objects.read("a", 10),
    lambda objects: objects.write("a", b"x"),
    lambda objects: objects.delete("a"),
    lambda objects: objects.create(),
    lambda objects: objects.create_exclusively("a", b"x"),
]


def objects_at(url: str, timeout_s: float) -> Objects:
    location = parse_location(url)
    return Objects(location.url, connect(location), location.root, timeout_s)


def test_what_is_written_is_there_and_what_is_deleted_is_not(bucket: Bucket) -> None:
    objects = bucket.objects()
    assert objects.list("a") == ([], [])
    assert objects.stat("a/b") is None
    with pytest.raises(FileNotFoundError):
        objects.read("a/b", 10)
    objects.write("a/b", b"first")
    objects.write("a/b", b"second")
    objects.write("a/c/d", b"")
    assert objects.read("a/b", 10) == b"second"
    assert objects.read("a/c/d", 10) == b""
    found, folders = objects.list("a")
    assert [(each.path, each.size) for each in found] == [("a/b", 6), ("a/c/d", 0)]
    assert "a/c" in folders
    assert abs(found[0].mtime_s - time.time()) < 60
    objects.delete("a/b")
    objects.delete("a/b")
    assert objects.stat("a/b") is None


def test_large_objects_go_in_pieces_and_come_in_ranges(bucket: Bucket) -> None:
    objects = bucket.objects()
    data = bytes(range(256)) * ((2 * CHUNK + 4096) // 256)
    wrote: list[int] = []
    objects.write("big", data, wrote.append)
    assert wrote == [CHUNK, 2 * CHUNK, 2 * CHUNK + 4096]
    reading = objects.open("big")
    assert reading.size == len(data)
    assert reading.start(CHUNK - 3, 7, bytes).result(20.0) == data[CHUNK - 3 : CHUNK + 4]
    with pytest.raises(InvalidArgument, match="expected at most"):
        objects.read("big", 100)


def test_listings_are_complete_beyond_one_page(bucket: Bucket) -> None:
    with paging(pages=3) as options:
        found, _ = objects_at(f"s3://bucket/prefix?{options}", 20.0).list("many")
    assert [each.path for each in found] == [f"many/{i}" for i in range(3)]


def test_of_many_who_create_one_path_at_most_one_succeeds(bucket: Bucket) -> None:
    def create(who: int) -> bool:
        try:
            bucket.objects().create_exclusively("one", str(who).encode())
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(create, range(6)))
    objects = bucket.objects()
    assert sum(won) <= 1
    if any(won):
        assert objects.read("one", 10) == str(won.index(True)).encode()
    else:
        objects.create_exclusively("one", b"alone")
    with pytest.raises(FileExistsError):
        objects.create_exclusively("one", b"late")
    assert [each.path for each in objects.list("")[0]] == ["one"]


@pytest.mark.parametrize("ask", ASKING)
def test_a_bucket_that_is_not_there_is_an_outage_and_not_empty(
    bucket_server: BucketServer, bucket: Bucket, ask: Callable[[Objects], Any]
) -> None:
    objects = objects_at(f"s3://nobodys/prefix?{bucket_server.options}", 20.0)
    with pytest.raises(Unavailable):
        ask(objects)


def test_a_server_that_is_away_is_an_outage(bucket: Bucket) -> None:
    url = "s3://bucket/prefix?endpoint_override=127.0.0.1:1&scheme=http&region=us-east-1"
    objects = objects_at(url, 20.0)
    with ThreadPoolExecutor(len(ASKING)) as pool:
        asked = [pool.submit(ask, objects) for ask in ASKING]
    for each in asked:
        with pytest.raises(Unavailable, match=r"s3://bucket/prefix.*NETWORK_CONNECTION"):
            each.result()


def test_a_server_that_hangs_is_an_outage_in_bounded_time(bucket: Bucket) -> None:
    with hanging() as options:
        are_outages(objects_at(f"s3://bucket/prefix?{options}", 0.3), ASKING)


def test_a_server_that_trickles_is_an_outage_in_bounded_time(bucket: Bucket) -> None:
    """The client library has no bound on an answer that comes byte by byte."""
    with trickling() as options:
        objects = objects_at(f"s3://bucket/prefix?{options}", 0.3)
        are_outages(objects, [ASKING[0], lambda objects: objects.read("a", 1 << 20)])


def are_outages(objects: Objects, asking: list[Callable[[Objects], Any]]) -> None:
    """All end by themselves, long before a server that is never done would let them."""
    with ThreadPoolExecutor(len(asking)) as pool:
        for each in [pool.submit(ask, objects) for ask in asking]:
            with pytest.raises(Unavailable):
                each.result(20.0)


def test_secrets_are_in_no_message(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client library may repeat whatever it was given."""
    secret = CREDENTIALS["AWS_SECRET_ACCESS_KEY"]

    def broken() -> Any:
        raise OSError(f"denied for {secret}\nand more")

    objects = Objects("s3://bucket", broken, "bucket")
    with pytest.raises(Unavailable) as caught:
        objects.stat("a")
    assert str(caught.value) == "looking in s3://bucket: denied for ***"


def test_a_bucket_of_the_other_provider_is_opened_with_its_options() -> None:
    options = "anonymous=true&endpoint_override=127.0.0.1:1&scheme=http"
    files = connect(parse_location(f"gs://bucket/prefix?{options}"))()
    assert files.type_name == "gcs"


def test_a_container_at_azure_is_reached_with_the_key_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_KEY", "c2VjcmV0")
    options = "account_name=us&blob_storage_authority=127.0.0.1:1&blob_storage_scheme=http"
    files = connect(parse_location(f"abfs://box/prefix?{options}"))()
    assert files.type_name == "abfs"
