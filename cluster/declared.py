"""The controller's durable memory: what was declared, and where versions were placed.

One JSON document per change, numbered by (term, seq); the highest wins and is the truth. Declared
state says what should be; rollouts say which labels and splits were in effect, so that a new
controller does not take away what waits for its successor; placements say which part of a version
was ordered onto which actor, so that a new controller adopts what actors still hold instead of
loading it again.

Decides the document's form and how a reign begins. Does not know how a store keeps bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

import msgspec

from batching.errors import DataLoss, FailedPrecondition
from cluster.config import Config, ConfigInvalid, dump, undump
from cluster.placement import Copies
from cluster.shifts import Shift
from cluster.traffic import Rollout

__all__ = ["SCHEMA", "DeclaredState", "Placed", "StateStore", "claim", "decode", "encode", "write"]

SCHEMA: Final = 4


class StateStore(Protocol):
    """What is needed of a store; `shards.store.LocalStore` is one."""

    def put_state(self, cluster: str, term: int, seq: int, data: bytes) -> None:
        """Keep durably; refuses (FailedPrecondition) what is not after the latest."""

    def latest_state(self, cluster: str) -> tuple[int, int, bytes] | None:
        """The state of the highest (term, seq)."""

    def next_term(self, cluster: str) -> int:
        """A term that nobody had."""


class Placed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A version and where its parts were ordered.

    Attributes:
        servable: its name.
        version: its number.
        available: whether routing epochs named it.
        units: local unit name to its copies, see `cluster.placement.Copies`.
        idle: those of the actors that it has given up, or is to get later.
        moves: actor to the one whose place it takes, see `cluster.moving`.
        shift: parts of it that go from one actor to another, see `cluster.shifts`.
    """

    servable: str
    version: int
    available: bool
    units: dict[str, Copies]
    idle: tuple[str, ...] = ()
    moves: dict[str, str] = {}
    shift: Shift | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredState:
    """One durable state.

    Attributes:
        term: the reign that wrote it.
        seq: counts the states of a reign.
        config: what was declared, None before anything was.
        placements: versions whose parts actors may hold, by name and version.
        rollouts: servable to labels, split and shadow copies that were in effect.
        drained: nodes on which no actor should be.
        rebalancing: tables are being made even over the actors.
    """

    term: int
    seq: int
    config: Config | None = None
    placements: tuple[Placed, ...] = ()
    rollouts: Mapping[str, Rollout] = field(default_factory=dict)
    drained: tuple[str, ...] = ()
    rebalancing: bool = False


def encode(state: DeclaredState) -> bytes:
    """The state as JSON; equal states are equal bytes."""
    document = {
        "schema": SCHEMA,
        "term": state.term,
        "seq": state.seq,
        "config": None if state.config is None else msgspec.Raw(dump(state.config)),
        "placements": msgspec.to_builtins(state.placements),
        "rollouts": msgspec.to_builtins(state.rollouts),
        "drained": list(state.drained),
        "rebalancing": state.rebalancing,
    }
    # Not by `json`, which indents in Python; a start of hundreds of servables keeps many states.
    return msgspec.json.format(msgspec.json.encode(document, order="sorted"), indent=1) + b"\n"


def decode(data: bytes) -> DeclaredState:
    """The state back.

    Raises:
        DataLoss: the bytes are not a state.
        FailedPrecondition: the state was written by a newer version of this software.
    """
    try:
        document = json.loads(data)
        schema = document["schema"]
        if not isinstance(schema, int):
            raise TypeError(f"schema {schema!r} is not a number")
        if schema > SCHEMA:
            raise FailedPrecondition(
                f"the cluster's state has schema {schema}, this software reads up to {SCHEMA}; "
                "upgrade it"
            )
        config = document["config"]
        return DeclaredState(
            term=int(document["term"]),
            seq=int(document["seq"]),
            config=None if config is None else undump(json.dumps(config).encode()),
            placements=msgspec.convert(document["placements"], tuple[Placed, ...]),
            # Schema 1 had none.
            rollouts=msgspec.convert(document.get("rollouts", {}), dict[str, Rollout]),
            # Neither schema 1 nor the first states of schema 3 had any, and none before 4 the next.
            drained=msgspec.convert(document.get("drained", ()), tuple[str, ...]),
            rebalancing=msgspec.convert(document.get("rebalancing", False), bool),
        )
    except (ValueError, TypeError, KeyError, ConfigInvalid) as error:
        raise DataLoss(f"the cluster's durable state does not parse: {error}") from error


def claim(store: StateStore, cluster: str) -> DeclaredState:
    """Begin a reign: take a term that nobody had, and what the last reign left.

    The state that is returned is written already, so any controller of a lower term that still
    writes is refused from here on.

    Raises:
        DataLoss: the latest state does not parse. Nothing is guessed: serving goes on without a
            controller until a person has looked.
        FailedPrecondition: another controller claimed a higher term in between.
    """
    term = store.next_term(cluster)
    latest = store.latest_state(cluster)
    if latest is None:
        state = DeclaredState(term=term, seq=0)
    else:
        found_term, found_seq, data = latest
        found = decode(data)
        if (found.term, found.seq) != (found_term, found_seq):
            raise DataLoss(
                f"state {found_term}-{found_seq} of cluster {cluster!r} says that it is "
                f"{found.term}-{found.seq}"
            )
        state = replace(found, term=term, seq=0)
    write(store, cluster, state)
    return state


def write(store: StateStore, cluster: str, state: DeclaredState) -> None:
    """Keep a state durably.

    Raises:
        FailedPrecondition: a later state is there: another controller reigns.
    """
    store.put_state(cluster, state.term, state.seq, encode(state))
