"""Handwritten digits: scikit-learn's bundled data, split once and always alike.

The half that trains the classifier and the half that its clients send are made here, so that no
client ever sends a digit the model has seen. This file does not know JAX.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from cluster.demo.errors import FilesMissing

__all__ = ["HOLDOUT", "LABELS", "PIXELS", "Digits", "Split", "read"]

#: Pixels of one image, eight rows of eight, each from 0 to 16.
PIXELS: Final = 64
LABELS: Final = tuple("0123456789")
#: Images kept from training.
HOLDOUT: Final = 360

_SEED: Final = 20_260


@dataclass(frozen=True, slots=True, kw_only=True)
class Digits:
    """Images, float32 ``[n, PIXELS]``, and what they show, int32 ``[n]``."""

    pixels: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Images to learn from, and images to be asked about."""

    train: Digits
    holdout: Digits


def read() -> Split:
    """The digits, shuffled by a fixed seed, the last `HOLDOUT` of them held out.

    Raises:
        FilesMissing: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise FilesMissing(
            "the digits come with scikit-learn: pip install 'shardserve[demo]'"
        ) from None
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(_SEED).permutation(len(labels))
    digits = Digits(pixels=pixels.astype(np.float32), labels=labels.astype(np.int32))
    return Split(
        train=_take(digits, order[:-HOLDOUT]),
        holdout=_take(digits, order[-HOLDOUT:]),
    )


def _take(digits: Digits, where: npt.NDArray[np.int64]) -> Digits:
    return Digits(pixels=digits.pixels[where], labels=digits.labels[where])
