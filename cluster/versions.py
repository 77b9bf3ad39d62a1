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

__all__ = [
    "TRANSITIONS",
    "Action",
    "ActionKind",
    "VersionSnapshot",
    "aspired",
    "availability_preserving",
    "resource_preserving",
]

_COMING: Final = frozenset({State.NEW, State.RESERVED, State.LOADING, State.WARMING})
_GOING: Final = frozenset({State.DRAINING, State.UNLOADING, State.ERROR})


class ActionKind(StrEnum):
    """What to do with a version."""

    LOAD = "load"  # begin its life
    CANCEL = "cancel"  # it is on its way, and no longer wanted
    DRAIN = "drain"  # stop serving it, then unload it
    REVIVE = "revive"  # serve it again: it was draining


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One thing to do."""

    kind: ActionKind
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSnapshot:
    """A version as a policy sees it.

    Attributes:
        version: its number.
        state: where it is in its life; None before its life, and where a failed life may be
            tried again.
        aspired: whether it should be loaded.
        ready: it is available, and every part of it can answer now.
    """

    version: int
    state: State | None
    aspired: bool
    ready: bool = False


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

    A version that is not aspired is drained only while another one is ready, aspired or not;
    only a servable that is no longer declared goes altogether. What cannot answer goes before
    what can, the old before the new; loads begin with the highest version.

    Args:
        snapshots: the versions of one servable, each once.
        removed: the servable is no longer declared; nothing of it is aspired.
    """
    assert not (removed and any(each.aspired for each in snapshots))
    ordered = sorted(snapshots, key=lambda each: each.version)
    ready = {each.version for each in ordered if each.ready}
    turned = _turned_back(ordered)
    if turned is not None:
        return turned
    leaving = [each for each in ordered if not each.aspired and each.state is State.AVAILABLE]
    for each in sorted(leaving, key=lambda each: (each.ready, each.version)):
        if removed or ready - {each.version}:
            return Action(kind=ActionKind.DRAIN, version=each.version)
    return _next_load(ordered)


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
    turned = _turned_back(ordered)
    if turned is not None:
        return turned
    may_come = any(each.aspired and each.state is not State.END for each in ordered)
    for each in ordered:
        if not each.aspired and each.state is State.AVAILABLE and (removed or may_come):
            return Action(kind=ActionKind.DRAIN, version=each.version)
    if any(not each.aspired and each.state in _GOING for each in ordered):
        return None
    return _next_load(ordered)


def _turned_back(ordered: Sequence[VersionSnapshot]) -> Action | None:
    """What is under way and no longer wanted, in either direction."""
    for each in ordered:
        if not each.aspired and each.state in _COMING:
            return Action(kind=ActionKind.CANCEL, version=each.version)
    for each in reversed(ordered):
        if each.aspired and each.state is State.DRAINING:
            return Action(kind=ActionKind.REVIVE, version=each.version)
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
}
