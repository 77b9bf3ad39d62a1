"""What a parsed request is, whatever its format was."""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

__all__ = ["DEFAULT_SIGNATURE", "Array", "Buffer", "Parsed"]

Array = npt.NDArray[np.generic]

#: A request's body: whatever the door's read buffer hands out.
Buffer = bytes | bytearray | memoryview

#: The signature of a request that names none.
DEFAULT_SIGNATURE: Final = "serving_default"


class Parsed(msgspec.Struct, frozen=True, kw_only=True):
    """A request's tensors, which fit the signature's specs.

    Attributes:
        signature_name: the signature they are for.
        arrays: name to array, exactly the signature's inputs, in their declared order.
        rows: the size of the batch dimension; 1 where no input has one.
        columnar: whether the client wrote ``inputs`` and so expects ``outputs``.
    """

    signature_name: str
    arrays: dict[str, Array]
    rows: int
    columnar: bool = False
