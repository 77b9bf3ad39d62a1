"""all-MiniLM-L6-v2 a second time, in NumPy and float64: the answer key for the encoder.

Written from the published description of BERT and apart from `cluster.demo.minilm`, one sentence
at a time and without padding or masks, so that a slip in one is unlikely to be in the other. Slow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["embed_all", "embed_one"]

_Doubles = npt.NDArray[np.float64]
_Floats = npt.NDArray[np.float32]

_erf = np.vectorize(math.erf, otypes=[np.float64])


def embed_all(
    words: _Floats, params: Mapping[str, _Floats], sentences: Iterable[Sequence[int]]
) -> _Doubles:
    """The embeddings ``[b, 384]`` of sentences given as token ids."""
    return np.stack([embed_one(words, params, ids) for ids in sentences])


def embed_one(words: _Floats, params: Mapping[str, _Floats], ids: Sequence[int]) -> _Doubles:
    """The embedding ``[384]`` of one sentence.

    Args:
        words: the word embeddings, ``[vocabulary, 384]``.
        params: the other tensors, by their names in the checkpoint.
        ids: the sentence's tokens with begin and end marks, at least one.
    """

    def tensor(name: str) -> _Doubles:
        return params[name].astype(np.float64)

    def affine(x: _Doubles, name: str) -> _Doubles:
        return x @ tensor(f"{name}.weight").T + tensor(f"{name}.bias")

    def norm(x: _Doubles, name: str) -> _Doubles:
        centre = x.mean(axis=1)[:, None]
        spread = np.sqrt(x.var(axis=1)[:, None] + 1e-12)
        even: _Doubles = (x - centre) / spread
        return even * tensor(f"{name}.weight") + tensor(f"{name}.bias")

    x = words[list(ids)].astype(np.float64)
    x += tensor("embeddings.position_embeddings.weight")[: len(ids)]
    x += tensor("embeddings.token_type_embeddings.weight")[0]
    x = norm(x, "embeddings.LayerNorm")
    for number in range(6):
        layer = f"encoder.layer.{number}"
        query = affine(x, f"{layer}.attention.self.query")
        key = affine(x, f"{layer}.attention.self.key")
        value = affine(x, f"{layer}.attention.self.value")
        heads = [
            _attend(query[:, at : at + 32], key[:, at : at + 32], value[:, at : at + 32])
            for at in range(0, 384, 32)
        ]
        mixed = affine(np.concatenate(heads, axis=1), f"{layer}.attention.output.dense")
        x = norm(x + mixed, f"{layer}.attention.output.LayerNorm")
        inner = _gelu(affine(x, f"{layer}.intermediate.dense"))
        x = norm(x + affine(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    pooled: _Doubles = x.mean(axis=0)
    return pooled / math.sqrt(float(pooled @ pooled))


def _attend(query: _Doubles, key: _Doubles, value: _Doubles) -> _Doubles:
    """One head: each position mixes all values by the likeness of its query to their keys."""
    likeness = query @ key.T / math.sqrt(32)
    weight = np.exp(likeness - likeness.max(axis=1)[:, None])
    mixed: _Doubles = (weight / weight.sum(axis=1)[:, None]) @ value
    return mixed


def _gelu(x: _Doubles) -> _Doubles:
    """``x`` times the normal distribution's probability of a value below ``x``."""
    below: _Doubles = 0.5 * (1.0 + _erf(x / math.sqrt(2.0)))
    return x * below
