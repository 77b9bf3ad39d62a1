"""A host unit for tests: texts to ids, in the way that entry points are written."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]


def load(
    files: dict[str, bytes], options: dict[str, int]
) -> Callable[[dict[str, Array]], dict[str, Array]]:
    """Each text's first ``width`` bytes as ids, ``-1`` where it has fewer."""
    width = options["width"]

    def to_ids(inputs: dict[str, Array]) -> dict[str, Array]:
        texts: list[bytes] = inputs["text"].tolist()
        ids = np.full((len(texts), width), -1, np.int64)
        for row, text in enumerate(texts):
            found = list(text[:width])
            ids[row, : len(found)] = found
        return {"ids": ids}

    return to_ids
