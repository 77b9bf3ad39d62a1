"""Whether a router's epoch is as a change of what is declared wants it.

Reads the edit, what came of it, and the epoch; decides nothing, and waits for nobody. The same for
a cluster's status is `cluster.settling`.
"""

from __future__ import annotations

from typing import Any

import orjson

from batching.errors import FailedPrecondition
from cluster.edits import (
    Edit,
    Edited,
    LoadVersion,
    ReplaceConfig,
    RollBack,
    SetLabel,
    UnloadVersion,
)
from cluster.epochs import Epoch

__all__ = ["missing"]


def missing(edit: Edit, edited: Edited, epoch: Epoch, began: int) -> list[str]:
    """What is still to come before requests are answered by a change.

    Args:
        edit: the change.
        edited: what came of it.
        epoch: the router's current one.
        began: number of the epoch that it had when the change was made.

    Raises:
        FailedPrecondition: a version that should come has failed since; what served goes on.
    """
    found = [*_unavailable(edit, edited, epoch)]
    failed = [
        f"version {status.version} of {status.servable}: {status.error_message}"
        for status in epoch.statuses
        if (status.state, status.error_code != "OK") == ("END", True)
        and (status.servable in found or f"{status.servable}:{status.version}" in found)
    ]
    if failed and epoch.number > began:
        raise FailedPrecondition(f"declared, and {'; '.join(failed)}; what served goes on")
    found += _otherwise(edit, epoch)
    if not found and epoch.number < edited.epoch:
        found.append(f"epoch {edited.epoch}")
    return found


def _unavailable(edit: Edit, edited: Edited, epoch: Epoch) -> list[str]:
    """Versions that are not available yet, as NAME:VERSION; NAME where any version will do."""
    match edit:
        case LoadVersion():
            wanted: list[tuple[str, int | None]] = [(edit.servable, edit.version)]
        case SetLabel() if edit.version is not None:
            wanted = [(edit.servable, edit.version)]
        case RollBack():
            wanted = [(edit.servable, version) for version in _declared(edit.servable, edited)]
        case ReplaceConfig():
            servables = orjson.loads(edited.config)["servables"]
            wanted = [(servable["name"], None) for servable in servables]
        case _:
            wanted = []
    return [
        name if version is None else f"{name}:{version}"
        for name, version in wanted
        if not (there := epoch.servables.get(name, {})) or version not in (None, *there)
    ]


def _otherwise(edit: Edit, epoch: Epoch) -> list[str]:
    """What else is not as a change of one servable wants it."""
    match edit:
        case LoadVersion(label=label) if label and _meaning(edit, epoch) != edit.version:
            return [f"label {label} of {edit.servable}"]
        case SetLabel() if _meaning(edit, epoch) != edit.version:
            return [f"label {edit.label} of {edit.servable}"]
        case UnloadVersion(version=None) if edit.servable in epoch.servables:
            return [f"{edit.servable} is served"]
        case UnloadVersion() if edit.version in epoch.servables.get(edit.servable, {}):
            return [f"{edit.servable}:{edit.version} is served"]
    return []


def _meaning(edit: LoadVersion | SetLabel, epoch: Epoch) -> int | None:
    return epoch.labels.get(edit.servable, {}).get(edit.label)


def _declared(name: str, edited: Edited) -> list[int]:
    """Versions that a declaration names of a servable."""
    servables: list[dict[str, Any]] = orjson.loads(edited.config)["servables"]
    found = [each["policy"].get("specific") or [] for each in servables if each["name"] == name]
    return found[0] if found else []
