"""Functions exported and compiled again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batching.errors import FailedPrecondition, InvalidArgument, ServingError
from shards.canonical import artefact_of, canonical
from shards.errors import BundleCorrupt, ExportFailed, SpecMismatch
from shards.leaves import put_leaves
from shards.manifest import BlobRef, MapUnit, Program
from shards.programs import ExportedUnit, buckets_of, export_unit, load_program
from shards.specs import Spec, dtype_of
from shards.store import LocalStore

X = {"x": Spec(("b", 4))}
WORDS = {"x": Spec(("b", "t", 4)), "mask": Spec(("b", "t"), "int32")}
W = np.arange(12, dtype=np.float32).reshape(4, 3)


def pooled(params: Any, x: Any, mask: Any) -> Any:
    kept = x * mask[..., None].astype(x.dtype)
    return {"z": kept.sum(1) @ params["w"], "n": mask.sum(1), "kept": kept}


def run(exported: ExportedUnit, *inputs: np.ndarray, **lengths: int) -> list[np.ndarray]:
    """Load what was exported and run it for the batch of the inputs."""
    batch = len(inputs[0])
    data = {artefact.batch: artefact.data for artefact in exported.programs}
    program = load_program(data.get(None) or data[batch], "cpu")
    return [np.asarray(y) for y in program.compile(batch, lengths)(*exported.leaves, *inputs)]


def as_unit(exported: ExportedUnit, store: LocalStore) -> MapUnit:
    blob = BlobRef(digest="0" * 64, size=1)
    return MapUnit(
        id="0" * 64,
        inputs=exported.inputs,
        outputs=exported.outputs,
        programs=tuple(
            Program(blob=blob, platforms=a.platforms, batch=a.batch) for a in exported.programs
        ),
        params=put_leaves(store, exported.leaves),
        batch_buckets=exported.batch_buckets,
        length_buckets=exported.length_buckets,
        donate=exported.donate,
    )


# --- what comes out ----------------------------------------------------------------------------


def test_one_program_serves_every_bucket_and_platform() -> None:
    exported = export_unit(
        pooled, {"w": W}, WORDS, batch_buckets=(4, 1, 4), length_buckets={"t": (16, 8)}
    )
    (artefact,) = exported.programs
    assert (artefact.batch, artefact.platforms) == (None, ("cpu", "cuda", "tpu"))
    assert exported.batch_buckets == (1, 4)
    assert exported.length_buckets == {"t": (8, 16)}
    assert exported.notices == ()
    for batch, length in ((1, 8), (4, 16)):
        x = np.random.default_rng(batch).random((batch, length, 4), np.float32)
        mask = np.ones((batch, length), np.int32)
        z, n, kept = run(exported, x, mask, t=length)
        np.testing.assert_allclose(z, x.sum(1) @ W, rtol=1e-5)
        np.testing.assert_array_equal(n, [length] * batch)
        np.testing.assert_array_equal(kept, x)


def test_outputs_have_the_symbols_of_the_inputs_and_the_functions_names_in_its_order() -> None:
    exported = export_unit(pooled, {"w": W}, WORDS, length_buckets={"t": (8,)})
    assert exported.outputs == {
        "z": Spec(("b", 3)),
        "n": Spec(("b",), "int32"),
        "kept": Spec(("b", "t", 4)),
    }
    assert list(exported.outputs) == ["z", "n", "kept"]


@pytest.mark.parametrize(
    ("fn", "names"),
    [
        (lambda p, x: x, ["outputs"]),
        (lambda p, x: (x, x + 1), ["output_0", "output_1"]),
        (lambda p, x: [x], ["output_0"]),
        (lambda p, x: {"b": x, "a": x}, ["b", "a"]),
    ],
)
def test_outputs_are_named_by_what_the_function_returns(
    fn: Callable[..., Any], names: list[str]
) -> None:
    assert list(export_unit(fn, None, X).outputs) == names


def test_parameters_are_arguments_in_the_order_of_the_tree() -> None:
    params = {"b": np.ones(3, np.float32), "a": [W, np.float32(2)]}
    exported = export_unit(lambda p, x: (x @ p["a"][0]) * p["a"][1] + p["b"], params, X)
    assert [leaf.shape for leaf in exported.leaves] == [(4, 3), (), (3,)]
    x = np.ones((8, 4), np.float32)
    np.testing.assert_allclose(run(exported, x)[0], x @ W * 2 + 1)


def test_leaves_that_are_no_arrays_stay_in_the_program() -> None:
    params = {"w": W, "act": jax.nn.relu, "scale": 2.0, "name": "x", "none": None, "on": True}

    def fn(p: Any, x: Any) -> Any:
        assert p["name"] == "x"
        assert p["none"] is None
        return p["act"](x @ p["w"]) * p["scale"] if p["on"] else x

    exported = export_unit(fn, params, X)
    assert len(exported.leaves) == 1
    x = -np.ones((1, 4), np.float32)
    np.testing.assert_array_equal(run(exported, x)[0], np.zeros((1, 3)))


def test_parameters_that_no_output_depends_on_are_left_out() -> None:
    params = {"pooler": np.ones((9, 9), np.float32), "unused": np.ones(5, np.float32), "w": W}

    def fn(p: Any, x: Any) -> Any:
        p["pooler"].sum()  # computed, and thrown away
        return x @ p["w"]

    exported = export_unit(fn, params, X)
    alone = export_unit(lambda p, x: x @ p["w"], {"w": W}, X)
    assert [leaf.shape for leaf in exported.leaves] == [(4, 3)]
    assert exported.programs == alone.programs


def test_random_keys_are_saved_as_their_integers() -> None:
    key = jax.random.key(7)

    def fn(p: Any, x: Any) -> Any:
        return x + jax.random.uniform(p["key"], (4,))

    exported = export_unit(fn, {"key": key}, X)
    assert [leaf.dtype for leaf in exported.leaves] == [np.uint32]
    (y,) = run(exported, np.zeros((1, 4), np.float32))
    np.testing.assert_array_equal(y[0], jax.random.uniform(key, (4,)))


def test_wide_parameters_are_narrowed_and_it_is_said() -> None:
    exported = export_unit(lambda p, x: x @ p["w"], {"w": W.astype(np.float64)}, X)
    assert exported.leaves[0].dtype == np.float32
    assert exported.notices == ("['w'] is saved as float32, not float64: jax_enable_x64 is off",)


def test_programs_hold_no_trace_of_where_and_how_they_were_written() -> None:
    def with_one_name(params: Any, x: Any) -> Any:
        @jax.jit
        def helper(v: Any) -> Any:
            return jax.nn.silu(v) * 2

        return helper(x @ params["w"])

    @jax.jit
    def _where(a: Any) -> Any:
        with jax.named_scope("scope"):
            b = jax.nn.silu(a)
            return b * 2

    def with_another(weights: Any, x: Any) -> Any:
        return _where(x @ weights[0])

    one = export_unit(with_one_name, {"w": W}, X)
    another = export_unit(with_another, [W], X)
    assert one.programs == another.programs
    assert b"helper" not in one.programs[0].data
    assert b"test_programs" not in one.programs[0].data


def test_reading_and_writing_a_program_changes_no_byte() -> None:
    # Equal shapes of several outputs are one object to JAX, or several.
    fns: list[Callable[[Any, Any], Any]] = [
        lambda p, x: x @ p["w"],
        lambda p, x: {"sum": x.sum(-1), "nan": jnp.full(x.shape[:1], jnp.nan), "same": x},
    ]
    for fn in fns:
        (artefact,) = export_unit(fn, {"w": W}, X).programs
        again = canonical(load_program(artefact.data, "cpu").exported)
        assert artefact_of(again.exported) == artefact.data
        assert again.text == artefact.text


def test_different_computations_are_different_programs() -> None:
    texts = {
        export_unit(fn, {"w": W}, X).programs[0].text
        for fn in (
            lambda p, x: x @ p["w"],
            lambda p, x: x @ p["w"] + 1,
            lambda p, x: x @ p["w"] + 2,
            lambda p, x: (x + 1) @ p["w"],
        )
    }
    assert len(texts) == 4


# --- fallbacks ---------------------------------------------------------------------------------


def asks_for_its_batch(params: Any, x: Any) -> Any:
    # A symbolic batch has no answer to this.
    return x * 2 if x.shape[0] > 4 else x + x


def test_without_a_symbolic_batch_there_is_a_program_a_bucket_and_it_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO", "shards"):
        exported = export_unit(asks_for_its_batch, None, X, batch_buckets=(8, 1))
    assert [artefact.batch for artefact in exported.programs] == [1, 8]
    assert exported.outputs == {"outputs": Spec(("b", 4))}
    assert exported.programs[0].platforms == ("cpu", "cuda", "tpu")
    assert "symbolic batch" in exported.notices[0]
    assert "inconclusive" in exported.notices[0].lower()
    assert exported.notices[0] in caplog.text
    for batch in (1, 8):
        x = np.full((batch, 4), 3, np.float32)
        np.testing.assert_array_equal(run(exported, x)[0], 2 * x)


def test_lengths_stay_symbolic_in_a_program_a_bucket() -> None:
    def fn(params: Any, x: Any, mask: Any) -> Any:
        return x[:, :, 0] * 2 if x.shape[0] > 4 else x[:, :, 0]

    exported = export_unit(fn, None, WORDS, batch_buckets=(1, 8), length_buckets={"t": (4, 8)})
    assert [artefact.batch for artefact in exported.programs] == [1, 8]
    assert exported.outputs == {"outputs": Spec(("b", "t"))}
    for length in (4, 8):
        x, mask = np.ones((8, length, 4), np.float32), np.ones((8, length), np.int32)
        assert run(exported, x, mask, t=length)[0].shape == (8, length)


def test_a_limit_settles_what_a_symbol_alone_leaves_open() -> None:
    positions = np.ones((16, 4), np.float32)

    def fn(p: Any, x: Any, mask: Any) -> Any:
        return x + p[: x.shape[1]]

    exported = export_unit(fn, positions, WORDS, length_buckets={"t": (8, 16)})
    assert exported.programs[0].batch is None
    assert exported.notices == ()


def test_without_one_of_the_platforms_the_current_one_is_kept_and_it_is_said() -> None:
    def fn(params: Any, x: Any) -> Any:
        return jnp.linalg.eigvals(x).real  # JAX has no lowering of it for TPUs

    exported = export_unit(fn, None, {"x": Spec(("b", 2, 2))}, platforms=("cpu", "tpu"))
    assert [(a.platforms, a.batch) for a in exported.programs] == [(("cpu",), None)]
    assert "for cpu, tpu" in exported.notices[0]
    x = np.array([[[3.0, 0.0], [0.0, 3.0]]], np.float32)
    np.testing.assert_allclose(run(exported, x)[0], [[3.0, 3.0]])


# --- refusals ----------------------------------------------------------------------------------

LARGE = np.random.default_rng(0).random((600, 600)).astype(np.float32)


@pytest.mark.parametrize(
    ("fn", "error", "says"),
    [
        (lambda p, x: jax.pure_callback(lambda v: v, x, x), ExportFailed, "to a host unit"),
        (lambda p, x: x if x.sum() > 0 else -x, ExportFailed, "jax.lax.cond"),
        (lambda p, y: y, ExportFailed, "by input name"),
        (lambda p, x: x @ np.ones((5, 5), np.float32), ExportFailed, "cannot be exported: TypeErr"),
        (lambda p, x: x[:, :1] @ LARGE[:1] @ LARGE, ExportFailed, "pass weights through params"),
        (
            lambda p, x: x[:, :1] @ jax.jit(lambda: jnp.asarray(LARGE))()[:1],
            ExportFailed,
            "pass weights through params",
        ),
        (lambda p, x: x.sum(), SpecMismatch, "not one row for every row"),
        (lambda p, x: x.T, SpecMismatch, "not one row for every row"),
        (lambda p, x: jnp.concatenate([x, x]), SpecMismatch, "not one row for every row"),
        (lambda p, x: x @ x.T, SpecMismatch, r"\[b,b\] mixes the rows"),
        (lambda p, x: {"a": {"b": x}}, SpecMismatch, "output 'a' is not an array but a dict"),
        (lambda p, x: {0: x}, SpecMismatch, "not a name"),
        (lambda p, x: {}, SpecMismatch, "returns nothing"),
        (lambda p, x: x + 1j, SpecMismatch, "complex64"),
    ],
)
def test_a_function_that_cannot_be_served_is_refused_with_advice(
    fn: Callable[..., Any], error: type[ServingError], says: str
) -> None:
    with pytest.raises(error, match=says):
        export_unit(fn, None, X)


def test_a_length_that_is_no_plain_symbol_is_refused() -> None:
    with pytest.raises(SpecMismatch, match=r"size t - 1 is not a plain symbol"):
        export_unit(lambda p, x, mask: x[:, 1:], None, WORDS, length_buckets={"t": (8,)})


@pytest.mark.parametrize(
    ("inputs", "options", "error", "says"),
    [
        ({}, {}, InvalidArgument, "at least one input"),
        ({"x": Spec((4,))}, {}, InvalidArgument, "one batch symbol"),
        ({"x": Spec(("b", 4)), "y": Spec(("c", 4))}, {}, InvalidArgument, "one batch symbol"),
        ({"x": Spec(("b",), "string")}, {}, InvalidArgument, "host unit"),
        ({"x": Spec(("b", 4), "int64")}, {}, SpecMismatch, "jax_enable_x64"),
        (X, {"batch_buckets": ()}, InvalidArgument, "must be positive"),
        (X, {"batch_buckets": (0, 1)}, InvalidArgument, "must be positive"),
        (X, {"length_buckets": {"t": (8,)}}, InvalidArgument, "length_buckets"),
        (WORDS, {}, InvalidArgument, r"names \[\], the inputs use \['t'\]"),
        ({"x": Spec(("b", "b"))}, {"length_buckets": {"b": (8,)}}, InvalidArgument, "length_b"),
        (X, {"platforms": ("cpu", "abacus")}, InvalidArgument, "choose from cpu, cuda"),
        (X, {"platforms": ()}, InvalidArgument, "choose from cpu, cuda"),
        (X, {"donate": ("y",)}, InvalidArgument, "donate"),
        (X, {"donate": (1,)}, InvalidArgument, "donate"),
    ],
)
def test_inputs_and_buckets_that_do_not_fit_together_are_refused(
    inputs: dict[str, Spec], options: dict[str, Any], error: type[ServingError], says: str
) -> None:
    with pytest.raises(error, match=says):
        export_unit(lambda p, **_: None, None, inputs, **options)


def test_a_parameter_that_cannot_be_saved_is_named() -> None:
    with pytest.raises(SpecMismatch, match=r"\['names'\]: dtype"):
        export_unit(lambda p, x: x, {"names": np.array(["a"])}, X)


# --- loading -----------------------------------------------------------------------------------


def test_bytes_that_are_no_program_are_corrupt() -> None:
    with pytest.raises(BundleCorrupt, match="cannot be read"):
        load_program(b"", "cpu")


def test_a_program_for_other_platforms_is_refused_with_their_names() -> None:
    exported = export_unit(lambda p, x: x, None, X, platforms=("cuda", "tpu"))
    data = exported.programs[0].data
    with pytest.raises(FailedPrecondition, match="lowered for cuda, tpu, not for cpu"):
        load_program(data, "cpu")
    assert load_program(data, "gpu").platforms == ("cuda", "tpu")


def test_a_missing_length_is_named() -> None:
    exported = export_unit(pooled, {"w": W}, WORDS, length_buckets={"t": (8,)})
    program = load_program(exported.programs[0].data, "cpu")
    with pytest.raises(SpecMismatch, match="no size given for t"):
        program.compile(1)


def test_donations_are_declared_again_and_only_where_an_output_fits(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    def fn(p: Any, x: Any, y: Any) -> Any:
        return {"a": x + p, "b": y.sum(1)}

    inputs = {"x": Spec(("b", 4)), "y": Spec(("b", 9))}
    exported = export_unit(fn, np.ones(4, np.float32), inputs, donate=("y", "x"))
    assert exported.donate == (0, 1)
    unit = as_unit(exported, LocalStore(tmp_path_factory.mktemp("store")))
    program = load_program(exported.programs[0].data, "cpu")
    device = jax.devices("cpu")[0]
    x, y = jnp.ones((8, 4)), jnp.ones((8, 9))
    # No output has y's shape: JAX would warn about it, and warnings are errors here.
    program.compile(8, {}, unit, device)(*exported.leaves, x, y)
    assert x.is_deleted()
    assert not y.is_deleted()
    kept = jnp.ones((8, 4))
    program.compile(8)(*exported.leaves, kept, y)
    assert not kept.is_deleted()


def test_a_unit_with_other_parameters_is_refused(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    exported = export_unit(lambda p, x: x @ p, W, X)
    other = export_unit(lambda p, x: x @ p, W.T.copy().reshape(4, 3)[:, :2], X)
    unit = as_unit(other, LocalStore(tmp_path_factory.mktemp("store")))
    with pytest.raises(SpecMismatch, match="takes something else"):
        load_program(exported.programs[0].data, "cpu").compile(1, {}, unit)


def test_every_bucket_is_named_once_from_small_to_large(tmp_path_factory: Any) -> None:
    exported = export_unit(
        pooled, {"w": W}, WORDS, batch_buckets=(1, 4), length_buckets={"t": (8, 16)}
    )
    unit = as_unit(exported, LocalStore(tmp_path_factory.mktemp("store")))
    assert list(buckets_of(unit)) == [
        (1, {"t": 8}), (1, {"t": 16}), (4, {"t": 8}), (4, {"t": 16}),
    ]  # fmt: skip


def test_a_row_has_the_same_bits_wherever_it_stands_in_its_bucket() -> None:
    exported = export_unit(lambda p, x: jnp.tanh(x @ p), W, X, batch_buckets=(8,))
    program = load_program(exported.programs[0].data, "cpu").compile(8)
    x = np.random.default_rng(3).random((8, 4), np.float32)
    (y,) = (np.asarray(part) for part in program(*exported.leaves, x))
    (turned,) = (np.asarray(part) for part in program(*exported.leaves, np.roll(x, 3, axis=0)))
    np.testing.assert_array_equal(np.roll(y, 3, axis=0), turned)


def test_dtypes_of_every_kind_pass_through() -> None:
    for name in ("bool", "int8", "uint8", "int32", "float16", "bfloat16", "float32"):
        exported = export_unit(lambda p, x: x, None, {"x": Spec(("b", 2), name)})
        assert exported.outputs == {"outputs": Spec(("b", 2), name)}
        x = np.array([[0, 1]]).astype(dtype_of(name))
        np.testing.assert_array_equal(run(exported, x)[0], x)
