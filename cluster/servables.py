"""What the controller core remembers of servables: which versions they aspire, hold and have had.

Values and the questions that can be answered from them alone. Decides no step of a life; what it
remembers of each version is in `cluster.ledger`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from cluster.config import ServableConfig
from cluster.epochs import VersionStatus
from cluster.fleet import Fleet
from cluster.ledger import Version, is_whole
from cluster.lifecycle import State
from cluster.references import unfit
from cluster.signals import Listed
from cluster.traffic import Rollout, settle
from cluster.versions import VersionSnapshot, aspired

__all__ = ["Servable"]

_NO_ROLLOUT: Final = Rollout()
#: Statuses of versions that are gone, which a servable keeps for those who ask.
_ENDED_MAX: Final = 16


class Servable:
    """A servable and its versions.

    Attributes:
        config: what was declared last.
        removed: it is declared no longer.
        complete: versions of the latest listing that had any; None before the first.
        list_error: why the latest listing failed or is not believed, for people.
        list_at: when to list (again).
        policy_error: why the policy could not say which versions to load, for people.
        rollout: the labels, split and shadow copies that are in effect.
        versions: those that live, and failed ones that are aspired.
        ended: statuses of those that are gone, bounded.
        deadline_s: the longest deadline declared in this reign.
        needed: versions that those of other servables refer to.
        unfit: versions that labels may not move to, with why, for people.
    """

    __slots__ = (
        "_aspired",
        "complete",
        "config",
        "deadline_s",
        "ended",
        "list_at",
        "list_error",
        "needed",
        "policy_error",
        "removed",
        "rollout",
        "unfit",
        "versions",
    )

    def __init__(self, config: ServableConfig, *, removed: bool = False) -> None:
        self.config = config
        self.removed = removed
        self.complete: tuple[int, ...] | None = None
        self.list_error = ""
        self.policy_error = ""
        self.list_at = -math.inf
        self.rollout = Rollout()
        self.versions: dict[int, Version] = {}
        self.ended: dict[int, VersionStatus] = {}
        self.deadline_s = config.deadline_ms / 1000
        self.needed: frozenset[int] = frozenset()
        self.unfit: Mapping[int, str] = {}
        self._aspired: tuple[object, tuple[int, ...]] | None = None

    def declare(self, config: ServableConfig) -> None:
        """Take a new declaration; what failed under another one is tried again."""
        if config != self.config:
            self.try_again()
        self.config, self.removed = config, False
        self.deadline_s = max(self.deadline_s, config.deadline_ms / 1000)

    def take_listing(self, event: Listed) -> bool:
        """Note which versions there are; a listing that fails or is empty is not believed.

        Returns:
            Whether it says anything new. Policies of packages may change their minds without.
        """
        before = (self.list_error, self.complete)
        if event.error is not None:
            self.list_error = f"{event.error.code}: {event.error.message}"
        elif not event.versions:
            self.list_error = "the store lists no complete version"
        else:
            self.list_error = ""
            self.complete = tuple(sorted(set(event.versions)))
        return before != (self.list_error, self.complete) or bool(self.config.policy.registered)

    def try_again(self) -> None:
        """Forget the failures of versions, so that each has a new life."""
        for number in [n for n, v in self.versions.items() if v.state is State.END]:
            del self.versions[number]

    def aspired(self) -> tuple[int, ...]:
        """Versions that should be loaded, highest first: the policy's, and named or needed ones.

        Where a package's policy fails these are the ones that live: it loads and unloads nothing.
        """
        there = self.versions.keys() & self.needed
        if self.removed:
            return tuple(sorted(there, reverse=True))
        asked = (self.config, self.complete, self.needed)
        if self._aspired is not None and self._aspired[0] == asked:
            self.policy_error = ""
            return self._aspired[1]
        try:
            found = aspired(self.config.policy, self.complete or ())
        except Exception as error:  # of a package: it must not take the controller with it
            self.policy_error = f"{type(error).__name__}: {error}"
            return tuple(sorted(self.versions, reverse=True))
        self.policy_error = ""
        named = (self.config.rollout.versions | self.needed).intersection(self.complete or ())
        found = tuple(sorted(named.union(found, there), reverse=True))
        if self.config.policy.registered is None:
            self._aspired = (asked, found)
        return found

    @property
    def is_going(self) -> bool:
        """Whether it is no longer declared, and nobody refers to it."""
        return self.removed and not self.aspired()

    @property
    def is_at_rest(self) -> bool:
        """Whether no policy has anything to do: what is aspired is there whole, and nothing else.

        Most are, in most comparisons. Where actors of a version are lost it is still so: giving
        them what they held is no policy's business.
        """
        return (
            not self.removed
            and self.versions.keys() == set(self.aspired())
            and all(v.state is State.AVAILABLE and not v.idle for v in self.versions.values())
        )

    def settle_rollout(self, fleet: Fleet, servables: Mapping[str, Servable]) -> None:
        """Let what is declared about labels, split and shadow take effect, if it can now."""
        declared = _NO_ROLLOUT if self.removed else self.config.rollout
        if not declared and not self.rollout:
            return
        available = {n: v for n, v in self.versions.items() if v.state is State.AVAILABLE}
        whole = {number for number, version in available.items() if is_whole(version, fleet)}
        self.unfit = unfit(self, whole, servables)
        ready = whole - self.unfit.keys()
        self.rollout = settle(declared, self.rollout, ready, available.keys())

    def _held(self) -> set[int]:
        """Versions that serve something which is in effect, and stay until it has moved on."""
        if self.config.transition == "resource":
            return set()
        named = self.rollout.versions & self.versions.keys()
        return {number for number in named if self.versions[number].state is State.AVAILABLE}

    def snapshots(self, fleet: Fleet, now: float, room: object) -> list[VersionSnapshot]:
        """The versions as a policy sees them."""
        held, wanted = self._held(), self.aspired()
        found: list[VersionSnapshot] = []
        for number in sorted({*wanted, *self.versions}):
            snapshot = VersionSnapshot(
                version=number,
                state=self._state_for_policy(number, now, room),
                aspired=number in wanted,
                held=number in held,
            )
            version = self.versions.get(number)
            if version is not None:
                snapshot = replace(
                    snapshot,
                    ready=is_whole(version, fleet),
                    parts=version.parts,
                    idle=frozenset(version.idle),
                    live=version.live_actors(fleet),
                    back=version.may_come_back(fleet),
                )
            found.append(snapshot)
        return found

    def leaving(self) -> list[Version]:
        """Versions that answer, and go when what is aspired does."""
        wanted = self.aspired()
        return [
            version
            for number, version in sorted(self.versions.items())
            if version.state is State.AVAILABLE and number not in wanted
        ]

    def bury(self, version: Version) -> None:
        """Forget a life that has ended, keeping what a status request would show."""
        number = version.key[1]
        del self.versions[number]
        self.ended.pop(number, None)
        self.ended[number] = version.status("")
        while len(self.ended) > _ENDED_MAX:
            del self.ended[next(iter(self.ended))]

    def _state_for_policy(self, number: int, now: float, room: object) -> State | None:
        version = self.versions.get(number)
        if version is None or version.state is not State.END:
            return None if version is None else version.state
        due = version.retry_at is not None and now >= version.retry_at
        return None if due or version.blocked not in (None, room) else State.END
