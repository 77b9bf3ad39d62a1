"""The digits classifier: what it learns, what it answers, and that chance has no part."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cluster.demo import digits, digits_data
from tests.cluster.demo_support import abstract


@functools.cache
def split() -> digits_data.Split:
    return digits_data.read()


@functools.cache
def trained() -> digits.Params:
    return digits.train(split().train)


def test_it_recognises_digits_it_has_not_seen() -> None:
    assert digits.accuracy(trained(), split().holdout) >= 0.95


def test_training_is_deterministic() -> None:
    again = digits.train(split().train)
    for name, value in trained().items():
        np.testing.assert_array_equal(value, again[name], err_msg=name)


def test_another_seed_is_another_model() -> None:
    other = digits.train(split().train, seed=1)
    assert not np.array_equal(other["out.weight"], trained()["out.weight"])


def test_scores_are_probabilities_of_each_label() -> None:
    scores = digits.classify(trained(), jnp.asarray(split().holdout.pixels))["scores"]
    assert scores.shape == (digits_data.HOLDOUT, len(digits_data.LABELS))
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-5)
    assert bool((scores >= 0).all())


def test_no_image_is_in_both_halves_and_none_is_lost() -> None:
    train, holdout = split().train, split().holdout
    assert len(train.labels) + len(holdout.labels) == 1797
    assert len(holdout.labels) == digits_data.HOLDOUT
    seen = {image.tobytes() for image in train.pixels}
    assert not [image for image in holdout.pixels if image.tobytes() in seen]


def test_the_split_is_the_same_each_time() -> None:
    again = digits_data.read()
    np.testing.assert_array_equal(again.holdout.labels, split().holdout.labels)
    np.testing.assert_array_equal(again.holdout.pixels, split().holdout.pixels)


def test_it_traces_with_symbolic_batch_under_strict_promotion() -> None:
    (b,) = jax.export.symbolic_shape("b")
    params = {k: abstract(v.shape, v.dtype) for k, v in trained().items()}
    pixels = abstract((b, digits_data.PIXELS), np.float32)

    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        out = jax.eval_shape(digits.classify, params, pixels)

    assert out["scores"].shape == (b, 10)
