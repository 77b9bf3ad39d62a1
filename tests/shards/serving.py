"""What the tests of serving stand on: links that record, devices that obey, virtual time.

`run_virtual` runs a scenario on a loop whose clock jumps to the next timer; where nothing is left
to happen it fails instead of hanging. `Bench` is an engine on such a loop, over a device that ends
a step when the test says so. `DeviceRig` is the same engine as an actor has it: a loop thread, an
executor and JAX on a CPU.
"""

from __future__ import annotations

import asyncio
import selectors
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self, cast

import jax
import msgspec
import numpy as np
import numpy.typing as npt

from batching import Batcher, EffSafe, Policy, RoundRobin
from batching.allowance import CRITICAL
from batching.errors import Internal, InvalidArgument
from shards.engine import DeviceEngine
from shards.errors import DeviceLost, LinkClosed, LinkFull
from shards.executor import CompileWatch, Executor, LoadedUnit, Step, StepResult
from shards.hosted import LaneBounds
from shards.loop import LoopThread
from shards.manifest import MapUnit
from shards.programs import bucket_key, buckets_of, shape_of
from shards.specs import Spec
from shards.staging import fill
from shards.together import joined, parted
from shards.transport import PeerInfo
from shards.wire import (
    HEADER_BYTES_MAX,
    Buffer,
    CallHeader,
    Frame,
    FrameKind,
    Item,
    ItemError,
    ReplyHeader,
    encode_header,
    encode_tensors,
)

GENERATION = 7
#: Until something counts as stuck. On a busy machine the start of a compile process takes 20 s.
DEADLINE_S = 45.0
HOUR_US = 3_600_000_000

Array = npt.NDArray[Any]
Fn = Callable[..., Sequence[Any]]


# --- frames and links --------------------------------------------------------------------------


def call(
    unit: str,
    rows: Mapping[int, int],
    *arrays: Array,
    remaining_us: int = HOUR_US,
    owner: str = "",
    criticality: int = CRITICAL,
    op: str = "run",
    **changes: Any,
) -> Frame:
    """A CALL frame: request to its rows, and the tensors in which all of them lie."""
    headers, buffers = encode_tensors(arrays)
    items = [Item(request, count, remaining_us) for request, count in rows.items()]
    header = CallHeader(
        1, unit, op, changes.pop("items", items), headers, owner=owner, criticality=criticality
    )
    assert not changes
    return Frame(FrameKind.CALL, 0, header, memoryview(b"".join(buffers)))


def together(*frames: Frame) -> Frame:
    """The calls of these frames in one."""
    parts = [(cast(CallHeader, frame.header), [frame.body]) for frame in frames]
    header, buffers = joined(parts)
    return Frame(FrameKind.CALL, 0, header, memoryview(b"".join(buffers)))


class FakeLink:
    """A link that keeps what it is sent.

    The buffers are kept as they came and read when a test asks: a sender that writes to them
    afterwards is found out.
    """

    def __init__(self, name: str = "router", body_bytes_max: int = 1 << 30) -> None:
        self.peer = PeerInfo(name=name, generation=1, node="node-a")
        self.waiting_bytes = 0
        self.full = False
        self.closed: list[str] = []
        self.sent: list[tuple[ReplyHeader, list[Buffer]]] = []
        self._body_bytes_max = body_bytes_max
        self._news = threading.Condition()

    def flush(self) -> None:
        """What is sent is there at once."""

    def send(
        self,
        kind: FrameKind,
        header: msgspec.Struct | bytes,
        buffers: Sequence[Buffer] = (),
        stream: int = 0,
    ) -> None:
        assert kind is FrameKind.REPLY
        assert isinstance(header, ReplyHeader)
        assert header.generation == GENERATION
        if self.closed:
            raise LinkClosed("the link is closed")
        if self.full:
            raise LinkFull("the peer does not read")
        if len(encode_header(header)) > HEADER_BYTES_MAX:
            raise InvalidArgument("a header over the bound")
        if sum(len(buffer) for buffer in buffers) > self._body_bytes_max:
            raise InvalidArgument("a body over the bound")
        with self._news:
            self.sent.append((header, list(buffers)))
            self._news.notify_all()

    def close(self, reason: str = "") -> None:
        self.closed.append(reason)

    @property
    def replies(self) -> list[tuple[ReplyHeader, list[Array]]]:
        """The frames, decoded now."""
        return [
            (each, cast(list[Array], arrays))
            for header, body in self.sent
            for each, arrays in parted(header, memoryview(b"".join(body)))
        ]

    @property
    def answers(self) -> dict[int, list[Array]]:
        """Request to its rows of every output; fails if one was answered twice."""
        found: dict[int, list[Array]] = {}
        for header, arrays in self.replies:
            at = 0
            for request, rows in header.items:
                assert request not in found, f"request {request} was answered twice"
                found[request] = [array[at : at + rows] for array in arrays]
                at += rows
            assert all(len(array) == at for array in arrays)
        return found

    @property
    def errors(self) -> dict[int, ItemError]:
        """Request to its refusal; fails if one was refused twice."""
        found: dict[int, ItemError] = {}
        for header, _ in self.sent:
            for error in header.errors:
                assert error.request not in found, f"request {error.request} was refused twice"
                found[error.request] = error
        return found

    @property
    def codes(self) -> dict[int, str]:
        """Request to the code of its refusal."""
        return {request: str(error.code) for request, error in self.errors.items()}

    @property
    def ended(self) -> set[int]:
        """Every request that has its end; fails if one has two."""
        answered, refused = self.answers.keys(), self.errors.keys()
        assert not answered & refused, f"answered and refused: {answered & refused}"
        return answered | refused

    def wait_for(self, requests: int) -> None:
        """Wait, on a thread, until so many requests have their end."""

        def done() -> bool:
            return sum(len(h.items) + len(h.errors) for h, _ in self.sent) >= requests

        with self._news:
            assert self._news.wait_for(done, DEADLINE_S), f"only {len(self.ended)} of {requests}"


