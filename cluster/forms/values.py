"""What a body without JSON says, and what one is made of, whatever its form."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["DIMENSIONS_MAX", "TENSORS_MAX", "Array", "Buffer", "Columns", "Written"]

Array = npt.NDArray[np.generic]
Buffer = bytes | bytearray | memoryview

#: No body has more tensors. Looked at before anything is set apart for them.
TENSORS_MAX: Final = 1024
DIMENSIONS_MAX: Final = 32


class Columns(NamedTuple):
    """A request: whole tensors by name, the rows of all instances together.

    Attributes:
        arrays: name to array, in the order of the body; views of the body where that can be.
        signature_name: empty for the default one.
    """

    arrays: dict[str, Array]
    signature_name: str = ""


class Written(NamedTuple):
    """A body to be sent.

    Attributes:
        buffers: of the body, one after the other; large ones are views of the arrays.
        head_bytes: of these, the head; 0 for a form that has none.
    """

    buffers: list[Buffer]
    head_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Of the whole body."""
        return sum(memoryview(buffer).nbytes for buffer in self.buffers)
