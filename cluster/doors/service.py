"""From an HTTP request to the router and back, for every door alike.

Both doors (the direct port and the Ray Serve replica) hand over method, path, headers and body,
and get one `Response`. What a path means, how bodies read and print, and which status an error
has are `cluster.api`'s; where rows go is the router's. Called on the router's loop thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Final, TypeAlias

from batching.allowance import CRITICAL, criticality_named
from batching.errors import (
    Internal,
    InvalidArgument,
    NotFound,
    ServingError,
    Unauthenticated,
    Unavailable,
)
from cluster.access import Keyring, Right
from cluster.api import (
    CONTENT_TYPE,
    Call,
    ExamplesCodec,
    Parsed,
    Verb,
    error_body,
    http_status,
    parse_path,
    retry_after,
)
from cluster.device_reports import DeviceReports
from cluster.doors.admin import PREFIX, Admin, Change
from cluster.doors.answers import Answer, FormAnswer, Respond
from cluster.doors.describing import Describing
from cluster.doors.packing import Packer
from cluster.doors.reader import Method
from cluster.doors.reading import Reading, ReadingRoom
from cluster.doors.request_log import RequestLogs
from cluster.doors.response import Response
from cluster.doors.settings import BODY_BYTES_MAX, COMPRESS_BYTES_MIN
from cluster.doors.shadowing import Shadows
from cluster.doors.siblings import Siblings
from cluster.doors.version_codecs import VersionCodecs
from cluster.forms import (
    ENCODINGS,
    BodyTooLarge,
    Form,
    Forms,
    NotAcceptable,
    UnknownEncoding,
    forms_of,
)
from cluster.metrics import Metrics
from cluster.router import Execution, Router, Sink
from cluster.routes import Routes

__all__ = [
    "CRITICALITY_HEADER",
    "DEADLINE_HEADER",
    "ERROR_CODE",
    "SPLIT_KEY",
    "Ongoing",
    "Respond",
    "Response",
    "Service",
]

logger = logging.getLogger(__name__)

#: How long the client will wait, in milliseconds, counted from when the request was read.
DEADLINE_HEADER: Final = b"x-request-timeout-ms"
#: Requests with the same key go to the same version of a split.
SPLIT_KEY: Final = b"x-split-key"
#: Says which error an answer is.
ERROR_CODE: Final = b"x-error-code"
#: Makes a request less critical than its servable is declared to be.
CRITICALITY_HEADER: Final = b"x-request-criticality"
TRACE_HEADER: Final = b"traceparent"
_TIMEOUT_MS_MAX: Final = 3_600_000
#: A `traceparent` has 55 bytes. Longer ones are left behind: they would crowd out the requests that
#: share a frame.
_TRACE_BYTES_MAX: Final = 128
#: Up to here a body is read on the loop whatever it is: the worst there are take 1.6 us a byte.
_AT_ONCE_BYTES_MAX: Final = 8 << 10
#: Up to here one that looks as most do is: 5 to 30 ns a byte, 100 at worst.
_USUAL_BYTES_MAX: Final = 128 << 10
_PATHS_MAX: Final = 1024
_PATH_BYTES_MAX: Final = 256
#: Errors that HTTP has a number of its own for, whatever their code.
_STATUSES: Final[Mapping[type[ServingError], int]] = {
    NotAcceptable: 406,
    BodyTooLarge: 413,
    UnknownEncoding: 415,
}
_ACCEPTED: Final = b"accept-encoding: %b, identity\r\n" % ", ".join(ENCODINGS).encode()
_CHALLENGE: Final = b'www-authenticate: Bearer realm="shardserve"\r\n'


#: A request that `Service.cancel` can end: one that the router has, or one whose body is read.
Ongoing: TypeAlias = "Execution | _Apart"


class Service:
    """Answers requests of a door.

    Args:
        router: where rows go.
        metrics: what is counted.
        keyring: who may do what; None lets anybody do everything.
        devices: what devices count, where this door tells it.
        siblings: the node's other routers, where there are any.
        compress_bytes_min: answers of so many bytes are compressed for who asks for it.
        body_bytes_max: what a compressed body may hold.
    """

    def __init__(
        self,
        router: Router,
        metrics: Metrics,
        keyring: Keyring | None = None,
        devices: DeviceReports | None = None,
        siblings: Siblings | None = None,
        compress_bytes_min: int = COMPRESS_BYTES_MIN,
        body_bytes_max: int = BODY_BYTES_MAX,
    ) -> None:
        self._router = router
        self._metrics = metrics
        self._keyring = keyring
        self._describing = Describing(router, metrics, devices, siblings)
        self._admin: Admin | None = None
        self._shadows = Shadows(router, time.monotonic, metrics.shadow)
        self._logs = RequestLogs(router, metrics.request_log)
        self._room = ReadingRoom(inflated_bytes_max=body_bytes_max)
        self._clock = time.monotonic
        self._packer = Packer(compress_bytes_min, self.refusal, self._clock)
        self._versions: dict[tuple[str, int], VersionCodecs] = {}
        self._routes: Routes | None = None
        #: what predict paths mean in these routes
        self._predicts: dict[bytes, VersionCodecs] = {}

    def use_keys(self, keyring: Keyring) -> None:
        """Decide by these keys from now on; requests under way are not asked again."""
        self._keyring = keyring
        for version in self._versions.values():
            version.plain_headers = None

    def open_admin(self, change: Change) -> None:
        """Answer the admin API, too.

        Args:
            change: hands edits to the controller.
        """
        self._admin = Admin(change, lambda: self._router.routes.epoch, self.refusal)

    @property
    def logs(self) -> RequestLogs:
        """The request logs, for what does not come as HTTP."""
        return self._logs

    def count_refused(self, status: int) -> None:
        """A door refused something that did not become a request."""
        self._metrics.refused(status)

    def handle(
        self,
        method: bytes,
        path: bytes,
        headers: Mapping[bytes, bytes],
        body: bytes | bytearray,
        respond: Respond,
    ) -> Ongoing | None:
        """Answer one request; ``respond`` is called exactly once, now or later.

        Returns:
            What `cancel` wants when the client goes away; None if there is nothing to cancel.
        """
        now = self._clock()
        try:
            version = self._predicts.get(path)
            if version is not None and method == b"POST" and self._router.routes is self._routes:
                if headers is version.plain_headers:
                    forms = version.plain_forms
                else:
                    if self._keyring is not None:
                        self._keyring.check(headers, Right.PREDICT, version.served.servable)
                    forms = forms_of(headers)
                if forms is not None:
                    return self._read_form(
                        version, Verb.PREDICT, body, headers, forms, now, respond
                    )
                if len(body) > _AT_ONCE_BYTES_MAX:
                    return self._read(version, Verb.PREDICT, body, headers, now, respond)
                parsed = version.parser.parse(body)
                return self._submit(version, None, parsed, headers, now, respond)
            if self._admin is not None and path.startswith(PREFIX):
                self._admin.handle(method, path, headers, body, self._keyring, respond)
                return None
            call = parse_path(method, path)
            if call is None:
                respond = self._packer.describing(respond, headers, now)
                self._describing.elsewhere(method, path, headers, self._keyring, respond)
            elif call.verb in _INFERENCE:
                # Before the name is looked up: who may not use a servable learns nothing of it.
                if self._keyring is not None:
                    self._keyring.check(headers, Right.PREDICT, call.servable)
                return self._infer(call, path, headers, body, now, respond)
            else:
                response = self._describing.describe(call, headers, self._keyring)
                self._packer.describing(respond, headers, now)(response)
        except ServingError as error:
            respond(self.refusal(error))
        except Exception:
            logger.exception("a request failed for a reason of our own")
            respond(self.refusal(Internal("internal error")))
        return None

    def cancel(self, request: Ongoing) -> None:
        """The client of this request has gone; its rows need not be computed."""
        if isinstance(request, _Apart):
            request.cancel()
        else:
            self._router.cancel(request)

    def close(self) -> None:
        """End the processes that read bodies, and the threads that compress and log, if any."""
        self._room.close()
        self._packer.close()
        self._logs.close()

    # Inference

    def _infer(
        self,
        call: Call,
        path: bytes,
        headers: Mapping[bytes, bytes],
        body: bytes | bytearray,
        now: float,
        respond: Respond,
    ) -> Ongoing | None:
        version = self._version(call, headers)
        is_new = len(path) <= _PATH_BYTES_MAX and len(self._predicts) < _PATHS_MAX
        # What a split answers is asked anew for each request.
        is_fixed = call.names_one or not self._router.routes.is_split(call.servable)
        if call.verb is Verb.PREDICT and is_new and is_fixed:
            self._predicts[path] = version
        forms = forms_of(headers)
        if forms is not None:
            return self._read_form(version, call.verb, body, headers, forms, now, respond)
        return self._read(version, call.verb, body, headers, now, respond)

    def _read_form(
        self,
        version: VersionCodecs,
        verb: Verb,
        body: bytes | bytearray,
        headers: Mapping[bytes, bytes],
        forms: Forms,
        now: float,
        respond: Respond,
    ) -> Ongoing | None:
        """Read a body where the client does not speak JSON alone, or has compressed it."""
        if forms.encoding:  # a few bytes may hold millions
            return _Apart.begin(self, version, verb, body, headers, now, respond, forms)
        if forms.request is Form.JSON:
            return self._read(version, verb, body, headers, now, respond, forms)
        parser = version.columns_of(verb)
        if len(body) > _AT_ONCE_BYTES_MAX and parser.may_take_long(body, forms.request):
            return _Apart.begin(self, version, verb, body, headers, now, respond, forms)
        # What is left takes the same time whatever its size: tensors stay where they are.
        parsed = parser.parse(body, forms)
        codec = version.codec(verb, parsed)
        return self._submit(version, codec, parsed, headers, now, respond, forms)

    def _read(
        self,
        version: VersionCodecs,
        verb: Verb,
        body: bytes | bytearray,
        headers: Mapping[bytes, bytes],
        now: float,
        respond: Respond,
        forms: Forms | None = None,
    ) -> Ongoing | None:
        """Read the body here, if that is sure to be quick, else in a process of its own."""
        parsed: Parsed | None = None
        if len(body) <= _AT_ONCE_BYTES_MAX:
            parsed = version.parser_of(verb).parse(body)
        elif verb is Verb.PREDICT and len(body) <= _USUAL_BYTES_MAX:
            parsed = version.parser.parse_usual(body)
        if parsed is not None:
            codec = version.codec(verb, parsed)
            return self._submit(version, codec, parsed, headers, now, respond, forms)
        return _Apart.begin(self, version, verb, body, headers, now, respond, forms)

    def _resume(
        self,
        version: VersionCodecs,
        verb: Verb,
        parsed: Parsed,
        headers: Mapping[bytes, bytes],
        now: float,
        respond: Respond,
        forms: Forms | None,
    ) -> Execution | None:
        """Go on with a request whose body was read apart."""
        # Meanwhile there may be new routes, and a plan must be of the current ones. The same
        # version has the same signatures; if it went, the client may ask for its successor.
        served = version.served
        try:
            version.served = self._router.routes.find(served.servable, served.version)
        except NotFound:
            raise Unavailable("the version was replaced while the body was read", 100) from None
        codec = version.codec(verb, parsed)
        return self._submit(version, codec, parsed, headers, now, respond, forms)

    def _submit(
        self,
        version: VersionCodecs,
        codec: ExamplesCodec | None,
        parsed: Parsed,
        headers: Mapping[bytes, bytes],
        now: float,
        respond: Respond,
        forms: Forms | None = None,
    ) -> Execution | None:
        served = version.served
        timeout_s = served.deadline_s
        trace, criticality = b"", CRITICAL
        if headers is not version.plain_headers:
            timeout_s = _timeout_s(headers, timeout_s)
            asked = headers.get(CRITICALITY_HEADER)
            if asked is not None:
                criticality = criticality_named(asked.decode("latin-1"))
            trace = headers.get(TRACE_HEADER, b"")
            if len(trace) > _TRACE_BYTES_MAX:
                trace = b""
            elif not trace and asked is None and DEADLINE_HEADER not in headers:
                version.plain_headers = headers  # a door gives the same object for the same head
                version.plain_forms = forms
        deadline = now + timeout_s
        sink: Sink
        if forms is not None and forms.packing is not None:
            respond = self._packer.over(respond, forms.packing, deadline)
        if forms is None or forms.answer is Form.JSON:
            sink = Answer(self, version, codec, parsed, now, respond)
        else:
            sink = FormAnswer(self, version, codec, parsed, now, respond)
            sink.form = forms.answer
        plan = served.plans[parsed.signature_name]
        arrays, rows = parsed.arrays, parsed.rows
        if version.copying is not None:
            sink = self._shadows.over(sink, version.copying, plan, arrays, rows)
        if version.logging is not None:
            sink = self._logs.over(sink, version.logging, plan, arrays)
        return self._router.submit(plan, arrays, rows, deadline, sink, trace, criticality)

    def _version(self, call: Call, headers: Mapping[bytes, bytes]) -> VersionCodecs:
        routes = self._router.routes
        if self._routes is not routes:
            # Codecs are kept across epochs for the versions that the new one still serves.
            self._versions = {key: v for key, v in self._versions.items() if routes.has(*key)}
            self._routes = routes
            self._predicts.clear()
            for key, kept in self._versions.items():
                kept.metrics = self._metrics.of(*key)  # what is served is never the oldest
        if call.names_one:
            served = routes.find(call.servable, call.version, call.label)
        else:
            served = routes.pick(call.servable, headers.get(SPLIT_KEY, b""))
        key = (served.servable, served.version)
        found = self._versions.get(key)
        if found is None:
            found = self._versions[key] = VersionCodecs(served, self._metrics)
        found.served = served
        found.copying = self._shadows.of(*key)
        found.logging = self._logs.of(served)
        return found

    def now(self) -> float:
        """On the clock by which requests are timed."""
        return self._clock()

    def refusal(self, error: ServingError, extra: bytes = b"") -> Response:
        """The response that says what is wrong, counted.

        Args:
            error: what is wrong.
            extra: header lines.
        """
        self._metrics.failed(error.code)
        if isinstance(error, Unauthenticated) and self._keyring is not None:
            extra += _CHALLENGE
        wait = retry_after(error)
        if wait is not None:
            # Whole seconds are all that the standard knows, and a device is busy for less.
            extra += b"retry-after: %b\r\n" % wait.encode()
            extra += b"retry-after-ms: %d\r\n" % error.retry_after_ms
        # Several codes share a status.
        extra += b"%b: %b\r\n" % (ERROR_CODE, error.code.encode())
        status = _STATUSES.get(type(error)) or http_status(error.code)
        if isinstance(error, UnknownEncoding | NotAcceptable):
            extra += _ACCEPTED
        return Response(status, CONTENT_TYPE, extra, error_body(error.message))


_INFERENCE: Final[Mapping[Verb, Method]] = {
    Verb.PREDICT: "predict",
    Verb.CLASSIFY: "classify",
    Verb.REGRESS: "regress",
}


class _Apart:
    """A request whose body is read in a process of its own, until the router has it."""

    __slots__ = ("_execution", "_forms", "_headers", "_now", "_reading", "_respond", "_service",
                 "_verb", "_version")  # fmt: skip

    def __init__(
        self,
        service: Service,
        version: VersionCodecs,
        verb: Verb,
        headers: Mapping[bytes, bytes],
        now: float,
        respond: Respond,
        forms: Forms | None,
    ) -> None:
        self._service = service
        self._version = version
        self._verb = verb
        self._headers = headers
        self._now = now
        self._respond = respond
        self._forms = forms
        self._reading: Reading | None = None
        self._execution: Execution | None = None

    @classmethod
    def begin(
        cls,
        service: Service,
        version: VersionCodecs,
        verb: Verb,
        body: bytes | bytearray,
        headers: Mapping[bytes, bytes],
        now: float,
        respond: Respond,
        forms: Forms | None,
    ) -> _Apart:
        """Have the body read.

        Raises:
            ServingError: it cannot be taken.
        """
        apart = cls(service, version, verb, headers, now, respond, forms)
        deadline = now + _timeout_s(headers, version.served.deadline_s)
        apart._reading = service._room.read(
            _INFERENCE[verb], version.signatures, body, deadline, apart._done, forms
        )
        return apart

    def cancel(self) -> None:
        """The client has gone."""
        if self._execution is not None:
            self._service._router.cancel(self._execution)
        elif self._reading is not None:
            self._reading.cancel()

    def _done(self, outcome: Parsed | ServingError) -> None:
        try:
            if isinstance(outcome, ServingError):
                raise outcome
            self._execution = self._service._resume(
                self._version, self._verb, outcome, self._headers, self._now, self._respond,
                self._forms,
            )  # fmt: skip
        except ServingError as error:
            self._respond(self._service.refusal(error))
        except Exception:
            logger.exception("a request failed for a reason of our own")
            self._respond(self._service.refusal(Internal("internal error")))


def _timeout_s(headers: Mapping[bytes, bytes], default_s: float) -> float:
    text = headers.get(DEADLINE_HEADER)
    if text is None:
        return default_s
    if not text.isdigit() or len(text) > 9 or not 0 < int(text) <= _TIMEOUT_MS_MAX:
        raise InvalidArgument(
            f"{DEADLINE_HEADER.decode()} must be a whole number of milliseconds from 1 to "
            f"{_TIMEOUT_MS_MAX}"
        )
    return int(text) / 1000