def eventually(condition: Callable[[], bool]) -> None:
    """Wait on a thread until it holds, or fail; for what tells nobody when it happens."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it never came to hold"
        time.sleep(0.002)


async def until(condition: Callable[[], bool]) -> None:
    """Wait on a loop until it holds, or fail."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 -- what is waited for is not an event of ours
            await asyncio.sleep(0.001)


# --- virtual time ------------------------------------------------------------------------------


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop whose time passes only while nothing else is to be done, and then at once."""

    def __init__(self) -> None:
        self.now = 1000.0
        super().__init__(_Jumping(self))

    def time(self) -> float:
        return self.now


class _Jumping(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if not events:
            assert timeout is not None, "everybody waits, and nothing will ever happen"
            self._loop.now += max(timeout, 0.0)
        return events


def run_virtual(scenario: Callable[[VirtualLoop], Awaitable[None]]) -> None:
    """Run a scenario in virtual time; fails if the loop met an error that nobody took."""
    untaken: list[dict[str, Any]] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.set_exception_handler(lambda _, what: untaken.append(what))
        await scenario(loop)

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())
    assert untaken == []


# --- units -------------------------------------------------------------------------------------


def map_unit(
    name: str = "unit",
    inputs: Mapping[str, Spec] | None = None,
    outputs: Mapping[str, Spec] | None = None,
    batch_buckets: tuple[int, ...] = (1, 4),
    length_buckets: Mapping[str, tuple[int, ...]] | None = None,
    request_buckets: tuple[int, ...] = (),
) -> MapUnit:
    """A unit without programs, of rows of two floats unless said otherwise."""
    return MapUnit(
        id=name,
        inputs=dict(inputs or {"x": Spec(("b", 2))}),
        outputs=dict(outputs or {"y": Spec(("b", 2))}),
        programs=(),
        params=(),
        batch_buckets=batch_buckets,
        length_buckets=dict(length_buckets or {}),
        request_buckets=request_buckets,
    )


def compiled(
    fn: Fn, unit: MapUnit, params: Sequence[Array] = (), cost_s: float = 0.0
) -> LoadedUnit:
    """``fn(*params, *inputs)`` compiled for every bucket of the unit."""
    leaves = tuple(jax.device_put(array) for array in params)
    programs: dict[tuple[int, tuple[int, ...]], Callable[..., Any]] = {}
    for batch, sizes in buckets_of(unit):
        avals = [
            jax.ShapeDtypeStruct(*shape_of(spec, batch, sizes))  # type: ignore[no-untyped-call]
            for spec in unit.program_inputs
        ]
        programs[bucket_key(unit, batch, sizes)] = jax.jit(fn).lower(*leaves, *avals).compile()
    return loaded(unit, programs, leaves, cost_s)


def loaded(
    unit: MapUnit,
    programs: Mapping[tuple[int, tuple[int, ...]], Callable[..., Any]],
    leaves: tuple[jax.Array, ...] = (),
    cost_s: float = 0.0,
) -> LoadedUnit:
    """A unit with these programs; steps that cost nothing are finished by the executor thread."""
    return LoadedUnit(
        unit=unit.id,
        leaves=leaves,
        compiled=dict(programs),
        costs=dict.fromkeys(programs, cost_s),
        pads=tuple(spec.pad for spec in unit.program_inputs),
        per_request=unit.per_request,
    )


# --- an engine in virtual time -----------------------------------------------------------------


class HeldStep(NamedTuple):
    """A step on the fake device."""

    step: Step
    #: the staging memory itself, which this device reads only when the step ends
    views: tuple[Array, ...]

    @property
    def bucket(self) -> int:
        return self.step.descriptor.batch


class HeldDevice:
    """An executor that lays rows out at once and computes when it is told to.

    Like XLA it reads the staging memory of a step until the step's end: a slot that is used again
    too early shows in the answers.
    """

    def __init__(self, on_done: Callable[[StepResult], None]) -> None:
        self._on_done = on_done
        self.units: dict[str, tuple[LoadedUnit, Fn]] = {}
        self.fns: dict[str, Fn] = {}
        self.running: list[HeldStep] = []
        self.launched = 0
        self.ran_now: list[Step] = []

    def install(self, unit: LoadedUnit) -> None:
        self.units[unit.unit] = (unit, self.fns[unit.unit])

    def remove(self, unit: str) -> None:
        assert all(held.step.descriptor.unit != unit for held in self.running)
        del self.units[unit]

    def submit(self, step: Step) -> None:
        self._lay_out(step)
        self.running.append(HeldStep(step, tuple(step.views)))
        self.launched += 1

    def finish(self, index: int = 0) -> None:
        """End one of the running steps, with its function's outputs or its error."""
        self._on_done(self._compute(self.running.pop(index).step))

    def run_now(self, step: Step) -> StepResult:
        assert not self.running, "a short step would wait for the device"
        self._lay_out(step)
        self.ran_now.append(step)
        return self._compute(step)

    def _lay_out(self, step: Step) -> None:
        unit, _ = self.units[step.descriptor.unit]
        fill(step.views, step.sources, unit.pads, unit.per_request)

    def _compute(self, step: Step) -> StepResult:
        _, fn = self.units[step.descriptor.unit]
        try:
            outputs = tuple(np.array(output) for output in fn(*step.views))
        except DeviceLost as error:
            return StepResult(step.descriptor, None, error, 0.0)
        except ValueError as error:
            return StepResult(step.descriptor, None, Internal(str(error)), 0.0)
        return StepResult(step.descriptor, outputs, None, 0.001)


