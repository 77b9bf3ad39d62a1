"""From output arrays to the bodies of answers: predictions, classifications, regressions.

The outputs come from a servable, so a servable that does not keep its signature's promise is found
out here; the messages are TensorFlow Serving's and name the output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import ml_dtypes
import numpy as np
import orjson

from batching.errors import Internal, InvalidArgument
from cluster.api.printing import array_text, dump_plain, row_texts, tokens
from cluster.api.values import Array

__all__ = [
    "classified",
    "regressed",
    "render_classify",
    "render_predictions",
    "render_regress",
    "render_rows_plain",
]

_FLOATS: Final = (
    np.dtype(np.float16),
    np.dtype(np.float32),
    np.dtype(np.float64),
    np.dtype(ml_dtypes.bfloat16),
)


def render_predictions(outputs: Mapping[str, Array], columnar: bool) -> bytes:
    """The body of an answer: ``predictions`` by row, or ``outputs`` by column.

    A single output stands without its name.

    Raises:
        InvalidArgument: an output has no JSON form, or cannot be cut into the rows that the
            others have. The message names it.
    """
    if not outputs:
        raise Internal("Cannot convert empty tensor map to JSON")
    if columnar:
        if len(outputs) == 1:
            (name, array), *_ = outputs.items()
            return b'{"outputs":' + array_text(name, array) + b"}"
        members = (orjson.dumps(n) + b":" + array_text(n, a) for n, a in outputs.items())
        return b'{"outputs":{' + b",".join(members) + b"}}"
    _check_rows(outputs)
    if len(outputs) == 1:
        (name, array), *_ = outputs.items()
        if not array.shape[0]:
            return b'{"predictions":[]}'
        return b'{"predictions":' + array_text(name, array) + b"}"
    keys = [orjson.dumps(name) + b":" for name in outputs]
    columns = [row_texts(name, array) for name, array in outputs.items()]
    rows = (
        b"{" + b",".join([key + text for key, text in zip(keys, row, strict=True)]) + b"}"
        for row in zip(*columns, strict=True)
    )
    return b'{"predictions":[' + b",".join(rows) + b"]}"


def render_rows_plain(array: Array) -> bytes:
    """The body of a row answer with one output, for which `plain_floats` was found true.

    The array has a batch dimension. This is the hot path: nothing is checked.
    """
    return b'{"predictions":' + dump_plain(array) + b"}"


def render_classify(outputs: Mapping[str, Array], rows: int, labels: Sequence[bytes] = ()) -> bytes:
    """``{"results": [[[label, score], ...], ...]}``, one list per example.

    Args:
        outputs: ``scores`` [b, k], ``classes`` [b, k], or both. Without scores every score is 0.
        rows: how many examples were asked about.
        labels: the k labels as JSON text, where ``classes`` is not given; empty for none.

    Raises:
        InvalidArgument: dtype, shape or batch size are not as promised.
    """
    scores, classes, width = _classification(outputs, rows, len(labels))
    score_texts = [b"0.0"] * (rows * width) if scores is None else tokens("scores", scores)
    if classes is not None:
        label_texts = tokens("classes", classes)
    else:
        label_texts = (list(labels) or [b'""'] * width) * rows
    pairs = [
        b"[" + label + b"," + score + b"]"
        for label, score in zip(label_texts, score_texts, strict=True)
    ]
    results = [
        b"[" + b",".join(pairs[row * width : (row + 1) * width]) + b"]" for row in range(rows)
    ]
    return b'{"results":[' + b",".join(results) + b"]}"


def render_regress(outputs: Mapping[str, Array], rows: int) -> bytes:
    """``{"results": [number, ...]}``, one per example.

    Args:
        outputs: ``outputs``, or a single one of any name: [b] or [b, 1].
        rows: how many examples were asked about.

    Raises:
        InvalidArgument: dtype, shape or batch size are not as promised.
    """
    name, values = regressed(outputs, rows)
    return b'{"results":[' + b",".join(tokens(name, values)) + b"]}"


def regressed(outputs: Mapping[str, Array], rows: int) -> tuple[str, Array]:
    """The output that holds a regression's numbers, and its name.

    Raises:
        InvalidArgument: as for `render_regress`.
    """
    name = "outputs" if "outputs" in outputs or len(outputs) != 1 else next(iter(outputs))
    values = outputs.get(name)
    if values is None:
        raise InvalidArgument("Expected regression signature outputs to contain 'outputs'")
    _check_floats(name, values)
    if values.ndim not in (1, 2) or (values.ndim == 2 and values.shape[1] != 1):
        raise InvalidArgument(
            f"Expected {name} Tensor shape to be either [batch_size] or [batch_size, 1] "
            f"but got {list(values.shape)}"
        )
    _check_batch(name, values, rows)
    return name, values


def classified(
    outputs: Mapping[str, Array], rows: int, labels: Sequence[str] = ()
) -> dict[str, Array]:
    """A classification as tensors: ``scores`` [b, k] and ``classes`` [b, k], strings.

    Args:
        outputs: as of `render_classify`, like the next two.
        rows: how many examples were asked about.
        labels: the k labels, where ``classes`` is not given; empty for none.

    Raises:
        InvalidArgument: as for `render_classify`.
    """
    scores, classes, width = _classification(outputs, rows, len(labels))
    if scores is None:
        scores = np.zeros((rows, width), np.float32)
    if classes is None:
        one_row = np.empty(width, object)
        one_row[:] = [label.encode() for label in labels] or [b""] * width
        classes = np.broadcast_to(one_row, (rows, width))
    return {"scores": scores, "classes": classes}


def _classification(
    outputs: Mapping[str, Array], rows: int, labels: int
) -> tuple[Array | None, Array | None, int]:
    """Scores, classes, and how many there are a row; what was promised of them holds."""
    scores, classes = outputs.get("scores"), outputs.get("classes")
    if scores is None and classes is None:
        raise InvalidArgument(
            "Expected classification signature outputs to contain at least one of 'classes' and "
            "'scores'"
        )
    if classes is not None:
        if classes.dtype != np.dtype(object):
            raise InvalidArgument(f"Expected classes Tensor of DT_STRING. Was: {classes.dtype}")
        _check_table("classes", classes, rows)
    if scores is not None:
        _check_floats("scores", scores)
        _check_table("scores", scores, rows)
    return scores, classes, _width(scores, classes, labels)


def _check_rows(outputs: Mapping[str, Array]) -> None:
    rows: int | None = None
    for name, array in outputs.items():
        if not array.ndim:
            raise InvalidArgument(f"Tensor name: {name} has no shape information")
        if rows is not None and array.shape[0] != rows:
            raise InvalidArgument(
                f"Tensor name: {name} has inconsistent batch size: {array.shape[0]} "
                f"expecting: {rows}"
            )
        rows = array.shape[0]


def _check_floats(name: str, array: Array) -> None:
    if array.dtype not in _FLOATS:
        raise InvalidArgument(f"Expected {name} Tensor of DT_FLOAT. Was: {array.dtype}")


def _check_table(name: str, array: Array, rows: int) -> None:
    if array.ndim != 2:
        raise InvalidArgument(
            f"Expected {name} Tensor shape to be [batch_size num_classes] "
            f"but got {list(array.shape)}"
        )
    _check_batch(name, array, rows)


def _check_batch(name: str, array: Array, rows: int) -> None:
    if array.shape[0] != rows:
        raise InvalidArgument(
            f"Expected {name} output batch size to be {rows}. Was: {array.shape[0]}"
        )


def _width(scores: Array | None, classes: Array | None, labels: int) -> int:
    """How many classes there are; whatever is known of labels must agree with the scores."""
    sizes = [int(array.shape[1]) for array in (scores, classes) if array is not None]
    named = sizes[-1] if classes is not None else labels or sizes[0]
    if named != sizes[0]:
        raise InvalidArgument(
            "Tensors class and score should match in dim_size(1). "
            f"Was: {named} classes and {sizes[0]} scores"
        )
    return sizes[0]
