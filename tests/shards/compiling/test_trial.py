"""What the compile process does with a unit, done here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

from batching.errors import FailedPrecondition
from shards.compiling.handover import load_compiled, load_lowered
from shards.compiling.messages import Bucket, Settings, Trial
from shards.compiling.spans import spans_of
from shards.compiling.trial import try_unit
from shards.errors import BundleCorrupt, ProgramRefused, SpecMismatch
from shards.manifest import MapUnit
from shards.specs import Spec
from shards.store import LocalStore
from tests.shards.compiling.units import (
    WEIGHTS,
    answer,
    exported,
    layers,
    program_of,
    saved,
    with_program,
)


def settings(platform: str = "cpu", device: int = 0) -> Settings:
    return Settings(
        platform=platform, device=device, device_count=4, enable_x64=False,
        memory_bytes_max=1 << 32, step_cpu_s_max=60,
    )  # fmt: skip


def tried(
    store: LocalStore,
    unit: MapUnit,
    how: Settings | None = None,
    *,
    is_checkable: bool = True,
    buckets: tuple[Bucket, ...] = ((1, ()), (4, ())),
    executables: tuple[bytes, ...] | None = None,
) -> tuple[dict[Bucket, bytes], list[str]]:
    """What was handed over, and the steps that were told."""
    steps: list[str] = []
    blobs = {leaf.blob.digest: store.map(leaf.blob) for leaf in unit.params}
    with spans_of(blobs) as spans:
        trial = Trial(
            unit=unit,
            programs=tuple(store.map(program.blob).tobytes() for program in unit.programs),
            blobs=spans,
            buckets=buckets,
            executables=executables or (b"",) * len(buckets),
            is_checkable=is_checkable,
        )
        made = {each.bucket: each.data for each in try_unit(trial, how or settings(), steps.append)}
    return made, steps


def rows(count: int) -> np.ndarray:
    return np.random.default_rng(count).random((count, 8), np.float32)


# --- what is handed over -----------------------------------------------------------------------


@pytest.mark.parametrize("device", [0, 2])
def test_an_executable_computes_on_the_device_that_it_was_made_for(
    tmp_path: Path, device: int
) -> None:
    store, unit = saved(tmp_path)
    made, steps = tried(store, unit, settings(device=device))
    target = jax.local_devices()[device]
    leaves = [jax.device_put(weight, target) for weight in WEIGHTS]
    for (batch, _), data in made.items():
        executable = load_compiled(data, len(leaves) + 1, 2, target)
        scores, best = executable.run(*leaves, rows(batch))
        assert best.devices() == {target}
        np.testing.assert_allclose(best, answer(rows(batch)), rtol=1e-5)
        assert executable.step_bytes >= scores.nbytes + best.nbytes
    assert steps == [
        f"reading program {unit.programs[0].blob.digest[:12]}",
        "finding its identity",
        "compiling it for batch 1",
        "running it for batch 1",
        "compiling it for batch 4",
        "running it for batch 4",
    ]


def test_what_an_equal_program_was_compiled_to_is_run_and_not_compiled(tmp_path: Path) -> None:
    store, unit = saved(tmp_path / "store")
    made, _ = tried(store, unit)
    newer = saved(tmp_path / "newer", params=[2 * weight for weight in WEIGHTS])
    again, steps = tried(*newer, executables=(made[1, ()], b""))
    assert again[1, ()] == b""
    assert again[4, ()]
    assert "running it for batch 1" in steps
    assert [step for step in steps if "compiling" in step] == ["compiling it for batch 4"]


def test_for_an_accelerator_a_lowered_module_is_handed_over_that_needs_no_jax_to_compile(
    tmp_path: Path,
) -> None:
    # Lowered for CUDA, and compiled for what is here: the module says nothing about the device.
    store, unit = saved(tmp_path, lambda p, x: {"y": jnp.tanh(x @ p[0]), "z": x + 1}, donate=("x",))
    made, steps = tried(store, unit, settings("gpu"))
    device = jax.local_devices()[1]
    weight = jax.device_put(WEIGHTS[0], device)
    for (batch, _), data in made.items():
        executable = load_lowered(data, device)
        x = jax.device_put(rows(batch), device)
        y, z = executable.run(weight, x)
        np.testing.assert_allclose(y, np.tanh(rows(batch) @ WEIGHTS[0]), rtol=1e-5)
        np.testing.assert_allclose(z, rows(batch) + 1)
        assert x.is_deleted()
        assert not weight.is_deleted()
    # Its first bucket was run here, since it is exported for a CPU as well.
    assert steps[2:] == [
        "compiling it for batch 1",
        "running it for batch 1",
        "lowering it for cuda, batch 1",
        "lowering it for cuda, batch 4",
    ]


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_a_program_with_inputs_per_request_is_handed_over_for_each_number_of_requests(
    tmp_path: Path, platform: str
) -> None:
    store, unit = saved(
        tmp_path,
        lambda p, user, x: jnp.tanh(x @ p[0]) * user,
        inputs={"user": Spec(("b", 8), per="request"), "x": Spec(("b", 8))},
        params=WEIGHTS[:1],
        request_buckets=(1,),
    )
    buckets: tuple[Bucket, ...] = ((1, (1,)), (4, (1,)), (4, (4,)))
    made, steps = tried(store, unit, settings(platform), buckets=buckets)
    device = jax.local_devices()[0]
    weight = jax.device_put(WEIGHTS[0], device)
    for (batch, (requests,)), data in made.items():
        # What is lowered for another device is compiled for what is here.
        loaded = (
            load_compiled(data, 4, 1, device) if platform == "cpu" else load_lowered(data, device)
        )
        index = np.arange(batch, dtype=np.int32)[::-1] % requests
        [y] = loaded.run(
            weight, *(jax.device_put(a, device) for a in (rows(requests), rows(batch), index))
        )
        expected = np.tanh(rows(batch) @ WEIGHTS[0]) * rows(requests)[index]
        np.testing.assert_allclose(y, expected, rtol=1e-5)
    what = "compiling" if platform == "cpu" else "lowering"
    assert len([step for step in steps if what in step and "batch 4, requests 4" in step]) == 1


def test_what_is_not_exported_for_a_cpu_is_not_run_here(tmp_path: Path) -> None:
    store, unit = saved(tmp_path, platforms=("tpu",))
    made, steps = tried(store, unit, settings("tpu"))
    assert len(made) == 2
    assert not any("running" in step for step in steps)


def test_a_program_a_bucket_and_other_symbols_are_handed_over(tmp_path: Path) -> None:
    def by_batch(p: Any, x: Any) -> Any:
        return (x * 2 if x.shape[0] > 2 else x + x).sum(1) @ p[0][:4]

    store, unit = saved(
        tmp_path,
        by_batch,
        inputs={"x": Spec(("b", "t", 4))},
        batch_buckets=(1, 4),
        length_buckets={"t": (2, 3)},
        params=WEIGHTS[:1],
    )
    assert len(unit.programs) == 2
    buckets: tuple[Bucket, ...] = ((1, (2,)), (1, (3,)), (4, (2,)), (4, (3,)))
    made, steps = tried(store, unit, buckets=buckets)
    assert tuple(made) == buckets
    assert "running it for batch 4, t 3" in steps
    for (batch, (length,)), data in made.items():
        x = np.ones((batch, length, 4), np.float32)
        (y,) = load_compiled(data, 2, 1, jax.local_devices()[0]).run(WEIGHTS[0], x)
        np.testing.assert_allclose(y, 2 * x.sum(1) @ WEIGHTS[0][:4], rtol=1e-5)


# --- what is refused ---------------------------------------------------------------------------


def test_bytes_that_are_no_program_are_corrupt(tmp_path: Path) -> None:
    store, unit = saved(tmp_path)
    with pytest.raises(BundleCorrupt, match="cannot be read"):
        tried(store, with_program(store, unit, b"nothing of the kind"))


def test_a_program_of_another_computation_is_not_what_its_unit_says(tmp_path: Path) -> None:
    store, unit = saved(tmp_path / "one")
    other_store, other = saved(tmp_path / "other", lambda p, x: layers(p[::-1], x))
    hostile = with_program(store, unit, program_of(other_store, other))
    with pytest.raises(BundleCorrupt, match="computes something else than its identity says"):
        tried(store, hostile)


def test_other_weights_are_not_what_its_unit_says(tmp_path: Path) -> None:
    _, unit = saved(tmp_path / "one")
    other_store, other = saved(tmp_path / "other", params=WEIGHTS[::-1])
    hostile = msgspec.structs.replace(other, id=unit.id)
    with pytest.raises(BundleCorrupt, match="computes something else than its identity says"):
        tried(other_store, hostile)


def test_an_export_that_no_save_has_written_was_changed(tmp_path: Path) -> None:
    store, unit = saved(tmp_path, lambda p, x: x @ p[0] @ p[1] @ p[2])
    raw = exported(lambda a, b, c, x: (x @ a @ b @ c,), platforms=("cpu", "cuda", "tpu"))
    with pytest.raises(BundleCorrupt, match="not what a save writes"):
        tried(store, with_program(store, unit, raw))


def test_a_bundle_of_another_jax_is_not_held_against_what_this_one_writes(tmp_path: Path) -> None:
    store, unit = saved(tmp_path, lambda p, x: x @ p[0] @ p[1] @ p[2])
    raw = exported(lambda a, b, c, x: (x @ a @ b @ c,))
    made, steps = tried(store, with_program(store, unit, raw), is_checkable=False)
    assert len(made) == 2
    assert "finding its identity" not in steps


@pytest.mark.parametrize(
    ("fn", "what"),
    [
        (lambda a, b, c, x: (x @ a, x), "returns something else"),
        (lambda a, b, c, x: (x[:, :4],), "returns something else"),
        (lambda a, b, c, x: ((x @ a).astype(jnp.int32),), "returns something else"),
    ],
)
def test_outputs_that_the_unit_does_not_declare_are_refused(
    tmp_path: Path, fn: Any, what: str
) -> None:
    store, unit = saved(tmp_path, lambda p, x: x @ p[0] @ p[1] @ p[2])
    with pytest.raises(SpecMismatch, match=what):
        tried(store, with_program(store, unit, exported(fn)), is_checkable=False)


def test_inputs_that_the_unit_does_not_declare_are_refused(tmp_path: Path) -> None:
    store, unit = saved(tmp_path)
    narrow = msgspec.structs.replace(unit, params=unit.params[:2])
    with pytest.raises(SpecMismatch, match="takes something else"):
        tried(store, narrow, is_checkable=False)


def test_a_custom_call_is_refused_before_anything_is_compiled(tmp_path: Path) -> None:
    def fn(a: jax.Array, b: jax.Array, c: jax.Array, x: jax.Array) -> tuple[jax.Array]:
        call = jax.ffi.ffi_call(
            "xla_ffi_python_cpu_callback",
            jax.ShapeDtypeStruct((8,), jnp.float32),  # type: ignore[no-untyped-call]
        )
        return (x + call(a),)

    allowed = [jax.export.DisabledSafetyCheck.custom_call("xla_ffi_python_cpu_callback")]
    store, unit = saved(tmp_path, lambda p, x: x @ p[0] @ p[1] @ p[2])
    hostile = with_program(store, unit, exported(fn, disabled_checks=allowed))
    with pytest.raises(ProgramRefused, match="'xla_ffi_python_cpu_callback', which is not allowed"):
        tried(store, hostile, is_checkable=False)


def test_a_program_for_other_platforms_is_refused_with_advice(tmp_path: Path) -> None:
    store, unit = saved(tmp_path, platforms=("cuda",))
    with pytest.raises(FailedPrecondition, match=r"lowered for cuda, not for cpu: save"):
        tried(store, unit)


def test_a_program_for_several_devices_is_refused(tmp_path: Path) -> None:
    devices = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec())  # type: ignore[no-untyped-call]

    def fn(a: jax.Array, b: jax.Array, c: jax.Array, x: jax.Array) -> tuple[jax.Array]:
        return (jax.lax.with_sharding_constraint(x @ a, sharding),)  # type: ignore[no-untyped-call]

    store, unit = saved(tmp_path, lambda p, x: x @ p[0] @ p[1] @ p[2])
    with pytest.raises(ProgramRefused, match="not a plain function on one device"):
        tried(store, with_program(store, unit, exported(fn)), is_checkable=False)
