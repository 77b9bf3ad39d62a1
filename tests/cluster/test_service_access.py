"""What a service with keys refuses, and what it still answers to anybody."""

from __future__ import annotations

import json

import pytest

from cluster.access import Key, Keyring, digest_of
from cluster.doors.service import Service
from cluster.epochs import VersionStatus
from tests.cluster.routing_fakes import doubled, epoch, plain, turns
from tests.cluster.test_service import BODY, ONE, PREDICT, Door, play

USER = "the-users-secret-key"
OTHER = "the-other-users-secret"
KEYS = Keyring(
    [
        Key(name="user", digest=digest_of(USER), predict=("model",), metadata=("model",)),
        Key(name="other", digest=digest_of(OTHER), metrics=True),
    ]
)
WITH_KEY = {b"x-api-key": USER.encode()}
WITH_OTHER = {b"authorization": b"Bearer " + OTHER.encode()}


def keyed(door: Door, keyring: Keyring = KEYS) -> None:
    door.service = Service(door.bench.router, door.metrics, keyring)


async def answered(door: Door, headers: dict[bytes, bytes], body: bytes = BODY) -> int:
    """The status of a predict request, whether it reaches the actor or not."""
    before = len(door.responses)
    door.ask(body, headers=headers)
    await turns()
    if len(door.responses) == before:
        doubled(door.bench.actors["a"].take())
    return door.responses[-1].status


def test_a_predict_request_needs_a_key_with_that_right(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(door: Door) -> None:
        keyed(door)
        await door.bench.router.adopt(epoch(1, (plain(), ONE)))
        # Twice each: the second time the path is known, and perhaps the headers.
        for headers, status in [({}, 401), (WITH_OTHER, 403), (WITH_KEY, 200)] * 3:
            assert await answered(door, headers) == status
        assert door.bench.router.stats.accepted == 3

    play(scenario, monkeypatch)


def test_a_refusal_says_how_to_prove_oneself_or_what_is_not_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(door: Door) -> None:
        keyed(door)
        await door.bench.router.adopt(epoch(1, (plain(), ONE)))
        door.ask()
        door.ask(headers=WITH_OTHER)
        unknown, forbidden = door.responses
        assert b'www-authenticate: Bearer realm="shardserve"\r\n' in unknown.headers
        assert b"key is needed" in unknown.body
        assert forbidden.headers == b"x-error-code: PERMISSION_DENIED\r\n"
        error = json.loads(forbidden.body)["error"]
        assert error == "key 'other' has no right 'predict' on 'model'"
        scraped = door.scrape()
        assert 'serving_errors_total{code="UNAUTHENTICATED"} 1.0' in scraped
        assert 'serving_errors_total{code="PERMISSION_DENIED"} 1.0' in scraped

    play(scenario, monkeypatch)


def test_a_body_is_not_read_for_who_may_not_send_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(door: Door) -> None:
        keyed(door)
        await door.bench.router.adopt(epoch(1, (plain(), ONE)))
        assert await answered(door, WITH_KEY) == 200
        for headers, status in [({}, 401), (WITH_OTHER, 403), (WITH_KEY, 400)]:
            assert await answered(door, headers, b"not json") == status

    play(scenario, monkeypatch)


def test_who_may_not_ask_does_not_learn_what_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(door: Door) -> None:
        keyed(door)
        await door.bench.router.adopt(epoch(1, (plain(), ONE)))
        for path in (b"/v1/models/model", b"/v1/models/none", b"/v1/models/none/metadata"):
            door.ask(b"", path, b"GET")
            door.ask(b"", path, b"GET", WITH_OTHER)
        door.ask(path=b"/v1/models/none:predict", headers=WITH_OTHER)
        assert [each.status for each in door.responses] == [401, 403] * 3 + [403]

    play(scenario, monkeypatch)


def test_the_list_shows_what_a_key_may_see(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(door: Door) -> None:
        keyed(door)
        statuses = tuple(
            VersionStatus(servable=name, version=1, state="AVAILABLE") for name in ("model", "x")
        )
        found = epoch(1, (plain(), ONE), statuses=statuses)
        await door.bench.router.adopt(found)
        bodies = []
        for headers in ({}, WITH_OTHER, WITH_KEY):
            door.ask(b"", b"/v1/models", b"GET", headers)
            bodies.append((door.responses[-1].status, door.responses[-1].body))
        assert [status for status, _ in bodies] == [401, 200, 200]
        assert b'"model"' not in bodies[1][1]
        assert b'"model"' in bodies[2][1]
        assert b'"x"' not in bodies[2][1]

    play(scenario, monkeypatch)


def test_anybody_may_ask_whether_the_door_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(door: Door) -> None:
        keyed(door)
        loading = VersionStatus(servable="secret-project", version=1, state="LOADING")
        await door.bench.router.adopt(epoch(1, (plain(), ONE), statuses=(loading,)))
        assert door.get(b"/healthz").status == 200
        ready = door.get(b"/readyz")
        assert (ready.status, ready.body) == (503, b"not available yet: 1 servables\n")
        assert door.get(b"/nothing/here").status == 404

    play(scenario, monkeypatch)


@pytest.mark.parametrize("path", [b"/metrics", b"/monitoring/prometheus/metrics"])
def test_counters_need_their_right_unless_they_are_open(
    monkeypatch: pytest.MonkeyPatch, path: bytes
) -> None:
    async def scenario(door: Door) -> None:
        keyed(door)
        for headers, status in (({}, 401), (WITH_KEY, 403), (WITH_OTHER, 200)):
            door.ask(b"", path, b"GET", headers)
            assert door.responses[-1].status == status
        keyed(door, Keyring([], open_metrics=True))
        assert door.get(path).status == 200

    play(scenario, monkeypatch)


def test_keys_that_change_count_at_once_for_headers_that_were_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(door: Door) -> None:
        keyed(door)
        await door.bench.router.adopt(epoch(1, (plain(), ONE)))
        for _ in range(3):  # the door gives the same object for the same head
            assert await answered(door, WITH_KEY) == 200
        door.service.use_keys(Keyring([]))
        assert await answered(door, WITH_KEY) == 401
        door.service.use_keys(KEYS)
        assert await answered(door, WITH_KEY) == 200

    play(scenario, monkeypatch)


def test_headers_that_are_good_for_one_servable_are_asked_again_for_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(door: Door) -> None:
        keyed(door)
        both = epoch(1, (plain(), ONE), (plain("other"), ONE))
        await door.bench.router.adopt(both)
        assert await answered(door, WITH_KEY) == 200
        for _ in range(2):
            door.ask(path=PREDICT.replace(b"model:", b"other:"), headers=WITH_KEY)
            assert door.responses[-1].status == 403

    play(scenario, monkeypatch)
