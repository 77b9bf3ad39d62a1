"""What a bundle says of units that it does not have: another servable's, named and described.

A reference names a servable, one of its units, and a version or a label; and says what the bundle
that refers relies on: the kind of unit, what it takes and yields, how long its inputs may be. So
a bundle is checked and traced by itself, and whoever serves it can tell whether the unit that the
reference comes to mean is one that it may be given. Which version a label means is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from batching.errors import NotFound
from shards.errors import SpecMismatch
from shards.manifest import (
    CustomUnit,
    HostUnit,
    Manifest,
    MapUnit,
    Reference,
    TableUnit,
    Unit,
)

__all__ = ["bound", "check_fit", "named", "reference_to", "units_called"]


def reference_to(manifest: Manifest, unit: str, version: int | None, label: str) -> Reference:
    """A reference to a unit of a servable, described as it is in one version of that.

    Args:
        manifest: of the version.
        unit: the name of one of its units, or of one that it refers to itself.
        version: that is meant; None for a label's.
        label: that is meant; "" for a version.

    Raises:
        NotFound: it has no such unit.
    """
    found = manifest.units.get(unit) or manifest.references.get(unit)
    if found is None:
        known = ", ".join([*manifest.units, *manifest.references])
        raise NotFound(f"{manifest.name}/{manifest.version} has no unit {unit!r}, it has {known}")
    face = found if isinstance(found, Reference) else _face(found)
    return msgspec.structs.replace(
        face, servable=manifest.name, unit=unit, version=version, label=label
    )


def check_fit(reference: Reference, found: Unit | Reference) -> None:
    """Refuse a unit that is not what a reference describes.

    Inputs may be longer than was asked for, and a table may have more rows or fewer.

    Args:
        reference: what is relied on.
        found: what it would mean; or what that refers to, in turn.

    Raises:
        SpecMismatch: says what differs.
    """
    face = found if isinstance(found, Reference) else _face(found)
    for what in ("kind", "inputs", "outputs", "dtype", "dim", "keys"):
        wanted, has = getattr(reference, what), getattr(face, what)
        # Dicts compare without order, and arguments are given by it.
        if wanted != has or (isinstance(wanted, dict) and list(wanted) != list(has)):
            raise SpecMismatch(
                f"{named(reference)} is relied on to have {what} {_text(wanted)}, "
                f"it has {_text(has)}"
            )
    for symbol, length in reference.lengths.items():
        # What is relied on is what a manifest says, and that may name what no unit has.
        if (most := face.lengths.get(symbol, 0)) < length:
            raise SpecMismatch(
                f"{named(reference)} is relied on to take {symbol} up to {length}, it takes up to "
                f"{most}"
            )


def units_called(manifest: Manifest) -> dict[str, Unit]:
    """Everything that signatures may call, by name.

    What is referred to is there as a unit of its kind that has nothing but what it takes and
    yields: enough to check a graph and to say what runs once a request, and for nothing else.
    """
    return {
        **manifest.units,
        **{name: _hollow(reference) for name, reference in manifest.references.items()},
    }


def bound(manifest: Manifest, found: Mapping[str, Unit]) -> Manifest:
    """A manifest with the units that its references have come to mean in their places.

    Args:
        manifest: of the bundle that refers.
        found: by the local name of each reference.
    """
    assert found.keys() == manifest.references.keys(), (found.keys(), manifest.references.keys())
    return msgspec.structs.replace(manifest, units={**manifest.units, **found}, references={})


def named(reference: Reference) -> str:
    """What a reference means, for people: ``encoder@stable/trunk`` or ``encoder:3/trunk``."""
    which = f"@{reference.label}" if reference.version is None else f":{reference.version}"
    return f"{reference.servable}{which}/{reference.unit}"


def _face(unit: Unit) -> Reference:
    """What may be relied on of a unit."""
    nobody = Reference(servable="", unit="")
    replace = msgspec.structs.replace
    if isinstance(unit, TableUnit):
        return replace(nobody, kind="table", dtype=unit.dtype, dim=unit.dim, keys=unit.keys)
    lengths: dict[str, int] = {}
    match unit:
        case MapUnit():
            kind = "map"
            lengths = {symbol: sizes[-1] for symbol, sizes in unit.length_buckets.items()}
        case HostUnit():
            kind = "host"
        case CustomUnit():
            kind = "custom"
    return replace(nobody, kind=kind, inputs=unit.inputs, outputs=unit.outputs, lengths=lengths)


def _hollow(reference: Reference) -> Unit:
    if reference.kind == "table":
        return TableUnit(
            id="",
            dtype=reference.dtype,
            dim=reference.dim,
            rows=0,
            partitions=(),
            keys=reference.keys,
        )
    # Only what is given to it and what comes back is looked at, whatever kind it is of.
    return CustomUnit(
        id="", kind="", inputs=reference.inputs, outputs=reference.outputs, partitions=()
    )


def _text(value: object) -> str:
    if not isinstance(value, dict):
        return str(value)
    texts = (f"{name} {spec.dtype}{list(spec.shape)}" for name, spec in value.items())
    return f"({', '.join(texts)})"
