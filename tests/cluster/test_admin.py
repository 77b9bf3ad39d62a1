"""The admin API at a door: who may use it, what it understands, and that it waits.

G numbers are TensorFlow Serving's test cases.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from batching.errors import Unavailable
from cluster.access import Key, Keyring, digest_of
from cluster.config import ConfigInvalid, dump, parse
from cluster.control import Event
from cluster.doors.response import Response
from cluster.editing import digest_of as config_digest
from cluster.editing import take_edit
from cluster.epochs import VersionStatus
from cluster.signals import NodesSeen
from tests.cluster.control_fakes import Shell, begun, config, loading
from tests.cluster.routing_fakes import AB, epoch, plain, sleep_ms, turns
from tests.cluster.test_service import Door, error_of, play

HERE = {b"host": b"127.0.0.1:8501", b"content-type": b"application/json"}
CONFIG = b"/v1/admin/config"


class AdminDoor:
    """A door whose admin API edits the declaration of a controller core."""

    def __init__(self, door: Door) -> None:
        self.door = door
        self.shell: Shell = begun(config("m"))
        self.shell.carry_out(loading(self.shell, 1, 2))
        self.is_away = False
        door.service.open_admin(self.change)

    async def change(self, edit: bytes) -> bytes:
        def feed(event: Event) -> None:
            self.shell.send(event)

        if self.is_away:
            raise Unavailable("no controller")
        return take_edit(self.shell.core, edit, feed)

    async def ask(
        self,
        method: bytes,
        path: bytes,
        body: object = None,
        headers: dict[bytes, bytes] | None = None,
    ) -> Response:
        data = b"" if body is None else json.dumps(body).encode()
        before = len(self.door.responses)
        self.door.ask(data, path, method, HERE if headers is None else headers)
        await turns(8)
        assert len(self.door.responses) == before + 1
        return self.door.responses[-1]


def run(scenario: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def with_admin(door: Door) -> None:
        await scenario(AdminDoor(door))

    play(with_admin, monkeypatch)


def test_the_declaration_is_read_with_its_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(admin: AdminDoor) -> None:
        found = await admin.ask(b"GET", CONFIG)
        declared = admin.shell.core.config
        assert declared is not None
        assert (found.status, json.loads(found.body)) == (
            200,
            {"config": json.loads(dump(declared)), "digest": config_digest(declared)},
        )
        assert found.headers == b'etag: "%b"\r\n' % config_digest(declared).encode()

    run(scenario, monkeypatch)


@pytest.mark.parametrize(
    ("verb", "body", "changed"),
    [
        ("rollback", None, 'm.policy: {"latest": 1} -> {"specific": [1]}'),
        ("rollback", {"to": 1}, 'm.policy: {"latest": 1} -> {"specific": [1]}'),
        ("label", {"label": "stable", "version": 2}, "m.labels.stable: (nothing) -> 2"),
        ("split", {"weights": {"2": 1}}, "m.split.2: (nothing) -> 1"),
        ("load", {"version": 1}, 'm.policy: {"latest": 1} -> {"specific": [1, 2]}'),
        ("unload", {}, 'm.policy: {"latest": 1} -> (nothing)'),
    ],
)
def test_a_change_is_made_and_told(
    monkeypatch: pytest.MonkeyPatch, verb: str, body: object, changed: str
) -> None:
    async def scenario(admin: AdminDoor) -> None:
        found = await admin.ask(b"POST", b"/v1/admin/models/m:" + verb.encode(), body)
        assert found.status == 200, found.body
        assert changed in json.loads(found.body)["changes"]

    run(scenario, monkeypatch)


def test_a_node_is_drained_and_drained_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(admin: AdminDoor) -> None:
        admin.shell.send(NodesSeen(memory_bytes={"n1": 0, "n2": 0}))
        for verb, drained in ((b"drain", {"n1"}), (b"undrain", set())):
            found = await admin.ask(b"POST", b"/v1/admin/nodes/n1:" + verb)
            assert found.status == 200, found.body
            assert len(json.loads(found.body)["changes"]) == 1
            assert admin.shell.core.drained == drained
        assert (await admin.ask(b"POST", b"/v1/admin/nodes/other:drain")).status == 404
        assert (await admin.ask(b"GET", b"/v1/admin/nodes/n1:drain")).status == 400

    run(scenario, monkeypatch)


def test_load_is_made_even_or_only_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(admin: AdminDoor) -> None:
        for body in ({"dry_run": True}, None):
            found = await admin.ask(b"POST", b"/v1/admin/rebalance", body)
            assert found.status == 200, found.body
            document = json.loads(found.body)
            assert document["changes"] == document["balance"]["moves"] == []
        assert (await admin.ask(b"POST", b"/v1/admin/rebalance", {"dry": 1})).status == 400
        assert (await admin.ask(b"GET", b"/v1/admin/rebalance")).status == 400

    run(scenario, monkeypatch)


def test_a_put_replaces_the_whole_and_a_failure_leaves_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(admin: AdminDoor) -> None:
        before = admin.shell.core.config
        bad = {"servables": [{"name": "m", "labels": {"a": 0}}, {"name": "new"}]}
        found = await admin.ask(b"PUT", CONFIG, bad)
        assert (found.status, error_of(found)) == (
            400,
            "servables[0].labels.a: a version is at least 1, got 0",
        )
        stale = {**HERE, b"if-match": b'"0123"'}
        found = await admin.ask(b"PUT", CONFIG, {"servables": []}, stale)
        assert "has changed since it was read" in error_of(found)
        assert admin.shell.core.config == before
        tag = (await admin.ask(b"GET", CONFIG)).headers.partition(b": ")[2].strip()
        found = await admin.ask(b"PUT", CONFIG, {"servables": []}, {**HERE, b"if-match": tag})
        assert found.status == 200
        assert admin.shell.core.config is not None
        assert admin.shell.core.config.servables == ()

    run(scenario, monkeypatch)


@pytest.mark.parametrize(
    ("method", "path", "body", "told"),
    [
        (b"POST", b"/v1/admin/models/m:label", {"labl": "a"}, "label: Object contains unknown"),
        (b"POST", b"/v1/admin/models/m:label", {"version": 1}, "label: Object missing required"),
        (b"POST", b"/v1/admin/models/m:label", {"label": "a", "version": "1"}, "Expected `int"),
        (b"POST", b"/v1/admin/models/m:load", [1], "load: Expected `object`"),
        (b"POST", b"/v1/admin/models/m:fly", {}, "Malformed request: POST /v1/admin/models/m:fly"),
        (b"GET", b"/v1/admin/models/m:load", {}, "Malformed request: GET"),
        (b"DELETE", b"/v1/admin/config", None, "Malformed request: DELETE"),
        (b"PUT", b"/v1/admin/config?wait_s=x", {}, "wait_s is a number of seconds"),
        (b"PUT", b"/v1/admin/config?wait_s=nan", {}, "wait_s is a number of seconds"),
        (b"PUT", b"/v1/admin/config", None, "a declaration is JSON"),
        (b"POST", b"/v1/admin/models/m:label", {"label": "a", "version": 7},
         "not currently available for inference"),
    ],
)  # fmt: skip
def test_what_is_not_understood_or_not_possible_is_refused_with_why(
    monkeypatch: pytest.MonkeyPatch, method: bytes, path: bytes, body: object, told: str
) -> None:
    async def scenario(admin: AdminDoor) -> None:
        found = await admin.ask(method, path, body)
        assert found.status == 400
        assert told in error_of(found)

    run(scenario, monkeypatch)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({**HERE, b"host": b"evil.example"}, 403),
        ({**HERE, b"host": b"127.0.0.1.evil.example"}, 403),
        ({b"content-type": b"application/json"}, 403),
        ({b"host": b"localhost", b"content-type": b"text/plain"}, 400),
        ({b"host": b"[::1]:8501", b"content-type": b"application/json; charset=utf-8"}, 200),
    ],
)
def test_without_keys_a_browser_that_was_led_here_is_refused(
    monkeypatch: pytest.MonkeyPatch, headers: dict[bytes, bytes], status: int
) -> None:
    async def scenario(admin: AdminDoor) -> None:
        found = await admin.ask(b"POST", b"/v1/admin/models/m:rollback", {}, headers)
        assert found.status == status

    run(scenario, monkeypatch)


def test_with_keys_the_right_admin_is_needed_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = Keyring(
        [
            Key(name="user", digest=digest_of("u" * 16), predict=("*",), metadata=("*",)),
            Key(name="boss", digest=digest_of("b" * 16), admin=True),
        ]
    )

    async def scenario(admin: AdminDoor) -> None:
        admin.door.service.use_keys(ring)
        for secret, status in ((b"u" * 16, 403), (b"x" * 16, 401), (b"b" * 16, 200)):
            found = await admin.ask(b"GET", CONFIG, None, {b"x-api-key": secret})
            assert found.status == status

    run(scenario, monkeypatch)


def test_where_it_is_not_declared_there_is_no_admin_api(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(door: Door) -> None:
        door.ask(b"", CONFIG, b"GET", HERE)
        assert door.responses[-1].status == 400
        assert error_of(door.responses[-1]).startswith("Malformed request")

    play(scenario, monkeypatch)


def test_a_controller_that_is_away_is_a_503(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(admin: AdminDoor) -> None:
        admin.is_away = True
        found = await admin.ask(b"GET", CONFIG)
        assert (found.status, error_of(found)[:22]) == (503, "the controller is away")
        assert b"retry-after" in found.headers

    run(scenario, monkeypatch)


@pytest.mark.parametrize("comes", [True, False])
def test_g10_a_load_that_is_waited_for_is_answered_when_it_is_available(
    monkeypatch: pytest.MonkeyPatch, comes: bool
) -> None:
    async def scenario(admin: AdminDoor) -> None:
        door = admin.door
        await door.bench.router.adopt(epoch(1, (plain("m", 2), AB)))
        door.ask(b'{"version": 1}', b"/v1/admin/models/m:load?wait_s=5", b"POST", HERE)
        await sleep_ms(1000)
        assert door.responses == []
        if comes:
            number = admin.shell.epoch.number
            await door.bench.router.adopt(epoch(number, (plain("m", 1), AB), (plain("m", 2), AB)))
        await sleep_ms(100 if comes else 4500)
        assert [response.status for response in door.responses] == [200 if comes else 504]

    run(scenario, monkeypatch)


def test_a_change_that_is_waited_for_is_answered_when_every_router_answers_by_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(admin: AdminDoor) -> None:
        door, shell = admin.door, admin.shell
        shell.router("other")
        door.ask(b'{"weights": {"2": 1}}', b"/v1/admin/models/m:split?wait_s=5", b"POST", HERE)
        await sleep_ms(100)
        assert door.responses == []  # not even the router that was asked
        await door.bench.router.adopt(epoch(shell.epoch.number, (plain("m", 2), AB)))
        await sleep_ms(100)
        assert door.responses == []
        shell.router("other")
        await sleep_ms(100)
        assert [response.status for response in door.responses] == [200]

    run(scenario, monkeypatch)


def test_a_router_that_does_not_follow_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(admin: AdminDoor) -> None:
        door, shell = admin.door, admin.shell
        shell.router("other")
        door.ask(b'{"weights": {"2": 1}}', b"/v1/admin/models/m:split?wait_s=5", b"POST", HERE)
        await sleep_ms(100)
        await door.bench.router.adopt(epoch(shell.epoch.number, (plain("m", 2), AB)))
        await sleep_ms(5100)
        (found,) = door.responses
        assert found.status == 504
        assert error_of(found) == "declared, and not available yet: router other"

    run(scenario, monkeypatch)


def test_a_load_that_fails_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(admin: AdminDoor) -> None:
        door = admin.door
        await door.bench.router.adopt(epoch(1, (plain("m", 2), AB)))
        door.ask(b'{"version": 1}', b"/v1/admin/models/m:load?wait_s=5", b"POST", HERE)
        await sleep_ms(100)
        failed = VersionStatus(
            servable="m", version=1, state="END", error_code="INTERNAL", error_message="shapes"
        )
        await door.bench.router.adopt(epoch(2, (plain("m", 2), AB), statuses=[failed]))
        await sleep_ms(100)
        (found,) = door.responses
        assert (found.status, error_of(found)) == (
            400,
            "declared, and version 1 of m: shapes; what served goes on",
        )

    run(scenario, monkeypatch)


def test_an_admin_api_that_is_open_to_anybody_cannot_be_declared() -> None:
    with pytest.raises(ConfigInvalid, match=r"cluster.http.admin: would let anybody on 0\.0\.0\.0"):
        parse("store: s\ncluster: {http: {host: 0.0.0.0, admin: true}}")
    text = "store: s\ncluster: {http: {host: 0.0.0.0, admin: true}, auth: {keys: keys.yaml}}"
    assert parse(text).cluster.http.admin
    assert parse("store: s\ncluster: {http: {admin: true}}").cluster.http.admin
