"""How the batcher says no.

    ServingError (batching.errors)
    ├── InvalidArgument
    │   └── TicketTooLarge   more than the lane may ever hold: waiting would not help
    ├── FailedPrecondition
    │   ├── LaneBusy         a lane with work cannot be removed
    │   └── LaneExists       a lane is added once
    ├── ResourceExhausted
    │   ├── LaneFull         the lane is at its bound; `retry_after_ms` says when there may be room
    │   └── TooBusy          it would not be answered in time; says when one like it would
    └── Unavailable
        ├── LaneUnknown      this batcher has no such lane; another actor or epoch may
        └── LaneDraining     the lane ends what it has and takes no more

A ticket past its deadline is refused with `DeadlineExceeded` itself. A refused ticket is as it was:
it still belongs to the caller, who may offer it again.
"""

from __future__ import annotations

from batching.errors import (
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)

__all__ = [
    "LaneBusy",
    "LaneDraining",
    "LaneExists",
    "LaneFull",
    "LaneUnknown",
    "TicketTooLarge",
    "TooBusy",
]


class TicketTooLarge(InvalidArgument):
    """More rows or bytes than the lane may ever hold, so waiting would not help."""


class LaneBusy(FailedPrecondition):
    """A lane with rows that wait or run cannot be removed; drain it first."""


class LaneExists(FailedPrecondition):
    """The batcher has this lane already."""


class LaneFull(ResourceExhausted):
    """The lane is at its bound; `retry_after_ms` estimates when there is room."""


class TooBusy(ResourceExhausted):
    """The rows would not be answered in time; after `retry_after_ms` others like them would."""


class LaneUnknown(Unavailable):
    """The batcher has no such lane; a router with a newer table asks another actor."""


class LaneDraining(Unavailable):
    """The lane finishes what it has and takes no more."""
