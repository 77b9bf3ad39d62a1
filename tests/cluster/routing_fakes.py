"""A router's surroundings as fakes: virtual time, manifests and epochs, and who asks."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from batching.allowance import CRITICAL
from batching.errors import ServingError
from cluster.epochs import Copies, Epoch, ServableVersion, Share, VersionStatus
from cluster.router import Execution, Router
from cluster.routes import SignaturePlan
from shards.manifest import (
    SCHEMA,
    BlobRef,
    Created,
    HostUnit,
    Manifest,
    MapUnit,
    Node,
    Partition,
    Signature,
    TableUnit,
    Unit,
)
from shards.orders import Endpoint
from shards.specs import Spec
from tests.cluster.routing_actors import Asked, FakeActors

T = TypeVar("T")
Array = npt.NDArray[np.generic]


# Virtual time


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting, lets the time pass."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def select(self, timeout: float | None = None) -> Any:
        events = super().select(0)
        if not events:
            assert timeout is not None, "everybody waits, and nothing will happen"
            self.now += max(timeout, 0.0)
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in which a second takes no time. Nothing may come from outside."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now

    def stand_still(self, seconds: float) -> None:
        """Let time pass in which this loop does nothing, as in a process that was stopped."""
        self._jumping.now += seconds


def run_virtually(scenario: Callable[[VirtualLoop], Coroutine[Any, Any, T]]) -> T:
    """Run a scenario to its end; an exception in any callback fails it."""
    broken: list[dict[str, Any]] = []

    async def run() -> T:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.set_exception_handler(lambda _, context: broken.append(context))
        return await scenario(loop)

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        result = runner.run(run())
    assert not broken, broken
    return result


async def turns(count: int = 5) -> None:
    """Let everything that is due happen; time stands still."""
    for _ in range(count):
        await asyncio.sleep(0)


async def sleep_ms(ms: float) -> None:
    """Let everything happen that is due within this time, and take none."""
    await asyncio.sleep(ms / 1000)


# Manifests


def map_unit(
    unit_id: str = "map",
    inputs: Mapping[str, Spec] | None = None,
    outputs: Mapping[str, Spec] | None = None,
    lengths: Mapping[str, tuple[int, ...]] | None = None,
) -> MapUnit:
    return MapUnit(
        id=unit_id,
        inputs=dict(inputs or {"x": Spec(("b",))}),
        outputs=dict(outputs or {"y": Spec(("b",))}),
        programs=(),
        params=(),
        batch_buckets=(1, 8),
        length_buckets=dict(lengths or {}),
    )


def host_unit(
    unit_id: str = "host", inputs: Mapping[str, Spec] | None = None, output: Spec | None = None
) -> HostUnit:
    return HostUnit(
        id=unit_id,
        entry_point="some.module:load",
        inputs=dict(inputs or {"text": Spec(("b",), "string")}),
        outputs={"ids": output or Spec(("b",), "int64")},
    )


def table_unit(
    unit_id: str = "table",
    *,
    sizes: Sequence[int] = (4, 3, 5),
    dim: int = 2,
    missing: Literal["error", "zero"] = "error",
) -> TableUnit:
    partitions: list[Partition] = []
    for size in sizes:
        first = sum(part.rows for part in partitions)
        blob = BlobRef(digest="0" * 64, size=size * dim * 4)
        partitions.append(Partition(first_row=first, rows=size, blob=blob))
    return TableUnit(
        id=unit_id, dtype="float32", dim=dim, rows=sum(sizes), partitions=tuple(partitions),
        missing=missing,
    )  # fmt: skip


def rows_of(unit: TableUnit) -> npt.NDArray[np.float32]:
    """What a table of `table_unit` holds: every number once."""
    return np.arange(unit.rows * unit.dim, dtype=np.float32).reshape(unit.rows, unit.dim)


def manifest(
    units: Mapping[str, Unit],
    nodes: Sequence[tuple[str, Mapping[str, str]]],
    inputs: Mapping[str, Spec],
    outputs: Mapping[str, Spec],
    returns: Mapping[str, str],
    *,
    name: str = "model",
    version: int = 1,
) -> Manifest:
    signature = Signature(
        method="predict",
        inputs=dict(inputs),
        outputs=dict(outputs),
        nodes=tuple(Node(unit=unit, inputs=dict(given)) for unit, given in nodes),
        returns=dict(returns),
    )
    return Manifest(
        schema=SCHEMA,
        name=name,
        version=version,
        units=dict(units),
        signatures={"serving_default": signature},
        created=Created(shardserve="0", jax="0", at="2026-01-01T00:00:00+00:00"),
    )


def plain(name: str = "model", version: int = 1, unit_id: str = "map") -> Manifest:
    """One map unit from ``x`` to ``y``."""
    x, y = {"x": Spec(("b",))}, {"y": Spec(("b",))}
    nodes = [("unit", {"x": "in:x"})]
    return manifest(
        {"unit": map_unit(unit_id)}, nodes, x, y, {"y": "0:y"}, name=name, version=version
    )


def look_up(unit: TableUnit, name: str = "model", version: int = 1) -> Manifest:
    """One table from ``ids`` to ``rows``."""
    ids, rows = {"ids": Spec(("b",), "int64")}, {"rows": Spec(("b", unit.dim))}
    nodes = [("unit", {"ids": "in:ids"})]
    return manifest(
        {"unit": unit}, nodes, ids, rows, {"rows": "0:rows"}, name=name, version=version
    )


Placement = Mapping[str, Sequence[Sequence[str]]]


def epoch(
    number: int,
    *versions: tuple[Manifest, Placement],
    generations: Mapping[str, int] | None = None,
    labels: Mapping[str, Mapping[str, int]] | None = None,
    statuses: Sequence[VersionStatus] = (),
    term: int = 1,
    continuation_bytes_min: int | None = None,
    splits: Mapping[str, Mapping[int, int]] | None = None,
    copies: Mapping[str, Copies] | None = None,
) -> Epoch:
    """An epoch of these versions, each with its units' holders by partition."""
    servables: dict[str, dict[int, ServableVersion]] = {}
    names: set[str] = set()
    for found, placement in versions:
        holders = {
            unit: tuple(tuple(actors) for actors in parts) for unit, parts in placement.items()
        }
        servables.setdefault(found.name, {})[found.version] = ServableVersion(
            manifest=found, placement=holders
        )
        names.update(actor for parts in holders.values() for part in parts for actor in part)
    endpoints = {name: endpoint(name, (generations or {}).get(name, 1)) for name in sorted(names)}
    return Epoch(
        term=term,
        number=number,
        servables=servables,
        labels={name: dict(found) for name, found in (labels or {}).items()},
        endpoints=endpoints,
        statuses=tuple(statuses),
        continuation_bytes_min=continuation_bytes_min,
        splits={
            name: tuple(
                Share(target=str(version), version=version, weight=weight)
                for version, weight in shares.items()
            )
            for name, shares in (splits or {}).items()
        },
        copies=dict(copies or {}),
    )


