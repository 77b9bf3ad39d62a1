"""Weights and tables from and to other formats, and frameworks' models as plain functions.

Decides how a foreign format becomes arrays and how a framework's module becomes ``(fn, params)``
for `Bundle.unit`. Everything foreign is imported where it is used: none of it is needed to serve.
"""

from __future__ import annotations

import importlib
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from batching.errors import FailedPrecondition, InvalidArgument, NotFound
from shards.checking import leaf_bytes
from shards.cutting import in_order
from shards.errors import BundleCorrupt, SpecMismatch
from shards.leaves import Array, map_leaves
from shards.manifest import Manifest, MapUnit, TableUnit
from shards.overlays import rows_of_partition
from shards.specs import STRING, dtype_of
from shards.store import Store
from shards.stored_rows import decoded

__all__ = [
    "from_safetensors",
    "leaves_of_equinox",
    "leaves_of_nnx",
    "table_from_arrow",
    "table_to_arrow",
    "to_safetensors",
]

#: The format's names of the dtypes that we know.
_SAFETENSORS: Final = {
    "BOOL": "bool", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
}  # fmt: skip

_HEADER_BYTES_MAX: Final = 100 << 20


# --- safetensors -------------------------------------------------------------------------------


class _Tensor(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


#: Made before there are threads; see `shards.checking`.
_TENSORS: Final = msgspec.json.Decoder(_Tensor)


def from_safetensors(path: str | Path) -> dict[str, Array]:
    """The tensors of a safetensors file, in the file's order of names.

    The arrays are read-only views of the mapped file: nothing is copied until it is used. They are
    seldom 64-byte aligned, which the format does not promise; saving aligns them.

    Raises:
        BundleCorrupt: not a safetensors file.
        SpecMismatch: a tensor of a dtype that we do not know; names it.
    """
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        if size < 8:
            raise BundleCorrupt(f"{path} is not a safetensors file: {size} bytes")
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > min(size - 8, _HEADER_BYTES_MAX):
        raise BundleCorrupt(f"{path} is not a safetensors file: a header of {length} bytes")
    try:
        header = msgspec.json.decode(data[8 : 8 + length].tobytes(), type=dict[str, msgspec.Raw])
        header.pop("__metadata__", None)
        tensors = {name: _TENSORS.decode(raw) for name, raw in header.items()}
    except msgspec.MsgspecError as error:
        raise BundleCorrupt(f"{path} is not a safetensors file: {error}") from None
    body = data[8 + length :]
    return {name: _tensor(body, name, tensor, path) for name, tensor in tensors.items()}


def _tensor(body: Array, name: str, tensor: _Tensor, path: str | Path) -> Array:
    known = _SAFETENSORS.get(tensor.dtype)
    if known is None:
        raise SpecMismatch(f"{path}: tensor {name!r} has the unknown dtype {tensor.dtype}")
    dtype = dtype_of(known)
    start, stop = tensor.data_offsets
    count = int(np.prod(tensor.shape, dtype=np.int64))
    if min((0, *tensor.shape)) < 0 or not 0 <= start <= stop <= len(body):
        raise BundleCorrupt(f"{path}: tensor {name!r} lies outside the file")
    if stop - start != count * dtype.itemsize:
        raise BundleCorrupt(f"{path}: tensor {name!r} has {stop - start} bytes for its shape")
    return body[start:stop].view(dtype).reshape(tensor.shape)


def to_safetensors(manifest: Manifest, store: Store, unit: str, path: str | Path) -> None:
    """Write a map unit's parameters to a safetensors file.

    They are named ``0``, ``1``, ... in the order in which the program takes them: a bundle keeps no
    names of parameters, which have no part in a unit's identity.

    Raises:
        NotFound: the bundle has no map unit of that name.
        FailedPrecondition: the package is not installed.
    """
    found = manifest.units.get(unit)
    if not isinstance(found, MapUnit):
        raise NotFound(f"{manifest.name}/{manifest.version} has no map unit {unit!r}")
    numpy_format = _optional("safetensors.numpy", "safetensors", "interchange")
    # The writer does not take read-only views of every NumPy version; a copy always fits.
    arrays = {str(i): np.array(array) for i, array in enumerate(map_leaves(store, found.params))}
    total = sum(leaf_bytes(leaf) for leaf in found.params)
    metadata = {"servable": manifest.name, "version": str(manifest.version), "bytes": str(total)}
    numpy_format.save_file(arrays, str(path), metadata=metadata)


# --- Arrow -------------------------------------------------------------------------------------


def table_from_arrow(source: Any, column: str | None = None) -> Array:
    """The rows of a table unit from a column of fixed-size lists.

    Args:
        source: a `pyarrow.Table`, or the path of a Feather, Arrow IPC or Parquet file.
        column: its name; None where there is only one column of lists.

    Returns:
        ``[rows, dim]``; a view of Arrow's memory where the column is one chunk.

    Raises:
        SpecMismatch: the column holds something else, rows of different widths, or nulls.
    """
    import pyarrow as pa

    table = source if isinstance(source, pa.Table) else _read_arrow(Path(source))
    name = column or _only_list_column(table)
    if name not in table.column_names:
        raise NotFound(f"no column {name!r}; there are {', '.join(table.column_names)}")
    chunks = [_rows_of(chunk, name) for chunk in table.column(name).chunks]
    if not chunks:
        raise SpecMismatch(f"column {name!r} has no rows")
    if len({chunk.shape[1] for chunk in chunks}) > 1:
        raise SpecMismatch(f"column {name!r} has rows of different widths")
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)


