"""The sentence encoder all-MiniLM-L6-v2 in plain JAX: word vectors and a mask in, one vector out.

A BERT of six layers, the mean of its last layer over the real tokens, scaled to length one. Word
vectors are looked up elsewhere (they are a table of the cluster's), so this file does not know
words, ids or text, and never reads a file.

Padding never changes an answer: a padded position is hidden from attention and from the mean.
The legend of shape suffixes: B rows, T positions, D = 384 features, H = 12 heads, K = 32 features
of a head.
"""

from __future__ import annotations

import math
from typing import Final

import jax
import jax.numpy as jnp

__all__ = ["HEADS", "LAYERS", "POSITIONS", "Params", "encode"]

LAYERS: Final = 6
HEADS: Final = 12
#: The most positions the model was trained with.
POSITIONS: Final = 512

#: Tensors under their names in the checkpoint; see `cluster.demo.minilm_files.read_params`.
Params = dict[str, jax.Array]

_EPSILON: Final = 1e-12
# Stands for minus infinity, and is finite: a row without any real token then attends evenly
# instead of dividing zero by zero.
_NEVER: Final = -1e30
# The default on GPUs and TPUs rounds factors to 10 or 7 bits, and the answer would then depend on
# the platform. At this model's size the full product is still cheap.
_EXACT: Final = jax.lax.Precision.HIGHEST


def encode(params: Params, words: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Embed sentences.

    Args:
        params: the encoder's 100 tensors.
        words: word vectors, ``[b, t, 384]``; what stands in padded positions must be finite, and
            is ignored.
        mask: integers ``[b, t]``, 1 for a real token, 0 for padding.

    Returns:
        ``embedding``, ``[b, 384]``: of length one, or zeros for a row that has no real token.
    """
    x_BTD = _embed(params, words)
    for layer in range(LAYERS):
        x_BTD = _layer(params, f"encoder.layer.{layer}.", x_BTD, mask)
    return {"embedding": _normalise(_mean(x_BTD, mask))}


def _embed(params: Params, words_BTD: jax.Array) -> jax.Array:
    # A gather rather than a slice: a slice of symbolic length cannot be exported without proof
    # that the length is at most POSITIONS.
    positions_T = jnp.arange(words_BTD.shape[1])
    where_TD = params["embeddings.position_embeddings.weight"][positions_T]
    # All text is of the first of two segments; the second exists for training on pairs.
    segment_D = params["embeddings.token_type_embeddings.weight"][0]
    x_BTD = words_BTD + where_TD[None, :, :] + segment_D[None, None, :]
    return _layer_norm(params, "embeddings.LayerNorm.", x_BTD)


def _layer(params: Params, name: str, x_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
    attended_BTD = _attention(params, name + "attention.", x_BTD, mask_BT)
    x_BTD = _layer_norm(params, name + "attention.output.LayerNorm.", x_BTD + attended_BTD)
    hidden = jax.nn.gelu(_dense(params, name + "intermediate.dense.", x_BTD), approximate=False)
    out_BTD = _dense(params, name + "output.dense.", hidden)
    return _layer_norm(params, name + "output.LayerNorm.", x_BTD + out_BTD)


def _attention(params: Params, name: str, x_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
    batch, length, dim = x_BTD.shape
    per_head = (batch, length, HEADS, dim // HEADS)
    query_BTHK = _dense(params, name + "self.query.", x_BTD).reshape(per_head)
    key_BTHK = _dense(params, name + "self.key.", x_BTD).reshape(per_head)
    value_BTHK = _dense(params, name + "self.value.", x_BTD).reshape(per_head)
    scores_BHTT = jnp.einsum("bqhk,bthk->bhqt", query_BTHK, key_BTHK, precision=_EXACT)
    scores_BHTT = jnp.where(
        mask_BT[:, None, None, :] != 0,
        scores_BHTT / math.sqrt(dim // HEADS),
        _NEVER,
    )
    weights_BHTT = jax.nn.softmax(scores_BHTT, axis=-1)
    mixed_BTHK = jnp.einsum("bhqt,bthk->bqhk", weights_BHTT, value_BTHK, precision=_EXACT)
    return _dense(params, name + "output.dense.", mixed_BTHK.reshape(batch, length, dim))


def _mean(x_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
    real_BT = (mask_BT != 0).astype(x_BTD.dtype)
    count_B = jnp.maximum(real_BT.sum(axis=1), 1)
    return jnp.einsum("btd,bt->bd", x_BTD, real_BT, precision=_EXACT) / count_B[:, None]


def _normalise(x_BD: jax.Array) -> jax.Array:
    return x_BD / jnp.maximum(jnp.linalg.norm(x_BD, axis=1, keepdims=True), _EPSILON)


def _dense(params: Params, name: str, x: jax.Array) -> jax.Array:
    # The checkpoint stores weights as [out, in].
    product = jnp.einsum("btd,fd->btf", x, params[name + "weight"], precision=_EXACT)
    return product + params[name + "bias"][None, None, :]


def _layer_norm(params: Params, name: str, x_BTD: jax.Array) -> jax.Array:
    # Centre first, then square: the difference of two large means would lose digits.
    centred_BTD = x_BTD - x_BTD.mean(axis=-1, keepdims=True)
    variance_BT1 = jnp.square(centred_BTD).mean(axis=-1, keepdims=True)
    scaled_BTD = centred_BTD * jax.lax.rsqrt(variance_BT1 + _EPSILON)
    return (
        scaled_BTD * params[name + "weight"][None, None, :] + params[name + "bias"][None, None, :]
    )
