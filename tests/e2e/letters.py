"""The host unit of the end-to-end tests: letters of a text to ids. Imported by host actors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

__all__ = ["load"]

Arrays = Mapping[str, npt.NDArray[np.generic]]


def load(
    files: Mapping[str, bytes], options: Mapping[str, str | int | float | bool]
) -> Callable[[Arrays], Arrays]:
    """Make the splitter; ``rows`` is the size of the table that the ids are for."""
    rows = int(options["rows"])

    def split(inputs: Arrays) -> Arrays:
        texts: list[bytes] = list(inputs["text"])
        shape = (len(texts), max(map(len, texts), default=0))
        ids, mask = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = [letter % rows for letter in text]
            mask[row, : len(text)] = 1.0
        return {"ids": ids, "mask": mask}

    return split