def _read_arrow(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet

    if path.suffix in (".parquet", ".pq"):
        return pyarrow.parquet.read_table(path)
    try:
        # Feather version 2 is the Arrow IPC file format.
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except pa.ArrowInvalid:
        try:
            return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        except pa.ArrowInvalid as error:
            raise BundleCorrupt(f"{path} is no Arrow, Feather or Parquet file: {error}") from None


def _only_list_column(table: Any) -> str:
    import pyarrow as pa

    found = [
        field.name for field in table.schema
        if pa.types.is_fixed_size_list(field.type) or pa.types.is_list(field.type)
    ]  # fmt: skip
    if len(found) != 1:
        raise InvalidArgument(f"say which column holds the rows: {found or table.column_names}")
    return str(found[0])


def _rows_of(chunk: Any, name: str) -> Array:
    import pyarrow as pa

    kind = chunk.type
    if chunk.null_count:
        raise SpecMismatch(f"column {name!r} has {chunk.null_count} nulls")
    if pa.types.is_fixed_size_list(kind):
        dim = kind.list_size
    elif pa.types.is_list(kind):
        widths = {stop - start for start, stop in _pairs(chunk.offsets.to_numpy())}
        if len(widths) != 1:
            raise SpecMismatch(f"column {name!r} has rows of different widths")
        dim = int(widths.pop())
    else:
        raise SpecMismatch(f"column {name!r} holds {kind}, not lists of numbers")
    values = chunk.flatten()
    if values.null_count:
        raise SpecMismatch(f"column {name!r} has {values.null_count} nulls inside its rows")
    array: Array = values.to_numpy(zero_copy_only=False)
    return array.reshape(len(chunk), dim)


def _pairs(offsets: Array) -> Iterator[tuple[int, int]]:
    yield from zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)


def table_to_arrow(manifest: Manifest, store: Store, unit: str, column: str = "rows") -> Any:
    """A table unit as a `pyarrow.Table` with one column of fixed-size lists.

    A partition is one chunk, where it lies; one with overlays is several that are copied. A table
    that is spread by hash or cut by columns is put together in memory.

    Raises:
        NotFound: the bundle has no table of that name.
    """
    import pyarrow as pa

    found = manifest.units.get(unit)
    if not isinstance(found, TableUnit):
        raise NotFound(f"{manifest.name}/{manifest.version} has no table {unit!r}")
    if found.dtype in (STRING, "bfloat16"):
        raise SpecMismatch(f"table {unit!r}: Arrow has no {found.dtype}")
    partitions = (
        (decoded(found.stored, stored) for stored in rows_of_partition(store, found, index))
        for index in range(len(found.partitions))
    )
    chunks = [
        pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), found.dim)
        for rows in in_order(found, partitions)
    ]
    return pa.table({column: pa.chunked_array(chunks)})


# --- frameworks --------------------------------------------------------------------------------


def leaves_of_nnx(
    module: Any, call: Callable[..., Any] | None = None
) -> tuple[Callable[..., Any], Any]:
    """A Flax NNX module as ``(fn, params)`` for `Bundle.unit`.

    Args:
        module: the module, in evaluation mode (``module.eval()``): what it changes in itself
            while it is called is lost.
        call: called as ``call(module, **inputs)``; None calls the module with the inputs in
            their order.

    Raises:
        FailedPrecondition: flax is not installed.
    """
    nnx = _optional("flax.nnx", "flax", "")
    graph, state = nnx.split(module)

    def fn(params: Any, **inputs: Any) -> Any:
        return _called(nnx.merge(graph, params), call, inputs)

    return fn, state


def leaves_of_equinox(
    module: Any, call: Callable[..., Any] | None = None
) -> tuple[Callable[..., Any], Any]:
    """An Equinox module as ``(fn, params)`` for `Bundle.unit`.

    Args:
        module: the module, in inference mode (``equinox.nn.inference_mode``).
        call: called as ``call(module, **inputs)`` with whole batches; None maps the module over
            the rows of the inputs, in their order, since Equinox modules take one row.

    Raises:
        FailedPrecondition: equinox is not installed.
    """
    import jax

    equinox = _optional("equinox", "equinox", "")
    arrays, static = equinox.partition(module, equinox.is_array)

    def fn(params: Any, **inputs: Any) -> Any:
        whole = equinox.combine(params, static)
        return _called(whole if call else jax.vmap(whole), call, inputs)

    return fn, arrays


def _called(module: Any, call: Callable[..., Any] | None, inputs: dict[str, Any]) -> Any:
    return module(*inputs.values()) if call is None else call(module, **inputs)


def _optional(module: str, package: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # the package is there, something that it needs is not
        what = f"'shardserve[{extra}]'" if extra else package
        raise FailedPrecondition(f"{package} is not installed: pip install {what}") from None
