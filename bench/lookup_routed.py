"""The second half of ``lookup``: many tables over four shards, through the product's router core.

Router and shards are processes of this machine joined by Unix sockets, without Ray and HTTP; each
shard is made of what an actor is made of and has one processor, in turns. A request brings bags for
all tables and gets their sums. The same ids are asked of the same files in this process, by one
thread and without any router, and of Ray actors as a user would write them. Rows hold small whole
numbers, so the sums of all must be equal to the bit.

What is compared with the figure in this process is the processor time of all five processes: it is
what a core yields, whatever waits for what, where five processes share two cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import uvloop

import shards
from batching.errors import ServingError
from bench.errors import AnswersDiffer
from bench.look_ups_actor import NODE, READY, SECRET_VARIABLE, SERVABLE
from bench.lookup_naive import Asked, naive_actors
from bench.processes import child, python
from bench.registry import Options
from cluster.epochs import Epoch, ServableVersion
from cluster.processes import marked
from cluster.router import Router
from shards.layout import blob_path
from shards.manifest import Manifest, TableUnit
from shards.orders import Endpoint, HostedUnit
from shards.overlays import view_rows
from shards.resident import Crew
from shards.specs import Spec
from shards.store import LocalStore
from shards.tables import HostedTable
from shards.transport import Link, LinkHandler, connect

__all__ = ["BATCHES", "CONTENDERS", "Case", "Outcomes", "measure"]

SHARDS: Final = 4
TABLES: Final = 26
LENGTH: Final = 20
DIM: Final = 64
BATCHES: Final = (1, 256)
#: Partitions of a table; its shard has all of them.
PARTITIONS: Final = 16
#: Requests under way where as much as possible is to be done.
WINDOW: Final = 8
CONTENDERS: Final = ("in process", "routed", "routed, 16 partitions", "naive", "naive, by table")
_START_S: Final = 90.0
_TIMEOUT_S: Final = 30.0
_BLOCK_SEED: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Case:
    """What was measured of one contender and batch in one round.

    Attributes:
        one_ms: for a request, one at a time.
        cpu_ms: of all its processes for a request, `WINDOW` under way; 0 where that is not known.
        router_ms: of these, the router's.
        one_cpu_ms: as `cpu_ms`, one at a time.
    """

    one_ms: float
    cpu_ms: float = 0.0
    router_ms: float = 0.0
    one_cpu_ms: float = 0.0


#: Contender and batch to its rounds.
Outcomes = Mapping[tuple[str, int], Sequence[Case]]


class _Sink:
    def __init__(self) -> None:
        self.answered: asyncio.Future[Mapping[str, Any]] = (
            asyncio.get_running_loop().create_future()
        )

    def done(self, outputs: Mapping[str, Any], frame: Sequence[Any] | None) -> None:
        self.answered.set_result(outputs)

    def failed(self, error: ServingError) -> None:
        self.answered.set_exception(error)


def _names(kind: str) -> list[str]:
    return [f"{kind}{number:02}" for number in range(TABLES)]


def _save(store: Path, rows: int, seed: int) -> None:
    """One bundle with all tables twice: whole, and in many partitions."""
    with shards.Bundle.create(store, SERVABLE, 1) as bundle:
        for kind, partitions in (("whole", 1), ("parts", PARTITIONS)):
            names = _names(kind)
            tables = {
                name: bundle.table(name, _rows(rows, seed + number), partitions=partitions)
                for number, name in enumerate(names)
            }

            def pool(tables: Any = tables, **ids: Any) -> Any:
                return {name: tables[name].pool(bags) for name, bags in ids.items()}

            inputs = {name: Spec(("b", "t"), "int32") for name in names}
            only = inspect.Parameter.KEYWORD_ONLY
            pool.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
                [inspect.Parameter(name, only) for name in names]
            )
            bundle.signature(name=kind, inputs=inputs)(pool)


def _rows(rows: int, seed: int) -> npt.NDArray[np.float32]:
    """Sums of 20 of them are exact in any order."""
    random = np.random.default_rng(seed)
    return random.integers(-3, 4, (rows, DIM), np.int8).astype(np.float32)


def placement_of(manifest: Manifest) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Table-wise: all partitions of a table are at one shard, tables go round the shards."""
    holders = {name: f"shard-{int(name[-2:]) % SHARDS}" for name in manifest.units}
    return {
        name: ((holders[name],),) * len(unit.partitions)
        for name, unit in manifest.units.items()
        if isinstance(unit, TableUnit)
    }


