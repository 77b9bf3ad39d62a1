"""The servables of the end-to-end tests: small, of whole numbers, with answers known beforehand.

* ``mlp``: one unit on a device. Version v multiplies by v, so an answer tells its version.
* ``trunk`` is such a one, too, and others multiply by ten what it answers, by reference.
* ``map``: a hash map of an installed package (``examples/hashmap``), over shards.
* ``words``: text, hashed by a host unit, looked up in a table over shards, summed on a device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

import shards

__all__ = [
    "BUCKETS",
    "MAP",
    "TEXTS",
    "WIDTH",
    "mlp_answer",
    "save_mlp",
    "save_tenfold",
    "save_words",
    "words_answer",
]

WIDTH: Final = 4
BUCKETS: Final = (1, 8)
MAP: Final = {f"key-{n}": [float(n), -float(n)] for n in range(64)}
TEXTS: Final = ["shard", "a much longer te", ""]
_ROWS: Final = 64
_DIM: Final = 4
_TABLE: Final = np.arange(_ROWS * _DIM, dtype=np.float32).reshape(_ROWS, _DIM)


def save_mlp(store: Path, version: int, name: str = "mlp") -> None:
    """Save ``x`` times the version, plus one."""

    def forward(params: Mapping[str, Any], x: Any) -> Any:
        return x @ params["weights"] + params["bias"][None, :]

    params = {
        "weights": np.eye(WIDTH, dtype=np.float32) * version,
        "bias": np.ones(WIDTH, np.float32),
    }
    inputs = {"x": shards.Spec(("b", WIDTH))}
    shards.save(forward, params, store, name, version, inputs=inputs, batch_buckets=BUCKETS)


def mlp_answer(rows: Sequence[Sequence[float]], version: int) -> list[list[float]]:
    """What version answers to these rows."""
    return [[value * version + 1.0 for value in row] for row in rows]


def save_tenfold(store: Path, name: str, *, version: int | None = None, label: str = "") -> None:
    """Save ten times what a version or label of ``trunk`` answers; the unit is its own."""

    def tenfold(params: Mapping[str, Any], x: Any) -> Any:
        return x @ params["weights"]

    x = {"x": shards.Spec(("b", WIDTH))}
    weights = {"weights": np.eye(WIDTH, dtype=np.float32) * 10}
    with shards.Bundle.create(store, name, 1) as bundle:
        trunk = bundle.refer("trunk", servable="trunk", unit="model", version=version, label=label)
        head = bundle.unit("head", tenfold, weights, inputs=x, batch_buckets=BUCKETS)

        @bundle.signature("serving_default", inputs=x)
        def predict(x: Any) -> Any:
            return head(trunk(x))


def save_words(store: Path, version: int = 1) -> None:
    """Save the sum of the table's rows that a text's letters name."""

    def total(params: Any, rows: Any, mask: Any) -> Any:
        return (rows * mask[:, :, None]).sum(axis=1) + params["bias"][None, :]

    text = {"text": shards.Spec(("b",), "string")}
    ids, mask = shards.Spec(("b", "t"), "int32"), shards.Spec(("b", "t"))
    with shards.Bundle.create(store, "words", version) as bundle:
        table = bundle.table("table", _TABLE, partitions=4)
        split = bundle.host(
            "split",
            "tests.e2e.letters:load",
            inputs=text,
            outputs={"ids": ids, "mask": mask},
            options={"rows": _ROWS},
        )
        pool = bundle.unit(
            "pool",
            total,
            {"bias": np.zeros(_DIM, np.float32)},
            inputs={"rows": shards.Spec(("b", "t", _DIM)), "mask": mask},
            batch_buckets=BUCKETS,
            length_buckets={"t": (4, 16)},
        )

        @bundle.signature("serving_default", inputs=text)
        def embed(text: Any) -> Mapping[str, Any]:
            letters = split(text)
            return {"total": pool(table.rows(letters["ids"]), letters["mask"])}

        # So that every cluster of these tests replays a request before it serves.
        bundle.warmup("serving_default", {"text": ["warm", "up"]})


def words_answer(texts: Sequence[str]) -> list[list[float]]:
    """What ``words`` answers to these texts."""
    return [
        [float(x) for x in _TABLE[[ord(letter) % _ROWS for letter in text]].sum(axis=0)]
        for text in texts
    ]
