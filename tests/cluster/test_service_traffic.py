"""Requests that name no version, at a door: by the split, the same for the same key."""

from __future__ import annotations

from collections import Counter

import pytest

from cluster.doors.service import SPLIT_KEY
from tests.cluster.routing_fakes import doubled, epoch, plain, turns
from tests.cluster.test_service import ONE, PREDICT, Door, play

BOTH = [(plain(version=number), ONE) for number in (1, 2)]


async def answered(door: Door) -> list[int]:
    """The versions of the answers to what was asked since the last time, in order."""
    await turns()
    for one in list(door.bench.actors["a"].asked):
        doubled(one)
    door.bench.actors["a"].asked.clear()
    versions = [
        int(response.headers.removeprefix(b"x-servable-version: ")) for response in door.responses
    ]
    door.responses.clear()
    return versions


def test_requests_without_a_version_go_by_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(epoch(1, *BOTH, splits={"model": {1: 9, 2: 1}}))
        for _ in range(100):
            door.ask()
        assert abs(Counter(await answered(door))[2] - 10) <= 1

    play(scenario, monkeypatch)


def test_a_key_sticks_to_its_version_and_a_named_version_is_not_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(
            epoch(1, *BOTH, splits={"model": {1: 1, 2: 1}}, labels={"model": {"old": 1}})
        )
        for number in range(20):
            for _ in range(3):
                door.ask(headers={SPLIT_KEY: b"user-%d" % number})
        found = await answered(door)
        assert all(len(set(found[at : at + 3])) == 1 for at in range(0, 60, 3))
        assert set(found) == {1, 2}
        for _ in range(10):
            door.ask(path=b"/v1/models/model/versions/2:predict")
            door.ask(path=b"/v1/models/model/labels/old:predict")
        assert await answered(door) == [2, 1] * 10

    play(scenario, monkeypatch)


def test_when_the_split_ends_the_newest_answers_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(epoch(1, *BOTH, splits={"model": {1: 1}}))
        door.ask()
        door.ask()
        assert await answered(door) == [1, 1]
        await door.bench.router.adopt(epoch(2, *BOTH))
        door.ask()
        door.ask()
        assert await answered(door) == [2, 2]

    play(scenario, monkeypatch)


def test_metadata_and_states_by_label(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(epoch(1, *BOTH, labels={"model": {"old": 1}}))
        found = door.get(b"/v1/models/model/labels/old/metadata")
        assert (found.status, b'"version":"1"' in found.body.replace(b" ", b"")) == (200, True)
        assert door.get(b"/v1/models/model/labels/gone").status == 400

    play(scenario, monkeypatch)


def test_only_what_is_not_split_is_kept_by_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick way by path knows one version; a split must not be taken for one."""

    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(epoch(1, *BOTH, splits={"model": {1: 1, 2: 1}}))
        door.ask()
        assert PREDICT not in door.service._predicts
        await door.bench.router.adopt(epoch(2, *BOTH))
        door.ask()
        assert PREDICT in door.service._predicts
        await answered(door)

    play(scenario, monkeypatch)
