"""The part of a bundle that is written which refers to units of other servables.

Decides which references may be written. The unit is looked at where it lies in the store now, so
that signatures can be traced over it; what it will be is for whoever serves the bundle.
"""

from __future__ import annotations

from typing import Any

from batching.errors import InvalidArgument
from shards.manifest import Reference
from shards.references import reference_to
from shards.store import Store, check_name, read
from shards.tracing import TableCall, UnitCall

__all__ = ["Referring"]


class Referring:
    """What `shards.Bundle` does with references.

    Args:
        store: has the servables that are referred to.
        name: of the servable that is written.
    """

    def __init__(self, store: Store, name: str) -> None:
        self.name = name
        self._store = store
        self._references: dict[str, Reference] = {}

    def refer(
        self,
        name: str,
        *,
        servable: str,
        unit: str,
        version: int | None = None,
        label: str = "",
        like: int | None = None,
    ) -> Any:
        """Use a unit of another servable, which has versions and labels of its own.

        Nothing of it is copied: the cluster asks that servable's copies, of the version that is
        named, or of the one that the label is on, and all who refer to a label change with it.
        What the unit takes and yields is relied on: a label does not move to a version where
        that is different.

        Args:
            name: of the unit in this bundle.
            servable: whose unit it is.
            unit: its name there.
            version: which is meant.
            label: or the label that is meant, as the cluster declares it.
            like: with a label, the version in the store whose unit is looked at now; None for
                the highest.

        Returns:
            The unit or table, to be called in a signature function; what it is is in the store.

        Raises:
            InvalidArgument: the name is taken, or not one of version and label is given, or a
                servable refers to itself.
            NotFound: there is no such version in the store, or it has no such unit.
        """
        self._check_new(name)
        check_name(servable)
        if (version is None) == (not label):
            raise InvalidArgument(f"unit {name!r} refers to a version or to a label: give one")
        if servable == self.name:
            raise InvalidArgument(f"unit {name!r}: {servable} cannot refer to itself")
        if version is not None and like not in (None, version):
            raise InvalidArgument(f"unit {name!r} refers to version {version}, not to {like}")
        manifest = read(self._store, servable, like if version is None else version)
        reference = reference_to(manifest, unit, version, label)
        self._references[name] = reference
        if reference.kind == "table":
            return TableCall(name, reference.dim, reference.dtype, reference.keys)
        return UnitCall(name, reference.inputs, reference.outputs)

    def _check_new(self, name: str) -> None:
        if name in self._references:
            raise InvalidArgument(f"the bundle has a unit {name!r} already")
