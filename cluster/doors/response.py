"""What every door prints: one value, made by the service or by what it asks."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Response"]


class Response(NamedTuple):
    """What a door prints. ``headers`` are complete header lines, CRLF included."""

    status: int
    content_type: str
    headers: bytes
    body: bytes
