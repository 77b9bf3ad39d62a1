"""Other people's functions over named rows, as an engine calls them.

Decides that what goes in and what comes out is what the unit's specs say, so that a function never
sees a tensor that it did not declare, and a request never gets one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from batching.errors import Internal
from shards.errors import SpecMismatch
from shards.specs import Spec, check
from shards.worker import Handler

__all__ = ["UnitFunction", "checked"]

Array: TypeAlias = npt.NDArray[np.generic]

#: Rows of the unit's inputs, by name, to rows of its outputs, by name.
UnitFunction: TypeAlias = Callable[[dict[str, Array]], Mapping[str, Array]]


def checked(
    fn: UnitFunction, inputs: Mapping[str, Spec], outputs: Mapping[str, Spec], who: str
) -> Handler:
    """The function as a handler of a worker engine.

    Args:
        fn: what to call.
        inputs: specs in the order in which tensors come.
        outputs: specs in the order in which tensors are answered.
        who: names the function in errors.
    """

    def run(arrays: Sequence[Array]) -> Sequence[Array]:
        if len(arrays) != len(inputs):
            raise SpecMismatch(f"{len(arrays)} tensors came, the unit takes {', '.join(inputs)}")
        named = dict(zip(inputs, arrays, strict=True))
        check(inputs, named)
        answer = fn(named)
        try:
            check(outputs, answer, noun="output")
        except SpecMismatch as error:
            # What the unit does wrong is not the request's fault.
            raise Internal(f"{who} broke its specs: {error}") from error
        return [answer[name] for name in outputs]

    return run
