"""Version policies and sources that installed packages offer to a declaration.

A policy says which of the complete versions should be loaded; a source says which versions there
are, where that is not simply what the store lists. Both are asked on the controller's node. Does
not decide what happens when either fails: the servable keeps what it has (`cluster.ledger`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, TypeAlias

from cluster.http_source import http_source
from cluster.servable_settings import Registered
from shards.registry import Registry
from shards.store import Store

__all__ = ["POLICIES", "SOURCES", "Options", "Policy", "Source", "checked_versions", "listed"]

#: Plain values from the declaration.
Options: TypeAlias = Mapping[str, str | int | float | bool]

#: Complete versions, ascending, and options, to those that should be loaded. Must be pure: it is
#: asked often, on the controller's thread, and the same answer is expected for the same question.
Policy: TypeAlias = Callable[[Sequence[int], Options], Iterable[int]]

#: Servable name, options and the store, to the versions there are. It may block, for which it has
#: a thread; an exception says that it does not know, which unloads nothing.
Source: TypeAlias = Callable[[str, Options, Store], Iterable[int]]

#: ``shardserve.version_policies``: what ``policy: {registered: {name: ...}}`` may name.
POLICIES: Final[Registry[Policy]] = Registry("shardserve.version_policies", "version policy")

#: ``shardserve.sources``: what ``source: {name: ...}`` may name, beside what is here.
SOURCES: Final[Registry[Source]] = Registry(
    "shardserve.sources", "source", built_in={"http": http_source}
)


def listed(servable: str, source: Registered | None, store: Store) -> tuple[int, ...]:
    """The versions of a servable that there are, ascending. May block.

    Args:
        servable: its name.
        source: what says so; None asks the store.
        store: where the bundles are.

    Raises:
        FailedPrecondition: the source is of a package that is not installed here.
        Exception: whatever the store or the source raises.
    """
    if source is None:
        return store.versions(servable)
    found = SOURCES.get(source.name)(servable, dict(source.options), store)
    return checked_versions(found, f"source {source.name!r}")


def checked_versions(found: Iterable[int], who: str) -> tuple[int, ...]:
    """What a package answered, if it is versions; sorted, each once.

    Raises:
        TypeError: it is something else.
    """
    versions = tuple(found)
    wrong = [each for each in versions if type(each) is not int or each < 1]
    if wrong:
        raise TypeError(f"{who} answered {wrong[0]!r}, which is no version")
    return tuple(sorted(set(versions)))
