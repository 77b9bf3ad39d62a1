"""Units tried in a real compile process: what it survives, and what survives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batching.errors import ResourceExhausted
from shards.compiling import compiler as compiler_module
from shards.compiling.cache import ProgramCache
from shards.compiling.compiler import Compiler
from shards.compiling.process import CompileProcess
from shards.errors import ProgramRefused
from shards.executor import CompileWatch
from shards.manifest import MapUnit
from shards.store import LocalStore
from tests.shards.compiling.units import (
    WEIGHTS,
    Executables,
    answer,
    compiler,
    load,
    saved,
)
from tests.shards.serving import eventually


def check(made: Executables) -> None:
    """The executables compute what `layers` computes."""
    assert list(made) == [(1, ()), (4, ())]
    for (batch, _), executable in made.items():
        x = np.random.default_rng(batch).random((batch, 8), np.float32)
        np.testing.assert_allclose(executable.run(*WEIGHTS, x)[1], answer(x), rtol=1e-5)


def is_alive(pid: int) -> bool:
    """Whether there is such a process; a zombie counts."""
    return Path(f"/proc/{pid}").exists()


@pytest.fixture
def own() -> Iterator[list[Compiler]]:
    """Compilers that a test makes, ended with it."""
    made: list[Compiler] = []
    yield made
    for each in made:
        each.close()


def test_executables_come_from_another_process_and_nothing_is_lowered_here(tmp_path: Path) -> None:
    store, unit = saved(tmp_path)
    # On every thread: what JAX does on others' behalf would be seen as well.
    seen: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: seen.append(event))
    made = load(compiler(), store, unit)
    assert not [event for event in seen if event.startswith("/jax/core/compile/")]
    check(made)


def test_the_process_serves_several_units_and_takes_the_last_place(tmp_path: Path) -> None:
    store, unit = saved(tmp_path)
    check(load(compiler(), store, unit))
    pid = compiler().pid
    assert pid is not None
    check(load(compiler(), store, unit))
    assert compiler().pid == pid
    assert os.sched_getscheduler(pid) == os.SCHED_IDLE
    assert os.getpgid(pid) == pid, "what ends us by our group leaves it to the kernel"
    assert os.getsid(pid) == os.getsid(0), "another session would be another group to the scheduler"
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "1000\n"


def test_a_refusal_names_the_unit_and_costs_no_process(tmp_path: Path) -> None:
    good_store, good = saved(tmp_path / "good")
    store, bad = saved(tmp_path / "bad", lambda p, x: x @ p[0], platforms=("tpu",), params=WEIGHTS)
    check(load(compiler(), good_store, good))
    pid = compiler().pid
    with pytest.raises(ProgramRefused, match=f"^unit {bad.id[:12]}: the program was lowered for"):
        load(compiler(), store, bad)
    check(load(compiler(), good_store, good))
    assert compiler().pid == pid


class Killing(CompileProcess):
    """Ends its child by a signal from outside, after it has sent this many buckets."""

    after: int
    times: int
    number: signal.Signals

    def try_unit(self, trial: Any) -> Iterator[Any]:
        for count, compiled in enumerate(super().try_unit(trial)):
            yield compiled
            if self.times and count + 1 == self.after:
                self.kill()

    def _receive(self, step: str) -> Any:
        # Not before the trial has begun: a child that is found dead then is replaced, and no death.
        if self.times and self.after == 0:
            self.kill()
        return super()._receive(step)

    def kill(self) -> None:
        self.times -= 1
        assert self.pid is not None
        os.kill(self.pid, self.number)


def killing(
    own: list[Compiler], monkeypatch: pytest.MonkeyPatch, after: int, times: int
) -> Compiler:
    monkeypatch.setattr(compiler_module, "CompileProcess", Killing)
    made = Compiler(jax.devices()[0])
    own.append(made)
    process = made._process
    assert isinstance(process, Killing)
    process.after, process.times, process.number = after, times, signal.SIGKILL
    return made


@pytest.mark.parametrize("after", [0, 1])
def test_a_process_that_is_killed_in_the_middle_of_a_load_is_replaced_and_the_load_succeeds(
    tmp_path: Path, own: list[Compiler], monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    store, unit = saved(tmp_path)
    check(load(killing(own, monkeypatch, after, times=1), store, unit))


def test_a_load_whose_process_is_killed_twice_fails_and_the_next_one_succeeds(
    tmp_path: Path, own: list[Compiler], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, unit = saved(tmp_path)
    made = killing(own, monkeypatch, after=0, times=2)
    # A kill from outside is most often the kernel's, for want of memory: another time may do.
    with pytest.raises(ResourceExhausted, match=r"was ended by SIGKILL while starting"):
        load(made, store, unit)
    assert made.pid is None
    check(load(made, store, unit))


def test_a_program_that_never_ends_is_given_up(tmp_path: Path, own: list[Compiler]) -> None:
    def endless(p: Any, x: Any) -> Any:
        return jax.lax.while_loop(lambda y: y.sum() < 1e9, lambda y: y * 0, x) @ p[0]

    store, unit = saved(tmp_path, endless, params=WEIGHTS[:1])
    own.append(Compiler(jax.devices()[0], step_cpu_s_max=1))
    text = r"used more than 1 s of processor time while running it for batch 1$"
    with pytest.raises(ProgramRefused, match=text):
        load(own[0], store, unit)
    assert own[0].pid is None


def test_a_process_that_says_nothing_is_given_up(tmp_path: Path, own: list[Compiler]) -> None:
    store, unit = saved(tmp_path)
    own.append(Compiler(jax.devices()[0], silence_s_max=0.05))
    own[0].start()
    assert own[0].pid is not None
    os.kill(own[0].pid, signal.SIGSTOP)
    with pytest.raises(ProgramRefused, match=r"said nothing for 0.05 s and was ended while"):
        load(own[0], store, unit)
    assert own[0].pid is None


def test_a_process_that_is_let_run_by_nobody_is_replaced_by_one_that_takes_its_share(
    tmp_path: Path, own: list[Compiler]
) -> None:
    store, unit = saved(tmp_path)
    own.append(Compiler(jax.devices()[0], patience_s=0.2))
    own[0].start()
    patient = own[0].pid
    assert patient is not None
    eventually(lambda: os.sched_getscheduler(patient) == os.SCHED_IDLE)
    os.kill(patient, signal.SIGSTOP)  # to it, as if everything else were always busy
    check(load(own[0], store, unit))
    assert own[0].pid not in (None, patient)
    assert own[0].pid is not None
    assert os.sched_getscheduler(own[0].pid) == os.SCHED_OTHER
    assert os.getpriority(os.PRIO_PROCESS, own[0].pid) >= 10
    own[0].end_if_idle(0.0)
    own[0].start()
    after = own[0].pid
    assert after is not None
    eventually(lambda: os.sched_getscheduler(after) == os.SCHED_IDLE)


def test_a_program_that_takes_all_memory_is_refused(tmp_path: Path, own: list[Compiler]) -> None:
    def large(p: Any, x: Any) -> Any:
        # Sorted, so that XLA cannot fuse it away.
        wide = jnp.sort(jnp.broadcast_to(x[:, :1, None], (x.shape[0], 1 << 14, 1 << 14)), axis=1)
        return wide[:, 0, :8] @ p[0]

    store, unit = saved(tmp_path, large, params=WEIGHTS[:1])
    own.append(Compiler(jax.devices()[0], memory_bytes_max=256 << 20))
    with pytest.raises((ResourceExhausted, ProgramRefused), match=r"memory|SIGABRT"):
        load(own[0], store, unit)


def test_an_idle_process_is_ended_and_a_busy_one_is_not(own: list[Compiler]) -> None:
    own.append(Compiler(jax.devices()[0]))
    own[0].start()
    pid = own[0].pid
    assert pid is not None
    own[0].end_if_idle(60.0)
    assert own[0].pid == pid
    own[0].end_if_idle(0.0)
    eventually(lambda: own[0].pid is None and not is_alive(pid))


def test_a_compiler_that_nobody_holds_leaves_no_process() -> None:
    made = Compiler(jax.devices()[0])
    made.start()
    pid = made.pid
    assert pid is not None
    del made
    eventually(lambda: not is_alive(pid))


PARENT = """
import jax, sys, time
from shards.compiling.compiler import Compiler
made = Compiler(jax.devices()[0])
made.start()
print(made.pid, flush=True)
time.sleep(600)
"""


def test_a_process_ends_with_its_actor() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as actor:
        assert actor.stdout is not None
        pid = int(actor.stdout.readline())
        assert is_alive(pid)
        # It must have got far enough to have said with whom it ends.
        eventually(lambda: os.sched_getscheduler(pid) == os.SCHED_IDLE)
        actor.kill()
        eventually(lambda: not is_alive(pid))


# --- what was kept -----------------------------------------------------------------------------


def cached(directory: Path, own: list[Compiler]) -> Compiler:
    own.append(Compiler(jax.devices()[0], cache=ProgramCache(directory, "1")))
    return own[-1]


def test_what_was_compiled_once_needs_no_process(tmp_path: Path, own: list[Compiler]) -> None:
    store, unit = saved(tmp_path / "store")
    check(load(cached(tmp_path / "cache", own), store, unit))
    again = cached(tmp_path / "cache", own)
    watch = CompileWatch([])
    check(load(again, store, unit))
    assert again.pid is None
    watch.close()


def test_only_what_is_missing_is_compiled(tmp_path: Path, own: list[Compiler]) -> None:
    store, unit = saved(tmp_path / "store")
    check(load(cached(tmp_path / "cache", own), store, unit))
    entries = (tmp_path / "cache" / "executables-1").iterdir()
    first = min(path for path in entries if path.stat().st_size > 1000)
    first.write_bytes(b"torn")
    again = cached(tmp_path / "cache", own)
    made = load(again, store, unit)
    assert again.pid is not None
    check({bucket: made[bucket] for bucket in sorted(made)})
    assert again.compiled == 1


NEWER = [np.flip(weight, 1).copy() for weight in WEIGHTS]


def reweighted(path: Path, **options: Any) -> tuple[LocalStore, MapUnit]:
    """The same program over other weights, as a next version has them."""
    return saved(path, params=NEWER, **options)


def test_a_unit_with_other_weights_of_the_same_shapes_compiles_nothing(
    tmp_path: Path, own: list[Compiler]
) -> None:
    store, unit = saved(tmp_path / "store")
    newer_store, newer = reweighted(tmp_path / "newer")
    assert newer.id != unit.id
    one = cached(tmp_path / "cache", own)
    first = load(one, store, unit)
    assert one.compiled == 2
    second = load(one, newer_store, newer)
    assert one.compiled == 2
    assert {bucket: each.run for bucket, each in second.items()} == {
        bucket: each.run for bucket, each in first.items()
    }, "what runs already is run, and not loaded twice"
    again = cached(tmp_path / "cache", own)
    third = load(again, newer_store, newer)
    times = [each.run_s for each in third.values()]
    assert again.pid is None, "that it was tried with its own weights is remembered"
    assert times == [each.run_s for each in second.values()], "and what a run took"
    assert min(times) > 0


def test_weights_with_which_a_known_program_never_ends_are_refused(
    tmp_path: Path, own: list[Compiler]
) -> None:
    def counts(params: Any, x: Any) -> Any:
        return jax.lax.while_loop(lambda at: at[0, 0] < 1, lambda at: at + params, x)

    ends, never = (np.full((1, 8), step, np.float32) for step in (1, 0))
    own.append(
        Compiler(
            jax.devices()[0],
            cache=ProgramCache(tmp_path / "cache", "1"),
            step_cpu_s_max=1,
            silence_s_max=30.0,
        )
    )
    load(own[-1], *saved(tmp_path / "ends", counts, params=ends, batch_buckets=(1,)))
    with pytest.raises(ProgramRefused, match="running it for batch 1"):
        load(own[-1], *saved(tmp_path / "never", counts, params=never, batch_buckets=(1,)))
    assert own[-1].compiled == 1


def test_another_program_shape_device_or_count_of_devices_does_not_find_it(
    tmp_path: Path, own: list[Compiler]
) -> None:
    wide = [np.ones((8, 16), np.float32), np.ones((16, 8), np.float32)]
    units = [
        saved(tmp_path / "store")[1],
        saved(tmp_path / "fewer", params=WEIGHTS[:2])[1],
        saved(tmp_path / "wide", params=wide)[1],
        saved(tmp_path / "half", params=[weight.astype(np.float16) for weight in WEIGHTS])[1],
    ]
    own += [Compiler(device) for device in jax.devices()[:2]]
    keys = {
        each._kept._program_key(unit, bucket)
        for each in own
        for unit in units
        for bucket in ((1, ()), (4, ()))
    }
    assert len(keys) == 2 * 4 * 2
    newer = reweighted(tmp_path / "newer")[1]
    assert own[0]._kept._program_key(newer, (1, ())) in keys
    assert own[0]._kept._unit_key(newer, (1, ())) != own[0]._kept._unit_key(units[0], (1, ()))


def test_an_executable_that_cannot_be_loaded_is_compiled_again(
    tmp_path: Path, own: list[Compiler], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, unit = saved(tmp_path / "store")
    made = cached(tmp_path / "cache", own)
    cache = ProgramCache(tmp_path / "cache", "1")
    cache.put(made._kept._program_key(unit, (1, ())), b"of our own, and yet no executable")
    check(load(made, store, unit))
    assert made.pid is not None
