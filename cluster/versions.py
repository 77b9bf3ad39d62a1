"""Which versions should be loaded, and what to do next about one servable.

Pure, idempotent functions from snapshots to at most one action; a declaration names the one that
is asked (`TRANSITIONS`). They do not know actors, epochs or time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from cluster.config import Registered, Transition, VersionPolicy
from cluster.lifecycle import State
from cluster.registered import POLICIES, checked_versions
from cluster.rolling import Parts, given_up

__all__ = [
    "TRANSITIONS",
    "Action",
    "ActionKind",
    "VersionSnapshot",
    "aspired",
    "availability_preserving",
    "resource_preserving",
    "shard_rolling",
]

_COMING: Final = frozenset({State.NEW, State.RESERVED, State.LOADING, State.WARMING})
_GOING: Final = frozenset({State.DRAINING, State.UNLOADING, State.ERROR})


class ActionKind(StrEnum):
    """What to do with a version."""

    LOAD = "load"  # begin its life
    CANCEL = "cancel"  # it is on its way, and no longer wanted
    DRAIN = "drain"  # stop serving it, then unload it
    REVIVE = "revive"  # serve it again: it was draining
    GIVE_UP = "give up"  # serve it no longer from one of its actors, which unloads it
    SPREAD = "spread"  # serve it from all of its actors (again)


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One thing to do.

    Attributes:
        kind: what.
        version: with which version.
        actor: on which actor, for what concerns one.
    """

    kind: ActionKind
    version: int
    actor: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSnapshot:
    """A version as a policy sees it.

    Attributes:
        version: its number.
        state: where it is in its life; None before its life, and where a failed life may be
            tried again.
        aspired: whether it should be loaded.
        ready: it is available, and every part of it can answer now.
        held: a label, split or shadow copies that are in effect name it.
        parts: for each part the actors that it is placed on.
        idle: those of them that should not hold it now.
        live: those that have loaded it.
        back: those that are idle and can be told at once to hold it.
    """

    version: int
    state: State | None
    aspired: bool
    ready: bool = False
    held: bool = False
    parts: Parts = ()
    idle: frozenset[str] = frozenset()
    live: frozenset[str] = frozenset()
    back: frozenset[str] = frozenset()

    @property
    def actors(self) -> frozenset[str]:
        """Those that should hold it."""
        return frozenset(actor for part in self.parts for actor in part) - self.idle


def aspired(policy: VersionPolicy, complete: Iterable[int]) -> tuple[int, ...]:
    """The versions that should be loaded, highest first.

    Args:
        policy: what was declared.
        complete: the versions in the store that are whole.

    Raises:
        FailedPrecondition: the policy is of a package that is not installed here.
        Exception: whatever a package's policy raises.
    """
    found = sorted(set(complete), reverse=True)
    if policy.registered is not None:
        return _registered(policy.registered, found)
    if policy.latest is not None:
        return tuple(found[: policy.latest])
    if policy.specific:
        return tuple(version for version in found if version in policy.specific)
    return tuple(found)


def _registered(declared: Registered, found: list[int]) -> tuple[int, ...]:
    policy = POLICIES.get(declared.name)
    wanted = checked_versions(
        policy(tuple(reversed(found)), dict(declared.options)), f"version policy {declared.name!r}"
    )
    return tuple(version for version in found if version in wanted)


def availability_preserving(
    snapshots: Sequence[VersionSnapshot], *, removed: bool = False
) -> Action | None:
    """Load before unloading: a servable that answers goes on answering.

    A version that is neither aspired nor held is drained only while another one is ready, aspired
    or not; only a servable that is no longer declared goes altogether. What cannot answer goes
    before what can, the old before the new; loads begin with the highest version.

    Args:
        snapshots: the versions of one servable, each once.
        removed: the servable is no longer declared; nothing of it is aspired.
    """
    assert not (removed and any(each.aspired for each in snapshots))
    ordered = sorted(snapshots, key=lambda each: each.version)
    return (
        _placed_otherwise(ordered)
        or _turned_back(ordered)
        or _next_drain(ordered, removed)
        or _next_load(ordered)
    )


