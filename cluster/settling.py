"""Whether a cluster's status says that a change of one servable is done, and if not, why not.

Reads what `cluster.control.ControlCore.status` shows. Does not know how a status is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batching.errors import FailedPrecondition, NotFound
from cluster.traffic import version_of

__all__ = ["shares", "unbalanced", "undrained", "unsettled"]


def unsettled(status: Mapping[str, Any], name: str, version: int | None, *, listed: bool) -> str:
    """For what a servable waits; empty once it is as declared.

    Args:
        status: of the controller.
        name: the servable.
        version: one that must be available; None for what is aspired.
        listed: whether the store was surely looked into since the change.

    Raises:
        FailedPrecondition: a version has failed; what served before goes on.
        NotFound: the store has no such version.
    """
    servable = status["servables"].get(name)
    if servable is None:
        return "" if version is None else f"{name} is not declared"
    rows = servable["versions"]
    if not servable["declared"]:
        return "; ".join(f"version {row['version']} {row['step']}" for row in rows)
    if version is not None and version not in servable["complete"]:
        text = f"the store has no complete version {version} of {name}"
        if listed:
            raise NotFound(f"{text}; it stays declared, and is loaded when it is there")
        return text
    wanted = [row for row in rows if row["aspired"]]
    failed = [row for row in wanted if row["state"] == "END" and row["error_message"]]
    coming = [row for row in wanted if row["state"] != "AVAILABLE" and row not in failed]
    going = [row for row in rows if not row["aspired"] and row["state"] != "END"]
    if coming or (not wanted and not listed):
        shown = [f"version {row['version']} {row['step']} {row['note']}".strip() for row in coming]
        return "; ".join(shown) or str(servable["listing"])
    if failed:
        told = "; ".join(f"version {row['version']}: {row['error_message']}" for row in failed)
        raise FailedPrecondition(f"{told}; what served before goes on")
    if servable["rollout"] != "ok":
        return str(servable["rollout"])
    return "; ".join(f"version {row['version']} {row['step']}" for row in going)


def undrained(status: Mapping[str, Any], node: str) -> str:
    """Which actors are still on a drained node, and what is in their way; empty once none is.

    Args:
        status: of the controller.
        node: its id, or the beginning of it.

    Raises:
        FailedPrecondition: it is not drained any more.
    """
    rows = [row for name, row in status["nodes"].items() if name.startswith(node)]
    if any(row["state"] == "serving" for row in rows):
        # Somebody undid it, or the controller died before it had written it down.
        raise FailedPrecondition(f"node {node} is not drained any more; drain it again")
    if status["recovering"]:
        return "a new controller is still to hear who is there"
    there = [actor for row in rows if row["state"] == "draining" for actor in row["actors"]]
    notes = [
        f"{name}:{version['version']} {version['note']}"
        for name, servable in status["servables"].items()
        for version in servable["versions"]
        if version["note"]
    ]
    return "; ".join([f"{', '.join(there)} there", *notes]) if there else ""


def unbalanced(status: Mapping[str, Any]) -> str:
    """What is still moved by a rebalance, or waited for; empty once it is done."""
    shifts = [f"{name} {text}" for name, text in status["rebalance"]["shifts"].items()]
    if shifts or not status["rebalance"]["wanted"]:
        return "; ".join(shifts)
    return "waits for actors, loads or drains"


def shares(servable: Mapping[str, Any]) -> dict[int, float]:
    """Which part of the requests that name no version each version of a servable gets."""
    available = [row["version"] for row in servable["versions"] if row["state"] == "AVAILABLE"]
    weights: dict[int, int] = {}
    for target, weight in servable["split"].items():
        version = version_of(target, servable["labels"])
        if version in available:
            assert version is not None
            weights[version] = weights.get(version, 0) + weight
    total = sum(weights.values())
    if total:
        return {version: weight / total for version, weight in weights.items()}
    return {max(available): 1.0} if available else {}
