"""What an epoch says of servables: which versions answer, where their parts are, who gets which.

Values from the ledger's state alone; decides no step of a life, and publishes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from cluster.doors.settings import RequestLog
from cluster.epochs import Copies, ServableVersion, Share
from cluster.fleet import Fleet
from cluster.ledger import Version
from cluster.lifecycle import State
from cluster.pieces import piece_sizes
from cluster.placement import Copies as Placed
from cluster.servables import Servable
from cluster.traffic import version_of
from shards.orders import Endpoint

__all__ = [
    "Traffic",
    "logs_of",
    "placed_elsewhere",
    "routing_table",
    "served_by",
    "traffic_of",
]


def routing_table(
    servables: Iterable[Servable], fleet: Fleet
) -> tuple[dict[str, dict[int, ServableVersion]], dict[str, Endpoint]]:
    """What an epoch says of available versions: what serves them, and where those listen."""
    known = {servable.config.name: servable for servable in servables}
    table: dict[str, dict[int, ServableVersion]] = {}
    named: set[str] = set()
    for servable in known.values():
        for number, version in sorted(servable.versions.items()):
            if version.state is not State.AVAILABLE:
                continue
            if not version.is_bound:
                continue
            served = served_by(version, known, fleet, servable.config.deadline_ms)
            table.setdefault(servable.config.name, {})[number] = served
            named.update(*(part for parts in served.placement.values() for part in parts))
    endpoints: dict[str, Endpoint] = {}
    for name in sorted(named):
        endpoint = fleet.actors[name].endpoint
        assert endpoint is not None
        endpoints[name] = endpoint
    return table, endpoints


def served_by(
    version: Version, servables: Mapping[str, Servable], fleet: Fleet, deadline_ms: int
) -> ServableVersion:
    """What an epoch says of a version, and of what it refers to."""
    assert version.manifest is not None, version.key
    manifest, placement = version.manifest, version.live_units(fleet)
    if manifest.references:
        assert version.bound is not None, version.key
        manifest = version.bound.manifest
        placement = placement | placed_elsewhere(version, servables, fleet)
    found = version.served
    if (
        found is None
        or (found.placement is not placement and found.placement != placement)
        or found.manifest is not manifest
        or found.deadline_ms != deadline_ms
    ):
        found = version.served = ServableVersion(
            manifest=manifest, placement=placement, deadline_ms=deadline_ms
        )
    return found


def placed_elsewhere(
    version: Version, servables: Mapping[str, Servable], fleet: Fleet
) -> dict[str, Placed]:
    """Where the units are that a version refers to; no actors where nobody answers for a part."""
    found: dict[str, Placed] = {}
    if version.bound is None:
        return found
    for name, (key, unit) in version.bound.targets.items():
        servable = servables.get(key[0])
        target = None if servable is None else servable.versions.get(key[1])
        live = {} if target is None else target.live_units(fleet)
        parts = len(piece_sizes(version.bound.manifest.units[name]))
        found[name] = live.get(unit, ((),) * parts)
    return found


class Traffic(NamedTuple):
    """What an epoch says of which version answers; see its attributes of the same names."""

    labels: dict[str, dict[str, int]]
    pending: dict[str, dict[str, int]]
    splits: dict[str, tuple[Share, ...]]
    copies: dict[str, Copies]


def traffic_of(
    servables: Iterable[Servable], table: Mapping[str, Mapping[int, ServableVersion]]
) -> Traffic:
    """What an epoch with these available versions says of which version answers."""
    found = Traffic({}, {}, {}, {})
    for servable in servables:
        name, rollout = servable.config.name, servable.rollout
        if not (rollout or servable.config.labels):
            continue
        there = table.get(name, {})
        labels = {label: number for label, number in rollout.labels.items() if number in there}
        declared = {} if servable.removed else servable.config.labels
        pending = {label: number for label, number in declared.items() if label not in labels}
        if labels:
            found.labels[name] = labels
        if pending:
            found.pending[name] = pending
        shares = tuple(
            Share(target=target, version=number, weight=weight)
            for target, weight in sorted(rollout.split.items())
            if (number := version_of(target, labels)) is not None and number in there
        )
        if any(share.weight for share in shares):
            found.splits[name] = shares
        shadow = rollout.shadow
        if shadow is not None and (candidate := version_of(shadow.to, labels)) in there:
            assert candidate is not None
            found.copies[name] = Copies(
                version=candidate, percent=shadow.percent, tolerance=shadow.tolerance
            )
    return found


def logs_of(servables: Iterable[Servable]) -> dict[str, RequestLog]:
    """Of which servables requests are kept, and how."""
    return {
        servable.config.name: servable.config.log
        for servable in servables
        if servable.config.log is not None and not servable.removed
    }
