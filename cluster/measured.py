"""Saved costs: what the batches of a cluster's devices take, in a file for simulation.

A file holds one entry for each device, unit and shape, with the mean and a bound (the mean and two
standard deviations) of every compiled size, so that a simulation can have batches take one thing
and be estimated to take another, as they do. A plain table by unit and size is read as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from batching import LaneKey
from batching.costs import SizeCost
from batching.errors import InvalidArgument, NotFound
from cluster._version import __version__

__all__ = ["CostFile", "MeasuredUnit", "SavedCosts", "costs_in", "costs_of", "from_status", "save"]

#: What is known of every lane's sizes; the best known, where several devices have it.
SavedCosts = dict[LaneKey, dict[int, SizeCost]]


class MeasuredUnit(msgspec.Struct, frozen=True, kw_only=True):
    """One lane of one device; ``sizes`` are (size, mean seconds, bound, batches measured)."""

    device: str
    unit: str
    shape: tuple[int, ...] = ()
    sizes: tuple[tuple[int, float, float, int], ...]


class CostFile(msgspec.Struct, frozen=True, kw_only=True):
    """What is in a file.

    Attributes:
        shardserve: version of the software that measured.
        servables: versions that were loaded, as name:version.
        measured: the costs.
    """

    format: Literal["shardserve costs 1"] = "shardserve costs 1"
    shardserve: str = ""
    servables: tuple[str, ...] = ()
    measured: tuple[MeasuredUnit, ...]


def from_status(status: Mapping[str, Any]) -> CostFile:
    """The costs that a controller's status tells.

    Raises:
        NotFound: no device actor has told any.
    """
    measured = [
        MeasuredUnit(
            device=name,
            unit=each["unit"],
            shape=tuple(each["shape"]),
            sizes=tuple((size, mean, bound, count) for size, mean, bound, count in each["sizes"]),
        )
        for name, actor in sorted(status["actors"].items())
        for each in actor["costs"]
    ]
    if not measured:
        raise NotFound("no device actor has measured any costs: nothing is loaded on one")
    held = {key for actor in status["actors"].values() if actor["costs"] for key in actor["holds"]}
    return CostFile(shardserve=__version__, servables=tuple(sorted(held)), measured=tuple(measured))


def save(costs: CostFile, path: Path) -> None:
    """Write a file.

    Raises:
        InvalidArgument: it cannot be written.
    """
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(costs), indent=1) + b"\n")
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be written: {error.strerror}") from None


def costs_of(path: Path) -> SavedCosts:
    """The costs in a file; see `costs_in`.

    Raises:
        InvalidArgument: it cannot be read, or is not such a file.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InvalidArgument(f"{path} is no table of costs: {error.strerror}") from None
    return costs_in(text, str(path))


def costs_in(text: str | bytes, name: str) -> SavedCosts:
    """Costs by lane and size. Of several devices that have a lane, that with most batches counts.

    Args:
        text: a saved file, or ``{"unit": {"1": seconds, "8": seconds}}``, as JSON.
        name: what it was read from, for the error.

    Raises:
        InvalidArgument: it is neither, or a cost is not positive.
    """
    try:
        if "format" in msgspec.json.decode(text, type=dict[str, msgspec.Raw]):
            tables = _merged(msgspec.json.decode(text, type=CostFile))
        else:
            plain = msgspec.json.decode(text, type=dict[str, dict[int, float]])
            tables = {
                LaneKey(unit): {size: SizeCost(s, s, 1) for size, s in seconds.items()}
                for unit, seconds in plain.items()
            }
    except (msgspec.DecodeError, ValueError) as error:
        raise InvalidArgument(f"{name} is no table of costs: {error}") from None
    if not tables or not all(map(_is_table, tables.values())):
        raise InvalidArgument(f"{name}: every unit needs sizes, and every size takes some time")
    return tables


def _merged(file: CostFile) -> SavedCosts:
    tables: SavedCosts = {}
    for each in file.measured:
        key = LaneKey(each.unit, each.shape)
        sizes = {size: SizeCost(mean, bound, count) for size, mean, bound, count in each.sizes}
        if _batches(sizes) >= _batches(tables.get(key, {})):
            tables[key] = sizes
    return tables


def _batches(sizes: Mapping[int, SizeCost]) -> int:
    return sum(cost.batches for cost in sizes.values())


def _is_table(sizes: Mapping[int, SizeCost]) -> bool:
    return bool(sizes) and all(
        size > 0 and 0 < cost.mean_s <= cost.bound_s for size, cost in sizes.items()
    )
