"""Batching without I/O: lanes, buckets, deadlines, which batch next, and what becomes of tickets.

Pure and in virtual time: nothing here reads a clock, starts a thread, or knows Ray or JAX. See
README.md in this folder.
"""

from batching.batcher import Batcher
from batching.buckets import Ladder, bucketize, shapes
from batching.policy import LaneView, Policy, RoundRobin
from batching.refusals import (
    LaneBusy,
    LaneDraining,
    LaneExists,
    LaneFull,
    LaneUnknown,
    TicketTooLarge,
)
from batching.values import (
    Batch,
    Effect,
    Expired,
    Failed,
    Finished,
    LaneKey,
    LaneStats,
    Part,
    Run,
    Stats,
    Ticket,
    TicketEvent,
    TicketState,
)

#: Whose package this is; checked at start (`cluster.ownership`).
__distribution__ = "shardserve"

__all__ = [
    "Batcher",
    "Batch",
    "Effect",
    "Expired",
    "Failed",
    "Finished",
    "Ladder",
    "LaneBusy",
    "LaneDraining",
    "LaneExists",
    "LaneFull",
    "LaneKey",
    "LaneStats",
    "LaneUnknown",
    "LaneView",
    "Part",
    "Policy",
    "RoundRobin",
    "Run",
    "Stats",
    "Ticket",
    "TicketEvent",
    "TicketState",
    "TicketTooLarge",
    "bucketize",
    "shapes",
]
