"""Bodies of raw buffers behind a head: ``application/octet-stream`` with a head's length.

The header ``inference-header-content-length`` says how many bytes of the body are the head, in
JSON or, if its first byte is not ``{``, in msgpack. It is
``{"inputs": [TENSOR, ...], "signature_name": text}`` for a request, ``{"outputs": [TENSOR, ...]}``
for an answer, a TENSOR ``{"name": text, "dtype": text, "shape": [sizes]}``; strings say ``nbytes``
too. Their bytes follow in this order, without anything between them. Heads of answers are in JSON,
with blanks at the end so that the first buffer is aligned.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Final, TypeVar

import msgspec

from batching.errors import InvalidArgument
from cluster.forms.memory import array_of, bytes_of, dtype_name, size_of
from cluster.forms.values import DIMENSIONS_MAX, TENSORS_MAX, Array, Buffer, Columns, Written
from shards.specs import DTYPES, STRING

__all__ = ["HEAD_BYTES_MAX", "read_answer", "read_request", "write_answer", "write_request"]

#: A longer head is refused before it is read.
HEAD_BYTES_MAX: Final = 256 << 10
_ALIGNMENT: Final = 64
#: Tensors up to here are joined with the head; larger ones are sent from where they are.
_JOINED_BYTES_MAX: Final = 16 << 10

T = TypeVar("T")


class _Tensor(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    name: str
    dtype: str
    shape: Annotated[list[int], msgspec.Meta(max_length=DIMENSIONS_MAX)]
    nbytes: int | None = None


_Tensors = Annotated[list[_Tensor], msgspec.Meta(max_length=TENSORS_MAX)]


class _Request(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    inputs: _Tensors
    signature_name: str = ""


class _Answer(msgspec.Struct, forbid_unknown_fields=True):
    outputs: _Tensors


_JSON_REQUESTS: Final = msgspec.json.Decoder(_Request).decode
_PACKED_REQUESTS: Final = msgspec.msgpack.Decoder(_Request).decode
_JSON_ANSWERS: Final = msgspec.json.Decoder(_Answer).decode
_PACKED_ANSWERS: Final = msgspec.msgpack.Decoder(_Answer).decode
_ENCODER: Final = msgspec.json.Encoder()


def read_request(body: Buffer, head_bytes: int, dtypes: Container[str] = DTYPES) -> Columns:
    """The request in a body; its arrays are views of it.

    Args:
        body: head and buffers.
        head_bytes: what the header says.
        dtypes: those that are wanted.

    Raises:
        InvalidArgument: it is none.
    """
    head = _head(body, head_bytes, _JSON_REQUESTS, _PACKED_REQUESTS)
    return Columns(_arrays(head.inputs, body, head_bytes, dtypes), head.signature_name)


def read_answer(body: Buffer, head_bytes: int) -> dict[str, Array]:
    """The outputs in a body, as views of it.

    Raises:
        InvalidArgument: it is no answer.
    """
    head = _head(body, head_bytes, _JSON_ANSWERS, _PACKED_ANSWERS)
    return _arrays(head.outputs, body, head_bytes, DTYPES)


def write_request(request: Columns) -> Written:
    """The body of a request.

    Raises:
        InvalidArgument: a tensor cannot be sent.
    """
    tensors, buffers = _tensors(request.arrays)
    head = _ENCODER.encode(_Request(tensors, request.signature_name))
    return _written(head, buffers)


def write_answer(outputs: Mapping[str, Array]) -> Written:
    """The body of an answer.

    Raises:
        InvalidArgument: a tensor cannot be sent.
    """
    if len(outputs) == 1:
        # Nearly every answer of a servable has a head that another one had.
        [(name, array)] = outputs.items()
        dtype = dtype_name(name, array)
        if dtype != STRING:
            head = _head_of_one(name, dtype, array.shape)
            buffer = bytes_of(name, array)
            if isinstance(buffer, bytes):
                return Written([head + buffer], len(head))
            return Written([head, buffer], len(head))
    tensors, buffers = _tensors(outputs)
    return _written(_ENCODER.encode(_Answer(tensors)), buffers)


@lru_cache(maxsize=1024)
def _head_of_one(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    return _padded(_ENCODER.encode(_Answer([_Tensor(name, dtype, list(shape))])))


def _padded(head: bytes) -> bytes:
    return head + b" " * (-len(head) % _ALIGNMENT)


def _head(
    body: Buffer, head_bytes: int, as_json: Callable[[Buffer], T], packed: Callable[[Buffer], T]
) -> T:
    if not 0 < head_bytes <= min(len(body), HEAD_BYTES_MAX):
        raise InvalidArgument(
            f"the head of a body of {len(body)} bytes has 1 to {HEAD_BYTES_MAX} of them, "
            f"not {head_bytes}"
        )
    data = memoryview(body)[:head_bytes]
    try:
        return as_json(data) if data[0] == ord("{") else packed(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidArgument(f"the body's head: {error}") from None


def _arrays(
    tensors: Sequence[_Tensor], body: Buffer, at: int, dtypes: Container[str]
) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    data = memoryview(body)
    for each in tensors:
        nbytes = size_of(each.name, each.dtype, each.shape)
        if nbytes is None:
            nbytes = each.nbytes
        elif each.nbytes not in (None, nbytes):
            raise InvalidArgument(
                f"tensor {each.name[:64]!r} has {nbytes} bytes, not {each.nbytes}"
            )
        if nbytes is None:
            raise InvalidArgument(f"tensor {each.name[:64]!r}: strings must say their nbytes")
        end = at + nbytes
        if nbytes < 0 or end > len(data):
            raise InvalidArgument(
                f"tensor {each.name[:64]!r}: {nbytes} bytes from byte {at} are not in a body of "
                f"{len(data)}"
            )
        if each.name in arrays:
            raise InvalidArgument(f"tensor {each.name[:64]!r} is there twice")
        arrays[each.name] = array_of(each.name, each.dtype, each.shape, data[at:end], dtypes)
        at = end
    if at != len(data):
        raise InvalidArgument(f"the tensors end at byte {at}, the body at {len(data)}")
    return arrays


def _tensors(arrays: Mapping[str, Array]) -> tuple[list[_Tensor], list[Buffer]]:
    tensors: list[_Tensor] = []
    buffers: list[Buffer] = []
    for name, array in arrays.items():
        dtype, data = dtype_name(name, array), bytes_of(name, array)
        nbytes = len(data) if dtype == STRING else None
        tensors.append(_Tensor(name, dtype, list(array.shape), nbytes))
        buffers.append(data)
    return tensors, buffers


def _written(head: bytes, buffers: list[Buffer]) -> Written:
    head = _padded(head)
    if sum(map(len, buffers)) <= _JOINED_BYTES_MAX:
        return Written([b"".join((head, *buffers))], len(head))
    return Written([head, *buffers], len(head))
