"""A small client of the REST door, as a user without any library would write one.

One keep-alive connection, one request at a time, JSON in TensorFlow Serving's shapes, and a
deadline on every call. This file knows paths and shapes of the interface, not the models behind.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

from batching.errors import DeadlineExceeded, InvalidArgument
from cluster.demo.errors import BadReply, RequestRefused, ServerUnreachable

__all__ = ["REPLY_BYTES_MAX", "Client", "Json"]

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]

#: The largest reply the client reads.
REPLY_BYTES_MAX: Final = 64 * 1024 * 1024

_CHUNK: Final = 256 * 1024
_POLL_S: Final = 0.2


class Client:
    """A connection to one server; a context manager. Not for several threads at once.

    Args:
        base_url: such as ``http://127.0.0.1:8501``; a path in it goes before every path of ours.
        timeout_s: the longest a call may take.
        clock: monotonic seconds.

    Raises:
        InvalidArgument: the URL is not one of a web server.
    """

    def __init__(
        self,
        base_url: str,
        *,
        timeout_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        url = urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise InvalidArgument(f"{base_url!r} is not like http://host:port")
        if timeout_s <= 0:
            raise InvalidArgument(f"the time-out must be positive, not {timeout_s}")
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(url.hostname, url.port, timeout=timeout_s)
        self._prefix = url.path.rstrip("/")
        self._where = f"{url.scheme}://{url.netloc}{self._prefix}"
        self._timeout_s = timeout_s
        self._clock = clock

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; a later call connects anew."""
        self._connection.close()

    def predict(self, model: str, inputs: Json) -> Json:
        """The ``outputs`` of a columnar predict: a list, or a mapping if there are several.

        Raises:
            ServerUnreachable: there is no server, or it hung up.
            DeadlineExceeded: no answer in time.
            RequestRefused: the server answered with an error.
            BadReply: the answer has no outputs.
        """
        return self._ask(f"/v1/models/{model}:predict", {"inputs": inputs}, "outputs")

    def classify(self, model: str, examples: Sequence[Mapping[str, Json]]) -> Json:
        """The ``results`` of a classify: a list of ``[label, score]`` pairs for each example.

        Raises:
            ServingError: as `predict`.
        """
        body: Json = {"examples": examples}
        return self._ask(f"/v1/models/{model}:classify", body, "results")

    def states(self, model: str) -> dict[str, str]:
        """The state of every version of a model, such as ``{"1": "AVAILABLE"}``.

        Raises:
            ServingError: as `predict`.
        """
        listed = self._ask(f"/v1/models/{model}", None, "model_version_status")
        states: dict[str, str] = {}
        for one in listed if isinstance(listed, list) else ():
            match one:
                case {"version": str(version), "state": str(state)}:
                    states[version] = state
                case _:
                    raise BadReply(f"{model}: {_brief(one)} is not the status of a version")
        return states

    def wait_available(self, models: Sequence[str], timeout_s: float) -> None:
        """Return once every model has an available version.

        Raises:
            DeadlineExceeded: one has not after ``timeout_s``; the message holds what it is.
        """
        deadline = self._clock() + timeout_s
        for model in models:
            while True:
                try:
                    seen = ", ".join(self.states(model).values())
                except (RequestRefused, ServerUnreachable, DeadlineExceeded) as error:
                    seen = str(error)
                if "AVAILABLE" in seen.split(", "):
                    break
                if self._clock() >= deadline:
                    raise DeadlineExceeded(f"{model} is not available in {timeout_s:g} s: {seen}")
                time.sleep(_POLL_S)

    def _ask(self, path: str, body: Json, field: str) -> Json:
        """POST the body, or GET without one, and take a field out of the reply."""
        verb = "GET" if body is None else "POST"
        data = b"" if body is None else json.dumps(body).encode()
        name = f"{verb} {self._where}{path}"
        status, reply = self._send_twice(verb, path, data, name)
        try:
            value = json.loads(reply)
        except ValueError as error:
            raise BadReply(f"{name}: HTTP {status}, not JSON: {_brief(reply)}") from error
        if status != http.client.OK:
            words = value.get("error", value) if isinstance(value, dict) else value
            raise RequestRefused(f"{name}: HTTP {status}: {_brief(words)}")
        if not isinstance(value, dict) or field not in value:
            raise BadReply(f"{name}: the reply has no {field!r}: {_brief(value)}")
        answer: Json = value[field]
        return answer

    def _send_twice(self, verb: str, path: str, data: bytes, name: str) -> tuple[int, bytes]:
        """Send, and send again if a kept connection turns out to be closed.

        Servers close idle connections, and a client learns it only when it writes. Asking twice
        is safe: nothing that this client asks changes anything.
        """
        deadline = self._clock() + self._timeout_s
        kept = self._connection.sock is not None
        try:
            try:
                return self._send(verb, path, data, deadline)
            except (ConnectionResetError, BrokenPipeError):  # RemoteDisconnected is one, too.
                self.close()
                if not kept:
                    raise
                return self._send(verb, path, data, deadline)
        except TimeoutError as error:
            self.close()
            raise DeadlineExceeded(f"{name}: no answer in {self._timeout_s:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            self.close()
            cause = str(error) or type(error).__name__
            raise ServerUnreachable(f"{name}: {cause}; is the cluster up?") from error

    def _send(self, verb: str, path: str, data: bytes, deadline: float) -> tuple[int, bytes]:
        self._connection.timeout = self._left(deadline)
        if self._connection.sock is None:
            self._connection.connect()
        self._connection.sock.settimeout(self._left(deadline))
        headers = {"Content-Type": "application/json"} if data else {}
        self._connection.request(verb, self._prefix + path, data or None, headers)
        reply = self._connection.getresponse()
        missing = reply.length
        received = bytearray()
        # Piece by piece, so that a server that trickles cannot hold a call past its deadline.
        while piece := reply.read1(_CHUNK):
            received += piece
            self._left(deadline)
            if len(received) > REPLY_BYTES_MAX:
                self.close()
                raise BadReply(f"{self._where}{path}: a reply of over {REPLY_BYTES_MAX} bytes")
        # Reading in pieces leaves both to us: to notice a body cut short, and to end the reply,
        # without which a kept connection takes no further request.
        if missing is not None and len(received) < missing:
            raise http.client.IncompleteRead(bytes(received), missing - len(received))
        reply.close()
        return reply.status, bytes(received)

    def _left(self, deadline: float) -> float:
        left = deadline - self._clock()
        if left <= 0:
            raise TimeoutError
        return left


def _brief(value: object) -> str:
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return text if len(text) <= 300 else f"{text[:300]}..."
