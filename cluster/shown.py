"""What epochs tell of the states of versions, and a status of servables and loads as JSON values.

Adds up what actors report of their parts of a version. Does not know how it is asked for, nor how
it is printed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cluster.asked_rows import explained
from cluster.draining import nodes_status
from cluster.epochs import VersionStatus
from cluster.fleet import ActorState, Fleet
from cluster.held_once import held_once
from cluster.ledger import Version, is_whole
from cluster.lifecycle import State
from cluster.rebalancing import rebalance_status
from cluster.servables import Servable
from cluster.world import World
from shards.orders import Loading
from shards.references import named

__all__ = ["cluster_status", "progress_of", "servable_status", "statuses"]


def cluster_status(world: World, epoch: int) -> dict[str, Any]:
    """Everything a person may want to know, as plain JSON values; `epoch` is the latest."""
    promised = world.pieces()
    return {
        "term": world.term,
        "epoch": epoch,
        "recovering": world.recovering,
        "policy": world.config.cluster.batching.policy if world.config is not None else "",
        "servables": {
            name: servable_status(servable, world.fleet)
            for name, servable in sorted(world.servables.items())
        },
        "actors": {
            name: actor.status(sum(promised.get(name, {}).values()))
            for name, actor in sorted(world.fleet.actors.items())
        },
        "shared": held_once(world.versions(), world.fleet),
        "routers": world.leases.oldest(),
        "nodes": nodes_status(world),
        "rebalance": rebalance_status(world),
    }


def statuses(servables: Iterable[Servable], fleet: Fleet) -> tuple[VersionStatus, ...]:
    """State of every known version, by name, the highest version first."""
    found: list[VersionStatus] = []
    for servable in servables:
        shown = dict(servable.ended)
        for number, version in servable.versions.items():
            degraded = _degraded_text(version, fleet) if version.state is State.AVAILABLE else ""
            shown[number] = version.status(degraded)
        found += [shown[number] for number in sorted(shown, reverse=True)]
    return tuple(found)


def servable_status(servable: Servable, fleet: Fleet) -> dict[str, Any]:
    """One servable and its versions, those that have ended included."""
    wanted = servable.aspired()
    versions: list[dict[str, Any]] = []
    for row in statuses([servable], fleet):
        version = servable.versions.get(row.version)
        versions.append(
            {
                "version": row.version,
                "state": row.state,
                "error_code": row.error_code,
                "error_message": row.error_message,
                "aspired": row.version in wanted,
                "step": str(State.END if version is None else version.state),
                "attempts": 0 if version is None else version.attempts,
                "note": "" if version is None else version.note,
                "refers": {} if version is None else _refers(version),
                "progress": None if version is None else progress_of(version, fleet),
                "actors": [] if version is None else sorted(version.actors),
                "tables": None if version is None else _tables(version),
                "story": [] if version is None else list(version.life.story),
            }
        )
    return {
        "declared": not servable.removed,
        "aspired": list(wanted),
        "complete": list(servable.complete or ()),
        "policy": servable.policy_error or "ok",
        "placement": servable.config.placement,
        "labels": dict(servable.rollout.labels),
        "split": dict(servable.rollout.split),
        "rollout": _rollout_text(servable, fleet) or "ok",
        "needed": sorted(servable.needed),
        "listing": servable.list_error or ("ok" if servable.complete else "not listed yet"),
        "versions": versions,
    }


def progress_of(version: Version, fleet: Fleet) -> dict[str, Any] | None:
    """How far a version has come that loads; None for one that does not.

    Bytes and buckets are of the actors that still load, as they last reported. The seconds that are
    left are those of the slowest, None while any of them cannot tell.
    """
    if version.state not in (State.LOADING, State.WARMING):
        return None
    done = version.live_actors(fleet)
    left = version.actors - done
    told = [found for name in left if (found := _told(fleet, name, version)) is not None]
    etas = [each.eta_s for each in told if each.eta_s is not None]
    is_known = bool(etas) and len(etas) == len(left)
    return {
        "actors_done": len(done),
        "actors": len(version.actors),
        "bytes_done": sum(each.bytes_done for each in told),
        "bytes_total": sum(each.bytes_total for each in told),
        "buckets_done": sum(each.buckets_done for each in told),
        "buckets_total": sum(each.buckets_total for each in told),
        "eta_s": max(etas) if is_known else None,
    }


def _tables(version: Version) -> dict[str, Any] | None:
    """What its placement comes to; None where it has no tables, or no place yet."""
    if version.manifest is None or version.units is None:
        return None
    if version.explained is None:
        # Of thousands of partitions not for every status: 28 ms for 8,192.
        told = explained(version.manifest, version.units, version.pieces)
        version.explained = told or {}
    return version.explained or None


def _rollout_text(servable: Servable, fleet: Fleet) -> str:
    """For which versions the declared labels, split and shadow wait; empty where for none."""
    waits = [
        f"version {number} ({', '.join(users)})"
        + (f", but {servable.unfit[number]}" if number in servable.unfit else "")
        for number, users in sorted(servable.config.rollout.users().items())
        if number in servable.unfit
        or number not in servable.versions
        or not is_whole(servable.versions[number], fleet)
    ]
    return f"waits for {'; '.join(waits)}" if waits and not servable.removed else ""


def _refers(version: Version) -> dict[str, str]:
    """What a version refers to, by its own names for it: what is declared, and what it means."""
    if version.manifest is None:
        return {}
    targets = {} if version.bound is None else version.bound.targets
    return {
        name: named(reference)
        + (f" is {targets[name].key[0]}:{targets[name].key[1]}" if name in targets else "")
        for name, reference in version.manifest.references.items()
    }


def _told(fleet: Fleet, name: str, version: Version) -> Loading | None:
    report = fleet.actors[name].report
    for each in () if report is None else report.loading:
        if (each.servable, each.version) == version.key:
            return each
    return None


def _degraded_text(version: Version, fleet: Fleet) -> str:
    """Which parts have no copy left and whom they wait for; empty where none."""
    if not version.is_degraded(fleet):
        return ""
    live = version.live_units(fleet)
    missing = [
        f"{name}[{index}] waits for {_absences(version, fleet, part)}"
        for name, parts in (version.units or {}).items()
        for index, part in enumerate(parts)
        if not live[name][index]
    ]
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return "; ".join(missing[:3]) + more


def _absences(version: Version, fleet: Fleet, part: Iterable[str]) -> str:
    return ", ".join(_absence(version, fleet, each) for each in part if each in version.actors)


def _absence(version: Version, fleet: Fleet, name: str) -> str:
    actor = fleet.actors[name]
    if actor.state is ActorState.FAILED:
        return f"{name} (failed: {actor.reason})"
    hold = actor.holds.get(version.key)
    return f"{name} ({hold.error})" if hold is not None and hold.error else name
