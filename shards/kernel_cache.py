"""Compiled kernels on disk: numba's own format, in our own sealed cache.

What numba keeps is a pickle that holds machine code, in a folder beside the source or in one that
the environment names; who can write there runs code here. So its entries go through
`shards.compiling.cache`: a folder of this user alone, every entry sealed with this user's key and
written whole. Processes that compile the same kernel at once each write the same entry.

Decides what a kernel depends on. Does not know what kernels do.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from shards.compiling.cache import ProgramCache

__all__ = ["KernelCache", "compiled"]

logger = logging.getLogger(__name__)


class KernelCache(NullCache):  # type: ignore[misc]
    """Keeps what numba compiles of one function.

    Args:
        cache: where.
        name: of the function.
        sources: files that hold all of its code, and of what it calls.
    """

    def __init__(self, cache: ProgramCache, name: str, sources: Sequence[Path]) -> None:
        self._cache = cache
        digest = hashlib.sha256()
        for each in (name, sys.version, numba.__version__, llvmlite.__version__):
            digest.update(f"{each}\0".encode())
        for source in sources:
            digest.update(hashlib.sha256(source.read_bytes()).digest())
        self._about = digest.digest()

    def load_overload(self, signature: Any, context: Any) -> Any:
        """What was kept for a signature and this processor, or None."""
        context.refresh()
        key = self._key(signature, context.codegen())
        data = self._cache.get(key)
        if data is None:
            return None
        try:
            # Nothing but this user's own key seals an entry.
            return CompileResult._rebuild(context, *pickle.loads(data))  # noqa: S301
        except Exception as error:  # numba raises what it likes; the cache is only a short cut
            logger.warning("a kept kernel cannot be loaded: %s", error)
            self._cache.forget(key)
            return None

    def save_overload(self, signature: Any, data: Any) -> None:
        """Keep what was compiled."""
        self._cache.put(self._key(signature, data.codegen), dumps(data._reduce()))

    def _key(self, signature: Any, codegen: Any) -> bytes:
        about = f"{signature} {codegen.magic_tuple()}"
        return self._about + hashlib.sha256(about.encode()).digest()


def compiled(
    fn: Callable[..., Any],
    signatures: Sequence[Any],
    cache: ProgramCache,
    sources: Sequence[Path],
    **options: Any,
) -> Any:
    """A function compiled for these signatures and, later, for no other."""
    dispatcher = numba.njit(**options)(fn)
    dispatcher._cache = KernelCache(cache, f"{fn.__module__}.{fn.__qualname__}", sources)
    for signature in signatures:
        dispatcher.compile(signature)
    dispatcher.disable_compile()
    return dispatcher
