"""Text to token ids: the entry point of the encoder's ``host`` unit.

A worker process calls `load` once and the result once per request, from any thread. There is one
limit on length, given when the model is saved; the limits inside ``tokenizer.json`` (128 in one
file of this model, 256 in another) are not heeded.

This file does not know JAX, models or requests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from batching.errors import DataLoss, FailedPrecondition, InvalidArgument
from cluster.demo.errors import FilesMissing

__all__ = ["BYTES_MAX", "FILE", "Arrays", "load"]

#: The name under which `load` expects the tokenizer's file.
FILE: Final = "tokenizer.json"
#: The longest text accepted. What lies beyond the token limit would be thrown away after work
#: that grows with its length; nobody may order that work without bound.
BYTES_MAX: Final = 64 * 1024

Arrays = dict[str, npt.NDArray[np.generic]]


def load(
    files: Mapping[str, bytes], options: Mapping[str, str | int | float | bool]
) -> Callable[[Arrays], Arrays]:
    """Make the tokenizer.

    Args:
        files: `FILE`, in the format of the library ``tokenizers``.
        options: ``limit``, the most tokens a row may have, with its begin and end marks.

    Returns:
        A function from ``text`` (``bytes`` in UTF-8, ``[b]``) to ``ids`` and ``mask`` (int32,
        ``[b, t]``), padded with zeros to the longest row of the call. Safe in several threads.

    Raises:
        FailedPrecondition: a file or an option is missing or senseless.
        DataLoss: the file is not a tokenizer.
    """
    limit = options.get("limit")
    # A bool is an int to Python, and would be a limit of one token.
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 3:
        raise FailedPrecondition(
            f"the tokenizer's option 'limit' must be an integer of at least 3, not {limit!r}"
        )
    if FILE not in files:
        raise FailedPrecondition(f"the tokenizer needs the file {FILE!r}")
    # The library would start a thread per core; parallelism is the business of the process pool.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise FilesMissing(
            "the demo's tokenizer needs tokenizers: pip install 'shardserve[demo]'"
        ) from None
    try:
        tokenizer = Tokenizer.from_str(files[FILE].decode())
    except Exception as error:  # The library raises bare Exception on what it cannot parse.
        raise DataLoss(f"{FILE} is not a tokenizer: {error}") from error
    # Set once, before the first call: from here on the tokenizer is only read, by any thread.
    tokenizer.enable_truncation(max_length=limit)
    tokenizer.no_padding()

    def tokenize(inputs: Arrays) -> Arrays:
        texts = _texts(inputs["text"])
        rows = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]
        shape = (len(rows), max(map(len, rows), default=0))
        ids = np.zeros(shape, np.int32)
        mask = np.zeros(shape, np.int32)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        return {"ids": ids, "mask": mask}

    return tokenize


def _texts(column: npt.NDArray[np.generic]) -> list[str]:
    """The rows as text; refuses the first that is not, by its place."""
    texts: list[str] = []
    for i, value in enumerate(column.tolist()):
        if not isinstance(value, bytes):
            raise InvalidArgument(f"text[{i}] must be bytes, not {type(value).__name__}")
        if len(value) > BYTES_MAX:
            raise InvalidArgument(f"text[{i}] has {len(value)} bytes, the limit is {BYTES_MAX}")
        try:
            texts.append(value.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise InvalidArgument(f"text[{i}] is not UTF-8: {error.reason}") from None
    return texts
