"""``look-ups``: rows of a table that go straight to the device, against rows through the router.

Four shards, a device and this process, which hosts the product's router core; no Ray, no HTTP. A
request brings ids, and gets the sum of their rows. Both ways are asked in turn, in every round,
over the links of one node (Unix sockets, shared memory for bulk) and as if every actor were on a
node of its own (TCP).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import secrets
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import uvloop

import shards
from batching.errors import ServingError
from bench.errors import AnswersDiffer, LoadFailed
from bench.look_ups_actor import NODE, READY, SECRET_VARIABLE, SERVABLE
from bench.processes import child, python
from bench.registry import Bench, Options
from bench.report import Figure, Plot, Result, Samples, Series, Table, machine
from bench.stats import Estimate, bootstrap, paired_ratio
from cluster.epochs import Epoch, ServableVersion
from cluster.router import Router
from shards.errors import FrameRefused
from shards.orders import Endpoint, HostedUnit
from shards.specs import Spec
from shards.store import LocalStore
from shards.transport import Counters, Link, LinkHandler, connect
from shards.wire import Frame, Header

__all__ = ["BENCH"]

_SHARDS: Final = 4
_DIM: Final = 64
_TABLE_ROWS: Final = 400_000
#: Ids of a request: 4 KB to 4 MB of rows.
IDS: Final = (16, 64, 256, 1024, 4096, 16384)
#: Ways to name, and `continuation_bytes_min` of each.
WAYS: Final[Mapping[str, int | None]] = {"router": None, "straight": 0}
#: Links to name, and the node on which the actors say that they are.
LINKS: Final[Mapping[str, str]] = {"node": NODE, "tcp": "another node"}
_START_S: Final = 90.0
_WINDOW: Final = 8
_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Case:
    """What was measured of one way, links and size in one round.

    Attributes:
        p50_us: of requests one at a time.
        rate: requests a second, `_WINDOW` under way.
        bytes: that the router received and sent for a request, bodies of answers and all it sent.
        router_us: of this process's CPU for a request, `_WINDOW` under way.
    """

    p50_us: float
    rate: float
    bytes: float
    router_us: float


#: Links, way and ids to its rounds.
Outcomes = Mapping[tuple[str, str, int], Sequence[Case]]


class _Counting:
    """A link's handler that counts the bodies that come, in whatever memory they come."""

    def __init__(self, handler: LinkHandler, add: Any) -> None:
        self._handler = handler
        self._add = add

    def on_frame(self, link: Link, frame: Frame) -> None:
        self._add(len(frame.body))
        self._handler.on_frame(link, frame)

    def on_refused(self, link: Link, header: Header, error: FrameRefused) -> None:
        self._handler.on_refused(link, header, error)

    def on_closed(self, link: Link, error: Exception | None) -> None:
        self._handler.on_closed(link, error)


class _Sink:
    def __init__(self) -> None:
        self.answered: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    def done(self, outputs: Mapping[str, Any], frame: Sequence[Any] | None) -> None:
        [array] = outputs.values()
        self.answered.set_result(float(array[0]))

    def failed(self, error: ServingError) -> None:
        self.answered.set_exception(error)


class _Scene:
    """A router over actors that have loaded everything.

    Args:
        actors: endpoint of each actor.
        store: of the bundle.
        node: on which they are.
        secret: of their links.
    """

    def __init__(self, actors: Sequence[Endpoint], store: Path, node: str, secret: bytes) -> None:
        self._endpoints = {endpoint.actor: endpoint for endpoint in actors}
        self._manifest = LocalStore(store).read_manifest(SERVABLE, 1)
        self._secret = secret
        self._counters = Counters()
        self._received = 0
        self._number = 0
        self._random = np.random.default_rng(0)
        self.router = Router(asyncio.get_running_loop(), self._dial)

    async def _dial(self, endpoint: Endpoint, handler: LinkHandler) -> Link:
        return await connect(
            endpoint,
            name="router",
            node=NODE,
            secret=self._secret,
            handler=_Counting(handler, self._add),
            counters=self._counters,
        )

    def _add(self, nbytes: int) -> None:
        self._received += nbytes

    @property
    def _bytes(self) -> int:
        return self._received + self._counters.bytes_sent

    async def take(self, way: str) -> None:
        """Route this way from now on."""
        self._number += 1
        placement = {name: placement_of(name, self._manifest) for name in self._manifest.units}
        version = ServableVersion(manifest=self._manifest, placement=placement)
        await self.router.adopt(
            Epoch(
                term=1,
                number=self._number,
                servables={SERVABLE: {1: version}},
                endpoints=self._endpoints,
                continuation_bytes_min=WAYS[way],
            )
        )

    async def ask(self, count: int) -> None:
        """One request of so many ids."""
        ids = self._random.integers(0, _TABLE_ROWS, (1, count))
        sink = _Sink()
        plan = self.router.routes.find(SERVABLE).plans[f"sum{count}"]
        self.router.submit(plan, {"ids": ids}, 1, time.monotonic() + _TIMEOUT_S, sink)
        answer = await sink.answered
        # Rows hold small whole numbers, so a sum of them has one value in whatever order.
        expected = float(_row_sums(ids).sum())
        if answer != expected:
            raise AnswersDiffer(f"{count} rows sum up to {answer}, not to {expected}")

    async def measure(self, count: int, duration_s: float) -> Case:
        """One at a time, then several."""
        latencies: list[float] = []
        until = time.perf_counter() + duration_s
        before = self._bytes
        while time.perf_counter() < until or not latencies:
            began = time.perf_counter()
            await self.ask(count)
            latencies.append(time.perf_counter() - began)
        nbytes = (self._bytes - before) / len(latencies)
        began, cpu = time.perf_counter(), time.process_time()
        answered = await asyncio.gather(
            *(self._keep_asking(count, began + duration_s) for _ in range(_WINDOW))
        )
        total = sum(answered)
        return Case(
            float(np.median(latencies)) * 1e6,
            total / (time.perf_counter() - began),
            nbytes,
            (time.process_time() - cpu) / total * 1e6,
        )

    async def _keep_asking(self, count: int, until: float) -> int:
        answered = 0
        while time.perf_counter() < until:
            await self.ask(count)
            answered += 1
        return answered


