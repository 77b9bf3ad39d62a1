"""The naive contender of ``lookup``: tables in Ray actors, as a user would write it in an hour.

Each actor has some tables, NumPy picks the rows and adds them up, and who asks waits for all calls
with one `ray.get`. A call takes the ids of all tables of an actor, or those of one table.
Whoever thinks of the former has done by hand what a router is for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from bench.own_ray import own_ray

__all__ = ["Ask", "Asked", "Tables", "naive_actors"]

#: Ids or sums by table.
Asked = Mapping[str, npt.NDArray[Any]]

#: Asks for one request's sums; whether a call for each table, or one for each actor.
Ask = Callable[[Asked, bool], dict[str, npt.NDArray[Any]]]

_STORE_BYTES: Final = 512 << 20


class Tables:
    """What runs in an actor's process.

    Args:
        files: of each table, float32 rows one after the other.
        dim: elements of a row.
    """

    def __init__(self, files: Mapping[str, str], dim: int) -> None:
        self._tables = {
            name: np.memmap(path, np.float32, "r").view(np.ndarray).reshape(-1, dim)
            for name, path in files.items()
        }

    def pool(self, ids: Asked) -> dict[str, npt.NDArray[np.float32]]:
        """The sum of the rows of every bag."""
        return {name: self._tables[name][bags].sum(axis=1) for name, bags in ids.items()}


@contextlib.contextmanager
def naive_actors(shares: Sequence[Mapping[str, str]], dim: int) -> Iterator[Ask]:
    """A Ray of our own for as long as the context lasts; yields what asks all actors and waits.

    Args:
        shares: for each actor, its tables' files.
        dim: elements of a row.

    Raises:
        ContenderFailed: Ray did not start.
    """
    with own_ray(len(shares), _STORE_BYTES) as ray:
        actors = [ray.remote(Tables).remote(dict(files), dim) for files in shares]

        def ask(ids: Asked, by_table: bool) -> dict[str, npt.NDArray[Any]]:
            calls = [
                actor.pool.remote({name: ids[name] for name in names})
                for actor, files in zip(actors, shares, strict=True)
                for names in ([[name] for name in files] if by_table else [list(files)])
            ]
            return {name: sums for answer in ray.get(calls) for name, sums in answer.items()}

        yield ask