class Bench:
    """An engine on a virtual loop, over a device that the test moves on."""

    def __init__(
        self,
        loop: VirtualLoop,
        in_flight_max: int = 2,
        run_now_s: float = 0.0,
        policy: Policy | None = None,
    ) -> None:
        self.batcher = Batcher(policy or RoundRobin(), in_flight_max)
        #: why the engine would have ended its process
        self.lost: list[str] = []
        self.engine = DeviceEngine(
            loop,
            self.batcher,
            GENERATION,
            in_flight_max,
            run_now_s,
            clock=loop.time,
            on_lost=self.lost.append,
        )
        self.device = HeldDevice(self.engine.results)
        self.engine.attach(cast(Executor, self.device))

    def install(
        self,
        fn: Fn,
        unit: MapUnit | None = None,
        rows_max: int = 4096,
        bytes_max: int = 1 << 30,
        cost_s: float = 1.0,
    ) -> None:
        unit = unit or map_unit()
        self.device.fns[unit.id] = fn
        program = loaded(unit, dict.fromkeys(_buckets(unit), fn), cost_s=cost_s)
        self.engine.lanes.install(unit, program, LaneBounds(rows_max, bytes_max))

    async def finish(self, index: int = 0) -> None:
        """End one step and let the engine hear of it."""
        self.device.finish(index)
        await self.settle()

    async def finish_all(self) -> None:
        """End steps, oldest first, until none runs."""
        while self.device.running:
            await self.finish()

    async def settle(self) -> None:
        """Let the engine do what it has to do at this instant."""
        for _ in range(3):
            await asyncio.sleep(0)
        self.batcher.check_invariants()

    def check_idle(self) -> None:
        """Nothing waits, runs or is remembered."""
        self.batcher.check_invariants()
        assert self.batcher.stats().in_flight == self.batcher.stats().waiting == 0
        assert self.engine._staging.free == len(self.engine._staging._buffers)
        assert not self.engine._running
        assert not any(self.engine._tickets.values())


def _buckets(unit: MapUnit) -> list[tuple[int, tuple[int, ...]]]:
    return [bucket_key(unit, batch, sizes) for batch, sizes in buckets_of(unit)]


# --- an engine as an actor has it --------------------------------------------------------------


class DeviceRig:
    """An engine on its loop thread, with an executor and JAX on a CPU."""

    def __init__(self, in_flight_max: int = 2, run_now_s: float = 0.0) -> None:
        self.io = LoopThread("test-io")
        self.batcher = Batcher(EffSafe(), in_flight_max)
        self.engine = DeviceEngine(self.io.loop, self.batcher, GENERATION, in_flight_max, run_now_s)
        self.executor = Executor(jax.devices()[0], self.engine.results)
        self.engine.attach(self.executor)
        self.watch = CompileWatch((*self.executor.thread_ids, self.io.ident))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.executor.close()
        self.watch.close()
        self.io.call(self.batcher.check_invariants)
        self.io.close()

    def install(self, unit: MapUnit, program: LoadedUnit, rows_max: int = 4096) -> None:
        self.io.call(self.engine.lanes.install, unit, program, LaneBounds(rows_max))

    def call(self, link: FakeLink, *frames: Frame) -> None:
        """Let frames arrive, all in one turn of the loop."""

        def arrive() -> None:
            for frame in frames:
                self.engine.on_call(link, frame)

        self.io.call(arrive)