class _Local:
    """The tables in this process, looked up by one thread."""

    def __init__(self, store: LocalStore, manifest: Manifest) -> None:
        crew = Crew(1)
        self.tables: dict[str, HostedTable] = {}
        for name in _names("whole"):
            unit = manifest.units[name]
            assert isinstance(unit, TableUnit)
            rows = view_rows(unit, store.map(unit.partitions[0].blob))
            rows.sum()  # every page is mapped
            self.tables[name] = HostedTable(unit, {0: rows}, crew=crew)

    def take(self, asked: Sequence[Asked]) -> Case:
        """All requests of a turn."""
        bags = len(asked[0][next(iter(self.tables))])
        offsets = np.arange(bags + 1, dtype=np.int64) * LENGTH
        began, cpu = time.perf_counter(), time.process_time()
        for ids in asked:
            for name, table in self.tables.items():
                table.pool(ids[name].reshape(-1), offsets, "sum")
        spent, took = time.process_time() - cpu, time.perf_counter() - began
        count = len(asked)
        return Case(took / count * 1e3, spent / count * 1e3, 0.0, spent / count * 1e3)

    def expected(self, ids: Asked) -> dict[str, npt.NDArray[np.float32]]:
        """The answer to one request."""
        bags = len(next(iter(ids.values())))
        offsets = np.arange(bags + 1, dtype=np.int64) * LENGTH
        return {
            name: table.pool(ids[name].reshape(-1), offsets, "sum")
            for name, table in self.tables.items()
        }


class _Routed:
    """A router over shards that have loaded everything."""

    def __init__(self, router: Router, pids: Sequence[int]) -> None:
        self.router = router
        self._pids = pids

    async def ask(self, kind: str, ids: Asked) -> Mapping[str, Any]:
        """One request."""
        sink = _Sink()
        plan = self.router.routes.find(SERVABLE).plans[kind]
        inputs = {f"{kind}{name[-2:]}": bags for name, bags in ids.items()}
        rows = len(next(iter(ids.values())))
        self.router.submit(plan, inputs, rows, time.monotonic() + _TIMEOUT_S, sink)
        return await sink.answered

    async def take(self, kind: str, asked: Sequence[Asked]) -> Case:
        """All requests of a turn one at a time, and all again with several under way."""
        count = len(asked)
        shards_ms, router, began = self._shards_ms(), time.process_time(), time.perf_counter()
        for ids in asked:
            await self.ask(kind, ids)
        took, own = time.perf_counter() - began, (time.process_time() - router) * 1e3
        one_cpu = (self._shards_ms() - shards_ms + own) / count
        shards_ms, router = self._shards_ms(), time.process_time()
        left = list(asked)

        async def work() -> None:
            while left:
                await self.ask(kind, left.pop())

        await asyncio.gather(*(work() for _ in range(WINDOW)))
        own = (time.process_time() - router) * 1e3
        cpu = (self._shards_ms() - shards_ms + own) / count
        return Case(took / count * 1e3, cpu, own / count, one_cpu)

    def _shards_ms(self) -> float:
        """Processor time of the shards so far, their kernel's included."""
        total = 0
        for pid in self._pids:
            for task in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(OSError):  # a thread that has just ended
                    total += int((task / "schedstat").read_text().split()[0])
        return total / 1e6


@contextlib.asynccontextmanager
async def _routed(folder: Path, store: Path, manifest: Manifest) -> Any:
    secret = secrets.token_hex(16)
    placement = placement_of(manifest)
    with contextlib.ExitStack() as stack:
        said = [
            stack.enter_context(
                child(
                    python(
                        "bench.look_ups_actor", "--name", name, "--directory", str(folder),
                        "--node", NODE, "--store", str(store), "--processor", str(number),
                        "--units", msgspec.json.encode(_held(placement, name)).decode(),
                        "--resident", "locked",
                    ),
                    log=folder / f"{name}.log",
                    ready=READY,
                    timeout_s=_START_S,
                    environment={SECRET_VARIABLE: secret, "JAX_PLATFORMS": "cpu"},
                )
            )
            for number, name in enumerate(f"shard-{number}" for number in range(SHARDS))
        ]  # fmt: skip
        endpoints = [msgspec.json.decode(line, type=Endpoint) for line in said]

        async def dial(endpoint: Endpoint, handler: LinkHandler) -> Link:
            return await connect(
                endpoint, name="router", node=NODE, secret=secret.encode(), handler=handler
            )

        router = Router(asyncio.get_running_loop(), dial)
        version = ServableVersion(manifest=manifest, placement=placement)
        epoch = Epoch(
            term=1,
            number=1,
            servables={SERVABLE: {1: version}},
            endpoints={endpoint.actor: endpoint for endpoint in endpoints},
        )
        await router.adopt(epoch)
        try:
            yield _Routed(router, [one.pid for one in marked(SECRET_VARIABLE, secret)])
        finally:
            router.close()


