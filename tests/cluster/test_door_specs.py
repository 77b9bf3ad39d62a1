"""What the controller tells doors, over the wire and in words."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from batching.errors import FailedPrecondition
from cluster.bringup import _warnings
from cluster.config import parse
from cluster.doors.settings import Auth, DoorLimits, Tls
from cluster.doors.watched import Watched, follow
from cluster.specs import RouterAddress, RouterSpec, ServeDoorSpec, warnings_about
from shards.orders import decode, encode
from tests.cluster.rest_clients import until

AUTH = Auth(keys="/etc/keys.yaml", open_metrics=True)


@pytest.mark.parametrize(
    "spec",
    [
        RouterSpec(cluster="c", host="h", port=1, directory="/d"),
        RouterSpec(
            cluster="c",
            host="h",
            port=1,
            directory="/d",
            limits=DoorLimits(idle_s=5.0, body_bytes_max=1000),
            certificates=Tls(certificate="c", key="k", client_ca="a"),
            auth=AUTH,
        ),
        ServeDoorSpec(host="h", body_bytes_max=1, compress_bytes_min=2048, auth=AUTH),
        RouterAddress(
            router="r", node="n", host="h", port=1, pid=2, scheme="https", warnings=("one", "two")
        ),
    ],
)
def test_what_is_told_is_what_was_meant(spec: Any) -> None:
    assert decode(encode(spec), type(spec)) == spec


@pytest.mark.parametrize(
    ("host", "auth", "has_tls", "words"),
    [
        ("127.0.0.1", None, False, ""),
        ("localhost", AUTH, False, ""),
        ("0.0.0.0", None, False, "open on 0.0.0.0 to anybody"),
        ("0.0.0.0", None, True, "open on 0.0.0.0 to anybody"),
        ("10.0.0.7", AUTH, False, "keys cross the network in clear on 10.0.0.7"),
        ("::", AUTH, True, ""),
    ],
)
def test_a_door_to_the_network_is_warned_about_unless_it_has_keys_and_tls(
    host: str, auth: Auth | None, has_tls: bool, words: str
) -> None:
    found = warnings_about(host, auth, has_tls=has_tls)
    assert len(found) == bool(words)
    assert words in "".join(found)


def test_up_tells_the_warnings_of_both_doors() -> None:
    config = parse("store: s\ncluster: {serve: {host: 0.0.0.0}}")
    found = {"doors": [{"warnings": ["keys file k: not YAML"]}]}
    rest, serve = _warnings(config, found, with_serve=True)
    assert rest == "REST door: keys file k: not YAML"
    assert serve.startswith("Ray Serve door: open on 0.0.0.0 to anybody")
    assert _warnings(config, found, with_serve=False) == [rest]


def test_a_followed_file_is_used_when_it_changes_and_its_trouble_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "number"
    path.write_text("1")

    def read() -> tuple[int, tuple[Path, ...]]:
        try:
            return int(path.read_text()), (path,)
        except ValueError:
            raise FailedPrecondition("not a number") from None

    async def scenario() -> None:
        watched, used = Watched(read), list[int]()
        following = asyncio.create_task(follow(watched, used.append, poll_s=0.005))
        path.write_text("22")
        await until(lambda: used[-1:] == [22])
        path.write_text("no")
        await until(lambda: watched.error == "not a number")
        path.write_text("none")
        path.write_text("333")
        await until(lambda: used[-1] == 333)
        assert watched.error == ""
        following.cancel()

    asyncio.run(scenario())
    troubles = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert troubles == ["not a number; what was read before stays in use"]
