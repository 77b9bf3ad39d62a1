"""A hash map from text to vectors, as a servable: no JAX, no device, spread over shard actors.

What a package can add to shardserve is here once each: a kind of unit, a combine for its
partitions, a version policy and a source of versions. README.md beside this file explains them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

import shards
from batching.errors import FailedPrecondition, InvalidArgument
from cluster.registered import Options
from shards.combines import Outputs
from shards.custom import UnitPart
from shards.functions import UnitFunction
from shards.store import Store

MISSING = ("zero", "error")


def save_map(
    store: str | Path,
    name: str,
    values: Mapping[str, Sequence[float]],
    *,
    version: int | None = None,
    partitions: int = 1,
    missing: str = "zero",
) -> shards.Manifest:
    """Save a mapping as a servable: keys of text in, their vectors and whether they exist out.

    Args:
        store: the store or its path.
        name: of the servable.
        values: key to vector; all vectors are of one length.
        version: None for one more than the highest.
        partitions: how many pieces it can be spread over.
        missing: what a key that is not there does: yield zeros, or fail the request.
    """
    (dim,) = {len(vector) for vector in values.values()}
    pieces: list[dict[bytes, bytes]] = [{} for _ in range(partitions)]
    for key, vector in values.items():
        text = key.encode()
        pieces[home(text, partitions)][text] = np.asarray(vector, np.float32).tobytes()
    with shards.Bundle.create(store, name, version) as bundle:
        look_up = bundle.custom(
            "map",
            "hashmap",
            [{"entries": msgpack.packb(piece)} for piece in pieces],
            inputs={"keys": shards.Spec(("b",), shards.STRING)},
            outputs={
                "values": shards.Spec(("b", dim)),
                "found": shards.Spec(("b",), "bool"),
            },
            combine="whoever-knows" if partitions > 1 else "",
            options={"missing": missing},
        )

        @bundle.signature()
        def answer(keys: shards.Spec(("b",), shards.STRING)) -> Any:  # type: ignore[valid-type]
            return look_up(keys)

    return bundle.manifest


def home(key: bytes, partitions: int) -> int:
    """The partition of a key: the same in every process, unlike Python's own hash."""
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "little") % partitions


def open_part(part: UnitPart) -> UnitFunction:
    """The kind: opens one partition."""
    entries: dict[bytes, bytes] = msgpack.unpackb(part.files["entries"].tobytes(), raw=True)
    missing = part.options.get("missing")
    if missing not in MISSING:
        raise FailedPrecondition(f"missing: {missing!r} is none of {', '.join(MISSING)}")
    dim = part.outputs["values"].shape[1]
    vectors = {key: np.frombuffer(raw, np.float32) for key, raw in entries.items()}
    nothing = np.zeros(dim, np.float32)

    def look_up(inputs: dict[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        keys = inputs["keys"]
        if missing == "error":
            own = [key for key in keys if home(key, part.count) == part.index]
            unknown = next((key for key in own if key not in vectors), None)
            if unknown is not None:
                raise InvalidArgument(f"no such key: {unknown!r}")
        rows = [vectors.get(key, nothing) for key in keys]
        return {
            "values": np.array(rows, np.float32).reshape(len(keys), dim),
            "found": np.array([key in vectors for key in keys], bool),
        }

    return look_up


def whoever_knows(parts: Sequence[Outputs]) -> Outputs:
    """The combine: every key's answer from the partition that has it, zeros where none does."""
    values = parts[0]["values"].copy()
    found = parts[0]["found"].copy()
    for part in parts[1:]:
        values[part["found"]] = part["values"][part["found"]]
        found |= part["found"]
    return {"values": values, "found": found}


def at_most(complete: Sequence[int], options: Options) -> Iterable[int]:
    """The version policy: the highest version up to ``version``, for a cautious team."""
    limit = options["version"]
    return [version for version in complete if version <= limit][-1:]


def released(servable: str, options: Options, store: Store) -> Iterable[int]:
    """The source: versions that a file names, a line ``servable version`` each."""
    lines = Path(str(options["file"])).read_text().splitlines()
    return [int(line.split()[1]) for line in lines if line.split()[:1] == [servable]]
