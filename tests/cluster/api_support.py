"""What the tests of the API's bodies share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import numpy as np

from batching.errors import ServingError
from shards.manifest import Signature
from shards.specs import Spec

T = TypeVar("T")


def signature(
    inputs: dict[str, Spec],
    outputs: dict[str, Spec] | None = None,
    *,
    method: Literal["predict", "classify", "regress"] = "predict",
    labels: tuple[str, ...] = (),
) -> Signature:
    """A signature of which only the face is of interest."""
    return Signature(
        method=method, inputs=inputs, outputs=outputs or {}, nodes=(), returns={}, labels=labels
    )


def f32(values: object) -> Any:
    """A float32 array; what does not fit overflows."""
    return np.array(values, np.float32)


def f64(values: object) -> Any:
    """A float64 array."""
    return np.array(values, np.float64)


def i32(values: object) -> Any:
    """An int32 array."""
    return np.array(values, np.int32)


def texts(values: object) -> Any:
    """An array of bytes objects, which is what a string tensor is."""
    return np.array(values, object)


def assert_same_array(found: Any, expected: Any) -> None:
    """Equal in dtype, shape and every bit."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if expected.dtype == object:
        assert found.tolist() == expected.tolist()
    else:
        assert found.tobytes() == expected.tobytes()


def assert_same_arrays(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal in names, their order, and arrays."""
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert_same_array(found[name], array)


def accepted(call: Callable[[], T]) -> T | None:
    """The result, or None where it was refused with a typed error that says something.

    Any other exception gets out and fails the test.
    """
    try:
        return call()
    except ServingError as error:
        if not str(error):
            raise AssertionError("an error without words") from error
        return None
