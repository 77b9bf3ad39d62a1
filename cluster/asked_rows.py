"""What requests ask of the tables of a version, as far as its manifest tells.

A table's ids are taken to be spread evenly over its rows, so a partition's part of the look-ups
goes by its rows, whatever has been laid over them since. Decides nothing; does not know who holds
what.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from batching.errors import InvalidArgument, NotFound
from cluster.layout_costs import Part, Shape, read_bytes, shape_of
from shards.manifest import CustomUnit, Manifest, Node, Signature, TableUnit
from shards.specs import Spec

__all__ = ["explained", "shapes_in", "weights_of"]


def shapes_in(manifest: Manifest, signature: str = "") -> list[Shape]:
    """The tables of a bundle, cut as it is, and what a row of a request looks up in each.

    Args:
        manifest: the bundle.
        signature: whose look-ups; ``serving_default``, or the only one, unless it is said. A
            table that it does not use is held and not looked up. Where a request's number of ids
            is not in its specs, one is taken.

    Raises:
        NotFound: there is no such signature.
        InvalidArgument: the bundle has no tables.
    """
    name = signature or _default(manifest)
    asked = manifest.signatures.get(name)
    if asked is None:
        known = ", ".join(manifest.signatures)
        raise NotFound(f"{manifest.name} has no signature {name!r}; it has {known}")
    found = [
        shape
        for local, unit in manifest.units.items()
        if isinstance(unit, TableUnit)
        for shape in _shapes_of(local, unit, [asked])
    ]
    if not found:
        raise InvalidArgument(f"{manifest.name} version {manifest.version} has no tables")
    return found


def weights_of(manifest: Manifest) -> dict[str, tuple[float, ...]] | None:
    """Bytes of each partition of each table that memory moves for a row of a request.

    For the look-ups of ``serving_default``, or of all signatures together where there is none.

    Returns:
        By the tables' local names; None where that is not known: of registered kinds, and of
        tables of a dtype that plans have no costs of.
    """
    if any(isinstance(unit, CustomUnit) for unit in manifest.units.values()):
        return None
    default = manifest.signatures.get(_default(manifest))
    asked = [default] if default is not None else list(manifest.signatures.values())
    found: dict[str, tuple[float, ...]] = {}
    for name, unit in manifest.units.items():
        if not isinstance(unit, TableUnit):
            continue
        if not unit.rows:
            found[name] = (0.0,) * len(unit.partitions)
            continue
        try:
            shapes = _shapes_of(name, unit, asked)
        except InvalidArgument:
            return None
        if unit.columns:
            found[name] = tuple(shape.ids * read_bytes(shape) for shape in shapes)
        else:
            (shape,) = shapes
            each = shape.ids * read_bytes(shape) / unit.rows
            found[name] = tuple(each * part.rows for part in unit.partitions)
    return found


def explained(
    manifest: Manifest,
    units: Mapping[str, Sequence[Sequence[str]]],
    pieces: Mapping[str, Mapping[tuple[str, int], int]],
) -> dict[str, Any] | None:
    """What a placement of tables comes to, as plain values; None where a version has none.

    Args:
        manifest: the version.
        units: local unit name to the actors that hold a copy of each of its partitions.
        pieces: actor to the pieces that it hosts of this version, with bytes.

    Returns:
        ``messages``, the shard actors that a request asks which asks for all rows;
        ``actors``: of each its ``bytes``, and its ``load``, the share of a request's look-ups that
        it reads where copies are asked alike (None where that is not known).
    """
    homes = {
        (name, index): tuple(actors)
        for name, unit in manifest.units.items()
        if isinstance(unit, TableUnit | CustomUnit)
        for index, actors in enumerate(units.get(name, ()))
    }
    actors = sorted({actor for part in homes.values() for actor in part})
    if not actors:
        return None
    weights = weights_of(manifest)
    loads = dict.fromkeys(actors, 0.0)
    for (name, index), part in homes.items():
        for actor in part:
            loads[actor] += 0.0 if weights is None else weights[name][index] / len(part)
    total = sum(loads.values())
    return {
        "messages": len({part[0] for part in homes.values() if part}),
        "actors": {
            actor: {
                "bytes": sum(pieces.get(actor, {}).values()),
                "load": round(loads[actor] / total, 4) if total else None,
            }
            for actor in actors
        },
    }


def _default(manifest: Manifest) -> str:
    if "serving_default" in manifest.signatures or len(manifest.signatures) != 1:
        return "serving_default"
    return next(iter(manifest.signatures))


def _shapes_of(name: str, unit: TableUnit, asked: Iterable[Signature]) -> list[Shape]:
    """A table, or one for each of its partitions of columns: all are asked for the same ids."""
    nodes = [
        (node, signature) for signature in asked for node in signature.nodes if node.unit == name
    ]
    if unit.columns:
        pieces = {f"{name}/{index}": unit.piece(index) for index in range(len(unit.columns))}
        return [_shape_of(local, piece, nodes) for local, piece in pieces.items()]
    return [_shape_of(name, unit, nodes)]


def _shape_of(name: str, unit: TableUnit, nodes: Sequence[tuple[Node, Signature]]) -> Shape:
    parts = tuple(
        Part(rows=part.rows, nbytes=sum(blob.stored for blob in part.blobs))
        for part in unit.partitions
    )
    return shape_of(
        name,
        unit.rows,
        unit.dim,
        unit.stored or unit.dtype,
        ids=sum(_ids_of(node.inputs["ids"], signature.inputs) for node, signature in nodes),
        pooled=bool(nodes) and all(node.pool is not None for node, _ in nodes),
        parts=parts,
    )


def _ids_of(value: str, inputs: Mapping[str, Spec]) -> float:
    """Ids of a row, as far as the spec of what is looked up tells."""
    source, _, name = value.partition(":")
    if source != "in" or name not in inputs:
        return 1.0
    sizes = inputs[name].shape[1:]
    return float(math.prod(size for size in sizes if isinstance(size, int)))
