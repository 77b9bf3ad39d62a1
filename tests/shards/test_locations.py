"""Which URLs mean a store, and that none carries a secret."""

from __future__ import annotations

import pytest

from batching.errors import InvalidArgument, Unimplemented
from shards.locations import is_url, parse_location


@pytest.mark.parametrize(
    ("url", "root", "again"),
    [
        ("s3://bucket", "bucket", "s3://bucket"),
        ("s3a://bucket/", "bucket", "s3://bucket"),
        ("s3://bucket/a/b/", "bucket/a/b", "s3://bucket/a/b"),
        ("gs://bucket/a", "bucket/a", "gs://bucket/a"),
        ("abfss://box/a?account_name=us", "box/a", "abfs://box/a?account_name=us"),
        (
            "s3://b/p?scheme=http&endpoint_override=localhost:9000&region=eu-west-1",
            "b/p",
            "s3://b/p?endpoint_override=localhost:9000&region=eu-west-1&scheme=http",
        ),
    ],
)
def test_a_url_is_understood_and_written_again(url: str, root: str, again: str) -> None:
    location = parse_location(url)
    assert location.root == root
    assert location.url == again
    assert parse_location(location.url) == location


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIDX:hunter2@bucket/prefix",
        "s3://bucket/prefix?secret_key=hunter2",
        "s3://bucket/prefix?access_key=hunter2&region=eu-west-1",
        "gs://bucket/prefix?access_token=hunter2",
        "abfs://container/prefix?account_name=us&account_key=hunter2",
    ],
)
def test_a_secret_in_a_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_location(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "s3://",
        "s3:///prefix",
        "s3://b/../c",
        "s3://b/a//c",
        "s3://b/a#x",
        "s3://b?region=a&region=b",
        "abfs://container/prefix",
    ],
)
def test_a_url_that_leads_nowhere_is_refused(url: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_location(url)


@pytest.mark.parametrize("url", ["hdfs://host/path", "http://host/path", "://x"])
def test_other_kinds_are_not_offered(url: str) -> None:
    with pytest.raises(Unimplemented, match="s3://, gs://"):
        parse_location(url)


def test_paths_are_no_urls() -> None:
    assert not is_url("/data/store")
    assert not is_url("./store")
    assert is_url("s3://bucket")
