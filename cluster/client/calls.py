"""What a client says and how it reads what it is told: values in, bytes out, and back. Pure.

Tensors travel as raw buffers (`cluster.forms.raw`). Where an input is no array but a list or a
number the request is JSON, and the server converts it by its rules; the answer is raw all the same.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Generic, TypeVar
from urllib.parse import quote

import numpy as np

from batching.errors import Code, DataLoss, InvalidArgument, ServingError, error_of
from cluster.client.reception import Response
from cluster.client.values import Array, Classes, Numbers, Outputs, VersionState
from cluster.forms import HEAD_LENGTH, Columns, Form, raw
from cluster.forms.values import Buffer

__all__ = [
    "Call",
    "Examples",
    "Inputs",
    "Options",
    "classify",
    "document_in",
    "error_in",
    "header_value",
    "metadata",
    "metrics",
    "models",
    "predict",
    "predict_table",
    "ready",
    "regress",
    "status",
]

T = TypeVar("T")

#: Inputs by name: arrays, or anything that JSON has words for.
Inputs = Mapping[str, Any]
#: Examples: features by name; or inputs by name, one row an example.
Examples = Sequence[Mapping[str, Any]] | Inputs

_LENGTH: Final = HEAD_LENGTH.decode()
_JSON: Final = f"content-type: {Form.JSON.value}\r\n"
_ACCEPT_RAW: Final = f"accept: {Form.RAW.value}\r\n"
_PRINTABLE: Final = re.compile(r"[\x20-\x7e]*")

#: What statuses mean where no code was said: by proxies, and by a door that refuses a connection.
_CODES: Final[Mapping[int, Code]] = {
    400: Code.INVALID_ARGUMENT,
    401: Code.UNAUTHENTICATED,
    403: Code.PERMISSION_DENIED,
    404: Code.NOT_FOUND,
    405: Code.INVALID_ARGUMENT,
    408: Code.DEADLINE_EXCEEDED,
    413: Code.INVALID_ARGUMENT,
    415: Code.INVALID_ARGUMENT,
    429: Code.RESOURCE_EXHAUSTED,
    431: Code.INVALID_ARGUMENT,
    499: Code.CANCELLED,
    501: Code.UNIMPLEMENTED,
    502: Code.UNAVAILABLE,
    503: Code.UNAVAILABLE,
    504: Code.DEADLINE_EXCEEDED,
}


@dataclass(frozen=True, slots=True)
class Options:
    """What may be said with each inference request.

    Attributes:
        version: the version to ask; else the newest, or what a split gives.
        label: the label to ask, instead of a version.
        signature: its name; empty for the default one.
        split_key: requests with the same key go to the same version of a split.
        criticality: less than the servable's own: ``sheddable``, ``best_effort``...
    """

    version: int | None = None
    label: str | None = None
    signature: str = ""
    split_key: str = ""
    criticality: str = ""


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One call of a door.

    Attributes:
        method: of HTTP.
        path: with its query.
        read: makes the answer's value.
        headers: complete header lines.
        buffers: of the body.
        is_repeatable: whether asking twice does no harm.
        wait_s: how long the server may take beside the client's own time.
        may_be_compressed: whether the server takes a compressed body for it.
    """

    method: str
    path: str
    read: Callable[[Response], T]
    headers: str = ""
    buffers: Sequence[Buffer] = ()
    is_repeatable: bool = True
    wait_s: float = 0.0
    may_be_compressed: bool = False


# Inference


def predict(model: str, inputs: Inputs, options: Options) -> Call[Outputs]:
    """Ask for a prediction.

    Raises:
        InvalidArgument: an input cannot be sent, or an option cannot be said.
    """
    headers, buffers = _tensors(inputs, options)
    return _inference(_path(model, options, "predict"), _outputs, headers, buffers)


def predict_table(model: str, table: Any, options: Options) -> Call[Any]:
    """Ask for a prediction of the rows of a table, and for a table.

    Raises:
        InvalidArgument: it is no table, or an option cannot be said.
    """
    # Half a second, for the clients that have tables alone.
    import pyarrow as pa

    if not hasattr(table, "__arrow_c_stream__"):
        raise InvalidArgument(f"a {type(table).__name__} is no Arrow table")
    reader = pa.RecordBatchReader.from_stream(table)
    schema = reader.schema
    if options.signature:
        schema = schema.with_metadata({"signature_name": options.signature})
    else:
        schema = schema.remove_metadata()
    sink = pa.BufferOutputStream()
    rows = pa.Table.from_batches(reader, schema).combine_chunks()
    with pa.ipc.new_stream(sink, schema) as stream:
        stream.write_table(rows)
    body = memoryview(sink.getvalue()).cast("B")
    kind = Form.ARROW.value
    headers = f"{_said(options)}content-type: {kind}\r\naccept: {kind}\r\n"
    return _inference(_path(model, options, "predict"), _table, headers, [body])


