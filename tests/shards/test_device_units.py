"""Map units brought up on a device: saved, loaded through the books, served without a compile."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batching.allowance import Allowance
from batching.errors import FailedPrecondition, ResourceExhausted
from shards.compiling.messages import FromChild
from shards.compiling.process import CompileProcess
from shards.device_host import make_device_host
from shards.device_units import DeviceUnitOpener
from shards.engine import DeviceEngine
from shards.errors import BundleCorrupt, ProgramRefused
from shards.executor import CompileWatch
from shards.hosting import Hosting
from shards.orders import ActorSpec
from shards.programs import buckets_of
from shards.saving import save
from shards.specs import Spec
from tests.shards.loading import UNITS, Actor, compiler, rows, unit_of
from tests.shards.serving import (
    DEADLINE_S,
    Array,
    DeviceRig,
    FakeLink,
    call,
    eventually,
    map_unit,
)

X = {"x": Spec(("b", 4))}
WORDS = {"x": Spec(("b", "t", 4)), "keep": Spec(("b", "t"), "int32")}
W = np.arange(12, dtype=np.float32).reshape(4, 3) / 10


def layer(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["w"])


def sorting(params: Any, x: Any) -> Any:
    # XLA sorts in memory of its own, however clever it is otherwise.
    wide = jnp.sort(jnp.repeat(x @ params["w"], 50, axis=1), axis=1)
    return wide[:, :3] + jnp.sort(wide * wide, axis=1)[:, -3:]


def encode(params: Any, x: Any, keep: Any) -> Any:
    each = (x @ params["w"]) * keep[..., None].astype(x.dtype)
    return {"each": each, "total": each.sum(1)}


@pytest.fixture
def rig() -> Iterator[DeviceRig]:
    with DeviceRig(run_now_s=0.001) as made:
        yield made


def test_every_bucket_is_compiled_and_warm_before_the_first_request(
    rig: DeviceRig, tmp_path: Path
) -> None:
    unit = unit_of(
        save(
            encode, {"w": W}, tmp_path, "model", 1,
            inputs=WORDS, batch_buckets=(1, 4), length_buckets={"t": (8, 16)},
        )
    )  # fmt: skip
    actor = Actor(rig, tmp_path)
    actor.load()
    loaded = rig.executor._units[unit.id]
    assert len(loaded.compiled) == 4
    assert loaded.costs.keys() == loaded.compiled.keys()
    assert all(0 < cost_s < DEADLINE_S for cost_s in loaded.costs.values())
    for batch, sizes in buckets_of(unit):
        assert (batch, (sizes["t"],)) in loaded.compiled
        x = rows(batch, sizes["t"] - 1, 4)
        keep = np.ones(x.shape[:2], np.int32)
        answer = actor.ask(unit.id, x, keep)
        assert isinstance(answer, list)
        np.testing.assert_allclose(answer[0], x @ W, atol=1e-5)
        np.testing.assert_allclose(answer[1], (x @ W).sum(1), atol=1e-4)
    assert rig.watch.count == 0


def test_on_a_cpu_a_load_runs_nothing_in_the_process_that_serves(
    rig: DeviceRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> float:
        raise AssertionError("it was run here")

    monkeypatch.setattr(DeviceUnitOpener, "_warm", never)
    unit = unit_of(save(layer, {"w": W}, tmp_path, "model", 1, inputs=X, batch_buckets=(1,)))
    Actor(rig, tmp_path).load()
    assert min(rig.executor._units[unit.id].costs.values()) > 0


def test_a_bundle_with_a_program_a_bucket_is_served_from_all_of_them(
    rig: DeviceRig, tmp_path: Path
) -> None:
    def asks_for_its_batch(params: Any, x: Any) -> Any:
        return x * 2 if x.shape[0] > 4 else x + x + 0 * params["w"].sum()

    manifest = save(
        asks_for_its_batch, {"w": W}, tmp_path, "model", 1, inputs=X, batch_buckets=(2, 8)
    )
    unit = unit_of(manifest)
    assert [program.batch for program in unit.programs] == [2, 8]
    actor = Actor(rig, tmp_path)
    actor.load()
    for count in (1, 2, 3, 8, 11):
        answer = actor.ask(unit.id, rows(count, 4))
        assert isinstance(answer, list)
        np.testing.assert_allclose(answer[0], rows(count, 4) * 2, rtol=1e-6)
    assert rig.watch.count == 0


def test_a_unit_with_inputs_per_request_is_warm_for_every_number_of_requests(
    rig: DeviceRig, tmp_path: Path
) -> None:
    inputs = {"x": Spec(("b", 4)), "user": Spec(("b", 3), per="request")}
    unit = unit_of(
        save(
            lambda params, x, user: (x @ params["w"]) * user, {"w": W}, tmp_path, "model", 1,
            inputs=inputs, batch_buckets=(1, 4), request_buckets=(1, 2),
        )
    )  # fmt: skip
    actor = Actor(rig, tmp_path)
    actor.load()
    assert rig.executor._units[unit.id].costs.keys() == {
        (1, (1,)), (4, (1,)), (4, (2,)), (4, (4,)),
    }  # fmt: skip
    for requests in range(1, 6):
        link, x, user = FakeLink(), rows(2 * requests, 4), rows(requests, 3)
        rig.call(link, call(unit.id, dict.fromkeys(range(requests), 2), x, user))
        link.wait_for(requests)
        expected = (x @ W) * np.repeat(user, 2, axis=0)
        for request, [found] in link.answers.items():
            here = slice(2 * request, 2 * request + 2)
            np.testing.assert_allclose(found, expected[here], atol=1e-6)
    assert rig.watch.count == 0


def test_a_load_lowers_and_compiles_nothing_in_this_process(rig: DeviceRig, tmp_path: Path) -> None:
    unit = unit_of(save(layer, {"w": W}, tmp_path, "model", 1, inputs=X, batch_buckets=(1, 3)))
    actor = Actor(rig, tmp_path)
    watch = CompileWatch([actor.opener.loader_thread_id, threading.get_ident()])
    actor.load()
    assert (watch.lowered, watch.compiled) == (0, 0)
    assert rig.watch.count == 0
    watch.close()
    assert isinstance(actor.ask(unit.id, rows(3, 4)), list)


def test_donated_inputs_can_be_served_again_and_again(rig: DeviceRig, tmp_path: Path) -> None:
    # A staging slot is used again: on a CPU, where programs read it in place, nothing is donated.
    manifest = save(
        lambda params, x: x + params, np.float32(1), tmp_path, "model", 1,
        inputs=X, batch_buckets=(2,), donate=("x",),
    )  # fmt: skip
    unit = unit_of(manifest)
    assert unit.donate == (0,)
    actor = Actor(rig, tmp_path)
    actor.load()
    (executable,) = rig.executor._units[unit.id].compiled.values()
    assert isinstance(executable, jax.stages.Compiled)
    assert not any(info.donated for info in jax.tree.leaves(executable.args_info))
    answers = [actor.ask(unit.id, rows(n % 2 + 1, 4)) for n in range(12)]
    for n, answer in enumerate(answers):
        assert isinstance(answer, list)
        np.testing.assert_array_equal(answer[0], rows(n % 2 + 1, 4) + 1)


def test_a_warm_up_gives_a_donating_program_new_memory_for_every_run(
    rig: DeviceRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on an accelerator, where what was donated is gone after the first run.
    cpu = jax.devices()[0]
    put = jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda array, device: put(array, cpu))
    runs: list[Any] = []

    def donating(x: Any) -> Sequence[Array]:
        assert not x.is_deleted()
        runs.append(x)
        value = np.asarray(x).copy()
        x.delete()
        return (value,)

    device = cast(jax.Device, SimpleNamespace(platform="cuda"))
    opener = DeviceUnitOpener(rig.engine, device, compiler())
    assert opener._warm(map_unit(), (), donating, (4, ())) > 0
    assert len(runs) > 1


def test_two_models_with_the_same_unit_share_it_and_the_last_one_frees_it(
    rig: DeviceRig, tmp_path: Path
) -> None:
    w = np.full((4, 777), 0.5, np.float32)  # a shape by which its arrays can be told
    units = [
        unit_of(save(layer, {"w": w}, tmp_path, name, version, inputs=X, batch_buckets=(1,)))
        for name, version in (("model", 1), ("model", 2), ("twin", 1))
    ]
    (identity,) = {unit.id for unit in units}

    def copies() -> int:
        gc.collect()
        arrays = jax.live_arrays()  # type: ignore[no-untyped-call]
        return sum(array.shape == (4, 777) for array in arrays)

    actor = Actor(rig, tmp_path)
    before = copies()
    for name, version in (("model", 1), ("model", 2), ("twin", 1)):
        actor.load(name, version)
    assert copies() == before + 1
    assert actor.books.reserved_bytes >= w.nbytes
    assert actor.books.loaded == (("model", 1), ("model", 2), ("twin", 1))
    actor.unload("model", 1)
    actor.unload("twin", 1)
    assert isinstance(actor.ask(identity, rows(1, 4)), list)
    actor.unload("model", 2)
    assert actor.ask(identity, rows(1, 4)) == "STALE_EPOCH"
    assert actor.books.reserved_bytes == 0
    eventually(lambda: copies() == before)


def test_a_unit_comes_back_after_it_was_unloaded(rig: DeviceRig, tmp_path: Path) -> None:
    unit = unit_of(save(layer, {"w": W}, tmp_path, "model", 1, inputs=X, batch_buckets=(1,)))
    actor = Actor(rig, tmp_path)
    for _ in range(2):
        actor.load()
        assert isinstance(actor.ask(unit.id, rows(1, 4)), list)
        actor.unload()
    assert not rig.io.call(rig.batcher.stats).lanes
    assert rig.watch.count == 0


def test_lanes_are_bounded_as_the_order_says(rig: DeviceRig, tmp_path: Path) -> None:
    unit = unit_of(save(layer, {"w": W}, tmp_path, "model", 1, inputs=X, batch_buckets=(2,)))
    actor = Actor(rig, tmp_path)
    actor.load(allowance=Allowance(rows_max=3))
    assert actor.ask(unit.id, rows(4, 4)) == "INVALID_ARGUMENT"
    assert isinstance(actor.ask(unit.id, rows(3, 4)), list)


def test_parameters_that_do_not_fit_are_refused_before_they_are_read(
    rig: DeviceRig, tmp_path: Path
) -> None:
    save(layer, {"w": W}, tmp_path, "model", 1, inputs=X, batch_buckets=(1,))
    # Three floats of output, and 64 bytes for an input in each of three staging slots.
    need = W.nbytes + 12 + 3 * 64
    actor = Actor(rig, tmp_path, capacity_bytes=need - 1)
    with pytest.raises(ResourceExhausted, match=rf"needs {need} bytes on device-0.* 1 short"):
        actor.load()
    assert actor.books.reserved_bytes == 0


def test_what_a_unit_needs_is_reserved_before_and_measured_after_it_is_loaded(
    rig: DeviceRig, tmp_path: Path
) -> None:
    unit = unit_of(save(sorting, {"w": W}, tmp_path, "model", 1, inputs=X, batch_buckets=(1, 64)))
    actor = Actor(rig, tmp_path)
    estimate = actor.opener.estimate(unit, UNITS[0])
    staging = 3 * 64 * 4 * 4
    assert estimate == W.nbytes + 64 * 3 * 4 + staging
    actor.load()
    # What a step allocates for itself is on top, and only XLA knows it.
    assert actor.books.reserved_bytes > estimate
    assert rig.io.call(lambda: rig.engine.staging_bytes) == staging
    small = unit_of(save(layer, {"w": W}, tmp_path, "other", 1, inputs=X, batch_buckets=(1,)))
    assert actor.opener.estimate(small, UNITS[0]) == W.nbytes + 12  # its rows fit into the slots
    actor.unload()
    assert actor.books.reserved_bytes == 0


def test_a_unit_that_turns_out_to_need_more_than_there_is_is_refused_and_given_back(
    rig: DeviceRig, tmp_path: Path
) -> None:
    unit = unit_of(save(sorting, {"w": W}, tmp_path, "model", 1, inputs=X, batch_buckets=(1, 64)))
    room = Actor(rig, tmp_path).opener.estimate(unit, UNITS[0])
    actor = Actor(rig, tmp_path, capacity_bytes=room)
    with pytest.raises(ResourceExhausted, match=rf"more memory on device-0 .* of {room} bytes"):
        actor.load()
    assert actor.books.reserved_bytes == 0
    assert actor.ask(unit.id, rows(1, 4)) == "STALE_EPOCH"


def test_a_damaged_program_is_refused_and_what_is_served_goes_on(
    rig: DeviceRig, tmp_path: Path
) -> None:
    good = unit_of(save(layer, {"w": W}, tmp_path, "good", 1, inputs=X, batch_buckets=(1,)))
    bad = unit_of(
        save(
            lambda p, x: x @ p["w"] - 1, {"w": W}, tmp_path, "bad", 1, inputs=X, batch_buckets=(1,)
        )
    )
    blob = tmp_path / "blobs" / "blake3" / bad.programs[0].blob.digest
    blob.chmod(0o600)
    blob.write_bytes(bytes(blob.stat().st_size))
    actor = Actor(rig, tmp_path)
    actor.load("good")
    held = actor.books.reserved_bytes
    with pytest.raises(BundleCorrupt):
        actor.load("bad")
    assert actor.books.loaded == (("good", 1),)
    assert actor.books.reserved_bytes == held
    assert isinstance(actor.ask(good.id, rows(1, 4)), list)
    assert actor.ask(bad.id, rows(1, 4)) == "STALE_EPOCH"


def test_a_program_that_kills_who_reads_it_is_refused_and_what_is_served_goes_on(
    rig: DeviceRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = unit_of(save(layer, {"w": W}, tmp_path, "good", 1, inputs=X, batch_buckets=(1,)))
    save(lambda p, x: x @ p["w"] - 1, {"w": W}, tmp_path, "bad", 1, inputs=X, batch_buckets=(1,))
    actor = Actor(rig, tmp_path)
    actor.load("good")
    held = actor.books.reserved_bytes
    receive = CompileProcess._receive

    def killing(process: CompileProcess, step: str) -> FromChild:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSEGV)
        return receive(process, step)

    with monkeypatch.context() as patched:
        patched.setattr(CompileProcess, "_receive", killing)
        with pytest.raises(ProgramRefused, match=r"unit \w+: the compile process was ended by SIG"):
            actor.load("bad")
    assert actor.books.loaded == (("good", 1),)
    assert actor.books.reserved_bytes == held
    assert isinstance(actor.ask(good.id, rows(1, 4)), list)
    actor.load("bad")
    assert ("bad", 1) in actor.books.loaded


def test_a_program_for_another_platform_is_refused_with_advice(
    rig: DeviceRig, tmp_path: Path
) -> None:
    save(
        layer, {"w": W}, tmp_path, "model", 1,
        inputs=X, batch_buckets=(1,), platforms=("cuda",),
    )  # fmt: skip
    actor = Actor(rig, tmp_path)
    with pytest.raises(FailedPrecondition, match=r"lowered for cuda, not for cpu: save"):
        actor.load()
    assert actor.books.reserved_bytes == 0


def test_a_device_host_serves_what_its_parts_promise(rig: DeviceRig, tmp_path: Path) -> None:
    unit = unit_of(save(layer, {"w": W}, tmp_path, "model", 1, inputs=X, batch_buckets=(1, 8)))
    spec = ActorSpec(kind="device", name="device-0", directory="", capacity_bytes=1 << 30)
    host = rig.io.call(make_device_host, spec, rig.io, 7)
    assert isinstance(host.engine, DeviceEngine)
    actor = Actor(rig, tmp_path)
    actor.opener = host.opener
    actor.books = rig.io.call(Hosting, host.opener, "device-0", 1 << 30)
    actor.load()
    for number, count in enumerate((1, 3, 8, 20)):
        rig.io.call(host.engine.on_call, actor.link, call(unit.id, {number: count}, rows(count, 4)))
        actor.link.wait_for(number + 1)
        np.testing.assert_allclose(
            actor.link.answers[number][0], np.tanh(rows(count, 4) @ W), atol=1e-6
        )
    assert host.compiles_after_available() == 0
    [costs] = rig.io.call(host.costs)
    assert (costs.unit, costs.shape) == (unit.id, ())
    for size, mean_s, bound_s, batches in costs.sizes:
        assert size in (1, 8)
        assert 0 < mean_s <= bound_s
        assert batches > 1
    actor.unload()
    assert rig.io.call(host.costs) == ()
    host.close()
