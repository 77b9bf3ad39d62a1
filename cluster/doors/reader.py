"""A process that reads request bodies for a router: `python -m cluster.doors.reader FD`.

Bodies that are large, or unlike what bodies nearly always are, take long to read, and the parser
holds the interpreter all the while; in a process of its own it holds up nobody. The two talk over
a pair of sockets that only they have: a length, a msgpack header, then a body or tensors. Nothing
in here knows servables, versions or epochs: every question brings its signatures along.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Final, Literal

import msgspec

from batching.errors import Internal, ServingError
from cluster.api import ColumnsParser, ExamplesParser, Parsed, RequestParser
from cluster.forms import BodyTooLarge, Form, Forms
from cluster.forms.inflating import inflated
from shards.manifest import Signature
from shards.wire import Buffer, TensorHeader, encode_tensors

__all__ = ["LENGTH", "Answer", "Method", "Question", "main"]

Method = Literal["predict", "classify", "regress"]

#: Before every header: how many bytes it has.
LENGTH: Final = struct.Struct("<I")
#: Reading gives way to the router, which has all other requests to see to.
_NICENESS: Final = 5
_PARSERS_MAX: Final = 32


class Question(msgspec.Struct, array_like=True):
    """Followed by the body.

    Attributes:
        method: which API's body it is.
        signatures: of the version, by name, as msgpack.
        nbytes: of the body.
        form: of the body, as its media type.
        head_bytes: as in `Forms`.
        encoding: as in `Forms`.
        inflated_bytes_max: what a compressed body may hold.
    """

    method: Method
    signatures: bytes
    nbytes: int
    form: str = Form.JSON.value
    head_bytes: int = 0
    encoding: str = ""
    inflated_bytes_max: int = 0


class Answer(msgspec.Struct, array_like=True):
    """Followed by the tensors. With a code it is a refusal, and nothing follows.

    Attributes:
        code: of the error; empty where there is none.
        message: of the error.
        signature_name: as in `Parsed`, like the next two.
        rows: size of the batch dimension.
        columnar: whether the client wrote ``inputs``.
        names: of the arrays.
        tensors: of the arrays.
        nbytes: of all that follows.
        is_too_large: of a refusal, whether it is for what was in a compressed body.
    """

    code: str = ""
    message: str = ""
    signature_name: str = ""
    rows: int = 0
    columnar: bool = False
    names: list[str] = []
    tensors: list[TensorHeader] = []
    nbytes: int = 0
    is_too_large: bool = False


@lru_cache(maxsize=_PARSERS_MAX)
def _parser(method: Method, signatures: bytes) -> Callable[[bytearray], Parsed]:
    known = msgspec.msgpack.decode(signatures, type=dict[str, Signature])
    if method == "predict":
        return RequestParser(known).parse
    return ExamplesParser(known, method).parse


@lru_cache(maxsize=_PARSERS_MAX)
def _columns_parser(method: Method, signatures: bytes) -> ColumnsParser:
    known = msgspec.msgpack.decode(signatures, type=dict[str, Signature])
    return ColumnsParser(known, None if method == "predict" else ExamplesParser(known, method))


def _parsed(question: Question, body: bytearray) -> Parsed:
    form = Form(question.form)
    if question.encoding:
        body = inflated(body, question.encoding, question.inflated_bytes_max)
    if form is Form.JSON:
        return _parser(question.method, question.signatures)(body)
    parser = _columns_parser(question.method, question.signatures)
    return parser.parse(body, Forms(form, form, question.head_bytes))


def main(channel: socket.socket) -> None:
    """Answer questions until the other side closes."""
    questions = msgspec.msgpack.Decoder(Question)
    encode = msgspec.msgpack.Encoder().encode
    while True:
        head = _received(channel, LENGTH.size)
        if head is None:
            return
        header = _received(channel, LENGTH.unpack(head)[0])
        assert header is not None, "the router went away in the middle of a question"
        question = questions.decode(header)
        body = _received(channel, question.nbytes)
        assert body is not None, "the router went away in the middle of a question"
        answer, buffers = _answer(question, body)
        reply = encode(answer)
        channel.sendall(LENGTH.pack(len(reply)) + reply)
        for buffer in buffers:
            channel.sendall(buffer)


def _answer(question: Question, body: bytearray) -> tuple[Answer, list[Buffer]]:
    try:
        parsed = _parsed(question, body)
        tensors, buffers = encode_tensors(list(parsed.arrays.values()))
    except ServingError as error:
        is_too_large = isinstance(error, BodyTooLarge)
        return Answer(code=error.code, message=error.message, is_too_large=is_too_large), []
    except Exception as error:
        # As when it is read in the router: the client hears that it was our fault, the log why.
        print(f"a body could not be read: {error!r}", file=sys.stderr)  # noqa: T201
        return Answer(code=Internal.code, message="internal error"), []
    answer = Answer(
        signature_name=parsed.signature_name,
        rows=parsed.rows,
        columnar=parsed.columnar,
        names=list(parsed.arrays),
        tensors=tensors,
        nbytes=sum(memoryview(buffer).nbytes for buffer in buffers),
    )
    return answer, buffers


def _received(channel: socket.socket, nbytes: int) -> bytearray | None:
    """So many bytes, or None if the other side has closed."""
    data = bytearray(nbytes)
    view = memoryview(data)
    while view:
        count = channel.recv_into(view)
        if not count:
            return None
        view = view[count:]
    return data


if __name__ == "__main__":
    os.nice(_NICENESS)
    with socket.socket(fileno=int(sys.argv[1])) as ours:
        main(ours)