def _table(response: Response) -> Any:
    import pyarrow as pa

    if response.headers.get("content-type") != Form.ARROW.value:
        raise DataLoss(f"the answer is {response.headers.get('content-type')}, not an Arrow stream")
    try:
        table = pa.ipc.open_stream(pa.py_buffer(response.body)).read_all()
    except (pa.ArrowException, OSError) as error:
        raise DataLoss(f"the answer cannot be read: {error}") from None
    return table.replace_schema_metadata({"version": str(_version(response))})


def classify(
    model: str, examples: Examples, context: Inputs | None, options: Options
) -> Call[Classes]:
    """Ask for classes.

    Raises:
        InvalidArgument: as for `predict`.
    """
    headers, buffers = _examples(examples, context, options)
    return _inference(_path(model, options, "classify"), _classes, headers, buffers)


def regress(
    model: str, examples: Examples, context: Inputs | None, options: Options
) -> Call[Numbers]:
    """Ask for numbers.

    Raises:
        InvalidArgument: as for `predict`.
    """
    headers, buffers = _examples(examples, context, options)
    return _inference(_path(model, options, "regress"), _numbers, headers, buffers)


def _inference(
    path: str, read: Callable[[Response], T], headers: str, buffers: Sequence[Buffer]
) -> Call[T]:
    return Call("POST", path, read, headers, buffers, may_be_compressed=True)


def _tensors(inputs: Inputs, options: Options) -> tuple[str, Sequence[Buffer]]:
    said = _said(options)
    if not all(hasattr(value, "__array__") for value in inputs.values()):
        document: dict[str, Any] = {"inputs": dict(inputs)}
        return _json(document, options, said)
    arrays = {name: _array(name, value) for name, value in inputs.items()}
    written = raw.write_request(Columns(arrays, options.signature))
    kind = f"content-type: {Form.RAW.value}\r\n{_LENGTH}: {written.head_bytes}\r\n"
    return said + kind, written.buffers


def _examples(
    examples: Examples, context: Inputs | None, options: Options
) -> tuple[str, Sequence[Buffer]]:
    if isinstance(examples, Mapping):
        if context is not None:
            raise InvalidArgument("context goes with a list of examples; tensors have every input")
        return _tensors(examples, options)
    document: dict[str, Any] = {"examples": list(examples)}
    if context is not None:
        document["context"] = context
    return _json(document, options, _said(options))


def _json(document: dict[str, Any], options: Options, said: str) -> tuple[str, Sequence[Buffer]]:
    if options.signature:
        document["signature_name"] = options.signature
    try:
        text = json.dumps(document, default=_plain, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"the request cannot be written as JSON: {error}") from None
    return said + _JSON + _ACCEPT_RAW, [text.encode("utf-8", "surrogatepass")]


def _plain(value: object) -> object:
    """What JSON has no words for: bytes, arrays, NumPy's numbers."""
    if isinstance(value, bytes):
        return {"b64": base64.b64encode(value).decode()}
    if hasattr(value, "__array__"):
        return np.asarray(value).tolist()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__}")


def _array(name: str, value: object) -> Array:
    """An array as it travels: strings are objects of bytes."""
    array: Array = np.asarray(value)
    kind = array.dtype.kind
    if kind in "US" or (kind == "O" and not all(type(v) is bytes for v in array.flat)):
        found = np.empty(array.size, object)
        found[:] = [_text(name, each) for each in array.reshape(-1).tolist()]
        return found.reshape(array.shape)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _text(name: str, value: object) -> bytes:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    if isinstance(value, bytes):
        return value
    raise InvalidArgument(f"input {name!r} holds a {type(value).__name__}")


def _said(options: Options) -> str:
    if not (options.split_key or options.criticality):
        return ""
    lines = ""
    for header, value in (
        ("x-split-key", options.split_key),
        ("x-request-criticality", options.criticality),
    ):
        if value:
            lines += f"{header}: {header_value(header, value)}\r\n"
    return lines


def header_value(name: str, value: str) -> str:
    """A value that may stand in a header.

    Raises:
        InvalidArgument: it has characters that may not.
    """
    if _PRINTABLE.fullmatch(value) is None:
        raise InvalidArgument(f"{name} may have printable ASCII only")
    return value


