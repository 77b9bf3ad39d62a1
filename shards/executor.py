"""The device loop: takes steps in order, runs them, hands finished outputs back.

Three threads meet here. The *scheduling* thread (the actor's event loop) submits steps and is
told of their end by a callback. The *executor* thread lays rows into staging memory and launches
programs. The *completion* thread waits for the device, and brings outputs to the host. A step that
is done when its launch returns, as all are on a CPU, or that is known to be short, is finished by
the executor itself; `run_now` runs one on the thread that asks.

What to launch is said by a `StepDescriptor`: it names a loaded program, a bucket and a slot, holds
no array and is serialisable, so that followers of a device group can replay a leader's sequence
(there are no groups yet). A `Step` adds what this process needs to lay the rows into the slot.

This file does not know lanes, requests, deadlines, sockets or Ray. It never compiles: a program
that was not installed is an error, and `CompileWatch` proves that none was.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import msgspec
import numpy as np
import numpy.typing as npt

from batching.errors import Internal, ServingError
from shards.errors import DeviceLost
from shards.staging import Source, fill

__all__ = [
    "Bucket",
    "CompileWatch",
    "Executor",
    "LoadedUnit",
    "Step",
    "StepDescriptor",
    "StepResult",
]

logger = logging.getLogger(__name__)

Array = npt.NDArray[np.generic]
#: (batch, sizes of the unit's other symbols in order of their names, and last, where inputs are per
#: request, the number of requests)
Bucket = tuple[int, tuple[int, ...]]


class StepDescriptor(msgspec.Struct, frozen=True, array_like=True):
    """One launch, as data.

    Attributes:
        sequence: grows with every step; followers run steps in this order.
        unit: id of the unit.
        batch: rows of the bucket.
        lengths: sizes of the unit's other symbols, in the order of their names; then, where inputs
            are per request, the number of requests that there is room for.
        slot: staging slot that holds the rows.
    """

    sequence: int
    unit: str
    batch: int
    lengths: tuple[int, ...]
    slot: int


class Step(NamedTuple):
    """A descriptor with what the executor needs to fill its slot: views and sources."""

    descriptor: StepDescriptor
    views: Sequence[Array]
    sources: Sequence[Source]


class StepResult(NamedTuple):
    """How a step ended. ``outputs`` are host arrays of the whole bucket; None on error.

    ``layout_s`` is what copying the rows into the staging slot took, ``device_s`` everything.
    """

    descriptor: StepDescriptor
    outputs: tuple[Array, ...] | None
    error: Exception | None
    device_s: float
    layout_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedUnit:
    """A unit whose every bucket is compiled and whose parameters are on the device.

    Attributes:
        unit: the unit's id.
        leaves: parameters on the device, in program order.
        compiled: one executable a bucket.
        costs: seconds that a bucket took when it was warmed, launch to outputs on the host.
        pads: padding value of each input.
        load_s: seconds from the first parameter to the last bucket run once.
        per_request: where some inputs are per request, for each whether it is: programs take an
            index after the inputs, whose request each row is of; else ().
    """

    unit: str
    leaves: tuple[jax.Array, ...]
    compiled: dict[Bucket, Callable[..., Any]]
    costs: dict[Bucket, float]
    pads: tuple[float, ...]
    load_s: float = 0.0
    per_request: tuple[bool, ...] = ()


_END = None
#: A step shorter than this is waited for where it was launched: handing it to the completion
#: thread would cost as much as the overlap it makes possible (two thread switches, 20-50 us each).
_WAIT_HERE_S = 0.0003


class Executor:
    """Owns the order of launches on one device.

    Args:
        device: where inputs go.
        on_done: called with each `StepResult`, on the executor or the completion thread; it must
            only hand the result over to the scheduling thread.
        probe: raises if the device is lost. Asked after a step that failed, since what a runtime
            says of a broken device and of a broken program differs only in words.
    """

    def __init__(
        self,
        device: jax.Device,
        on_done: Callable[[StepResult], None],
        probe: Callable[[jax.Device], None] | None = None,
    ) -> None:
        self._device = device
        self._probe = probe or _there_and_back
        # On a CPU, a put costs more than a small program (measured: 30 us and another thread
        # hop), and a staging slot is aligned memory which the program reads in place. On an
        # accelerator the put is the transfer and is made explicit.
        self._put = None if device.platform == "cpu" else jax.device_put
        self._on_done = on_done
        self._units: dict[str, LoadedUnit] = {}
        self._steps: queue.SimpleQueue[Step | None] = queue.SimpleQueue()
        self._launched: queue.SimpleQueue[
            tuple[StepDescriptor, tuple[jax.Array, ...], float, float] | None
        ] = queue.SimpleQueue()
        self._threads = (
            threading.Thread(target=self._run, name="executor", daemon=True),
            threading.Thread(target=self._complete, name="completion", daemon=True),
        )
        for thread in self._threads:
            thread.start()

    def install(self, unit: LoadedUnit) -> None:
        """Make a unit's buckets launchable. Safe while serving."""
        self._units[unit.unit] = unit

    def remove(self, unit: str) -> None:
        """Forget a unit; no step of it may be submitted afterwards. Frees its parameters."""
        self._units.pop(unit, None)

    def loaded(self, unit: str) -> LoadedUnit | None:
        """What was installed under this id."""
        return self._units.get(unit)

    def submit(self, step: Step) -> None:
        """Queue a step. Its slot must not be touched until its result came back."""
        self._steps.put(step)

    def run_now(self, step: Step) -> StepResult:
        """Run a step on the calling thread and wait for it. For short steps, on a CPU."""
        started = time.perf_counter()
        try:
            launched, layout_s = self._launch(step)
            arrays = tuple(np.asarray(output) for output in launched)
        except Exception as error:
            return StepResult(step.descriptor, None, self._failure(error), 0.0)
        device_s = time.perf_counter() - started
        return StepResult(step.descriptor, arrays, None, device_s, layout_s)

    def close(self, timeout_s: float = 5.0) -> None:
        """Finish what was submitted and end both threads."""
        self._steps.put(_END)
        for thread in self._threads:
            thread.join(timeout_s)

    @property
    def thread_ids(self) -> tuple[int, ...]:
        """Identifiers of the two threads, for `CompileWatch`."""
        return tuple(thread.ident or 0 for thread in self._threads)

    def _run(self) -> None:
        while (step := self._steps.get()) is not _END:
            self._step(step)
            # An idle executor keeps no request's rows alive.
            del step
        self._launched.put(_END)

    def _step(self, step: Step) -> None:
        descriptor = step.descriptor
        started = time.perf_counter()
        try:
            outputs, layout_s = self._launch(step)
            cost_s = self._units[descriptor.unit].costs[_bucket(descriptor)]
            is_short = cost_s <= _WAIT_HERE_S or _are_ready(outputs)
        except Exception as error:  # one step's failure must not end the loop
            self._on_done(StepResult(descriptor, None, self._failure(error), 0.0))
            return
        if is_short:
            self._finish(descriptor, outputs, started, layout_s)
        else:
            self._launched.put((descriptor, outputs, started, layout_s))

    def _launch(self, step: Step) -> tuple[tuple[jax.Array, ...], float]:
        """Outputs that the device works on, and the seconds that laying out took."""
        descriptor = step.descriptor
        unit = self._units[descriptor.unit]
        started = time.perf_counter()
        fill(step.views, step.sources, unit.pads, unit.per_request)
        layout_s = time.perf_counter() - started
        program = unit.compiled[_bucket(descriptor)]
        inputs: Sequence[Any] = step.views
        if self._put is not None:
            inputs = [self._put(view, self._device) for view in step.views]
        outputs: tuple[jax.Array, ...] = tuple(program(*unit.leaves, *inputs))
        if self._put is not None:
            for output in outputs:
                output.copy_to_host_async()
        return outputs, layout_s

    def _complete(self) -> None:
        while (launched := self._launched.get()) is not _END:
            self._finish(*launched)
            del launched

    def _finish(
        self,
        descriptor: StepDescriptor,
        outputs: tuple[jax.Array, ...],
        started: float,
        layout_s: float,
    ) -> None:
        try:
            # np.asarray waits for the device with the GIL released; on a CPU it is a view.
            arrays = tuple(np.asarray(output) for output in outputs)
            device_s = time.perf_counter() - started
            result = StepResult(descriptor, arrays, None, device_s, layout_s)
        except Exception as error:
            result = StepResult(descriptor, None, self._failure(error), 0.0)
        self._on_done(result)

    def _failure(self, error: Exception) -> ServingError:
        """What a step's error means: the step's own fault, or the end of the device."""
        reason = _as_serving(error)
        try:
            self._probe(self._device)
        except Exception as lost:
            return DeviceLost(f"the device is lost: {_first_line(lost)}"[:512])
        return reason


