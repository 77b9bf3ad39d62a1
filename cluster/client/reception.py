"""One HTTP response, as its bytes come. Knows no socket.

httptools parses the head and chunked bodies. A body whose length is stated is received straight
into its own memory, so large tensors are copied once, by the kernel, and the arrays over them
belong to the caller alone.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import httptools

from batching.errors import DataLoss

__all__ = ["Reception", "Response"]

_SLAB_BYTES: Final = 64 << 10
_HEAD_BYTES_MAX: Final = 64 << 10
_TOO_LARGE: Final = "the answer is larger than the client takes"


class Response(NamedTuple):
    """A response that is whole. Header names are in small letters."""

    status: int
    headers: dict[str, str]
    body: bytearray


class Reception:
    """Receives one response after the other from a connection.

    Call `begin`, receive into `get_buffer`, tell `buffer_updated` how much it was, until there is
    a `response`.

    Args:
        body_bytes_max: a longer body is refused.

    Attributes:
        response: the response, once it is whole.
        keeps_open: whether the connection may be used again after it.
        has_begun: whether any of its bytes has come.
    """

    def __init__(self, body_bytes_max: int) -> None:
        self._body_bytes_max = body_bytes_max
        self._slab = memoryview(bytearray(_SLAB_BYTES))
        self.begin()

    def begin(self) -> None:
        """Expect the next response."""
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._head_bytes = 0
        self._body = bytearray()
        #: bytes of the body that have come, where its length is known
        self._filled = 0
        self._rest: memoryview | None = None
        self._length: int | None = None
        #: whether the head of the response, and not of an informative one, is whole
        self._has_head = False
        self.response: Response | None = None
        self.keeps_open = False
        self.has_begun = False

    def get_buffer(self) -> memoryview:
        """Where the next bytes go; never empty before there is a response."""
        return self._slab if self._rest is None else self._rest

    def buffer_updated(self, nbytes: int) -> None:
        """So many bytes were written to the start of what `get_buffer` gave.

        Raises:
            DataLoss: they are no HTTP response, or too many.
        """
        self.has_begun = True
        if self._rest is not None:
            self._filled += nbytes
            self._rest = self._rest[nbytes:]
            if not self._rest:
                self._finish()
            return
        if not self._has_head:
            # What the parser keeps of a header that does not end is counted, too.
            self._head_bytes += nbytes
            if self._head_bytes > _HEAD_BYTES_MAX + _SLAB_BYTES:
                raise DataLoss(_TOO_LARGE)
        try:
            self._parser.feed_data(self._slab[:nbytes])
        except httptools.HttpParserError as error:
            if isinstance(error.__context__, DataLoss):
                raise error.__context__ from None
            raise DataLoss(f"the answer is no HTTP response: {error}") from None
        length = self._length
        if length is not None and self.response is None and self._filled < length:
            self._rest = memoryview(self._body)[self._filled :]

    def eof(self) -> None:
        """The other side has closed. Where no length was said, that is the end of the body."""
        if (
            self.response is None
            and self._has_head
            and self._length is None
            and "transfer-encoding" not in self._headers
        ):
            self._finish()
            self.keeps_open = False

    # httptools callbacks

    def on_message_begin(self) -> None:
        """A response begins; one that is only informative may come before it."""
        if self.response is not None:
            raise DataLoss("more came than was asked for")
        self._headers = {}

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header."""
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """Set memory apart for a body whose length is known."""
        if self._parser.get_status_code() < 200:
            return
        self._has_head = True
        self.keeps_open = self._parser.should_keep_alive()
        length = self._headers.get("content-length")
        if length is not None and "transfer-encoding" not in self._headers:
            if int(length) > self._body_bytes_max:
                raise DataLoss(_TOO_LARGE)
            self._length = int(length)
            self._body = bytearray(self._length)

    def on_body(self, data: bytes) -> None:
        """Take a piece of the body."""
        if self._length is not None:
            self._body[self._filled : self._filled + len(data)] = data
            self._filled += len(data)
            return
        self._body += data
        if len(self._body) > self._body_bytes_max:
            raise DataLoss(_TOO_LARGE)

    def on_message_complete(self) -> None:
        """The response is whole, unless it was only informative."""
        if self._has_head:
            self._finish()

    def _finish(self) -> None:
        self._rest = None
        status = self._parser.get_status_code()
        self.response = Response(status, self._headers, self._body)
        self._body = bytearray()
