"""Parameter arrays, packed and mapped."""

from __future__ import annotations

from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import SpecMismatch
from shards.files import digest_of
from shards.leaves import (
    digest_of_leaf,
    dtype_name,
    leaf_bytes,
    map_leaf,
    map_leaves,
    map_pages,
    put_leaves,
)
from shards.specs import DTYPES, STRING
from shards.store import LocalStore

NUMERIC = [name for name in DTYPES if name != STRING]


@pytest.mark.parametrize("name", NUMERIC)
def test_every_dtype_comes_back_in_shape_and_value(tmp_path: Path, name: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(DTYPES[name])
    (leaf,) = put_leaves(LocalStore(tmp_path), [array])
    assert (leaf.dtype, leaf.shape) == (name, (2, 3))
    mapped = map_leaf(LocalStore(tmp_path), leaf)
    assert mapped.dtype == array.dtype
    np.testing.assert_array_equal(mapped, array)


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.sampled_from([0, 1, 3, 16, 17, 5000, 16_384, 20_000]), max_size=8))
def test_leaves_of_any_sizes_are_aligned_read_only_and_whole(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int]
) -> None:
    store = LocalStore(tmp_path_factory.mktemp("store"))
    arrays = [np.full(size, index, np.float32) for index, size in enumerate(sizes)]
    leaves = put_leaves(store, arrays)
    for array, leaf, mapped in zip(arrays, leaves, map_leaves(store, leaves), strict=True):
        assert leaf.offset % 64 == 0
        assert mapped.size == 0 or mapped.ctypes.data % 64 == 0
        assert not mapped.flags.writeable
        np.testing.assert_array_equal(mapped, array)
        assert leaf_bytes(leaf) == array.nbytes
        assert digest_of_leaf(array, leaf) == digest_of(array.tobytes())


def test_large_leaves_have_a_blob_each_and_small_ones_share_one(tmp_path: Path) -> None:
    small = [np.full(8, index, np.float32) for index in range(5)]
    large = [np.full(20_000, index, np.float32) for index in range(2)]
    leaves = put_leaves(LocalStore(tmp_path), [*small, *large])
    assert len({leaf.blob for leaf in leaves[:5]}) == 1
    assert len({leaf.blob for leaf in leaves[5:]}) == 2
    assert {leaf.offset for leaf in leaves[5:]} == {0}


def test_equal_arrays_are_kept_once(tmp_path: Path) -> None:
    tied = np.random.default_rng(0).random((200, 200))
    first, second = put_leaves(LocalStore(tmp_path), [tied, np.asfortranarray(tied)])
    assert first == second


def test_scalars_and_strided_views_are_saved_by_value(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    arrays = [np.array(2.5, np.float32), np.arange(12, dtype=np.int32).reshape(3, 4)[:, ::2]]
    for array, mapped in zip(arrays, map_leaves(store, put_leaves(store, arrays)), strict=True):
        assert mapped.shape == array.shape
        np.testing.assert_array_equal(mapped, array)


@pytest.mark.parametrize("dtype", ["complex64", "U3", object, "datetime64[s]"])
def test_other_dtypes_are_refused_by_name(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(SpecMismatch, match="is not one of bool"):
        put_leaves(LocalStore(tmp_path), [np.empty(1, dtype)])


def test_names_of_dtypes_are_those_of_specs() -> None:
    assert dtype_name(np.float32) == "float32"
    assert dtype_name(ml_dtypes.bfloat16) == "bfloat16"


def test_jax_takes_a_mapped_leaf_without_a_copy(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    arrays = [np.full(100, 1, np.float32), np.full(50_000, 2, np.float32)]
    for array in map_leaves(store, put_leaves(store, arrays)):
        on_device = jax.device_put(array, jax.devices("cpu")[0])
        assert on_device.unsafe_buffer_pointer() == array.ctypes.data


def test_pages_of_a_mapping_are_there_before_anybody_reads_them(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(bytes(3 << 20))
    mapped = np.memmap(tmp_path / "blob", np.uint8, "r").view(np.ndarray)
    # Not from the beginning of a page, nor to the end of one.
    map_pages(mapped[100 : (2 << 20) + 5])
    lines = Path("/proc/self/smaps").read_text().split(str(tmp_path / "blob"))[1].splitlines()
    (held,) = (int(line.split()[1]) for line in lines[:8] if line.startswith("Rss:"))
    assert held << 10 >= 2 << 20
    map_pages(np.empty(0, np.float32))
