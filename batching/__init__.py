"""Batching without I/O: lanes, buckets, deadlines, which batch next, and what becomes of tickets.

Pure and in virtual time: nothing here reads a clock, starts a thread, or knows Ray or JAX. See
README.md in this folder.
"""

from batching.baselines import (
    Aimd,
    EarliestDeadline,
    FairShare,
    FirstCome,
    LeastSlack,
    RoundRobin,
    Shrink,
)
from batching.batcher import LEAD_S, Batcher
from batching.buckets import Ladder, bucketize, shapes
from batching.costs import CostTable
from batching.effsafe import EffSafe
from batching.learning import advise, learn_batch_buckets, learn_buckets
from batching.policies import DEFAULT_POLICY, POLICIES, policy_named
from batching.policy import LaneView, Pick, Policy, Situation
from batching.refusals import (
    LaneBusy,
    LaneDraining,
    LaneExists,
    LaneFull,
    LaneUnknown,
    TicketTooLarge,
)
from batching.shares import Shares
from batching.telemetry import Distribution, Histogram
from batching.values import (
    Batch,
    Effect,
    Expired,
    Failed,
    Finished,
    LaneKey,
    LaneStats,
    OwnerStats,
    Part,
    Run,
    Shed,
    Stats,
    Tally,
    Ticket,
    TicketEvent,
    TicketState,
)

#: Whose package this is; checked at start (`cluster.ownership`).
__distribution__ = "shardserve"

__all__ = [
    "DEFAULT_POLICY",
    "LEAD_S",
    "POLICIES",
    "Aimd",
    "Batcher",
    "Batch",
    "CostTable",
    "Distribution",
    "EarliestDeadline",
    "EffSafe",
    "Effect",
    "Expired",
    "Failed",
    "FairShare",
    "Finished",
    "FirstCome",
    "Histogram",
    "Ladder",
    "LaneBusy",
    "LaneDraining",
    "LaneExists",
    "LaneFull",
    "LaneKey",
    "LaneStats",
    "LaneUnknown",
    "LaneView",
    "LeastSlack",
    "OwnerStats",
    "Part",
    "Pick",
    "Policy",
    "RoundRobin",
    "Run",
    "Shares",
    "Shed",
    "Shrink",
    "Situation",
    "Stats",
    "Tally",
    "Ticket",
    "TicketEvent",
    "TicketState",
    "TicketTooLarge",
    "advise",
    "bucketize",
    "learn_batch_buckets",
    "learn_buckets",
    "policy_named",
    "shapes",
]
