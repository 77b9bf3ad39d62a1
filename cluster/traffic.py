"""Which version answers: labels, the split of requests, shadow copies; and when that may change.

A declaration names versions that may not be there yet. So there are two of everything: what is
declared, and what is in effect. `settle` takes the one to the other in a single step, when every
version that is named can answer; until then what was in effect goes on, whole. Nothing here knows
actors, epochs, requests or time.

A target of a split or of shadow copies is a label, or a version written in digits; a label is
never only digits, so the two cannot be taken for one another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final

from cluster.fields import FieldError, check_at_least

__all__ = ["Rollout", "Shadow", "check_rollout", "is_version", "settle", "version_of"]

_LABEL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_LABELS_MAX: Final = 64
_TARGETS_MAX: Final = 16
_WEIGHT_MAX: Final = 1_000_000
#: One of int64; anything longer is a mistake, and slow to read.
_DIGITS_MAX: Final = 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Shadow:
    """Copies of requests for a candidate, whose answers are compared, counted and dropped.

    Attributes:
        to: the candidate: a label, or a version in digits.
        percent: of the requests that other versions of the servable answer.
        tolerance: by how much numbers may differ, absolutely or relatively, and still agree; 0
            asks for the same bits.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    to: str
    percent: float = 100.0
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise FieldError("percent", f"must be above 0 and at most 100, got {self.percent}")
        check_at_least(self, 0, "tolerance")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """Labels, split and shadow copies of one servable, declared or in effect.

    Attributes:
        labels: to versions.
        split: targets to weights, of requests that name neither version nor label; empty sends
            them to the newest.
        shadow: copies, or None.
    """

    labels: dict[str, int] = field(default_factory=dict)
    split: dict[str, int] = field(default_factory=dict)
    shadow: Shadow | None = None

    def __bool__(self) -> bool:
        return bool(self.labels or self.split or self.shadow)

    @property
    def versions(self) -> frozenset[int]:
        """Every version that is named, as far as its label has one."""
        return frozenset(self.users())

    def users(self) -> dict[int, list[str]]:
        """Version to what names it, in words."""
        found: dict[int, list[str]] = {}
        for text, target in self._uses():
            version = version_of(target, self.labels)
            if version is not None and text not in found.setdefault(version, []):
                found[version].append(text)
        return found

    def _uses(self) -> Iterator[tuple[str, str]]:
        for label, version in self.labels.items():
            yield f"label {label}", str(version)
        for target in self.split:
            yield "the split", target
        if self.shadow is not None:
            yield "shadow copies", self.shadow.to


def is_version(target: str) -> bool:
    """Whether a target is a version, and not a label."""
    return target.isascii() and target.isdigit()


def version_of(target: str, labels: Mapping[str, int]) -> int | None:
    """The version that a target means; None for a label that has none."""
    return int(target) if is_version(target) else labels.get(target)


def check_rollout(rollout: Rollout, specific: tuple[int, ...]) -> None:
    """Refuse what cannot be meant.

    Args:
        rollout: as declared.
        specific: the versions that its policy names, empty where it names none.

    Raises:
        FieldError: with the path below the servable.
    """
    _check_sizes(rollout)
    for label, version in rollout.labels.items():
        path = f"labels.{label}"
        if is_version(label):
            raise FieldError(path, "only digits: that is a version; a label needs a letter")
        if _LABEL.fullmatch(label) is None:
            raise FieldError(
                path,
                "is not a label; use letters, digits, '.', '_' and '-', at most 128, and begin "
                "with a letter or a digit",
            )
        _check_version(path, version, specific)
    for target, weight in rollout.split.items():
        path = f"split.{target}"
        _check_target(path, target, rollout, specific)
        if not 0 <= weight <= _WEIGHT_MAX:
            raise FieldError(path, f"a weight is from 0 to {_WEIGHT_MAX}, got {weight}")
    if rollout.split and not any(rollout.split.values()):
        raise FieldError("split", "every weight is 0; give one that is not")
    if rollout.shadow is not None:
        _check_target("shadow.to", rollout.shadow.to, rollout, specific)


def _check_sizes(rollout: Rollout) -> None:
    for name, found, most in (
        ("labels", rollout.labels, _LABELS_MAX),
        ("split", rollout.split, _TARGETS_MAX),
    ):
        if len(found) > most:
            raise FieldError(name, f"at most {most}, got {len(found)}")


def _check_target(path: str, target: str, rollout: Rollout, specific: tuple[int, ...]) -> None:
    if not is_version(target):
        if target not in rollout.labels:
            known = ", ".join(sorted(rollout.labels)) or "none"
            raise FieldError(path, f"neither a version nor a declared label; labels are: {known}")
    elif len(target) > _DIGITS_MAX or target != str(int(target)):
        raise FieldError(path, "a version is written in decimal, without leading zeros")
    else:
        _check_version(path, int(target), specific)


def _check_version(path: str, version: int, specific: tuple[int, ...]) -> None:
    if version < 1:
        raise FieldError(path, f"a version is at least 1, got {version}")
    if specific and version not in specific:
        listed = ", ".join(map(str, sorted(specific)))
        raise FieldError(path, f"version {version} is not in policy.specific ({listed}); add it")


def settle(declared: Rollout, current: Rollout, ready: Set[int], available: Set[int]) -> Rollout:
    """What is in effect from now on.

    A change is made whole, once every version that it names is ready. Until then nothing that is
    in effect moves; what was not there before (a first label, a first split) begins with those of
    its versions that are ready, since there is nothing that it could take away.

    Args:
        declared: what should be.
        current: what is in effect.
        ready: versions whose every part can answer.
        available: versions that an epoch may name, ready or not.
    """
    if declared.versions <= ready:
        return declared
    labels = {name: version for name, version in current.labels.items() if version in available}
    for name, version in declared.labels.items():
        if version in ready:
            labels.setdefault(name, version)
    return replace(current, labels=labels, split=current.split or declared.split)
