"""The device loop: order, failures, threads, memory, and the count of compiles."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

from shards.errors import DeviceLost
from shards.executor import CompileWatch, Executor, LoadedUnit, Step, StepDescriptor, StepResult
from shards.manifest import MapUnit
from shards.specs import Spec
from shards.staging import Source, StagingPool
from tests.shards.serving import DEADLINE_S, Array, compiled, eventually, loaded, map_unit

UNIT = map_unit()
LAYOUT = (((4, 2), np.dtype(np.float32)),)
W = np.array([[1, 2], [3, 4]], np.float32)
SHORT_S, LONG_S = 0.0, 1.0


def layer(w: Any, x: Any) -> Any:
    return (jnp.tanh(x @ w),)


class Results:
    """What an executor handed back, in order, and on which threads."""

    def __init__(self) -> None:
        self.list: list[StepResult] = []
        self.threads: list[str] = []
        self._news = threading.Condition()

    def __call__(self, result: StepResult) -> None:
        with self._news:
            self.list.append(result)
            self.threads.append(threading.current_thread().name)
            self._news.notify_all()

    def wait(self, count: int = 1) -> list[StepResult]:
        with self._news:
            assert self._news.wait_for(lambda: len(self.list) >= count, DEADLINE_S)
        return self.list

    @property
    def sequence(self) -> list[int]:
        return [result.descriptor.sequence for result in self.list]


@pytest.fixture
def results() -> Results:
    return Results()


@pytest.fixture
def executor(results: Results) -> Iterator[Executor]:
    made = Executor(jax.devices()[0], results)
    yield made
    made.close(DEADLINE_S)


def step(number: int, array: Array, unit: str = "unit", batch: int = 4) -> Step:
    """A step in staging memory of its own."""
    pool = StagingPool(1)
    wanted = (((batch, *array.shape[1:]), array.dtype),)
    pool.reserve(wanted)
    descriptor = StepDescriptor(number, unit, batch, (), 0)
    return Step(descriptor, pool.views(0, wanted), [Source([array], 0, len(array))])


def rows(*values: float) -> Array:
    return np.repeat(np.array(values, np.float32)[:, None], 2, axis=1)


class Later:
    """An output that is there when it is told, as on a device that is busy."""

    def __init__(self, value: Array) -> None:
        self._value = value
        self.here = threading.Event()
        self.asked = threading.Event()

    def is_ready(self) -> bool:
        return self.here.is_set()

    def __array__(self, dtype: Any = None, copy: Any = None) -> Array:
        self.asked.set()
        assert self.here.wait(DEADLINE_S)
        return self._value


class Unready(Later):
    """An output that never says that it is there, so that it is always waited for."""

    def is_ready(self) -> bool:
        return False


def failing(_: Array) -> Any:
    raise ValueError("no such luck\nand more of it\nin three lines")


def python_unit(program: Callable[..., Any], name: str = "unit", cost_s: float = 0.0) -> LoadedUnit:
    """A unit whose program for a batch of 4 is this function."""
    return loaded(map_unit(name), {(4, ()): program}, cost_s=cost_s)


# --- what comes back ---------------------------------------------------------------------------


@pytest.mark.parametrize("cost_s", [SHORT_S, LONG_S])
def test_outputs_are_those_of_the_function(
    executor: Executor, results: Results, cost_s: float
) -> None:
    executor.install(compiled(layer, UNIT, [W], cost_s))
    executor.submit(step(1, rows(0.1, 0.2, 0.3)))
    (result,) = results.wait()
    assert result.error is None
    assert result.outputs is not None
    (y,) = result.outputs
    assert isinstance(y, np.ndarray)
    assert y.shape == (4, 2)
    expected = np.tanh(rows(0.1, 0.2, 0.3, 0.1) @ W)
    np.testing.assert_allclose(y.astype(float), expected, rtol=1e-5)
    assert result.device_s > 0


def test_every_output_comes_in_the_programs_order(executor: Executor, results: Results) -> None:
    unit = map_unit(outputs={"y": Spec(("b", 2)), "n": Spec(("b",), "int32")})
    executor.install(compiled(lambda x: (x * 2, x.sum(1).astype(jnp.int32)), unit))
    executor.submit(step(1, rows(1, 2, 3, 4)))
    (result,) = results.wait()
    assert result.outputs is not None
    double, total = result.outputs
    assert double[:, 0].tolist() == [2, 4, 6, 8]
    assert total.tolist() == [2, 4, 6, 8]
    assert total.dtype == np.int32


def test_short_steps_end_on_the_executor_thread_in_the_order_in_which_they_came(
    executor: Executor, results: Results
) -> None:
    executor.install(compiled(layer, UNIT, [W], SHORT_S))
    for number in range(20):
        executor.submit(step(number, rows(number)))
    results.wait(20)
    assert results.sequence == list(range(20))
    assert set(results.threads) == {"executor"}


def test_long_steps_are_launched_while_an_earlier_one_still_runs(
    executor: Executor, results: Results
) -> None:
    outputs = [Later(rows(n)) for n in range(3)]
    launched: list[float] = []
    third = threading.Event()

    def program(x: Array) -> Any:
        launched.append(float(x[0, 0]))
        if len(launched) == 3:
            third.set()
        return (outputs[len(launched) - 1],)

    executor.install(python_unit(program, cost_s=LONG_S))
    for number in range(3):
        executor.submit(step(number, rows(number)))
    assert third.wait(DEADLINE_S)
    assert launched == [0, 1, 2]
    assert not results.list
    for output in reversed(outputs):
        output.here.set()
    results.wait(3)
    assert results.sequence == [0, 1, 2]
    assert set(results.threads) == {"completion"}


def test_a_short_step_overtakes_one_that_still_runs(executor: Executor, results: Results) -> None:
    slow = Later(rows(0))
    executor.install(python_unit(lambda x: (slow,), "slow", LONG_S))
    executor.install(compiled(layer, UNIT, [W], SHORT_S))
    executor.submit(step(1, rows(1), "slow"))
    executor.submit(step(2, rows(1)))
    results.wait(1)
    slow.here.set()
    results.wait(2)
    assert results.sequence == [2, 1]


def test_a_long_step_that_is_done_when_its_launch_returns_ends_there(
    executor: Executor, results: Results
) -> None:
    done = Later(rows(0))
    done.here.set()
    executor.install(python_unit(lambda x: (done,), cost_s=LONG_S))
    executor.submit(step(1, rows(1)))
    results.wait()
    assert results.threads == ["executor"]


def test_a_step_that_is_run_now_runs_on_the_callers_thread(executor: Executor) -> None:
    names: list[str] = []

    def program(x: Array) -> Any:
        names.append(threading.current_thread().name)
        return (x + 1,)

    executor.install(python_unit(program))
    result = executor.run_now(step(1, rows(1, 2)))
    assert result.outputs is not None
    assert result.outputs[0].tolist() == [[2.0, 2.0], [3.0, 3.0], [2.0, 2.0], [2.0, 2.0]]
    assert names == [threading.current_thread().name]


def test_a_step_that_is_run_now_and_fails_says_so(executor: Executor) -> None:
    executor.install(python_unit(failing))
    result = executor.run_now(step(1, rows(1)))
    assert result.outputs is None
    assert str(result.error) == "the program failed: ValueError: no such luck"


# --- what goes wrong ---------------------------------------------------------------------------


def test_a_failing_program_fails_its_step_and_the_loop_goes_on(
    executor: Executor, results: Results, caplog: pytest.LogCaptureFixture
) -> None:
    executor.install(python_unit(failing, "bad"))
    executor.install(compiled(layer, UNIT, [W]))
    executor.submit(step(1, rows(1), "bad"))
    executor.submit(step(2, rows(1)))
    bad, good = results.wait(2)
    assert bad.outputs is None
    assert str(bad.error) == "the program failed: ValueError: no such luck"
    assert good.error is None
    assert "and more of it" in caplog.text


@pytest.mark.parametrize("cost_s", [SHORT_S, LONG_S])
def test_a_program_that_fails_after_its_launch_fails_its_step(
    executor: Executor, results: Results, cost_s: float
) -> None:
    class Broken:
        def is_ready(self) -> bool:
            return True

        def __array__(self, dtype: Any = None, copy: Any = None) -> Array:
            raise RuntimeError("the device says no")

    executor.install(python_unit(lambda x: (Broken(),), cost_s=cost_s))
    executor.submit(step(1, rows(1)))
    (result,) = results.wait()
    assert str(result.error) == "the program failed: RuntimeError: the device says no"


def nothing(unit: MapUnit) -> LoadedUnit:
    return loaded(unit, {})


@pytest.mark.parametrize("cost_s", [SHORT_S, LONG_S])
def test_a_step_that_fails_on_a_device_that_answers_nothing_more_says_that_it_is_lost(
    results: Results, cost_s: float
) -> None:
    def silent(device: jax.Device) -> None:
        raise RuntimeError("INTERNAL: it fell off the bus\nand more")

    executor = Executor(jax.devices()[0], results, probe=silent)
    executor.install(compiled(layer, UNIT, [W], cost_s))
    executor.install(python_unit(failing, "bad", cost_s))
    executor.submit(step(1, rows(1)))
    executor.submit(step(2, rows(1), "bad"))
    good, bad = sorted(results.wait(2), key=lambda result: result.descriptor.sequence)
    assert good.error is None, "a step that went well asks for no proof"
    assert isinstance(bad.error, DeviceLost)
    assert str(bad.error) == "the device is lost: RuntimeError: INTERNAL: it fell off the bus"
    executor.close()


@pytest.mark.parametrize(
    ("install", "named"),
    [([], "unit"), ([nothing(UNIT)], "(4, ())")],
    ids=["unknown unit", "unknown bucket"],
)
def test_a_program_that_was_not_installed_is_an_error_and_never_a_compile(
    executor: Executor, results: Results, install: Sequence[LoadedUnit], named: str
) -> None:
    watch = CompileWatch(executor.thread_ids)
    for unit in install:
        executor.install(unit)
    executor.submit(step(1, rows(1)))
    (result,) = results.wait()
    assert "KeyError" in str(result.error)
    assert named in str(result.error)
    assert watch.count == 0
    watch.close()


def test_a_message_is_one_line_of_bounded_length(executor: Executor, results: Results) -> None:
    def verbose(_: Array) -> Any:
        raise ValueError("x" * 100_000)

    def silent(_: Array) -> Any:
        raise ValueError

    for number, program in enumerate((verbose, silent)):
        executor.install(python_unit(program, str(number)))
        executor.submit(step(number, rows(1), str(number)))
    long, empty = results.wait(2)
    assert len(str(long.error)) == 512
    assert str(empty.error) == "the program failed: ValueError: "


def test_inputs_of_another_shape_fail_and_do_not_compile(
    executor: Executor, results: Results
) -> None:
    executor.install(compiled(layer, UNIT, [W]))
    watch = CompileWatch(executor.thread_ids)
    executor.submit(step(1, np.zeros((4, 3), np.float32)))
    (result,) = results.wait()
    assert "TypeError" in str(result.error)
    assert watch.count == 0
    watch.close()


# --- threads and memory ------------------------------------------------------------------------


def test_close_finishes_what_was_submitted_and_ends_both_threads(results: Results) -> None:
    executor = Executor(jax.devices()[0], results)
    threads = [t for t in threading.enumerate() if t.ident in executor.thread_ids]
    assert sorted(t.name for t in threads) == ["completion", "executor"]
    executor.install(compiled(layer, UNIT, [W], LONG_S))
    for number in range(10):
        executor.submit(step(number, rows(number)))
    executor.close(DEADLINE_S)
    assert not any(thread.is_alive() for thread in threads)
    assert results.sequence == list(range(10))


def test_a_removed_unit_leaves_no_parameters_behind(executor: Executor, results: Results) -> None:
    # A shape that no other test of the process uses, so that its arrays can be told.
    w = np.zeros((2, 4321), np.float32)
    unit = map_unit(outputs={"y": Spec(("b", 4321))})

    def left() -> int:
        gc.collect()
        arrays = jax.live_arrays()  # type: ignore[no-untyped-call]
        return sum(array.shape in ((2, 4321), (4, 4321)) for array in arrays)

    def serve() -> None:
        executor.install(compiled(layer, unit, [w], LONG_S))
        executor.submit(step(1, rows(1)))
        results.wait()

    serve()
    assert left() >= 1
    executor.remove("unit")
    results.list.clear()
    eventually(lambda: left() == 0)


def test_an_idle_executor_keeps_no_rows_alive(
    executor: Executor, results: Results, caplog: pytest.LogCaptureFixture
) -> None:
    class Rows(np.ndarray[Any, Any]):
        pass

    kept: list[weakref.ref[Any]] = []

    def submit(number: int) -> None:
        array = rows(number).view(Rows)
        kept.append(weakref.ref(array))
        executor.submit(step(number, array))

    caplog.set_level(logging.CRITICAL, "shards.executor")  # a captured record keeps its frames
    for number, program in enumerate(
        (
            compiled(layer, UNIT, [W], SHORT_S),
            compiled(layer, UNIT, [W], LONG_S),
            python_unit(failing),
        )
    ):
        executor.install(program)
        submit(number)
        results.wait(number + 1)
    eventually(lambda: all(ref() is None for ref in kept))


def test_an_idle_completion_thread_keeps_no_outputs_alive(
    executor: Executor, results: Results
) -> None:
    made: list[weakref.ref[Later]] = []

    def program(_: Array) -> Any:
        later = Unready(rows(1))
        later.here.set()
        made.append(weakref.ref(later))
        return (later,)

    executor.install(python_unit(program, cost_s=LONG_S))
    executor.submit(step(1, rows(1)))
    results.wait()
    assert results.threads == ["completion"]
    eventually(lambda: made[0]() is None)


# --- descriptors -------------------------------------------------------------------------------


def test_a_descriptor_crosses_a_process_as_it_is() -> None:
    descriptor = StepDescriptor(5, "unit", 8, (16, 32), 1)
    data = msgspec.msgpack.encode(descriptor)
    assert msgspec.msgpack.decode(data, type=StepDescriptor) == descriptor


# --- compiles ----------------------------------------------------------------------------------


def compile_something(size: int) -> None:
    jax.jit(lambda x: x * size).lower(np.zeros(size, np.float32)).compile()


def on_a_thread(fn: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=fn)
    thread.start()
    return thread


def test_a_compile_on_a_watched_thread_is_counted() -> None:
    watch = CompileWatch([threading.get_ident()])
    compile_something(101)
    assert watch.count == 1
    compile_something(102)
    assert watch.count == 2
    watch.close()


def test_a_compile_on_another_thread_is_not() -> None:
    watch = CompileWatch([threading.get_ident()])
    on_a_thread(lambda: compile_something(103)).join(DEADLINE_S)
    assert watch.count == 0
    watch.close()


def test_a_compile_that_a_serving_thread_falls_into_is_counted(
    executor: Executor, results: Results
) -> None:
    # The defect itself: a program that is traced when it is called.
    watch = CompileWatch(executor.thread_ids)
    executor.install(python_unit(lambda x: (jax.jit(lambda y: y * 104)(x),)))
    executor.submit(step(1, rows(1)))
    (result,) = results.wait()
    assert result.error is None
    assert watch.count == 1
    watch.close()


def test_a_closed_watch_counts_no_more() -> None:
    watch = CompileWatch([threading.get_ident()])
    watch.close()
    compile_something(105)
    assert watch.count == 0


def test_running_what_is_compiled_counts_nothing(executor: Executor, results: Results) -> None:
    executor.install(compiled(layer, UNIT, [W]))
    watch = CompileWatch(executor.thread_ids)
    for number in range(5):
        executor.submit(step(number, rows(number)))
    results.wait(5)
    assert watch.count == 0
    watch.close()


def test_a_failed_step_is_logged_with_its_cause(
    executor: Executor, results: Results, caplog: pytest.LogCaptureFixture
) -> None:
    executor.install(python_unit(failing))
    with caplog.at_level(logging.WARNING, "shards.executor"):
        executor.submit(step(1, rows(1)))
        results.wait()
    (record,) = caplog.records
    assert record.exc_info is not None
    assert record.exc_info[0] is ValueError
