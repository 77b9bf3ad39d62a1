"""Writes the demo's two bundles: what becomes of the models' parts in the cluster.

The encoder's word embeddings are a table over shard actors, its other weights a unit on devices,
its tokenizer a host unit. The digits classifier is one unit, saved in one line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import shards
from cluster.demo import classify, digits, digits_data, minilm, minilm_files, search, tokenizer

__all__ = [
    "BATCH_BUCKETS",
    "LENGTH_BUCKETS",
    "PARTITIONS",
    "TOKENS_MAX",
    "save_digits",
    "save_minilm",
]

#: The most tokens of a text that count; the rest is cut off. The one place that states it.
TOKENS_MAX: Final = 128
#: Parts of the word table.
PARTITIONS: Final = 4

# Each (batch, length) takes half a second to one second to compile on a CPU, and all of them are
# compiled before the model is available: hence only eight. On the two cores this was tried on, a
# batch of 8 was as fast by the row as the encoder gets (16 rows took almost four times as long),
# and it leaves the device to other models after at most a fifth of a second.
BATCH_BUCKETS: Final = (1, 8)
LENGTH_BUCKETS: Final = (16, 32, 64, TOKENS_MAX)

_DIGITS_BUCKETS: Final = (1, 8, 32, 128)


def save_minilm(
    store: str | Path,
    version: int | None = None,
    *,
    batch_buckets: Sequence[int] = BATCH_BUCKETS,
) -> None:
    """Save the sentence encoder: ``text`` ``[b]`` in, ``embedding`` ``[b, 384]`` out.

    Args:
        store: the directory of bundles.
        version: of the servable; None for one more than the highest there is.
        batch_buckets: sizes to compile; larger ones pay on an accelerator.

    Raises:
        FilesMissing: the package that carries the model is not installed.
        ServingError: as the store's writer.
    """
    files = minilm_files.find()
    table = minilm_files.read_words(files.weights)
    params = minilm_files.read_params(files.weights)
    text = {"text": shards.Spec(("b",), "string")}
    ids, mask = shards.Spec(("b", "t"), "int32"), shards.Spec(("b", "t"), "int32")
    vectors = shards.Spec(("b", "t", minilm_files.DIM))
    with shards.Bundle.create(store, search.MODEL, version=version) as bundle:
        words = bundle.table("words", table, partitions=PARTITIONS)
        tokenize = bundle.host(
            "tokenize",
            f"{tokenizer.__name__}:load",
            inputs=text,
            outputs={"ids": ids, "mask": mask},
            files={tokenizer.FILE: files.tokenizer},
            options={"limit": TOKENS_MAX},
        )
        encoder = bundle.unit(
            "encoder",
            minilm.encode,
            params,
            inputs={"words": vectors, "mask": mask},
            batch_buckets=tuple(batch_buckets),
            length_buckets={"t": LENGTH_BUCKETS},
        )

        @bundle.signature("serving_default", method="predict", inputs=text)
        def embed(text: Any) -> Mapping[str, Any]:
            tokens = tokenize(text)
            return {"embedding": encoder(words.rows(tokens["ids"]), tokens["mask"])}


def save_digits(store: str | Path, version: int | None = None) -> None:
    """Train the digits classifier and save it: ``pixels`` ``[b, 64]`` in, ``scores`` out.

    Args:
        store: the directory of bundles.
        version: of the servable; None for one more than the highest there is.

    Raises:
        FilesMissing: the package that carries the data is not installed.
        ServingError: as the store's writer.
    """
    shards.save(
        digits.classify,
        digits.train(digits_data.read().train),
        store,
        classify.MODEL,
        version=version,
        inputs={"pixels": shards.Spec(("b", digits_data.PIXELS))},
        method="classify",
        labels=digits_data.LABELS,
        batch_buckets=_DIGITS_BUCKETS,
    )
