"""Which version every reference means: units of other servables, as bundles name them.

A version that refers to others is *bound*: each reference has a target, a unit that another version
has on actors. It is placed and loaded without these, and answers with them; one epoch says where
all are, so a label that moves takes everybody who refers to it along in the epoch in which it
moves. It does not move to a version that one of them could not use. Targets are needed as long as
somebody is bound to them: they count as aspired, and are neither drained nor unloaded before
(`cluster.servables.Servable.needed`).

Pure: decides what references mean and who is needed, from what servables declare, have and serve.
Takes no step of a life, knows no actors, epochs or time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from batching.errors import FailedPrecondition, NotFound, ServingError
from cluster.lifecycle import State
from shards.manifest import Manifest, Reference, Unit
from shards.references import bound, check_fit, named

if TYPE_CHECKING:
    from cluster.fleet import Key
    from cluster.ledger import Version
    from cluster.servables import Servable

__all__ = [
    "DEPTH_MAX",
    "Bound",
    "NotDeclared",
    "NotYet",
    "Settled",
    "Target",
    "needed",
    "resolve",
    "settle",
    "unfit",
]

#: How many servables may refer to one another in a row.
DEPTH_MAX: Final = 8

#: In these a version keeps what it is bound to: requests may be using it, or soon will.
_BOUND: Final = frozenset(
    {State.RESERVED, State.LOADING, State.WARMING, State.AVAILABLE, State.DRAINING}
)
#: In these it follows labels that move.
_FOLLOWING: Final = _BOUND - {State.DRAINING}


class NotDeclared(NotFound):
    """A reference means a servable, version or label that nobody declares or has saved."""


class NotYet(Exception):
    """A reference means something that is not there yet; says in words what is waited for."""


class Target(NamedTuple):
    """A unit that some version has itself.

    Attributes:
        key: servable and version.
        unit: its name there.
    """

    key: Key
    unit: str


@dataclass(frozen=True, slots=True)
class Bound:
    """What the references of a version mean.

    Attributes:
        targets: by the local name of each reference.
        through: every version that is needed for that, those between included.
        manifest: of the version that refers, with the units in their places.
    """

    targets: Mapping[str, Target]
    through: frozenset[Key]
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Settled:
    """What came of binding everybody.

    Attributes:
        refused: versions that cannot be bound, with why.
        mended: versions that could not be when they ended, and now might.
    """

    refused: list[tuple[Version, ServingError]] = field(default_factory=list)
    mended: list[Version] = field(default_factory=list)


def settle(servables: Mapping[str, Servable]) -> Settled:
    """Bind every version that refers to others to what its references mean now.

    One that is bound stays so where they mean nothing any more: what answers goes on answering.
    """
    referring = list(_referring(servables))
    if not referring:
        for servable in servables.values():
            servable.needed = frozenset()
        return Settled()
    # Who refers to one that refers to others is bound by what that is bound to.
    for _ in range(DEPTH_MAX):
        if not any([_rebind(version, servables) for version in referring]):
            break
    found = Settled()
    for version in referring:
        if version.state is State.NEW and (error := _refusal(version, servables)) is not None:
            found.refused.append((version, error))
        elif version.state is State.END and _is_mended(version, servables):
            found.mended.append(version)
    wanted = needed(referring)
    for name, servable in servables.items():
        servable.needed = wanted.get(name, frozenset())
    return found


def resolve(
    version: Version, servables: Mapping[str, Servable], *, must_answer: bool = True
) -> Bound:
    """What the references of a version mean now.

    Args:
        version: whose manifest has been read.
        servables: all that are known.
        must_answer: whether it has to be available.

    Raises:
        NotYet: something that is meant is still to come.
        NotFound: there is no such servable, version, label or unit.
        SpecMismatch: a unit is not what it is relied on to be.
        FailedPrecondition: servables refer to one another in a circle, or too many in a row.
    """
    manifest = version.manifest
    assert manifest is not None, version.key
    # Circles first: those in one would wait for one another.
    _height(version, servables, (), {})
    targets: dict[str, Target] = {}
    units: dict[str, Unit] = {}
    through: set[Key] = set()
    awaited: list[str] = []
    for name, reference in manifest.references.items():
        meant = _meant(reference, servables)
        found = _unit(reference, meant)
        through.add(meant.key)
        target = Target(meant.key, reference.unit)
        if isinstance(found, Reference):
            if meant.bound is None:
                raise NotYet(_awaited(meant))
            target = meant.bound.targets[reference.unit]
            through |= meant.bound.through
            found = meant.bound.manifest.units[reference.unit]
        targets[name], units[name] = target, found
        if must_answer and meant.state is not State.AVAILABLE:
            awaited.append(_awaited(meant))
    if awaited:
        raise NotYet("; ".join(awaited))
    return Bound(targets, frozenset(through), bound(manifest, units))


def needed(versions: Iterable[Version]) -> dict[str, frozenset[int]]:
    """Servable to the versions that these need of it, whatever its own policy says."""
    found: dict[str, set[int]] = {}
    for version in versions:
        if version.state in _FOLLOWING or version.state is State.NEW:
            assert version.manifest is not None
            for reference in version.manifest.references.values():
                if reference.version is not None:
                    found.setdefault(reference.servable, set()).add(reference.version)
        if version.state in _BOUND and version.bound is not None:
            for servable, number in version.bound.through:
                found.setdefault(servable, set()).add(number)
    return {name: frozenset(numbers) for name, numbers in found.items()}


def unfit(
    servable: Servable, numbers: Collection[int], servables: Mapping[str, Servable]
) -> dict[int, str]:
    """Versions on which a declared label may not be, since who refers to the label needs another.

    Args:
        servable: whose labels are to move.
        numbers: the versions to look at.
        servables: all that are known.

    Returns:
        The version to why, in words.
    """
    name, labels = servable.config.name, servable.config.labels
    found: dict[int, str] = {}
    if not labels:
        return found
    for version in _referring(servables):
        # One that is being drained may be served again.
        if version.state not in _BOUND or version.manifest is None:
            continue
        for reference in version.manifest.references.values():
            number = labels.get(reference.label) if reference.servable == name else None
            if number is None or number not in numbers:
                continue
            try:
                _unit(reference, servable.versions[number])
            except (NotYet, ServingError) as error:
                found[number] = f"{_text(version.key)} cannot follow: {error}"
    return found


def _rebind(version: Version, servables: Mapping[str, Servable]) -> bool:
    """Bind one version; whether it is bound otherwise than before."""
    is_new = version.state is State.NEW
    if not is_new and version.state not in _FOLLOWING:
        return False
    found: Bound | None = None
    try:
        found = resolve(version, servables, must_answer=is_new or version.bound is not None)
    except NotYet as error:
        if is_new:
            version.note = f"waits for {error}"
    except ServingError:
        pass
    if found == version.bound or (found is None and not is_new):
        return False
    version.bound = found
    return True


def _refusal(version: Version, servables: Mapping[str, Servable]) -> ServingError | None:
    try:
        resolve(version, servables)
    except NotYet:
        pass
    except ServingError as error:
        return error
    return None


def _is_mended(version: Version, servables: Mapping[str, Servable]) -> bool:
    """Whether a version that was refused as it could not be bound has something to be bound to.

    What is not there any more, since nobody needs it now, says nothing of whether it fits.
    """
    if version.refused is None:
        return False
    try:
        resolve(version, servables, must_answer=False)
    except NotYet:
        return isinstance(version.refused, NotDeclared)
    except ServingError:
        return False
    return True


def _referring(servables: Mapping[str, Servable]) -> Iterable[Version]:
    for servable in servables.values():
        for version in servable.versions.values():
            if version.manifest is not None and version.manifest.references:
                yield version


def _height(
    version: Version,
    servables: Mapping[str, Servable],
    above: tuple[Key, ...],
    known: dict[Key, int],
) -> int:
    """How many servables refer to one another in a row from this one on.

    Raises:
        FailedPrecondition: they come back to themselves, or are too many.
    """
    path = (*above, version.key)
    if version.key in above:
        circle = " -> ".join(map(_text, path[above.index(version.key) :]))
        raise FailedPrecondition(f"servables refer to one another in a circle: {circle}")
    if len(path) > DEPTH_MAX:
        row = " -> ".join(map(_text, path))
        raise FailedPrecondition(f"more than {DEPTH_MAX} servables refer to one another: {row}")
    if version.key in known and len(above) + known[version.key] <= DEPTH_MAX:
        return known[version.key]
    heights = [0]
    references = () if version.manifest is None else version.manifest.references.values()
    for reference in references:
        try:
            meant = _meant(reference, servables)
        except (NotYet, NotFound):
            continue  # whoever needs it says so
        heights.append(_height(meant, servables, path, known))
    known[version.key] = 1 + max(heights)
    return known[version.key]


def _meant(reference: Reference, servables: Mapping[str, Servable]) -> Version:
    """The version that a reference means."""
    servable = servables.get(reference.servable)
    going = None if servable is None else servable.versions.get(reference.version or 0)
    if servable is not None and going is not None and going.key[1] in servable.needed:
        # Whoever is bound to it goes on, and with it, if it refers to others by label.
        return going
    if servable is None or servable.removed:
        raise NotDeclared(f"{named(reference)}: no servable {reference.servable} is declared")
    number = reference.version
    if number is None:
        labels = {**servable.config.labels, **servable.rollout.labels}
        number = labels.get(reference.label)
    if number is None:
        raise NotDeclared(
            f"{named(reference)}: {reference.servable} is declared without a label "
            f"{reference.label}"
        )
    version = servable.versions.get(number)
    if version is None:
        if servable.complete is not None and number not in servable.complete:
            raise NotDeclared(
                f"{named(reference)}: the store has no {reference.servable} version {number}"
            )
        raise NotYet(f"{reference.servable}:{number}")
    return version


def _unit(reference: Reference, meant: Version) -> Unit | Reference:
    """The unit that a reference means, or what that refers to in turn."""
    if meant.manifest is None:
        raise NotYet(_awaited(meant))
    found = meant.manifest.units.get(reference.unit)
    chained = meant.manifest.references.get(reference.unit)
    if found is None and chained is None:
        raise NotFound(f"{named(reference)}: {_text(meant.key)} has no unit {reference.unit!r}")
    one = found or chained
    assert one is not None
    check_fit(reference, one)
    return one


def _awaited(meant: Version) -> str:
    why = "" if meant.error is None else f", which has failed: {meant.error.message}"
    return f"{_text(meant.key)}{why}"


def _text(key: Key) -> str:
    return f"{key[0]}:{key[1]}"
