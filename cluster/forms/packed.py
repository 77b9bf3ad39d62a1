"""Bodies in msgpack: `application/x-msgpack`.

A request is ``{"inputs": {name: TENSOR, ...}, "signature_name": text}``, the last if it is not the
default one; an answer ``{"outputs": {name: TENSOR, ...}}``. A TENSOR is
``{"dtype": text, "shape": [sizes], "data": bytes}``; `cluster.forms.memory` says which bytes.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Annotated, Final

import msgspec

from batching.errors import InvalidArgument
from cluster.forms.memory import array_of, bytes_of, dtype_name
from cluster.forms.values import DIMENSIONS_MAX, TENSORS_MAX, Array, Buffer, Columns, Written
from shards.specs import DTYPES

__all__ = ["read_answer", "read_request", "write_answer", "write_request"]


class _Tensor(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    dtype: str
    shape: Annotated[list[int], msgspec.Meta(max_length=DIMENSIONS_MAX)]
    #: a view of the body that is read
    data: memoryview


_Tensors = Annotated[dict[str, _Tensor], msgspec.Meta(max_length=TENSORS_MAX)]


class _Request(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    inputs: _Tensors
    signature_name: str = ""


class _Answer(msgspec.Struct, forbid_unknown_fields=True):
    outputs: _Tensors


_REQUESTS: Final = msgspec.msgpack.Decoder(_Request)
_ANSWERS: Final = msgspec.msgpack.Decoder(_Answer)
_ENCODER: Final = msgspec.msgpack.Encoder()


def read_request(body: Buffer, dtypes: Container[str] = DTYPES) -> Columns:
    """The request in a body; its arrays are views of it.

    Args:
        body: all of it.
        dtypes: those that are wanted.

    Raises:
        InvalidArgument: it is none.
    """
    try:
        request = _REQUESTS.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidArgument(f"not a request in msgpack: {error}") from None
    return Columns(_arrays(request.inputs, dtypes), request.signature_name)


def read_answer(body: Buffer) -> dict[str, Array]:
    """The outputs in a body, as views of it.

    Raises:
        InvalidArgument: it is no answer.
    """
    try:
        answer = _ANSWERS.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidArgument(f"not an answer in msgpack: {error}") from None
    return _arrays(answer.outputs, DTYPES)


def write_request(request: Columns) -> Written:
    """The body of a request.

    Raises:
        InvalidArgument: a tensor cannot be sent.
    """
    tensors = _tensors(request.arrays)
    return Written([_ENCODER.encode(_Request(tensors, request.signature_name))])


def write_answer(outputs: Mapping[str, Array]) -> Written:
    """The body of an answer.

    Raises:
        InvalidArgument: a tensor cannot be sent.
    """
    return Written([_ENCODER.encode(_Answer(_tensors(outputs)))])


def _arrays(tensors: Mapping[str, _Tensor], dtypes: Container[str]) -> dict[str, Array]:
    return {
        name: array_of(name, each.dtype, each.shape, each.data, dtypes)
        for name, each in tensors.items()
    }


def _tensors(arrays: Mapping[str, Array]) -> dict[str, _Tensor]:
    return {
        name: _Tensor(dtype_name(name, array), list(array.shape), memoryview(bytes_of(name, array)))
        for name, array in arrays.items()
    }
