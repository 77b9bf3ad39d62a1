"""The servables of ``swap``: weights that are the version's number, so that answers tell it.

* ``plain``: two layers on a device.
* ``sharded``: rows of a table over all shards, and a layer on a device over them.

Every number in an answer is exact in float32, and is the product or the sum of the versions of the
parts that it came from, so an answer of two versions cannot pass for one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson

from bench.load import Request
from bench.traffic import Asked

__all__ = ["SERVABLES", "VERSIONS_MAX", "kinds", "read", "save"]

SERVABLES: Final = ("plain", "sharded")
#: Sums of squares of versions are exact up to here.
VERSIONS_MAX: Final = 200
_WIDTH: Final = 256
_ROWS: Final = 1 << 16
_DIM: Final = 16
_LOOKED_UP: Final = 4
_PARTITIONS: Final = 4
_BUCKETS: Final = (1, 8, 32)


def save(store: Path, servable: str, version: int) -> None:
    """Save a version of a servable."""
    # Here, since it imports JAX.
    import shards

    if not 1 <= version <= VERSIONS_MAX:
        raise ValueError(f"version {version} is not within 1 and {VERSIONS_MAX}")
    if servable == "plain":
        weights = {
            "first": np.full((_WIDTH, _WIDTH), version, np.float32),
            "second": np.full((_WIDTH, _WIDTH), version / _WIDTH, np.float32),
        }
        inputs = {"x": shards.Spec(("b", _WIDTH))}
        shards.save(
            _plain, weights, store, servable, version, inputs=inputs, batch_buckets=_BUCKETS
        )
        return
    ids = {"ids": shards.Spec(("b", _LOOKED_UP), "int32")}
    rows = {"rows": shards.Spec(("b", _LOOKED_UP, _DIM))}
    weights = {"head": np.full((_LOOKED_UP * _DIM, _WIDTH), version, np.float32)}
    with shards.Bundle.create(store, servable, version) as bundle:
        table = bundle.table(
            "rows", np.full((_ROWS, _DIM), version, np.float32), partitions=_PARTITIONS
        )
        head = bundle.unit("head", _head, weights, inputs=rows, batch_buckets=_BUCKETS)

        @bundle.signature("serving_default", inputs=ids)
        def sharded(ids: Any) -> Mapping[str, Any]:
            told: Mapping[str, Any] = head(table.rows(ids))
            return told


def _plain(params: Mapping[str, Any], x: Any) -> Mapping[str, Any]:
    hidden = x @ params["first"]
    out = hidden @ params["second"]
    return {"first": hidden[:, :4], "both": out[:, :4]}


def _head(params: Mapping[str, Any], rows: Any) -> Mapping[str, Any]:
    told = rows.reshape((rows.shape[0], _LOOKED_UP * _DIM)) @ params["head"]
    return {"rows": rows[:, :, 0], "both": told[:, :4]}


def kinds(seed: int) -> list[Asked]:
    """One kind of request a servable."""
    hot = [0.0] * _WIDTH
    hot[seed % _WIDTH] = 1.0
    drawn = np.random.default_rng(seed).integers(_ROWS, size=_LOOKED_UP)
    # One id of every partition, so that each answer has a part of every shard.
    each = _ROWS // _PARTITIONS
    ids = [int(number) % each + part * each for part, number in enumerate(drawn)]
    instances: tuple[list[float] | list[int], ...] = (hot, ids)
    return [
        Asked(name, _request(name, instance), partial(read, name))
        for name, instance in zip(SERVABLES, instances, strict=True)
    ]


def _request(servable: str, instance: list[float] | list[int]) -> Request:
    body = orjson.dumps({"instances": [instance]})
    return Request(path=f"/v1/models/{servable}:predict", body=body)


def read(servable: str, body: bytes) -> tuple[int, ...]:
    """The versions of the parts that an answer came from.

    Raises:
        ValueError: it is no answer of this servable.
    """
    try:
        [told] = orjson.loads(body)["predictions"]
        if servable == "plain":
            first = [_whole(value) for value in told["first"]]
            second = [_whole(value / one) for value, one in zip(told["both"], first, strict=True)]
            return (*first, *second)
        rows = [_whole(value) for value in told["rows"]]
        head = [_whole(value / (sum(rows) * _DIM)) for value in told["both"]]
        return (*rows, *head)
    except (KeyError, TypeError, ZeroDivisionError, orjson.JSONDecodeError) as error:
        raise ValueError(f"not an answer: {body[:200]!r}") from error


def _whole(value: float) -> int:
    """A version; 0, which is none, for a number that no single version gives."""
    return int(value) if math.isfinite(value) and value == int(value) else 0
