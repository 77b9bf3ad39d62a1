"""What a tensor must look like, and the check that one does.

A shape is written with integers and symbols: ``("b", "t", 384)``. The first symbol of a unit's
tensors is its batch dimension. Two tensors that use the same symbol must agree on its size. A
tensor that is declared ``per="request"`` has one row for a whole request, whatever number of rows
the request has of the others: one user, many items.

This file does not know JAX: specs are read by routers, which never import it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

import ml_dtypes
import msgspec
import numpy as np
import numpy.typing as npt

from shards.errors import SpecMismatch

__all__ = ["DTYPES", "REQUESTS", "STRING", "Per", "Spec", "check", "dtype_of"]

Per = Literal["row", "request"]

#: Text or bytes: a NumPy object array of ``bytes`` in our processes, offsets and bytes on the wire.
STRING: Final = "string"

#: What programs call the number of requests in a batch; no tensor of a user's may.
REQUESTS: Final = "_requests"

DTYPES: Final[Mapping[str, np.dtype[np.generic]]] = {
    **{
        name: np.dtype(name)
        for name in (
            "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
            "float16", "float32", "float64",
        )
    },
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    STRING: np.dtype(object),
}  # fmt: skip


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Dtype and shape of one tensor.

    Attributes:
        shape: sizes and symbols, batch dimension first, e.g. ``("b", 64)``.
        dtype: a key of `DTYPES`.
        pad: the value that fills the places that padding to a length bucket adds. Rows added to
            fill a batch bucket are copies of a real row and do not use it.
        per: ``row``, or ``request`` for a tensor of which a request has exactly one row. The batch
            dimension is written all the same: functions see a row of it for every row of the batch.
    """

    shape: tuple[int | str, ...]
    dtype: str = "float32"
    pad: float = 0.0
    per: Per = "row"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        for size in self.shape:
            if isinstance(size, int) and size < 0:
                raise ValueError(f"shape {self.shape}: a size must not be negative")
            if isinstance(size, str) and not size.isidentifier():
                raise ValueError(f"shape {self.shape}: {size!r} is not a symbol")
            if size == REQUESTS:
                raise ValueError(f"shape {self.shape}: {size!r} is not for use")
        if self.per == "request" and self.batch is None:
            raise ValueError(f"shape {self.shape}: what is per request begins with the batch")
        if self.per not in ("row", "request"):
            raise ValueError(f"per={self.per!r} is not 'row' or 'request'")

    @property
    def batch(self) -> str | None:
        """The batch symbol, or None for a tensor without a batch dimension."""
        first = self.shape[0] if self.shape else None
        return first if isinstance(first, str) else None

    @property
    def row_shape(self) -> tuple[int | str, ...]:
        """The shape without the batch dimension."""
        return self.shape[1:] if self.batch is not None else self.shape

    @property
    def per_request(self) -> bool:
        """Whether a request has exactly one row of it."""
        return self.per == "request"


def dtype_of(name: str) -> np.dtype[np.generic]:
    """The NumPy dtype of a spec's dtype name; `STRING` is object.

    Raises:
        SpecMismatch: the name is not one of `DTYPES`.
    """
    try:
        return DTYPES[name]
    except KeyError:
        raise SpecMismatch(f"unknown dtype {name!r}") from None


def check(
    specs: Mapping[str, Spec],
    arrays: Mapping[str, npt.NDArray[np.generic]],
    limits: Mapping[str, int] | None = None,
    *,
    noun: str = "input",
) -> dict[str, int]:
    """Hold the arrays of one request against their specs and bind the symbols.

    Args:
        specs: name to spec.
        arrays: name to array; exactly the names of `specs`.
        limits: the largest size a symbol may take, for symbols that have one.
        noun: what the messages call an array.

    Returns:
        The size of every symbol.

    Raises:
        SpecMismatch: with the name of the tensor, what was expected and what came.
    """
    if arrays.keys() != specs.keys():
        extra = ", ".join(sorted(arrays.keys() - specs.keys()))
        missing = ", ".join(sorted(specs.keys() - arrays.keys()))
        raise SpecMismatch(
            f"{noun} size does not match signature: {len(arrays)}!={len(specs)}. "
            f"Sent extra: {{{extra}}}. Missing but required: {{{missing}}}."
        )
    bound: dict[str, int] = {}
    for name, spec in specs.items():
        array = arrays[name]
        expected = dtype_of(spec.dtype)
        if array.dtype != expected:
            raise SpecMismatch(f"{noun} {name!r} must be {spec.dtype}, got {array.dtype}")
        if array.ndim != len(spec.shape):
            raise SpecMismatch(
                f"{noun} {name!r} must have shape {_text(spec.shape)}, got {_text(array.shape)}"
            )
        shape = spec.shape
        if spec.per == "request":
            if array.shape[0] != 1:
                raise SpecMismatch(
                    f"{noun} {name!r} is per request and must have one row, got "
                    f"{_text(array.shape)}"
                )
            shape = (1, *shape[1:])
        for declared, size in zip(shape, array.shape, strict=True):
            wanted = bound.setdefault(declared, size) if isinstance(declared, str) else declared
            if wanted != size:
                raise SpecMismatch(
                    f"{noun} {name!r} must have shape {_text(spec.shape)}, got "
                    f"{_text(array.shape)}: {declared} is {wanted}, not {size}"
                )
    for symbol, limit in (limits or {}).items():
        if bound.get(symbol, 0) > limit:
            name = next(n for n, s in specs.items() if symbol in s.shape)
            raise SpecMismatch(
                f"{noun} {name!r}: {symbol} is {bound[symbol]}, the limit is {limit}"
            )
    return bound


def _text(shape: tuple[int | str, ...]) -> str:
    return "[" + ",".join(str(size) for size in shape) + "]"
