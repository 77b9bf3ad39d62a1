"""What a program may call."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.export import _export as jax_export
from jax.extend.mlir import ir

from shards.canonical import module_of
from shards.custom_calls import ALLOWED_TARGETS, EXCLUDED_TARGETS, refuse_foreign_calls
from shards.errors import ProgramRefused
from shards.programs import export_unit
from shards.saving import save
from shards.specs import Spec
from tests.shards.compiling.units import exported

X = {"x": Spec(("b", 8))}


def check(data: bytes) -> None:
    with module_of(jax.export.deserialize(bytearray(data))) as module:
        refuse_foreign_calls(module, "the program")


def test_what_may_be_called_is_what_jax_keeps_stable_but_for_what_we_exclude() -> None:
    # Fails when JAX adds a target: read what it does before it is allowed.
    stable = jax_export._CUSTOM_CALL_TARGETS_GUARANTEED_STABLE
    assert stable == ALLOWED_TARGETS | EXCLUDED_TARGETS
    assert not ALLOWED_TARGETS & EXCLUDED_TARGETS
    assert not any("python" in target or "callback" in target for target in ALLOWED_TARGETS)


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: jnp.linalg.solve(p, x.T).T,
        lambda p, x: jnp.linalg.eigh(x[:, :, None] * x[:, None, :])[0],
        lambda p, x: jnp.linalg.svd(x[:, :, None] * x[:, None, :], compute_uv=False),
        lambda p, x: jax.lax.top_k(x, 3)[0],
        lambda p, x: jax.scipy.special.erfinv(x / 10),
        lambda p, x: jnp.sort(x, axis=1) + jnp.cumsum(x, axis=1),
        lambda p, x: x + jax.random.normal(jax.random.key(0), (8,)),
        lambda p, x: jax.lax.while_loop(lambda y: jnp.max(y) > 1, lambda y: y / 2, x),
    ],
)
def test_what_jax_lowers_to_is_allowed(fn: object) -> None:
    unit = export_unit(fn, np.eye(8, dtype=np.float32), X, platforms=("cpu",))  # type: ignore[arg-type]
    for artefact in unit.programs:
        check(artefact.data)


def custom_call(target: str) -> bytes:
    def fn(a: jax.Array, b: jax.Array, c: jax.Array, x: jax.Array) -> jax.Array:
        return jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((8,), jnp.float32))(a)  # type: ignore[no-untyped-call]

    allowed = [jax.export.DisabledSafetyCheck.custom_call(target)]
    return exported(fn, disabled_checks=allowed)


@pytest.mark.parametrize(
    "target",
    [
        "xla_python_cpu_callback",
        "xla_ffi_python_cpu_callback",
        "xla_ffi_python_gpu_callback",
        "tf.call_tf_function",
        "tpu_custom_call",
        "mosaic_gpu_v2",
        "system",
    ],
)
def test_a_call_of_anything_else_is_refused_by_name(target: str) -> None:
    with pytest.raises(ProgramRefused, match=f"the program makes the custom call '{target}'"):
        check(custom_call(target))


def test_a_call_inside_a_branch_of_a_loop_is_found() -> None:
    def fn(a: jax.Array, b: jax.Array, c: jax.Array, x: jax.Array) -> jax.Array:
        call = jax.ffi.ffi_call("hidden", jax.ShapeDtypeStruct((8, 8), jnp.float32))  # type: ignore[no-untyped-call]
        body = jax.jit(lambda i, y: jax.lax.cond(i > 3, call, lambda z: z, y))
        return jax.lax.fori_loop(0, 9, body, a)  # type: ignore[no-any-return]

    allowed = [jax.export.DisabledSafetyCheck.custom_call("hidden")]
    with pytest.raises(ProgramRefused, match="'hidden'"):
        check(exported(fn, disabled_checks=allowed))


@pytest.mark.parametrize("operation", ["stablehlo.outfeed", "stablehlo.send", "tensor.empty"])
def test_operations_that_reach_out_are_refused_by_name(operation: str) -> None:
    text = {
        "stablehlo.outfeed": """
            func.func @main(%x: tensor<f32>, %t: !stablehlo.token) -> !stablehlo.token {
              %r = "stablehlo.outfeed"(%x, %t) {outfeed_config = ""}
                : (tensor<f32>, !stablehlo.token) -> !stablehlo.token
              return %r : !stablehlo.token }""",
        "stablehlo.send": """
            func.func @main(%x: tensor<f32>, %t: !stablehlo.token) -> !stablehlo.token {
              %r = "stablehlo.send"(%x, %t) {
                channel_handle = #stablehlo.channel_handle<handle = 1, type = 2>,
                is_host_transfer = true}
                : (tensor<f32>, !stablehlo.token) -> !stablehlo.token
              return %r : !stablehlo.token }""",
        "tensor.empty": """
            func.func @main() -> tensor<4xf32> {
              %r = tensor.empty() : tensor<4xf32>
              return %r : tensor<4xf32> }""",
    }[operation]
    from jax._src.interpreters import mlir

    with mlir.make_ir_context() as context:
        context.allow_unregistered_dialects = True
        module = ir.Module.parse(text)
        with pytest.raises(ProgramRefused, match=f"'{operation}', which is not allowed"):
            refuse_foreign_calls(module, "the program")


def test_a_kernel_that_a_function_brings_along_is_refused_when_it_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # JAX itself refuses to export most foreign calls; this is one that it would let pass.
    def fn(params: jax.Array, x: jax.Array) -> jax.Array:
        call = jax.ffi.ffi_call("tpu_custom_call", jax.ShapeDtypeStruct((8,), jnp.float32))  # type: ignore[no-untyped-call]
        return x + call(params)

    with pytest.raises(ProgramRefused, match="'tpu_custom_call', which is not allowed"):
        save(fn, np.ones(8, np.float32), tmp_path, "model", 1, inputs=X)
    assert not (tmp_path / "model").exists()
