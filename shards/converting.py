"""What people give for a signature's inputs, as the arrays of one request.

Decides which lists, numbers and texts mean an array of a spec's dtype, and how many rows a request
has. Does not know signatures, units or who asks.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from batching.errors import InvalidArgument
from shards.specs import STRING, Spec, check, dtype_of

__all__ = ["convert", "rows_of"]

Array = npt.NDArray[np.generic]


def convert(
    specs: Mapping[str, Spec], inputs: Mapping[str, npt.ArrayLike]
) -> tuple[dict[str, Array], int]:
    """The arrays of one request, and how many rows it has.

    Args:
        specs: of the signature's inputs.
        inputs: by name; converted to their dtype where that loses nothing but precision: integers
            must be in range, and a float too large is an infinity. What is per request may leave
            out the dimension of its only row.

    Raises:
        InvalidArgument: something is no array of its dtype.
        SpecMismatch: an array does not fit its spec, or names are missing or too many.
    """
    arrays = {
        name: _whole(_convert(name, value, specs[name]), specs[name])
        if name in specs
        else np.asarray(value)
        for name, value in inputs.items()
    }
    return arrays, rows_of(specs, check(specs, arrays))


def rows_of(specs: Mapping[str, Spec], sizes: Mapping[str, int]) -> int:
    """How many rows a request has whose symbols have these sizes; see `shards.specs.check`."""
    batch = next((spec.batch for spec in specs.values() if spec.batch is not None), None)
    return sizes[batch] if batch is not None else 1


def _whole(array: Array, spec: Spec) -> Array:
    is_bare = spec.per_request and array.ndim == len(spec.shape) - 1
    return array[np.newaxis] if is_bare else array


def _convert(name: str, value: npt.ArrayLike, spec: Spec) -> Array:
    if spec.dtype == STRING:
        return _texts(name, value)
    try:
        array = np.asarray(value)
    except ValueError as error:  # lists of different lengths
        raise InvalidArgument(f"input {name!r} is not an array: {error}") from None
    wanted = dtype_of(spec.dtype)
    if array.dtype == wanted:
        return array
    if array.size and not _fits(array, wanted):
        raise InvalidArgument(f"input {name!r} must be {spec.dtype}, got {_content(array)}")
    with np.errstate(all="ignore"):
        return array.astype(wanted)


def _fits(array: Array, wanted: np.dtype[np.generic]) -> bool:
    if wanted.kind == "b":
        return False
    if wanted.kind in "iu":
        limits = np.iinfo(wanted.name)
        is_whole = array.dtype.kind in "iu"
        in_range = is_whole and limits.min <= int(array.min()) and int(array.max()) <= limits.max
        return in_range or array.dtype.kind == "b"
    return array.dtype.kind in "biuf" or array.dtype == dtype_of("bfloat16")


def _content(array: Array) -> str:
    if array.dtype.kind in "iu":
        return f"{array.dtype} from {array.min()} to {array.max()}"
    return str(array.dtype)


def _texts(name: str, value: npt.ArrayLike) -> Array:
    try:
        array = np.asarray(value, dtype=object)
        encoded = [item.encode() if isinstance(item, str) else item for item in array.reshape(-1)]
    except ValueError as error:  # lists of different lengths, or a lone surrogate
        raise InvalidArgument(f"input {name!r} is not an array of text: {error}") from None
    for item in encoded:
        if not isinstance(item, bytes):
            kind = type(item).__name__
            raise InvalidArgument(f"input {name!r} must be text or bytes, got {kind}")
    out = np.empty(len(encoded), object)
    out[:] = encoded
    return out.reshape(array.shape)
