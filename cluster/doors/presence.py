"""Whether a client that sends no more is still there for its answer.

The end of what a client sends looks the same whether it only closed its half or is gone: a killed
process closes its connections. What tells them apart is a word to it, which a client that is gone
refuses. HTTP has a word that means nothing: an interim response, which every client of HTTP/1.1
must be able to skip.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Final

__all__ = ["ASK_S", "abort_if_gone", "say_nothing"]

#: How long an answer to the word may take before it is looked for.
ASK_S: Final = 0.1
_TCP_CLOSE: Final = 7


def say_nothing(transport: asyncio.Transport) -> None:
    """Send the word."""
    transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def abort_if_gone(transport: asyncio.Transport) -> None:
    """Close at once if the client has refused what was sent to it."""
    sock = None if transport.is_closing() else transport.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        state: bytes = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        if state[0] == _TCP_CLOSE:
            transport.abort()