def endpoint(actor: str, generation: int = 1) -> Endpoint:
    return Endpoint(actor=actor, generation=generation, node="node")


#: The model of `plain` on two replicas.
AB = {"unit": [["a", "b"]]}


def sentence_model() -> tuple[Manifest, Any]:
    """Host unit to ids, table to rows, map unit to y."""
    text = {"text": Spec(("b",), "string")}
    table = table_unit(missing="zero")
    trunk = map_unit("trunk", {"rows": Spec(("b", 2))}, {"y": Spec(("b",))})
    units: dict[str, Unit] = {"host": host_unit(), "table": table, "trunk": trunk}
    nodes = [
        ("host", {"text": "in:text"}),
        ("table", {"ids": "0:ids"}),
        ("trunk", {"rows": "1:rows"}),
    ]
    found = manifest(units, nodes, text, {"y": Spec(("b",))}, {"y": "2:y"})
    return found, {"host": [["h"]], "table": [["s"], ["t"], ["s"]], "trunk": [["d"]]}


# Requests


class Recorder:
    """A sink that fails the test if it is told twice."""

    def __init__(self) -> None:
        self.request: Execution | None = None
        self.outputs: dict[str, Array] | None = None
        self.error: ServingError | None = None

    @property
    def is_told(self) -> bool:
        return self.outputs is not None or self.error is not None

    def done(self, outputs: Mapping[str, Array], frame: Sequence[Array] | None) -> None:
        assert not self.is_told, "told twice"
        self.outputs = dict(outputs)

    def failed(self, error: ServingError) -> None:
        assert not self.is_told, "told twice"
        self.error = error

    @property
    def answer(self) -> Array:
        """The one output."""
        assert self.error is None, self.error
        assert self.outputs is not None, "no answer yet"
        [array] = self.outputs.values()
        return array

    @property
    def code(self) -> str:
        assert self.error is not None, self.outputs
        return str(self.error.code)


class Bench:
    """A router among fake actors in virtual time."""

    def __init__(self, loop: VirtualLoop, **options: Any) -> None:
        self.loop = loop
        self.actors = FakeActors()
        self.router = Router(loop, self.actors.dial, clock=loop.time, **options)

    def plan(self, name: str = "model", version: int | None = None) -> SignaturePlan:
        return self.router.routes.find(name, version).plans["serving_default"]

    def ask(
        self,
        inputs: Mapping[str, Any],
        *,
        name: str = "model",
        timeout_s: float = 10.0,
        criticality: int = CRITICAL,
    ) -> Recorder:
        """Submit a request; its rows are those of its first input."""
        arrays = {key: np.asarray(value) for key, value in inputs.items()}
        sink = Recorder()
        rows = len(next(iter(arrays.values())))
        deadline = self.loop.time() + timeout_s
        sink.request = self.router.submit(
            self.plan(name), arrays, rows, deadline, sink, criticality=criticality
        )
        return sink

    def ask_x(
        self, *numbers: float, timeout_s: float = 10.0, criticality: int = CRITICAL
    ) -> Recorder:
        """Ask the model of `plain`."""
        inputs = {"x": np.array(numbers, np.float32)}
        return self.ask(inputs, timeout_s=timeout_s, criticality=criticality)

    def ask_ids(self, *ids: int, timeout_s: float = 10.0) -> Recorder:
        """Ask the model of `look_up`."""
        return self.ask({"ids": np.array(ids, np.int64)}, timeout_s=timeout_s)

    def check_at_rest(self) -> None:
        """Nothing is left over of requests that have ended."""
        assert self.router.in_flight == 0
        assert not self.router._asking.calls
        assert not len(self.router._wheel)
        assert all(peer.in_flight == 0 for peer in self.router._roster)
        stats = self.router.stats
        assert stats.accepted == stats.answered + stats.failed


def doubled(asked: Asked) -> None:
    """What every fake map unit computes."""
    asked.answer(asked.arrays[0] * 2)


def floats(*numbers: float) -> Any:
    return np.array(numbers, np.float32)