def _bucket(descriptor: StepDescriptor) -> Bucket:
    return descriptor.batch, descriptor.lengths


def _are_ready(outputs: Sequence[Any]) -> bool:
    return all(output.is_ready() for output in outputs)


def _as_serving(error: Exception) -> Internal:
    logger.warning("step failed: %s", error, exc_info=error)
    return Internal(f"the program failed: {_first_line(error)}"[:512])


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _there_and_back(device: jax.Device) -> None:
    """A number to the device and back; compiles nothing."""
    np.asarray(jax.device_put(np.zeros(1, np.float32), device))


class CompileWatch:
    """Counts what JAX traces, lowers or compiles on the given threads; it must be nothing.

    JAX reports each on the thread that asked for it. Lowering is counted like compiling, since it
    holds Python's lock for longer than a request may wait.

    Args:
        thread_ids: threads that must do neither.
        lowering: threads that may compile, but not lower: those that load for an accelerator.
    """

    _COMPILED = "/jax/core/compile/backend_compile_duration"
    _LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"

    def __init__(self, thread_ids: Sequence[int], lowering: Sequence[int] = ()) -> None:
        self._threads = frozenset(thread_ids)
        self._lowering = self._threads | frozenset(lowering)
        self.compiled = 0
        self.lowered = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    @property
    def count(self) -> int:
        """Programs that were lowered or compiled."""
        # A program that is called without having been compiled is first lowered, then compiled.
        return max(self.lowered, self.compiled)

    def _on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == self._COMPILED:
            self.compiled += threading.get_ident() in self._threads
        elif event == self._LOWERED:
            self.lowered += threading.get_ident() in self._lowering

    def close(self) -> None:
        """Stop counting."""
        jax.monitoring.unregister_event_duration_listener(self._on_event)