def placement_of(name: str, manifest: Any) -> tuple[tuple[str, ...], ...]:
    """A unit's actors by partition: partitions go round the shards."""
    if name != "table":
        return (("device-0",),)
    partitions = manifest.units[name].partitions
    return tuple((f"shard-{index % _SHARDS}",) for index in range(len(partitions)))


def _rows() -> npt.NDArray[np.float32]:
    numbers = np.arange(_TABLE_ROWS, dtype=np.float32) % 7
    return np.repeat(numbers[:, None], _DIM, axis=1)


def _row_sums(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return (ids % 7) * _DIM


def _save(store: Path) -> None:
    with shards.Bundle.create(store, SERVABLE, 1) as bundle:
        table = bundle.table("table", _rows(), partitions=2 * _SHARDS)
        for count in IDS:
            unit = bundle.unit(
                f"unit{count}",
                lambda p, rows: {"y": rows.sum((1, 2)) * p["one"]},
                {"one": np.float32(1)},
                inputs={"rows": Spec(("b", count, _DIM))},
                batch_buckets=(1, 4),
                platforms=("cpu",),
            )

            def answer(ids: Any, unit: Any = unit) -> Any:
                return unit(rows=table.rows(ids))

            bundle.signature(name=f"sum{count}", inputs={"ids": Spec(("b", count), "int64")})(
                answer
            )


@contextlib.asynccontextmanager
async def _scene(folder: Path, store: Path, links: str) -> AsyncIterator[_Scene]:
    """The actors, started side by side, and a router over them."""
    secret = secrets.token_hex(16)
    manifest = LocalStore(store).read_manifest(SERVABLE, 1)
    placement = placement_of("table", manifest)
    orders: dict[str, list[HostedUnit]] = {
        "device-0": [HostedUnit(name=name) for name in manifest.units if name != "table"]
    }
    for shard in range(_SHARDS):
        held = tuple(i for i, [name] in enumerate(placement) if name == f"shard-{shard}")
        orders[f"shard-{shard}"] = [HostedUnit(name="table", partitions=held)]
    with contextlib.ExitStack() as stack:
        said = [
            stack.enter_context(
                child(
                    python(
                        "bench.look_ups_actor", "--name", name, "--directory", str(folder),
                        "--node", f"{name} of many" if links == "tcp" else NODE,
                        "--store", str(store), "--units", msgspec.json.encode(units).decode(),
                    ),
                    log=folder / f"{links}-{name}.log",
                    ready=READY,
                    timeout_s=_START_S,
                    environment={SECRET_VARIABLE: secret, "JAX_PLATFORMS": "cpu"},
                )
            )
            for name, units in orders.items()
        ]  # fmt: skip
        endpoints = [msgspec.json.decode(line, type=Endpoint) for line in said]
        scene = _Scene(endpoints, store, LINKS[links], secret.encode())
        try:
            yield scene
        finally:
            scene.router.close()


async def _measure(options: Options) -> Outcomes:
    duration_s = 0.1 if options.quick else 0.4
    rounds = options.rounds_or(quick=3, full=7)
    outcomes: dict[tuple[str, str, int], list[Case]] = {}
    with tempfile.TemporaryDirectory(prefix="shardserve-") as name:
        store = Path(name, "store")
        _save(store)
        for links in LINKS:
            async with _scene(Path(name), store, links) as scene:
                for number in range(-1, rounds):
                    print(f"{links}: round {number + 1} of {rounds}", file=sys.stderr)
                    gc.collect()
                    for way in list(WAYS)[:: 1 if number % 2 else -1]:
                        await scene.take(way)
                        for count in IDS:
                            case = await scene.measure(count, duration_s if number >= 0 else 0.02)
                            if number >= 0:  # the first is the warm-up
                                outcomes.setdefault((links, way, count), []).append(case)
                stats = scene.router.stats
                if stats.failed or stats.unjoined or not stats.joined:
                    raise LoadFailed(f"rows did not go the way that was measured: {stats}")
    return outcomes


def _result(outcomes: Outcomes, conditions: Mapping[str, Figure], *, seed: int) -> Result:
    """All that is told of the outcomes."""
    estimates: dict[str, Estimate] = {}
    for (links, way, count), cases in outcomes.items():
        for figure in ("p50_us", "rate", "bytes", "router_us"):
            values = [getattr(case, figure) for case in cases]
            estimates[f"{links}_{way}_{count}_{figure}"] = bootstrap(values, seed=seed)
    ratios: dict[str, Estimate] = {}
    for links, way, count in outcomes:
        if way == "straight":
            for figure in ("p50_us", "rate", "bytes", "router_us"):
                ratios[f"{links}_{count}_{figure}"] = paired_ratio(
                    [getattr(case, figure) for case in outcomes[links, "straight", count]],
                    [getattr(case, figure) for case in outcomes[links, "router", count]],
                    seed=seed,
                )
    everything = estimates | {f"ratio_{name}": value for name, value in ratios.items()}
    return Result(
        bench=BENCH.name,
        ratios={name: estimate.value for name, estimate in ratios.items()},
        figures={
            **{name: estimate.value for name, estimate in estimates.items()},
            "intervals": {name: [each.low, each.high] for name, each in everything.items()},
            **conditions,
        },
        tables=_tables(outcomes, estimates, ratios),
        samples={
            "rounds": Samples(
                columns=("links", "way", "ids", "round", "p50_us", "rate", "bytes", "router_us"),
                rows=[
                    (*key, number, case.p50_us, case.rate, case.bytes, case.router_us)
                    for key, cases in outcomes.items()
                    for number, case in enumerate(cases)
                ],
            )
        },
        plot=Plot(
            title="A look-up and a sum (p50, one at a time)",
            x_label="bytes of rows",
            y_label="microseconds",
            log_x=True,
            log_y=True,
            series=tuple(
                Series(
                    label=f"{links} {way}",
                    x=tuple(float(count * _DIM * 4) for count in IDS),
                    y=tuple(estimates[f"{links}_{way}_{count}_p50_us"].value for count in IDS),
                )
                for links, way in dict.fromkeys((links, way) for links, way, _ in outcomes)
            ),
        ),
        notes=(
            f"{_SHARDS} shards and a device, each a process of this machine; nothing is pinned.",
            "Bytes are what the router receives and sends for one request.",
        ),
    )


def _tables(
    outcomes: Outcomes, estimates: Mapping[str, Estimate], ratios: Mapping[str, Estimate]
) -> tuple[Table, ...]:
    return tuple(
        Table(
            title=f"{links}: rows through the router, straight to the device, and their ratio",
            columns=(
                "ids", "rows", "p50 us", "straight", "ratio", "a second", "straight", "ratio",
                "bytes", "straight", "router us", "straight",
            ),
            rows=tuple(
                (
                    count,
                    f"{count * _DIM * 4 // 1024} KB",
                    *_three(estimates, ratios, links, count, "p50_us"),
                    *_three(estimates, ratios, links, count, "rate"),
                    *_three(estimates, ratios, links, count, "bytes")[:2],
                    *_three(estimates, ratios, links, count, "router_us")[:2],
                )
                for count in IDS
            ),
        )
        for links in dict.fromkeys(links for links, _, _ in outcomes)
    )  # fmt: skip


def _three(
    estimates: Mapping[str, Estimate],
    ratios: Mapping[str, Estimate],
    links: str,
    count: int,
    figure: str,
) -> tuple[float, float, float]:
    through, straight = (estimates[f"{links}_{way}_{count}_{figure}"].value for way in WAYS)
    return through, straight, ratios[f"{links}_{count}_{figure}"].value


def _run(options: Options) -> Result:
    # Before the load, so that the load average is what others do.
    conditions: dict[str, Figure] = {
        "quick": options.quick,
        "seed": options.seed,
        "machine": machine(),
    }
    return _result(uvloop.run(_measure(options)), conditions, seed=options.seed)


BENCH: Final = Bench(
    name="look-ups",
    summary="rows of look-ups straight to the device against rows through the router",
    run=_run,
)
