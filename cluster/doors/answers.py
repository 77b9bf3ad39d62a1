"""From the router's answer to a response: prints outputs in the form that the client asked for.

Knows codecs and forms; that a request exists once and who waits for it is the service's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from batching.errors import Internal, ServingError
from cluster.api import (
    CONTENT_TYPE,
    ExamplesCodec,
    Parsed,
    plain_floats,
    render_predictions,
    render_rows_plain,
)
from cluster.doors.response import Response
from cluster.doors.version_codecs import VersionCodecs
from cluster.forms import HEAD_LENGTH, Form, arrow_writing, packed, raw

__all__ = ["Answer", "FormAnswer", "Owner", "Respond"]

logger = logging.getLogger(__name__)

Array = npt.NDArray[np.generic]

Respond = Callable[[Response], None]


class Owner(Protocol):
    """What an answer asks of the service that it is of."""

    def refusal(self, error: ServingError, extra: bytes = b"") -> Response:
        """The response that says what is wrong, counted."""
        ...

    def now(self) -> float:
        """On the clock by which requests are timed."""
        ...


class Answer:
    """Turns the router's answer into a response in JSON."""

    __slots__ = ("_codec", "_owner", "_parsed", "_respond", "_started", "_version")

    #: tensors of the reply frame that was checked last, and what the check said
    _checked: tuple[Sequence[Array] | None, bool] = (None, False)

    def __init__(
        self,
        owner: Owner,
        version: VersionCodecs,
        codec: ExamplesCodec | None,
        parsed: Parsed,
        started: float,
        respond: Respond,
    ) -> None:
        self._owner = owner
        self._version = version
        self._codec = codec
        self._parsed = parsed
        self._started = started
        self._respond = respond

    def done(self, outputs: Mapping[str, Array], frame: Sequence[Array] | None) -> None:
        """Print the answer."""
        owner, version = self._owner, self._version
        try:
            response = self._printed(outputs, frame)
        except ServingError as error:
            self._respond(owner.refusal(error, version.header))
            return
        except Exception:
            logger.exception("an answer could not be printed")
            self._respond(owner.refusal(Internal("internal error"), version.header))
            return
        version.metrics.answered(owner.now() - self._started)
        self._respond(response)

    def _printed(self, outputs: Mapping[str, Array], frame: Sequence[Array] | None) -> Response:
        if self._codec is not None:
            body = self._codec.render(outputs, self._parsed.rows)
        elif (
            frame is not None
            and len(outputs) == 1
            and not self._parsed.columnar
            and (Answer._checked[1] if Answer._checked[0] is frame else _is_plain(frame))
        ):
            [array] = outputs.values()
            body = render_rows_plain(array)
        else:
            body = render_predictions(outputs, self._parsed.columnar)
        return Response(200, CONTENT_TYPE, self._version.header, body)

    def failed(self, error: ServingError) -> None:
        """Print the error."""
        self._version.metrics.failed(error.code)
        self._respond(self._owner.refusal(error, self._version.header))


class FormAnswer(Answer):
    """Turns the router's answer into a response without JSON."""

    __slots__ = ("form",)

    #: of the answer; set by whoever makes it
    form: Form

    def _printed(self, outputs: Mapping[str, Array], frame: Sequence[Array] | None) -> Response:
        if self._codec is not None:
            outputs = self._codec.tensors(outputs, self._parsed.rows)
        headers = self._version.header
        if self.form is Form.RAW:
            written = raw.write_answer(outputs)
            headers += b"%b: %d\r\n" % (HEAD_LENGTH, written.head_bytes)
        elif self.form is Form.ARROW:
            written = arrow_writing.write_answer(outputs)
        else:
            written = packed.write_answer(outputs)
        buffers = written.buffers
        body = buffers[0] if len(buffers) == 1 else b"".join(buffers)
        assert isinstance(body, bytes)
        return Response(200, self.form.value, headers, body)


def _is_plain(frame: Sequence[Array]) -> bool:
    """Whether the frame's one tensor prints by the fast path; asked once for all its requests."""
    plain = len(frame) == 1 and frame[0].ndim >= 1 and plain_floats(frame[0])
    Answer._checked = (frame, plain)
    return plain
