"""Other formats and frameworks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import equinox
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
import safetensors.numpy
from flax import nnx

import shards
from batching.errors import FailedPrecondition, InvalidArgument, NotFound
from shards.errors import BundleCorrupt, SpecMismatch
from shards.interchange import (
    from_safetensors,
    leaves_of_equinox,
    leaves_of_nnx,
    table_from_arrow,
    table_to_arrow,
    to_safetensors,
)
from shards.manifest import Manifest
from shards.programs import export_unit, load_program
from shards.specs import Spec
from shards.store import LocalStore

X = {"x": Spec(("b", 4))}
ROWS = np.arange(12, dtype=np.float32).reshape(6, 2)

# --- safetensors -------------------------------------------------------------------------------

TENSORS: dict[str, npt.NDArray[Any]] = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.array([1, 2], np.float16),
    "brain": np.array([1, 2, 3], ml_dtypes.bfloat16),
    "ids": np.array([[7]], np.int64),
    "flags": np.array([True, False]),
    "scalar": np.array(3, np.uint8),
    "nothing": np.empty((0, 5), np.float32),
}


@pytest.fixture
def tensors(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(TENSORS, str(path), metadata={"format": "pt"})
    return path


def test_tensors_are_read_in_place_with_shape_dtype_and_value(tensors: Path) -> None:
    read = from_safetensors(tensors)
    assert read.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        assert (read[name].dtype, read[name].shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(read[name], expected)
        assert not read[name].flags.writeable
        assert read[name].base is not None  # a view of the mapped file


def test_a_cut_file_is_corrupt_wherever_it_is_cut(tensors: Path) -> None:
    whole = tensors.read_bytes()
    for stop in (0, 4, 8, 20, len(whole) // 2, len(whole) - 1):
        tensors.write_bytes(whole[:stop])
        with pytest.raises(BundleCorrupt, match=r"model\.safetensors"):
            from_safetensors(tensors)


@pytest.mark.parametrize(
    ("header", "error", "says"),
    [
        (b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', BundleCorrupt, "4 bytes"),
        (b'{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', BundleCorrupt, "outside"),
        (b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}', BundleCorrupt, "outside"),
        (b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4', BundleCorrupt, "not a safe"),
        (b'{"w":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}', SpecMismatch, "'w'.*F8"),
    ],
)
def test_a_header_that_lies_is_refused(
    tmp_path: Path, header: bytes, error: type[Exception], says: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(error, match=says):
        from_safetensors(path)


def test_parameters_go_out_and_come_back(tmp_path: Path) -> None:
    params = [np.ones((4, 2), np.float32), np.zeros(2, np.float32)]
    manifest = shards.save(lambda p, x: x @ p[0] + p[1], params, tmp_path, "m", inputs=X)
    store = LocalStore(tmp_path)
    to_safetensors(manifest, store, "model", tmp_path / "out.safetensors")
    read = from_safetensors(tmp_path / "out.safetensors")
    np.testing.assert_array_equal(read["0"], params[0])
    np.testing.assert_array_equal(read["1"], params[1])
    with pytest.raises(NotFound, match="no map unit 'other'"):
        to_safetensors(manifest, store, "other", tmp_path / "x")


def test_a_missing_package_is_named_with_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = shards.save(lambda p, x: x, None, tmp_path, "m", inputs=X)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.delitem(sys.modules, "safetensors.numpy")
    with pytest.raises(FailedPrecondition, match=r"pip install 'shardserve\[interchange\]'"):
        to_safetensors(manifest, LocalStore(tmp_path), "model", tmp_path / "x")


# --- Arrow -------------------------------------------------------------------------------------


def arrow_table(kind: str = "fixed") -> pa.Table:
    if kind == "fixed":
        column = pa.FixedSizeListArray.from_arrays(pa.array(ROWS.reshape(-1)), 2)
    else:
        column = pa.array(ROWS.tolist(), pa.list_(pa.float32()))
    return pa.table({"name": pa.array(list("abcdef")), "vector": column})


@pytest.mark.parametrize("kind", ["fixed", "variable"])
def test_a_column_of_lists_becomes_rows(kind: str) -> None:
    np.testing.assert_array_equal(table_from_arrow(arrow_table(kind)), ROWS)
    np.testing.assert_array_equal(table_from_arrow(arrow_table(kind), "vector"), ROWS)


def test_chunks_and_slices_are_read_as_the_rows_they_show() -> None:
    table = pa.concat_tables([arrow_table().slice(1, 2), arrow_table("fixed").slice(4)])
    np.testing.assert_array_equal(table_from_arrow(table), ROWS[[1, 2, 4, 5]])
    np.testing.assert_array_equal(table_from_arrow(arrow_table("variable").slice(3, 2)), ROWS[3:5])


@pytest.mark.parametrize("suffix", ["feather", "arrow", "arrows", "parquet"])
def test_files_of_every_kind_are_read(tmp_path: Path, suffix: str) -> None:
    path, table = tmp_path / f"rows.{suffix}", arrow_table()
    if suffix == "feather":
        pyarrow.feather.write_feather(table, path)
    elif suffix == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        new = pa.ipc.new_file if suffix == "arrow" else pa.ipc.new_stream
        with new(path, table.schema) as writer:
            writer.write_table(table)
    np.testing.assert_array_equal(table_from_arrow(path), ROWS)


NULLS = pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2))
HOLES = pa.array([[1.0, None]], pa.list_(pa.float32(), 2))
RAGGED = pa.array([[1.0], [1.0, 2.0]], pa.list_(pa.float32()))


@pytest.mark.parametrize(
    ("table", "column", "error", "says"),
    [
        (pa.table({"v": NULLS}), None, SpecMismatch, "1 nulls"),
        (pa.table({"v": HOLES}), None, SpecMismatch, "nulls inside"),
        (pa.table({"v": RAGGED}), None, SpecMismatch, "different widths"),
        (pa.table({"v": pa.array([1.0])}), "v", SpecMismatch, "not lists"),
        (pa.table({"v": pa.array([1.0])}), None, InvalidArgument, "say which column"),
        (pa.table({"v": HOLES, "w": HOLES}), None, InvalidArgument, "say which column"),
        (pa.table({"v": HOLES}), "u", NotFound, "no column 'u'; there are v"),
    ],
)
def test_a_column_that_is_no_table_is_refused(
    table: pa.Table, column: str | None, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        table_from_arrow(table, column)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.arrow").write_bytes(b"not arrow at all")
    with pytest.raises(BundleCorrupt, match=r"x\.arrow"):
        table_from_arrow(tmp_path / "x.arrow")


def saved_table(store: Path, rows: Any) -> Manifest:
    with shards.Bundle.create(store, "m") as bundle:
        words = bundle.table("words", rows, partitions=4)
        bundle.signature(inputs={"ids": Spec(("b",), "int32")})(lambda ids: words.rows(ids))
    return bundle.manifest


def test_a_table_comes_in_and_goes_out(tmp_path: Path) -> None:
    manifest = saved_table(tmp_path, table_from_arrow(arrow_table()))
    out = table_to_arrow(manifest, LocalStore(tmp_path), "words", "vector")
    assert out.column("vector").num_chunks == 4
    np.testing.assert_array_equal(table_from_arrow(out), ROWS)
    assert out.schema.field("vector").type == pa.list_(pa.float32(), 2)
    with pytest.raises(NotFound, match="no table 'model'"):
        table_to_arrow(manifest, LocalStore(tmp_path), "model")


def test_rows_that_arrow_cannot_hold_are_refused(tmp_path: Path) -> None:
    manifest = saved_table(tmp_path, ROWS.astype(ml_dtypes.bfloat16))
    with pytest.raises(SpecMismatch, match="bfloat16"):
        table_to_arrow(manifest, LocalStore(tmp_path), "words")


# --- frameworks --------------------------------------------------------------------------------


class NnxMlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.second(self.drop(jax.nn.relu(self.norm(self.first(x)))))


class EquinoxMlp(equinox.Module):
    first: equinox.nn.Linear
    second: equinox.nn.Linear
    activation: Any
    scale: float

    def __init__(self, key: Any) -> None:
        one, two = jax.random.split(key)
        self.first = equinox.nn.Linear(4, 8, key=one)
        self.second = equinox.nn.Linear(8, 3, key=two)
        self.activation = jax.nn.gelu
        self.scale = 0.5

    def __call__(self, x: Any) -> Any:
        return self.second(self.activation(self.first(x))) * self.scale


def run(fn: Any, params: Any, x: np.ndarray) -> np.ndarray:
    exported = export_unit(fn, params, X)
    compiled = load_program(exported.programs[0].data, "cpu").compile(len(x))
    return np.asarray(compiled(*exported.leaves, x)[0])


def test_an_nnx_module_is_exported_with_its_state_and_without_its_dropout() -> None:
    module = NnxMlp(nnx.Rngs(0))
    module.eval()  # type: ignore[no-untyped-call]
    x = np.random.default_rng(0).random((8, 4), np.float32)
    fn, params = leaves_of_nnx(module)
    np.testing.assert_allclose(run(fn, params, x), module(jnp.asarray(x)), rtol=1e-5, atol=1e-6)
    # Two layers of two, the normalisation's four; no random key, no counter.
    assert len(export_unit(fn, params, X).leaves) == 8
    fn, params = leaves_of_nnx(module, lambda m, x: m.first(x))
    np.testing.assert_allclose(run(fn, params, x), module.first(jnp.asarray(x)), rtol=1e-5)


def test_an_equinox_module_is_mapped_over_the_rows() -> None:
    module = EquinoxMlp(jax.random.key(0))
    x = np.random.default_rng(0).random((8, 4), np.float32)
    expected = jax.vmap(module)(jnp.asarray(x))
    fn, params = leaves_of_equinox(module)
    np.testing.assert_allclose(run(fn, params, x), expected, rtol=1e-5, atol=1e-6)
    fn, params = leaves_of_equinox(module, lambda m, x: jax.vmap(m)(x) + 1)
    np.testing.assert_allclose(run(fn, params, x), expected + 1, rtol=1e-5, atol=1e-6)


def test_modules_are_saved_in_one_line(tmp_path: Path) -> None:
    module = NnxMlp(nnx.Rngs(0))
    module.eval()  # type: ignore[no-untyped-call]
    first = shards.save(*leaves_of_nnx(module), tmp_path, "nnx", inputs=X)
    assert list(first.signatures["serving_default"].outputs) == ["outputs"]
    second = shards.save(
        *leaves_of_equinox(EquinoxMlp(jax.random.key(0))), tmp_path, "equinox", inputs=X
    )
    assert second.signatures["serving_default"].outputs == {"outputs": Spec(("b", 3))}
