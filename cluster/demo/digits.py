"""A classifier of handwritten digits in plain JAX, trained here in a few seconds.

Two dense layers, trained by gradient descent with momentum on all training images at once. There
is one seed and no other source of chance, so every machine of one kind trains the same model.
This file does not know bundles or servers.
"""

from __future__ import annotations

from typing import Final

import jax
import jax.numpy as jnp

from cluster.demo.digits_data import LABELS, PIXELS, Digits

__all__ = ["Params", "accuracy", "classify", "train"]

Params = dict[str, jax.Array]

_HIDDEN: Final = 64
_STEPS: Final = 400
_RATE: Final = 0.2
_MOMENTUM: Final = 0.9
#: The brightest value of a pixel.
_WHITE: Final = 16.0
# Exact products, as in the encoder: the default on accelerators would make scores depend on them.
_EXACT: Final = jax.lax.Precision.HIGHEST


def classify(params: Params, pixels: jax.Array) -> dict[str, jax.Array]:
    """Probabilities ``scores``, ``[b, 10]``, of images ``[b, 64]`` with pixels from 0 to 16."""
    return {"scores": jax.nn.softmax(_logits(params, pixels), axis=-1)}


def train(digits: Digits, seed: int = 0) -> Params:
    """Parameters for `classify`, learned from ``digits``."""
    pixels, labels = jnp.asarray(digits.pixels), jnp.asarray(digits.labels)

    def loss(params: Params) -> jax.Array:
        surprise = -jax.nn.log_softmax(_logits(params, pixels), axis=-1)
        return jnp.take_along_axis(surprise, labels[:, None], axis=1).mean()

    def step(_: jax.Array, state: tuple[Params, Params]) -> tuple[Params, Params]:
        params, speed = state
        speed = jax.tree.map(lambda s, g: _MOMENTUM * s - _RATE * g, speed, jax.grad(loss)(params))
        return jax.tree.map(jnp.add, params, speed), speed

    start = _initial(jax.random.key(seed))
    at_rest = jax.tree.map(jnp.zeros_like, start)
    params: Params
    params, _ = jax.jit(lambda state: jax.lax.fori_loop(0, _STEPS, step, state))((start, at_rest))
    return params


def accuracy(params: Params, digits: Digits) -> float:
    """The share of images whose likeliest label is the right one."""
    scores = classify(params, jnp.asarray(digits.pixels))["scores"]
    return float((scores.argmax(axis=1) == jnp.asarray(digits.labels)).mean())


def _initial(key: jax.Array) -> Params:
    first, second = jax.random.split(key)
    he = jax.nn.initializers.he_normal()
    return {
        "hidden.weight": he(first, (PIXELS, _HIDDEN), jnp.float32),
        "hidden.bias": jnp.zeros(_HIDDEN, jnp.float32),
        "out.weight": he(second, (_HIDDEN, len(LABELS)), jnp.float32),
        "out.bias": jnp.zeros(len(LABELS), jnp.float32),
    }


def _logits(params: Params, pixels: jax.Array) -> jax.Array:
    hidden = jnp.matmul(pixels / _WHITE, params["hidden.weight"], precision=_EXACT)
    hidden = jax.nn.relu(hidden + params["hidden.bias"][None, :])
    logits = jnp.matmul(hidden, params["out.weight"], precision=_EXACT)
    return logits + params["out.bias"][None, :]
