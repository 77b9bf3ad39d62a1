"""Replaying warm-up requests: among fake actors in virtual time, and over a real serving path."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shards
from batching.errors import (
    Code,
    DeadlineExceeded,
    InvalidArgument,
    Unavailable,
)
from cluster.epochs import Epoch, Rehearsal
from cluster.rehearsing import Rehearsing, delegate, replay
from cluster.signals import Failure, Rehearse
from shards.orders import Outcome, decode, encode
from shards.recorded import Recorded
from shards.specs import Spec
from tests.cluster.routing_actors import Asked, FakeActors
from tests.cluster.routing_fakes import epoch, plain, run_virtually, sleep_ms, turns
from tests.cluster.serving import Cluster, dial

Respond = Callable[[Asked], None]

REQUESTS = [
    Recorded(signature="serving_default", inputs={"x": np.array([number], np.float32)})
    for number in range(3)
]


def rehearsal(published: Epoch, timeout_s: float = 10.0) -> Rehearsal:
    served = published.servables["model"][1]
    return Rehearsal(
        store="/store", served=served, endpoints=published.endpoints, timeout_s=timeout_s
    )


def answer(asked: Asked) -> None:
    asked.answer(asked.arrays[0])


def replayed(
    respond: Respond,
    *,
    actors: Sequence[str] = ("a",),
    timeout_s: float = 10.0,
    away: Sequence[str] = (),
) -> tuple[dict[str, list[float]], float]:
    """What each actor was asked, and the seconds it all took."""

    async def scenario(loop: asyncio.AbstractEventLoop) -> tuple[dict[str, list[float]], float]:
        fakes = FakeActors()
        for name in away:
            fakes[name].is_away = True
        order = rehearsal(epoch(1, (plain(), {"unit": [list(actors)]})), timeout_s)
        began = loop.time()
        running = asyncio.ensure_future(replay(order, REQUESTS, fakes.dial))
        asked: dict[str, list[float]] = {name: [] for name in actors}
        while not running.done():
            assert sum(len(actor.asked) for actor in fakes) <= 1, "several at once"
            for actor in fakes:
                while actor.asked:
                    item = actor.take()
                    asked[actor.name].append(float(item.arrays[0][0]))
                    respond(item)
            await sleep_ms(1)
        took_s = loop.time() - began
        await running
        await turns()
        assert not any(link.is_open() for actor in fakes for link in actor.links)
        return asked, took_s

    return run_virtually(scenario)


def refusing(count: int, code: str, retry_after_ms: int = 0) -> Respond:
    """Refuse so many requests, and answer what comes after them."""
    left = [count]

    def respond(asked: Asked) -> None:
        left[0] -= 1
        if left[0] >= 0:
            asked.refuse(code, "not now", retry_after_ms)
        else:
            answer(asked)

    return respond


def test_requests_are_replayed_one_after_the_other_in_order() -> None:
    asked, took_s = replayed(answer)
    assert asked == {"a": [0.0, 1.0, 2.0]}
    assert took_s < 1.0


def test_every_copy_of_a_unit_is_asked_every_request() -> None:
    assert replayed(answer, actors=("a", "b", "c"))[0] == {key: [0.0, 1.0, 2.0] for key in "abc"}


def test_a_request_that_fails_ends_the_replay_and_is_named() -> None:
    def respond(asked: Asked) -> None:
        if asked.arrays[0][0] == 1.0:
            asked.refuse("INVALID_ARGUMENT", "no such id")
        else:
            answer(asked)

    problem = r"warm-up request 2 of 3 \(serving_default\) failed: no such id"
    with pytest.raises(InvalidArgument, match=problem):
        replayed(respond)


def test_a_device_that_is_busy_is_asked_again_when_it_says() -> None:
    asked, took_s = replayed(refusing(3, "RESOURCE_EXHAUSTED", 400))
    assert asked == {"a": [0.0, 0.0, 0.0, 0.0, 1.0, 2.0]}
    assert 1.2 <= took_s < 2.0


def test_a_device_that_stays_busy_fails_the_replay_at_its_limit() -> None:
    with pytest.raises(DeadlineExceeded, match=r"request 1 of 3 .*within the 3 s for all: not now"):
        replayed(refusing(10**9, "RESOURCE_EXHAUSTED"), timeout_s=3.0)


def test_an_actor_that_is_silent_fails_the_replay_at_its_limit() -> None:
    with pytest.raises(DeadlineExceeded, match="request 1 of 3"):
        replayed(lambda asked: None, timeout_s=3.0)


def test_an_actor_that_stays_away_fails_the_replay_long_before_its_limit() -> None:
    with pytest.raises(Unavailable, match="request 1 of 3"):
        replayed(answer, away=("a",), timeout_s=10_000.0)


def test_an_actor_that_is_away_for_a_moment_fails_nothing() -> None:
    assert replayed(refusing(4, "UNAVAILABLE"))[0]["a"][-2:] == [1.0, 2.0]


# Who replays


def effect(number: int = 1) -> Rehearse:
    return Rehearse(number=number, order=rehearsal(epoch(1, (plain(), {"unit": [["a"]]}))))


def asks(outcomes: dict[str, Outcome | Exception], log: list[str]) -> Any:
    def ask_of(name: str) -> Callable[[bytes], Awaitable[bytes]]:
        async def ask(order: bytes) -> bytes:
            log.append(name)
            assert decode(order, Rehearsal).timeout_s == 10.0
            outcome = outcomes[name]
            if isinstance(outcome, Exception):
                raise outcome
            return encode(outcome)

        return ask

    return lambda: [ask_of(name) for name in outcomes]


def test_replays_are_spread_over_the_routers_and_one_that_is_lost_is_replaced() -> None:
    log: list[str] = []
    found = asks({"a": Outcome(), "b": RuntimeError("lost"), "c": Outcome()}, log)

    async def scenario(loop: asyncio.AbstractEventLoop) -> None:
        for number in range(3):
            done = await delegate(effect(number), found)
            assert (done.servable, done.version, done.number) == ("model", 1, number)
            assert done.error is None

    run_virtually(scenario)
    assert log == ["a", "b", "c", "c"]


def test_what_a_router_says_of_a_replay_is_final() -> None:
    log: list[str] = []
    found = asks({"a": Outcome(code="INTERNAL", message="bad"), "b": Outcome()}, log)

    async def scenario(loop: asyncio.AbstractEventLoop) -> None:
        done = await delegate(effect(0), found)
        assert done.error == Failure(code="INTERNAL", message="bad")

    run_virtually(scenario)
    assert log == ["a"]


def test_without_a_router_a_replay_fails_for_now() -> None:
    async def scenario(loop: asyncio.AbstractEventLoop) -> None:
        began = loop.time()
        done = await delegate(effect(), list)
        assert done.error is not None
        assert done.error.code == Code.UNAVAILABLE
        assert loop.time() - began < 60.0

    run_virtually(scenario)


# Over a real serving path

WIDTH, DIM = 6, 4
PATH = "/v1/models/reader:predict"


def save(store: Path, version: int, warmups: Sequence[list[str]]) -> None:
    """Texts to ids on a host actor, ids to rows on shards, rows to a sum on a device."""
    rows = np.arange(128 * DIM, dtype=np.float32).reshape(128, DIM) * version
    with shards.Bundle.create(store, "reader", version) as bundle:
        ids, texts = {"ids": Spec(("b", WIDTH), "int64")}, {"text": Spec(("b",), "string")}
        reader = bundle.host(
            "reader", "tests.cluster.serving_units:load", inputs=texts, outputs=ids,
            options={"width": WIDTH},
        )  # fmt: skip
        # An id that is not in the table fails its request: letters above "~", and texts too short.
        table = bundle.table("table", rows, partitions=5)
        trunk = bundle.unit(
            "trunk", lambda p, rows: {"y": rows.sum((1, 2))}, None,
            inputs={"rows": Spec(("b", WIDTH, DIM))}, batch_buckets=(1, 4), platforms=("cpu",),
        )  # fmt: skip

        @bundle.signature(inputs=texts)
        def serving_default(text: Any) -> Any:
            return trunk(rows=table.rows(reader(text=text)))

        for text in warmups:
            bundle.warmup("serving_default", {"text": text})


def rehearse(cluster: Cluster, version: int, store: Path) -> Outcome:
    order = Rehearsal(
        store=str(store), served=cluster.loaded("reader", version),
        endpoints=cluster.endpoints, timeout_s=30.0, continuation_bytes_min=0,
    )  # fmt: skip

    async def take() -> bytes:
        return await Rehearsing(dial).take(encode(order))

    return decode(cluster.io.run(take()), Outcome)


def rows_run(cluster: Cluster) -> int:
    """Rows that the device has computed."""
    opener: Any = cluster.actors["device-0"].hosting._opener
    lanes = cluster.io.call(opener._engine._batcher.stats).lanes.values()
    return sum(line.tally.rows_run for lane in lanes for line in lane.owners.values())


def test_a_version_that_fails_its_warm_up_leaves_the_old_one_serving(tmp_path: Path) -> None:
    store = tmp_path / "store"
    save(store, 1, [["abcdef"], ["ghijkl", "mnopqr"]])
    save(store, 2, [["abcdef"], ["abcdef", "short"]])
    cluster = Cluster(store, tmp_path, shards=2)
    try:
        cluster.load("reader", 1)
        assert rehearse(cluster, 1, store) == Outcome()
        assert rows_run(cluster) == 3
        cluster.publish()
        cluster.load("reader", 2)
        outcome = rehearse(cluster, 2, store)
        assert outcome.code == Code.INVALID_ARGUMENT
        assert outcome.message.startswith("warm-up request 2 of 2 (serving_default) failed: ")
        answered = cluster.ask(PATH, json.dumps({"instances": ["abcdef"]}))
        assert (answered.status, answered.headers["x-servable-version"]) == (200, "1")
        assert cluster.router.stats.accepted == 1, "a replay is nothing that clients asked"
        # And where the requests themselves are gone, that is what is said.
        warmups = cluster.loaded("reader", 1).manifest.warmups
        assert warmups is not None
        (store / "blobs" / "blake3" / warmups.blob.digest).unlink()
        outcome = rehearse(cluster, 1, store)
        assert outcome.code == Code.FAILED_PRECONDITION
        assert "is missing" in outcome.message
    finally:
        cluster.close()
