"""The servables of ``faults``: each part of an answer tells its version, and what was asked.

* ``chain``: a host unit reads a number and names rows of a table over all shards, and a unit on a
  device joins them. The answer repeats the number, and the version by every part.
* ``plain``: one unit on a device, which no host or shard actor can harm.

Numbers are unique in a run, so an answer to another request cannot pass for the right one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import orjson

from bench.faults_unit import GROUP_ROWS, GROUPS, ids_of
from bench.load import Request

__all__ = ["ENTRY_POINTS", "NUMBERS", "SERVABLES", "Reading", "read_answer", "request", "save"]

SERVABLES: Final = ("chain", "plain")
#: What the cluster must allow host actors to import.
ENTRY_POINTS: Final = ("bench.faults_unit:*",)
#: Numbers are below this: exact as float32, and told apart by their rows in the table.
NUMBERS: Final = GROUP_ROWS**GROUPS * 64
_BUCKETS: Final = (1, 8)


class Reading(NamedTuple):
    """What an answer says.

    Attributes:
        number: of the request that it answers.
        versions: by each of its parts.
        life: of the host unit, 0 where there is none.
    """

    number: int
    versions: tuple[int, ...]
    life: int


def save(store: Path, version: int) -> None:
    """Save a version of every servable."""
    # Here, since it imports JAX.
    import shards

    def join(params: Mapping[str, Any], rows: Any, stamp: Any) -> Mapping[str, Any]:
        own = stamp[:, :1] * 0.0 + params["version"][None, :]
        return {"versions": own, "table": rows[:, :, 0], "ids": rows[:, :, 1], "stamp": stamp}

    def tell(params: Mapping[str, Any], x: Any) -> Any:
        return x * params["keep"][None, :] + params["version"][None, :]

    stamp = shards.Spec(("b", 3))
    ids = shards.Spec(("b", GROUPS), "int32")
    text = {"number": shards.Spec(("b",), "string")}
    table = np.empty((GROUPS * GROUP_ROWS, 2), np.float32)
    table[:, 0], table[:, 1] = version, np.arange(len(table))
    with shards.Bundle.create(store, "chain", version) as bundle:
        rows = bundle.table("rows", table, partitions=GROUPS)
        reader = bundle.host(
            "reader",
            "bench.faults_unit:load",
            inputs=text,
            outputs={"ids": ids, "stamp": stamp},
            options={"version": version},
        )
        joined = bundle.unit(
            "join",
            join,
            {"version": np.asarray([version], np.float32)},
            inputs={"rows": shards.Spec(("b", GROUPS, 2)), "stamp": stamp},
            batch_buckets=_BUCKETS,
        )

        @bundle.signature("serving_default", inputs=text)
        def chain(number: Any) -> Mapping[str, Any]:
            read = reader(number)
            told: Mapping[str, Any] = joined(rows.rows(read["ids"]), read["stamp"])
            return told

    parameters = {
        "keep": np.asarray([1.0, 0.0], np.float32),
        "version": np.asarray([0.0, version], np.float32),
    }
    inputs = {"x": shards.Spec(("b", 2))}
    shards.save(tell, parameters, store, "plain", version, inputs=inputs, batch_buckets=_BUCKETS)


def request(servable: str, number: int) -> Request:
    """What asks a servable about a number."""
    instance = str(number) if servable == "chain" else [float(number), 0.0]
    body = orjson.dumps({"instances": [instance]})
    return Request(path=f"/v1/models/{servable}:predict", body=body)


def read_answer(servable: str, body: bytes) -> Reading:
    """What the body of an answer says.

    Raises:
        ValueError: it is no answer of this servable, or contradicts itself.
    """
    try:
        [told] = orjson.loads(body)["predictions"]
        if servable == "plain":
            number, version = told
            return Reading(_whole(number), (_whole(version),), 0)
        number, life, reader = map(_whole, told["stamp"])
        versions = (reader, *map(_whole, told["table"]), *map(_whole, told["versions"]))
        ids = list(map(_whole, told["ids"]))
    except (KeyError, TypeError, orjson.JSONDecodeError) as error:
        raise ValueError(f"not an answer: {body[:200]!r}") from error
    if ids != ids_of(number) or len(versions) != GROUPS + 2:
        raise ValueError(f"rows {ids} for number {number}")
    return Reading(number, versions, life)


def _whole(value: Any) -> int:
    if not isinstance(value, int | float) or value != int(value):
        raise ValueError(f"{value!r} is no whole number")
    return int(value)