def _held(placement: Mapping[str, tuple[tuple[str, ...], ...]], actor: str) -> list[HostedUnit]:
    return [
        HostedUnit(name=name, partitions=tuple(range(len(holders))))
        for name, holders in placement.items()
        if holders[0] == (actor,)
    ]


def _drawn(rows: int, batch: int, count: int, seed: int) -> list[Asked]:
    random = np.random.default_rng(seed)
    return [
        {
            name: random.integers(0, rows, (batch, LENGTH)).astype(np.int32)
            for name in _names("whole")
        }
        for _ in range(count)
    ]


def _check(who: str, answer: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    by_number = {name[-2:]: sums for name, sums in answer.items()}
    for name, sums in expected.items():
        if not np.array_equal(by_number[name[-2:]], sums):
            raise AnswersDiffer(f"{who} adds table {name} up to something else")


def _files(store: Path, manifest: Manifest) -> Iterator[dict[str, str]]:
    """The files of the whole tables, by shard."""
    for number in range(SHARDS):
        found: dict[str, str] = {}
        for name in _names("whole")[number::SHARDS]:
            unit = manifest.units[name]
            assert isinstance(unit, TableUnit)
            found[name] = str(store / blob_path(unit.partitions[0].blob))
        yield found


async def _rounds(folder: Path, rows: int, rounds: int, options: Options) -> Outcomes:
    store_folder = folder / "routed"
    _save(store_folder, rows, options.seed)
    store = LocalStore(store_folder)
    manifest = store.read_manifest(SERVABLE, 1)
    outcomes: dict[tuple[str, int], list[Case]] = {}
    local = _Local(store, manifest)
    with naive_actors(list(_files(store_folder, manifest)), DIM) as naive:
        async with _routed(folder, store_folder, manifest) as routed:
            gc.collect()
            gc.freeze()  # as the process of a router does
            for number in range(-1, rounds):
                print(f"routed: round {number + 1} of {rounds}", file=sys.stderr)
                gc.collect()
                for batch in BATCHES:
                    count = (320 if batch == 1 else 64) // (4 if options.quick else 1)
                    asked = _drawn(rows, batch, count, options.seed + _BLOCK_SEED + number)
                    expected = local.expected(asked[0])
                    for who in CONTENDERS[:: 1 if number % 2 else -1]:
                        if who == "in process":
                            case = local.take(asked)
                        elif who.startswith("naive"):
                            by_table = who != "naive"
                            _check(who, naive(asked[0], by_table), expected)
                            began = time.perf_counter()
                            for ids in asked:
                                naive(ids, by_table)
                            case = Case((time.perf_counter() - began) / count * 1e3)
                        else:
                            kind = "whole" if who == "routed" else "parts"
                            _check(who, await routed.ask(kind, asked[0]), expected)
                            case = await routed.take(kind, asked)
                        if number >= 0:  # the first is the warm-up
                            outcomes.setdefault((who, batch), []).append(case)
            gc.unfreeze()
    return outcomes


def measure(folder: Path, options: Options) -> Outcomes:
    """All contenders in turns, with fresh ids in every round.

    Args:
        folder: takes the bundle: 52 tables.
        options: of the bench.

    Raises:
        AnswersDiffer: a sum is not that of this process.
        ContenderFailed: a shard or Ray did not start.
    """
    # Smaller tables are looked up by NumPy.
    rows = 70_000 if options.quick else 100_000
    rounds = options.rounds_or(quick=5, full=9)
    return uvloop.run(_rounds(folder, rows, rounds, options))
