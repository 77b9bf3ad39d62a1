"""What the direct port counts. Plain integers; `cluster.metrics` prints them."""

from __future__ import annotations

import msgspec

__all__ = ["DoorStats", "LogStats", "ShadowStats"]


class DoorStats(msgspec.Struct, kw_only=True):
    """Counts of one door since its start, but for ``open``.

    Attributes:
        open: connections now.
        accepted: connections that got a place.
        refused: connections beyond the bound.
        timed_out_idle: connections closed because no request came.
        timed_out_head: because the rest of a request's headers did not.
        timed_out_body: because the rest of a request's body did not.
        timed_out_unread: because their answers were not taken.
        cut: connections closed because all answers not taken were too many bytes.
        bytes_read: of requests, as they came.
        bytes_written: of answers.
    """

    open: int = 0
    accepted: int = 0
    refused: int = 0
    timed_out_idle: int = 0
    timed_out_head: int = 0
    timed_out_body: int = 0
    timed_out_unread: int = 0
    cut: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


class ShadowStats(msgspec.Struct, kw_only=True):
    """Counts of the shadow copies for one candidate. Those that are under way are only due.

    Attributes:
        due: answered requests that were chosen.
        dropped: of these, not copied for want of room.
        agreed: copies with the same answer.
        differed: with another one.
        failed: with none: refused, late, or of another signature.
    """

    due: int = 0
    dropped: int = 0
    agreed: int = 0
    differed: int = 0
    failed: int = 0


class LogStats(msgspec.Struct, kw_only=True):
    """Counts of the request log of one servable. Those that wait to be written are only due.

    Attributes:
        due: requests that were chosen.
        unanswered: of these, those that were answered with an error; they are not kept.
        dropped: not kept, as too many or too large ones waited to be written.
        failed: not kept, as the file could not be written.
        written: kept.
    """

    due: int = 0
    unanswered: int = 0
    dropped: int = 0
    failed: int = 0
    written: int = 0
