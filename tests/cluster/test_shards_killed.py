"""Shards in processes of their own, ended by SIGKILL while they owe answers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import uvloop

import shards
from batching.errors import ServingError, Unavailable
from bench.look_ups_actor import GENERATION, NODE, READY, SECRET_VARIABLE, SERVABLE
from bench.processes import python
from bench.report import ROOT
from cluster.epochs import Epoch, ServableVersion
from cluster.router import Router
from shards.orders import Endpoint, HostedUnit
from shards.specs import Spec
from shards.store import LocalStore
from shards.transport import Link, LinkHandler, connect

SECRET = "only this test knows it"
ROWS = 64
TURNS_TOGETHER = 8


class Answer:
    """Takes one answer or error, and when it came."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.rows: asyncio.Future[Any] = loop.create_future()
        self.ended_at = 0.0

    def done(self, outputs: Mapping[str, Any], frame: Sequence[Any] | None) -> None:
        self.ended_at = time.monotonic()
        [rows] = outputs.values()
        self.rows.set_result(rows)

    def failed(self, error: ServingError) -> None:
        self.ended_at = time.monotonic()
        self.rows.set_exception(error)


def save(store: Path) -> None:
    rows = np.repeat(np.arange(ROWS, dtype=np.float32)[:, None], 4, axis=1)
    with shards.Bundle.create(store, SERVABLE, 1) as bundle:
        table = bundle.table("table", rows, partitions=2)
        inputs = {"ids": Spec(("b",), "int64")}
        bundle.signature(name="serving_default", inputs=inputs)(lambda ids: table.rows(ids))


@contextlib.contextmanager
def started(folder: Path, store: Path) -> Iterator[dict[str, tuple[Endpoint, int]]]:
    """Two shards, each with both partitions: by name where they listen, and their process."""
    units = msgspec.json.encode([HostedUnit(name="table", partitions=(0, 1))]).decode()
    with contextlib.ExitStack() as stack:
        children = {}
        for name in ("shard-0", "shard-1"):
            command = python(
                "bench.look_ups_actor", "--name", name, "--directory", str(folder),
                "--node", NODE, "--store", str(store), "--units", units,
            )  # fmt: skip
            environment = {**os.environ, SECRET_VARIABLE: SECRET}
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            children[name] = process
        found = {}
        for name, process in children.items():
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith(READY), line
            endpoint = msgspec.json.decode(line.removeprefix(READY), type=Endpoint)
            found[name] = (endpoint, process.pid)
        yield found


def ask(router: Router, deadline: float) -> Answer:
    answer = Answer()
    plan = router.routes.find(SERVABLE).plans["serving_default"]
    router.submit(plan, {"ids": np.arange(ROWS)}, ROWS, deadline, answer)
    return answer


async def keep_asking(router: Router, ended: asyncio.Event) -> int:
    """Ask again and again; how many were answered, none wrong and none failed."""
    answered = 0
    while not ended.is_set():
        rows = await ask(router, time.monotonic() + 10).rows
        assert rows[:, 0].tolist() == list(range(ROWS))
        answered += 1
    return answered


async def kill(router: Router, pid: int, deadline: float) -> list[Answer]:
    """End a process while requests are under way to it; those requests."""
    os.kill(pid, signal.SIGSTOP)  # so that it has answered none of them when it ends
    answers = [ask(router, deadline) for _ in range(TURNS_TOGETHER)]
    for _ in range(3):
        await asyncio.sleep(0)  # the router sends at the end of its turn
    os.kill(pid, signal.SIGKILL)
    return answers


async def scenario(store: Path, actors: Mapping[str, tuple[Endpoint, int]]) -> None:
    async def dial(endpoint: Endpoint, handler: LinkHandler) -> Link:
        return await connect(
            endpoint, name="router", node=NODE, secret=SECRET.encode(), handler=handler
        )

    router = Router(asyncio.get_running_loop(), dial)
    names = tuple(actors)
    version = ServableVersion(
        manifest=LocalStore(store).read_manifest(SERVABLE, 1),
        placement={"table": (names, names)},
    )
    endpoints = {name: endpoint for name, (endpoint, _) in actors.items()}
    assert {endpoint.generation for endpoint in endpoints.values()} == {GENERATION}
    try:
        await router.adopt(
            Epoch(term=1, number=1, servables={SERVABLE: {1: version}}, endpoints=endpoints)
        )
        ended = asyncio.Event()
        others = [asyncio.create_task(keep_asking(router, ended)) for _ in range(4)]
        (first, last) = (pid for _, pid in actors.values())
        for answer in await kill(router, first, time.monotonic() + 10):
            assert (await answer.rows)[:, 0].tolist() == list(range(ROWS))
        assert router.stats.replaced + router.stats.hedged > 0
        ended.set()
        assert min(await asyncio.gather(*others)) > 0
        assert router.stats.failed == 0

        deadline = time.monotonic() + 10
        answers = await kill(router, last, deadline)
        answers.append(ask(router, deadline))  # and one that finds nobody
        for answer in answers:
            with pytest.raises(Unavailable):
                await answer.rows
            assert answer.ended_at < deadline
    finally:
        router.close()


def test_of_two_replicas_one_is_killed_unnoticed_and_without_the_other_all_is_unavailable(
    tmp_path: Path,
) -> None:
    store = tmp_path / "store"
    save(store)
    with started(tmp_path, store) as actors:
        uvloop.run(scenario(store, actors))