def resource_preserving(
    snapshots: Sequence[VersionSnapshot], *, removed: bool = False
) -> Action | None:
    """Unload before loading: never room for two, and no answers in between.

    A version that is not aspired goes as soon as one is aspired that may come or is there; loads
    wait until nothing is on its way out. With nothing to come, what serves stays: an empty listing
    or a version that has failed for good takes nothing away.

    Args:
        snapshots: the versions of one servable, each once.
        removed: the servable is no longer declared; nothing of it is aspired.
    """
    assert not (removed and any(each.aspired for each in snapshots))
    ordered = sorted(snapshots, key=lambda each: each.version)
    turned = _placed_otherwise(ordered) or _turned_back(ordered)
    if turned is not None:
        return turned
    may_come = any(each.aspired and each.state is not State.END for each in ordered)
    for each in ordered:
        if not each.aspired and each.state is State.AVAILABLE and (removed or may_come):
            return Action(kind=ActionKind.DRAIN, version=each.version)
    if any(not each.aspired and each.state in _GOING for each in ordered):
        return None
    return _next_load(ordered)


def shard_rolling(snapshots: Sequence[VersionSnapshot], *, removed: bool = False) -> Action | None:
    """Unload before loading, on one actor at a time, and answer from the others meanwhile.

    As `availability_preserving`, for a version that is placed where others have to give way
    (`cluster.rolling`). They give up an actor when the new one has been loaded on every actor that
    they gave up before, and no part of them loses its last copy that answers.

    Args:
        snapshots: the versions of one servable, each once.
        removed: the servable is no longer declared; nothing of it is aspired.
    """
    assert not (removed and any(each.aspired for each in snapshots))
    ordered = sorted(snapshots, key=lambda each: each.version)
    return (
        _turned_back(ordered)
        or _next_drain(ordered, removed)
        or _next_given_up(ordered)
        or _next_load(ordered)
    )


def _next_drain(ordered: Sequence[VersionSnapshot], removed: bool) -> Action | None:
    ready = {each.version for each in ordered if each.ready}
    leaving = [
        each
        for each in ordered
        if not (each.aspired or each.held) and each.state is State.AVAILABLE
    ]
    for each in sorted(leaving, key=lambda each: (each.ready, each.version)):
        if removed or ready - {each.version}:
            return Action(kind=ActionKind.DRAIN, version=each.version)
    return None


def _next_given_up(ordered: Sequence[VersionSnapshot]) -> Action | None:
    leaving = [each for each in ordered if not each.aspired and each.state is State.AVAILABLE]
    coming = [
        each for each in ordered if each.aspired and each.state in (State.LOADING, State.WARMING)
    ]
    missing = frozenset(actor for each in coming for actor in each.actors - each.live)
    held = frozenset(actor for each in leaving for actor in each.actors)
    if missing - held:
        return None
    for actor in sorted(missing & given_up(part for each in leaving for part in each.parts)):
        for each in leaving:
            if actor in each.actors and _can_spare(each, actor):
                return Action(kind=ActionKind.GIVE_UP, version=each.version, actor=actor)
    return None


def _can_spare(snapshot: VersionSnapshot, actor: str) -> bool:
    """Whether no part that answers would cease to."""
    for part in snapshot.parts:
        rest = [each for each in part if each != actor and each not in snapshot.idle]
        answers = snapshot.live.intersection(part) - snapshot.idle
        if not rest or (answers and answers.isdisjoint(rest)):
            return False
    return True


def _placed_otherwise(ordered: Sequence[VersionSnapshot]) -> Action | None:
    """What is under way to where others were to give way, as versions no longer do.

    Its load would find them there. It begins anew, and is placed as is declared now; what has been
    given up for it comes back, or goes with the rest.
    """
    for each in ordered:
        if each.idle and each.state in _COMING:
            return Action(kind=ActionKind.CANCEL, version=each.version)
    return None


def _turned_back(ordered: Sequence[VersionSnapshot]) -> Action | None:
    """What is under way and no longer wanted, in either direction."""
    for each in ordered:
        if not each.aspired and each.state in _COMING:
            return Action(kind=ActionKind.CANCEL, version=each.version)
    for each in reversed(ordered):
        if each.aspired and each.state is State.DRAINING:
            return Action(kind=ActionKind.REVIVE, version=each.version)
    is_coming = any(each.aspired and each.state in _COMING for each in ordered)
    for each in reversed(ordered):
        wanted = each.aspired or not is_coming
        if wanted and each.state is State.AVAILABLE and each.back:
            return Action(kind=ActionKind.SPREAD, version=each.version)
    return None


def _next_load(ordered: Sequence[VersionSnapshot]) -> Action | None:
    for each in reversed(ordered):
        if each.aspired and each.state is None:
            return Action(kind=ActionKind.LOAD, version=each.version)
    return None


#: What a declaration may name, see `cluster.settings.Transition`.
TRANSITIONS: Final[Mapping[Transition, Callable[..., Action | None]]] = {
    "availability": availability_preserving,
    "resource": resource_preserving,
    "shard-rolling": shard_rolling,
}