@lru_cache(maxsize=1024)
def _target(model: str, version: int | None, label: str | None) -> str:
    path = f"/v1/models/{quote(model, safe='')}"
    if version is not None:
        if label is not None:
            raise InvalidArgument("a version or a label, not both")
        return f"{path}/versions/{int(version)}"
    return path if label is None else f"{path}/labels/{quote(label, safe='')}"


def _path(model: str, options: Options, verb: str) -> str:
    return f"{_target(model, options.version, options.label)}:{verb}"


def _version(response: Response) -> int:
    return int(response.headers.get("x-servable-version", "0"))


def _read(response: Response) -> dict[str, Array]:
    length = response.headers.get(_LENGTH)
    if length is None or not length.isdigit():
        raise DataLoss(f"the answer is {response.headers.get('content-type')}, not raw buffers")
    try:
        return raw.read_answer(response.body, int(length))
    except InvalidArgument as error:
        raise DataLoss(f"the answer cannot be read: {error}") from None


def _outputs(response: Response) -> Outputs:
    return Outputs(_read(response), _version(response))


def _classes(response: Response) -> Classes:
    outputs = _read(response)
    try:
        labels, scores = outputs["classes"], outputs["scores"]
    except KeyError as error:
        raise DataLoss(f"the answer has no {error}") from None
    found = np.empty(labels.size, object)
    found[:] = [each.decode("utf-8", "replace") for each in labels.reshape(-1).tolist()]
    return Classes(found.reshape(labels.shape), scores, _version(response))


def _numbers(response: Response) -> Numbers:
    outputs = _read(response)
    if "outputs" not in outputs:
        raise DataLoss("the answer has no 'outputs'")
    return Numbers(outputs["outputs"], _version(response))


# Descriptions


def models() -> Call[dict[str, tuple[VersionState, ...]]]:
    """Ask for every servable and its versions."""
    return Call("GET", "/v1/models", _listed)


def status(model: str, version: int | None, label: str | None) -> Call[tuple[VersionState, ...]]:
    """Ask for the states of versions."""
    return Call("GET", _target(model, version, label), lambda r: _states(document_in(r)))


def metadata(model: str, version: int | None, label: str | None) -> Call[dict[str, Any]]:
    """Ask for signatures, as the REST API describes them."""
    return Call("GET", f"{_target(model, version, label)}/metadata", document_in)


def metrics() -> Call[str]:
    """Ask for the counters, in Prometheus' text."""
    return Call("GET", "/metrics", lambda response: response.body.decode("utf-8", "replace"))


def ready() -> Call[bool]:
    """Ask whether the door is ready; one that is not is `Unavailable`."""
    return Call("GET", "/readyz", lambda response: response.status == 200)


def document_in(response: Response) -> dict[str, Any]:
    """The JSON object in a response.

    Raises:
        DataLoss: there is none.
    """
    try:
        document = json.loads(response.body)
    except (ValueError, RecursionError):
        raise DataLoss("the answer is not the JSON that was asked for") from None
    if not isinstance(document, dict):
        raise DataLoss("the answer is not the JSON that was asked for")
    return document


def _listed(response: Response) -> dict[str, tuple[VersionState, ...]]:
    try:
        return {
            str(model["name"]): tuple(
                VersionState(int(each["version"]), str(each["state"])) for each in model["versions"]
            )
            for model in document_in(response)["models"]
        }
    except (KeyError, TypeError, ValueError):
        raise DataLoss("the answer does not list servables") from None


def _states(document: Mapping[str, Any]) -> tuple[VersionState, ...]:
    try:
        return tuple(
            VersionState(
                int(each["version"]),
                str(each["state"]),
                str(each["status"]["error_code"]),
                str(each["status"]["error_message"]),
            )
            for each in document["model_version_status"]
        )
    except (KeyError, TypeError, ValueError):
        raise DataLoss("the answer does not describe versions") from None


# Errors


def error_in(response: Response) -> ServingError | None:
    """The error that a response is, or None where it is an answer."""
    if 200 <= response.status < 300:
        return None
    text = response.body[:100_000].decode("utf-8", "replace")
    try:
        message = str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError, RecursionError):
        message = f"{response.status}: {text[:500]}"
    code = response.headers.get("x-error-code") or _CODES.get(response.status, Code.INTERNAL)
    return error_of(code, message, _retry_after_ms(response.headers))


def _retry_after_ms(headers: Mapping[str, str]) -> int:
    fine, whole = headers.get("retry-after-ms", ""), headers.get("retry-after", "")
    if fine.isdigit():
        return int(fine[:9])
    return int(whole[:6]) * 1000 if whole.isdigit() else 0
