"""Names that installed packages may add to: what a name means is looked up here, and only here.

A package adds a name with a Python entry point, for example in its ``pyproject.toml``::

    [project.entry-points."shardserve.units"]
    hashmap = "hashmap_servable:open_part"

Decides which object a name stands for. Our own names cannot be replaced, and a name that two
packages claim stands for neither: which of them is meant would depend on the order of a listing.
A manifest or a declaration can only choose among the names that were installed, so nothing is
imported because a store or a client asked for it. Nothing of a package is imported before one of
its names is used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, Generic, TypeVar, cast

from batching.errors import FailedPrecondition

__all__ = ["Registry"]

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=Callable[..., Any])


class Registry(Generic[T]):
    """The objects of one kind, by name.

    Args:
        group: of the entry points, for example ``shardserve.units``.
        what: what one of the objects is called in messages, for example ``unit kind``.
        built_in: ours, by name.
    """

    def __init__(self, group: str, what: str, built_in: Mapping[str, T] | None = None) -> None:
        self.group: Final = group
        self._what = what
        self._built_in = dict(built_in or {})
        self._found: dict[str, T] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """All names, sorted; those of packages are listed whether they can be imported or not."""
        return tuple(sorted({*self._built_in, *(entry.name for entry in self._entries())}))

    def get(self, name: str) -> T:
        """The object of a name.

        Raises:
            FailedPrecondition: the name is not known in this process, two packages claim it, or
                its package cannot be imported; says which, and what to do.
        """
        found = self._built_in.get(name) or self._found.get(name)
        if found is None:
            found = self._found[name] = self._load(name)
        return found

    def _entries(self) -> tuple[EntryPoint, ...]:
        return tuple(entry_points(group=self.group))

    def _load(self, name: str) -> T:
        # The same distribution may lie twice on the path; that is one claim, not two.
        claims = {
            (entry.dist.name if entry.dist else "?", entry.value): entry
            for entry in self._entries()
            if entry.name == name
        }
        if not claims:
            known = ", ".join(self.names) or "none"
            raise FailedPrecondition(
                f"there is no {self._what} {name!r} here; known are: {known}. Install the package "
                f"that offers it (entry points {self.group!r}) on every node"
            )
        if len(claims) > 1:
            owners = " and ".join(sorted({owner for owner, _ in claims}))
            raise FailedPrecondition(
                f"the {self._what} {name!r} is offered by {owners}: uninstall all but one"
            )
        [((owner, value), entry)] = claims.items()
        try:
            found = entry.load()
        except Exception as error:
            raise FailedPrecondition(
                f"the {self._what} {name!r} ({value} of {owner}) cannot be imported: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not callable(found):
            raise FailedPrecondition(
                f"the {self._what} {name!r} ({value} of {owner}) cannot be called"
            )
        logger.info("%s %r is %s of %s", self._what, name, value, owner)
        return cast(T, found)
