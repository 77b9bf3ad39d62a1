"""One client connection of the direct REST door: HTTP/1.1 parsed by httptools.

A request is a few attributes of its connection. Requests that a client pipelines are answered in
order, one at a time. What is refused here, before a request exists: bytes that are not HTTP,
headers or bodies over their bounds. Everything else is the service's.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from typing import TYPE_CHECKING, Final, cast

import httptools

from cluster.api import CONTENT_TYPE, error_body
from cluster.doors.heads import (
    CLOSES,
    STAYS,
    STAYS_OPEN,
    Request,
    learn,
    response_head,
)
from cluster.doors.patience import Patience, Phase
from cluster.doors.presence import ASK_S, abort_if_gone, say_nothing
from cluster.doors.service import Ongoing, Response

if TYPE_CHECKING:
    from cluster.doors.rest import RestDoor

__all__ = ["Connection"]

#: How long a refused client may go on sending before its connection is cut.
_LINGER_S: Final = 2.0
#: Bytes that may hold many requests are given to the parser so many at a time, and one such piece
#: a turn: a quarter of a megabyte can hold 14,000 requests, or 40,000 chunks.
_PIECE_BYTES: Final = 4096
_PIECE_LINES: Final = 256
_HEAD_TOO_LARGE: Final = "the request's headers are too large"


class Connection(asyncio.Protocol):
    """One client connection."""

    __slots__ = (
        "_body", "_busy", "_can_half_close", "_closing", "_connection", "_deaf", "_door",
        "_expects", "_fed", "_feeding", "_head_bytes", "_headers", "_held", "_in_body", "_is_head",
        "_kept", "_lingering", "_loop", "_messages", "_open", "_parser", "_patience", "_paused",
        "_pipelined", "_refusal", "_request", "_seen", "_service", "_silent", "_transport", "_url",
        "_waiting_bytes", "_whole",
    )  # fmt: skip

    def __init__(self, door: RestDoor) -> None:
        self._door = door
        self._service = door.service
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        # The message that is being received.
        self._open = False
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._head_bytes = 0
        self._in_body = False
        self._body: bytes | bytearray = b""
        self._expects = False
        self._seen = -1
        self._silent = 0
        #: the bytes in hand, while they began where a message begins
        self._whole: bytes | None = None
        #: bytes that wait for the parser, and how many of them it has had
        self._held = b""
        self._fed = 0
        self._feeding = False
        # The request in hand, and those that wait for it.
        self._busy = False
        #: what the router knows the request in hand by, for as long as it can be cancelled
        self._request: Ongoing | None = None
        self._connection = STAYS
        self._is_head = False
        self._pipelined: deque[Request] = deque()
        self._waiting_bytes = 0
        self._refusal: tuple[int, str, bytes] | None = None
        # How it behaves.
        self._messages = 0
        self._kept = 0
        self._patience = Patience(self._loop.time())
        # The end.
        self._can_half_close = True
        self._deaf = False
        self._closing = False
        self._paused = False
        self._lingering: asyncio.TimerHandle | None = None

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a place among the connections, or be refused one."""
        self._transport = cast(asyncio.Transport, transport)
        self._can_half_close = transport.get_extra_info("sslcontext") is None
        if not self._door.admit(self):
            self._refuse(503, "too many connections", b"retry-after: 1\r\n")
            return
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A client whose machine has vanished must not hold its place for ever.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def data_received(self, data: bytes) -> None:
        """Read requests."""
        self._door.stats.bytes_read += len(data)
        if self._deaf:
            return
        if not self._open and not self._held:
            end = data.find(b"\r\n\r\n") + 4
            known = self._door.known_heads.get(data[:end])
            if known is not None and len(data) == end + known.length and self._is_idle():
                # The parser is between two messages and need not see this one.
                self._busy = True
                self._messages += 1
                self._connection = STAYS
                self._is_head = False
                self._request = self._service.handle(
                    known.method, known.url, known.headers, data[end:], self.respond
                )
                return
            self._whole = data if known is None else None
        if self._held or (len(data) > _PIECE_BYTES and data.count(b"\n") > _PIECE_LINES):
            self._held = self._held[self._fed :] + data
            self._fed = 0
            self._feed_piece()
        else:
            self._feed(data)
            self._account()

    def _feed_piece(self) -> None:
        """Give the parser a piece of what is held; another one next turn, if it may."""
        transport, self._feeding = self._transport, False
        if transport is None or not self._held or self._paused or self._is_full():
            return
        # Of a body whose length is known, all that is there is one piece.
        left = int(self._headers.get(b"content-length", 0)) - len(self._body)
        end = self._fed + max(_PIECE_BYTES, left if self._open and self._in_body else 0)
        piece, self._fed = self._held[self._fed : end], end
        if end >= len(self._held):
            self._held = b""
            self._fed = 0
        self._feed(piece)
        self._account()
        if self._closing and not self._has_work():
            transport.close()
        self._settle()

    def _settle(self) -> None:
        """Read on, or not, whatever is the state of affairs."""
        transport = self._transport
        if transport is None or self._deaf or transport.is_closing():
            return
        if self._paused or self._held or self._is_full():
            transport.pause_reading()
        elif not self._closing:
            transport.resume_reading()
        if self._held and not (self._feeding or self._paused or self._is_full()):
            self._feeding = True
            self._loop.call_soon(self._feed_piece)

    def _feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # The request is served as plain HTTP/1.1; what follows it may be another protocol.
            self._door.flush()
            self._deaf = self._closing = True
            self._held = b""
            if not self._has_work() and self._transport is not None:
                self._transport.close()
        except httptools.HttpParserError as error:
            # A callback's own exception comes wrapped; a refusal was answered already.
            if not self._deaf:
                self._refuse(400, f"not a valid HTTP request: {error}")
        self._whole = None
        if self._open:
            self._check_progress(len(data))

    def _account(self) -> None:
        """Tell the door how many bytes of requests it keeps for this client."""
        begun = self._head_bytes + self._silent + len(self._body) if self._open else 0
        kept = self._waiting_bytes + len(self._held) - self._fed + begun
        if kept != self._kept:
            more, self._kept = kept - self._kept, kept
            if not self._door.may_keep(more) and more > 0:
                self._refuse(503, "too many requests are under way", b"retry-after: 1\r\n")

    def eof_received(self) -> bool:
        """Stay open for answers that are still to come."""
        # A half-closed client still wants its answers. (TLS knows no half of a connection.)
        self._door.flush()
        self._closing = True
        stays = self._has_work() and self._can_half_close
        if stays and self._transport is not None and self._parser.get_http_version() != "1.0":
            say_nothing(self._transport)
            self._loop.call_later(ASK_S, abort_if_gone, self._transport)
        return stays

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget everything."""
        self._transport = None
        self._pipelined.clear()
        if self._request is not None:
            request, self._request = self._request, None
            self._service.cancel(request)
        self._door.may_keep(-self._kept)
        self._kept = 0
        if self._lingering is not None:
            self._lingering.cancel()
        self._door.forget(self)

    def pause_writing(self) -> None:
        """Stop reading."""
        # A client that does not read its answers gets no more requests read or served.
        self._paused = True
        if self._transport is not None:
            self._transport.pause_reading()
            self._door.leave_unread(self, self._transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """Go on."""
        self._paused = False
        self._door.was_read(self)
        if self._pipelined:
            self._next()
        else:
            self._settle()

    # httptools callbacks

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._open = True
        self._url = b""
        self._headers = {}
        self._head_bytes = 0
        self._in_body = False
        self._body = b""
        self._expects = False
        self._seen = -1
        self._silent = 0

    def on_url(self, url: bytes) -> None:
        """Take a piece of the request line."""
        self._head_bytes += len(url)
        if self._head_bytes > self._door.limits.head_bytes_max:
            self._refuse(431, "the request line is too long")
            return
        self._url = self._url + url if self._url else url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, or a trailer."""
        # What is between and behind them, too: headers of no name and no value are bytes as well.
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > self._door.limits.head_bytes_max:
            self._refuse(431, _HEAD_TOO_LARGE)
            return
        if self._in_body:
            return  # a trailer: counted against the bound, and otherwise not believed
        name = name.lower()
        # A header given twice is one list, as the standard has it: nobody's last word counts.
        given = self._headers.get(name)
        self._headers[name] = value if given is None else b"%b, %b" % (given, value)

    def on_headers_complete(self) -> None:
        """Judge the announced body."""
        headers = self._headers
        self._in_body = True
        length = headers.get(b"content-length")
        coding = headers.get(b"transfer-encoding")
        if length is not None and int(length) > self._door.limits.body_bytes_max:
            self._refuse_body()
        elif coding is not None and coding.lower() != b"chunked":
            # The parser would take it for chunked, and somebody before us for something else.
            self._refuse(501, "the only transfer coding understood is chunked")
        elif b"expect" in headers:
            is_known = headers[b"expect"].lower() == b"100-continue"
            self._expects = is_known and self._parser.get_http_version() != "1.0"
            if not self._has_work():
                self._continue()

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        if self._deaf:
            return
        if not self._body:
            self._body = body
        else:
            if isinstance(self._body, bytes):
                self._body = bytearray(self._body)
            self._body += body
        if len(self._body) > self._door.limits.body_bytes_max:
            self._refuse_body()

    def on_message_complete(self) -> None:
        """Serve the request, or let it wait for its turn."""
        self._open = False
        self._expects = False
        self._messages += 1
        if self._deaf:
            return
        parser = self._parser
        connection = CLOSES
        if parser.should_keep_alive():
            # Only HTTP/1.0 is told so, and it must have asked for it.
            is_old = b"connection" in self._headers and parser.get_http_version() == "1.0"
            connection = STAYS_OPEN if is_old else STAYS
        request = (parser.get_method(), self._url, self._headers, self._body, connection)
        self._body, self._headers = b"", {}  # an idle connection keeps nothing of its last request
        if self._whole is not None and connection is STAYS:
            learn(self._door.known_heads, self._whole, *request[:3])
            self._whole = None
        if self._is_idle():
            self._serve(*request)
            return
        self._pipelined.append(Request(*request))
        self._waiting_bytes += len(request[3])
        if self._is_full() and self._transport is not None:
            self._transport.pause_reading()

    # Requests and answers

    def _is_idle(self) -> bool:
        return not (self._busy or self._pipelined or self._paused or self._closing)

    def _is_full(self) -> bool:
        limits = self._door.limits
        return (
            len(self._pipelined) >= limits.pipelined_max
            or self._waiting_bytes >= limits.body_bytes_max
        )

    def _has_work(self) -> bool:
        # Between an answer and the next request's turn none is in hand, but some wait.
        return self._busy or bool(self._pipelined) or bool(self._held)

    def _serve(
        self,
        method: bytes,
        url: bytes,
        headers: dict[bytes, bytes],
        body: bytes | bytearray,
        connection: bytes,
    ) -> None:
        self._busy = True
        self._connection = connection
        self._is_head = method == b"HEAD"
        self._request = self._service.handle(method, url, headers, body, self.respond)

    def respond(self, response: Response) -> None:
        """Write the one answer to the request in hand, then take the next."""
        transport = self._transport
        if transport is None:
            return
        self._request = None
        self._busy = False
        connection = self._connection
        if self._closing and not self._pipelined and self._refusal is None:
            connection = CLOSES
        status, content_type, headers, body = response
        head = response_head(status, content_type, connection)
        data = b"%b%bcontent-length: %d\r\n\r\n%b" % (
            head, headers, len(body), b"" if self._is_head else body,
        )  # fmt: skip
        self._door.write_soon(transport, data)
        if self._paused:
            self._door.leave_unread(self, len(data))
        if connection is CLOSES:
            self._door.flush()
            self._deaf = True
            self._pipelined.clear()
            self._held = b""
            transport.close()
        elif self._pipelined:
            self._loop.call_soon(self._next)
        elif self._refusal is not None:
            self._write_refusal(*self._refusal)
        elif self._expects:
            self._continue()

    def _next(self) -> None:
        transport = self._transport
        if not self._pipelined or self._busy or self._paused or transport is None:
            return
        request = self._pipelined.popleft()
        self._waiting_bytes -= len(request.body)
        self._account()
        if not self._pipelined:
            self._settle()
        self._serve(*request)

    def _continue(self) -> None:
        if self._expects and not self._deaf and self._transport is not None:
            self._expects = False
            self._door.flush()
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    # Refusals

    def _check_progress(self, nbytes: int) -> None:
        # The parser keeps an unfinished header or trailer to itself, however long it gets.
        if self._deaf:
            return
        seen = self._head_bytes + len(self._body)
        if seen != self._seen:
            self._seen = seen
            self._silent = 0
            return
        self._silent += nbytes
        if self._silent > self._door.limits.head_bytes_max:
            self._refuse(431, _HEAD_TOO_LARGE)

    def _refuse_body(self) -> None:
        limit = self._door.limits.body_bytes_max
        self._refuse(413, f"the request body is larger than the limit of {limit} bytes")

    def _refuse(self, status: int, reason: str, headers: bytes = b"") -> None:
        """Answer and close: what follows on this connection cannot be trusted to be a request."""
        if self._deaf or self._transport is None:
            return
        self._deaf = True
        self._held = self._body = b""
        self._door.may_keep(self._waiting_bytes - self._kept)
        self._kept = self._waiting_bytes
        self._door.service.count_refused(status)
        if self._has_work():  # requests that came before it get their answers first
            self._refusal = (status, reason, headers)
        else:
            self._write_refusal(status, reason, headers)

    def _write_refusal(self, status: int, reason: str, headers: bytes) -> None:
        transport = self._transport
        assert transport is not None
        self._door.flush()
        body = error_body(reason)
        head = response_head(status, CONTENT_TYPE, CLOSES) + headers
        transport.write(b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body))
        if self._closing or not self._door.may_linger(self):
            transport.close()
            return
        # Closing over bytes that were not read would reset the connection, and the client, still
        # sending, might never see why. So what it sends is read for a moment, and dropped.
        if self._can_half_close:
            transport.write_eof()
        transport.resume_reading()
        self._lingering = self._loop.call_later(_LINGER_S, transport.abort)

    # Patience

    def look(self, now: float) -> None:
        """Give up a client that keeps the door waiting."""
        transport = self._transport
        if transport is None:
            return
        if self._closing:
            abort_if_gone(transport)
        phase = self._phase(transport)
        moved = len(self._body)
        if phase is Phase.UNREAD:
            moved = -transport.get_write_buffer_size()
        door = self._door
        if not self._patience.is_over(phase, self._messages, moved, now, door.limits):
            return
        door.count_timed_out(phase)
        if phase is Phase.IDLE:
            transport.close()
        elif phase is Phase.UNREAD:
            transport.abort()
        else:
            self._refuse(408, f"the rest of the request's {phase} took too long")

    def _phase(self, transport: asyncio.Transport) -> Phase:
        if self._paused or transport.is_closing():
            return Phase.UNREAD
        if self._deaf or self._pipelined or self._held or self._expects:
            return Phase.BUSY
        if self._open:
            return Phase.BODY if self._in_body else Phase.HEAD
        return Phase.BUSY if self._busy else Phase.IDLE

    def close_when_idle(self) -> None:
        """Close now if no request is in hand or waits, else after the last answer."""
        self._door.flush()
        self._closing = True
        if not self._has_work() and self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()
