"""The servables of ``many``: small, and as many as are wanted, of two kinds.

* ``apart-NNN``: each computes with a constant of its own, so each has programs of its own.
* ``alike-NNN``: one program for all, and weights of their own.

An answer tells the servable's number and its version, exactly, so a wrong servable is noticed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson

from bench.load import Request
from bench.traffic import Asked

__all__ = ["BUCKETS", "KINDS", "asked", "named", "read", "save"]

KINDS: Final = ("alike", "apart")
BUCKETS: Final = (1, 8)
_WIDTH: Final = 32
#: Numbers are told apart from versions by this.
_STEP: Final = 1000


def named(kind: str, number: int) -> str:
    """The name of one of them."""
    return f"{kind}-{number:03}"


def save(store: Path, kind: str, number: int, versions: Sequence[int]) -> None:
    """Save versions of a servable; those of one servable have the same program."""
    # Here, since it imports JAX.
    import shards

    mark = _STEP * (number + 1)
    own = mark if kind == "apart" else 0
    for version in versions:
        weight = version + mark - own
        shards.save(
            partial(_forward, own),
            {"w": np.full((_WIDTH, _WIDTH), weight, np.float32)},
            store,
            named(kind, number),
            version,
            inputs={"x": shards.Spec(("b", _WIDTH))},
            batch_buckets=BUCKETS,
        )


def _forward(own: int, params: Mapping[str, Any], x: Any) -> Any:
    return (x @ params["w"] + own)[:, :2]


def asked(kind: str, number: int) -> Asked:
    """What is asked of one of them; its answers tell the version."""
    name = named(kind, number)
    body = orjson.dumps({"instances": [[1.0] + [0.0] * (_WIDTH - 1)]})
    request = Request(path=f"/v1/models/{name}:predict", body=body)
    return Asked(name, request, partial(read, number))


def read(number: int, body: bytes) -> tuple[int, ...]:
    """The versions in an answer of the servable of this number.

    Raises:
        ValueError: it is no answer of it.
    """
    try:
        [told] = orjson.loads(body)["predictions"]
        versions = tuple(int(value) - _STEP * (number + 1) for value in told)
    except (KeyError, TypeError, orjson.JSONDecodeError) as error:
        raise ValueError(f"not an answer: {body[:200]!r}") from error
    if not all(0 < version < _STEP for version in versions):
        raise ValueError(f"an answer of another servable than {number}: {told}")
    return versions
