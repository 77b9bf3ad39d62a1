"""When tables are compacted in the background, and the one process at a time that does it.

Each time an epoch is published `due` says which versions have chains of overlays that are long
enough; `Compactor` has them folded (`shards.compacting`), one after the other, each once. What
fails is tried again after pauses that double, as long as it is still due. Nothing depends on the
result but the deltas that are saved later. Does not know how tables are folded.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import msgspec

from cluster.epochs import Epoch
from cluster.settings import Config
from shards.compacting import CompactOrder
from shards.folding import longest_chain

__all__ = ["Compactor", "due", "run_child"]

logger = logging.getLogger(__name__)

_PAUSE_FIRST_S: Final = 30.0
_PAUSE_S_MAX: Final = 3600.0
#: Versions that were compacted are remembered, so that each is looked at once; but not for ever.
_REMEMBERED_MAX: Final = 10_000


def due(config: Config, epoch: Epoch, cache: str) -> tuple[CompactOrder, ...]:
    """What should be compacted, in the order in which it is declared.

    Only the newest version of a servable that is available: it is the one that deltas are made of.

    Args:
        config: what is declared.
        epoch: what is available.
        cache: where the controller's node keeps blobs, where nothing else is declared.
    """
    orders = []
    for servable in config.servables:
        versions = epoch.servables.get(servable.name, {})
        if servable.compact is None or not versions:
            continue
        newest = max(versions)
        if longest_chain(versions[newest].manifest) >= servable.compact.overlays:
            orders.append(
                CompactOrder(
                    store=config.store,
                    servable=servable.name,
                    version=newest,
                    overlays=servable.compact.overlays,
                    cache=config.cluster.cache.path or cache,
                    cache_bytes=config.cluster.cache.size,
                )
            )
    return tuple(orders)


class Compactor:
    """Carries orders out, one at a time, on a thread of its own.

    Args:
        cache: where this node keeps blobs, where nothing else is declared.
        run: carries one out; says whether it did. Ended by the event that it is given.
        clock: seconds.
    """

    def __init__(
        self,
        cache: str,
        run: Callable[[CompactOrder, threading.Event], bool] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cache = cache
        self._run = run or run_child
        self._clock = clock
        self._orders: tuple[CompactOrder, ...] = ()
        self._done: deque[CompactOrder] = deque(maxlen=_REMEMBERED_MAX)
        #: of those that failed: when they are tried again, and the pause before that
        self._failed: dict[CompactOrder, tuple[float, float]] = {}
        #: and since when
        self._under_way: tuple[CompactOrder, float] | None = None
        self._news = threading.Condition()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def look(self, config: Config | None, epoch: Epoch) -> None:
        """This is declared and available now: nothing else is due. Returns at once."""
        orders = due(config, epoch, self._cache) if config is not None else ()
        with self._news:
            self._orders = orders
            self._failed = {each: self._failed[each] for each in orders if each in self._failed}
            self._news.notify()
            # Most clusters have nothing to compact, and need no thread for it.
            if self._orders and self._thread is None and not self._ended.is_set():
                # Lives as long as this process: the kernel ends a child with the thread that
                # started it.
                self._thread = threading.Thread(target=self._work, name="compactor", daemon=True)
                self._thread.start()

    @property
    def retries(self) -> dict[CompactOrder, float]:
        """Those that failed, and when by the clock they are tried again."""
        with self._news:
            return {order: at for order, (at, _) in self._failed.items()}

    def status(self) -> list[dict[str, Any]]:
        """What is under way and what waits, as plain JSON values; in the order in which it goes."""
        with self._news:
            now = self._clock()
            under_way = self._under_way
            todo = [each for each in self._orders if each not in self._done]
            rows = [
                {
                    "servable": each.servable,
                    "version": each.version,
                    "running_s": None,
                    "again_s": max(self._failed[each][0] - now, 0.0)
                    if each in self._failed
                    else None,
                }
                for each in todo
                if under_way is None or each != under_way[0]
            ]
            if under_way is not None:
                order, since = under_way
                name, version = order.servable, order.version
                running = {"running_s": now - since, "again_s": None}
                rows.insert(0, {"servable": name, "version": version, **running})
            return rows

    def close(self) -> None:
        """End what is under way, and begin nothing more. Waits for neither."""
        self._ended.set()
        with self._news:
            self._news.notify()

    # The thread

    def _work(self) -> None:
        while (order := self._next()) is not None:
            is_done = self._run(order, self._ended)
            with self._news:
                self._under_way = None
                if is_done:
                    self._failed.pop(order, None)
                    self._done.append(order)
                    continue
                _, before = self._failed.get(order, (0.0, _PAUSE_FIRST_S / 2))
                pause = min(2 * before, _PAUSE_S_MAX)
                self._failed[order] = (self._clock() + pause, pause)

    def _next(self) -> CompactOrder | None:
        """Waits until there is something to do; None when it is all over."""
        with self._news:
            while not self._ended.is_set():
                now = self._clock()
                todo = [each for each in self._orders if each not in self._done]
                at = {each: self._failed.get(each, (now, 0.0))[0] for each in todo}
                for order in todo:
                    if at[order] <= now:
                        self._under_way = (order, now)
                        return order
                self._news.wait(min(at.values()) - now if at else None)
            return None


def run_child(order: CompactOrder, ended: threading.Event) -> bool:
    """Have a process carry out an order; it is ended with this one, or when `ended` is set."""
    began = time.monotonic()
    name = f"{order.servable}:{order.version}"
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "shards.compacting",
         msgspec.json.encode(order).decode(), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Where this process finds our packages, that one does, and nowhere else.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        text=True,
    )  # fmt: skip
    while True:
        if ended.is_set():
            child.kill()
        try:
            said, complaint = child.communicate(timeout=0.2)
            break
        except subprocess.TimeoutExpired:
            pass
    if child.returncode:
        logger.warning(
            "%s is not compacted (status %d): %s", name, child.returncode, complaint.strip()[-500:]
        )
        return False
    took_s = time.monotonic() - began
    logger.info("%s: %s partitions were compacted in %.1f s", name, said.strip(), took_s)
    return True
