"""What the device and shard actors of a node say of themselves, for those who read metrics.

The actors that the current epoch names and that live on this node are asked over the links that the
router has anyway; those of other nodes are their own routers' to tell. They are asked when somebody
reads, at most a few times a second, and waited for for a moment: who does not answer by then is
down. The text is made in pieces, a turn of the loop each: with many servables all of it takes tens
of milliseconds.

Does not know HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, TypeAlias

from batching.errors import ServingError
from cluster.device_metrics import DeviceReport, texts
from cluster.epochs import Epoch
from cluster.peers import Peer
from cluster.router import Router
from cluster.shard_metrics import ShardReport, shard_text
from shards.figures import DeviceStatistics
from shards.manifest import MapUnit, TableUnit
from shards.questions import answered, question
from shards.shard_figures import ShardStatistics
from shards.wire import Frame

__all__ = ["DeviceReports"]

logger = logging.getLogger(__name__)

_Statistics: TypeAlias = DeviceStatistics | ShardStatistics

#: An actor that is well answers within a millisecond or two; one with a full loop may take longer.
_PATIENCE_S: Final = 0.25
#: What was told just now is told again.
_FRESH_S: Final = 0.25
#: After text was made none is made for so many times as long as that took.
_REST: Final = 20


class DeviceReports:
    """Asks, and keeps the text of the last answers. Everything happens on the loop thread.

    Args:
        router: knows the actors and has the links.
        node: whose actors.
        loop: the loop.
        clock: seconds.
    """

    def __init__(
        self,
        router: Router,
        node: str,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float],
    ) -> None:
        self._router = router
        self._node = node
        self._loop = loop
        self._clock = clock
        self._waiting: list[Callable[[bytes], None]] = []
        self._heard: dict[Peer, _Statistics] = {}
        self._awaited: set[Peer] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._text = b""
        self._keep_until = float("-inf")
        self._kinds: tuple[Epoch | None, dict[str, type[_Statistics]]] = (None, {})

    def read(self, then: Callable[[bytes], None]) -> None:
        """Get the metrics of this node's actors, now or within a moment.

        Args:
            then: told the text, once.
        """
        if not self._waiting and self._clock() < self._keep_until:
            then(self._text)
            return
        self._waiting.append(then)
        if len(self._waiting) == 1:
            self._ask()

    def _ask(self) -> None:
        self._heard.clear()
        self._awaited = {
            peer
            for peer, kind in self._peers()
            if peer.ask(question(), partial(self._on_answer, peer, kind))
        }
        # An actor that hangs still has its last question; it is not waited for again.
        if self._awaited:
            self._timer = self._loop.call_later(_PATIENCE_S, self._write)
        else:
            self._write()

    def _on_answer(self, peer: Peer, kind: type[_Statistics], frame: Frame | None) -> None:
        if peer not in self._awaited:
            return  # it was given up
        self._awaited.discard(peer)
        try:
            found = None if frame is None else answered(frame, kind)
        except ServingError as error:
            logger.warning("%s: %s", peer.endpoint.actor, error)
            found = None
        if found is not None:
            self._heard[peer] = found
        if not self._awaited:
            self._write()

    def _write(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._awaited.clear()
        devices: list[DeviceReport] = []
        shards: list[ShardReport] = []
        for peer, kind in sorted(self._peers(), key=lambda each: each[0].endpoint.actor):
            actor, heard = peer.endpoint.actor, self._heard.get(peer)
            if kind is DeviceStatistics:
                assert not isinstance(heard, ShardStatistics)
                devices.append(DeviceReport(actor, heard))
            else:
                assert not isinstance(heard, DeviceStatistics)
                shards.append(ShardReport(actor, heard))
        self._write_next(_pieces(devices, shards), [], 0.0)

    def _write_next(self, pieces: Iterator[str], text: list[bytes], took_s: float) -> None:
        began = self._clock()
        piece = next(pieces, None)
        if piece is not None:
            text.append(piece.encode())
            took_s += self._clock() - began
            self._loop.call_soon(self._write_next, pieces, text, took_s)
            return
        self._text = b"".join(text)
        self._keep_until = began + max(_FRESH_S, _REST * took_s)
        waiting, self._waiting = self._waiting, []
        for then in waiting:
            then(self._text)

    def _peers(self) -> list[tuple[Peer, type[_Statistics]]]:
        """Links to the actors of this node that are asked, and what they answer."""
        epoch = self._router.routes.epoch
        if self._kinds[0] is not epoch:
            self._kinds = (epoch, _kinds_of(epoch))
        kinds = self._kinds[1]
        return [
            (peer, kinds[peer.endpoint.actor])
            for peer in self._router.peers
            if peer.endpoint.actor in kinds and peer.endpoint.node == self._node
        ]


def _pieces(devices: list[DeviceReport], shards: list[ShardReport]) -> Iterator[str]:
    """The text, a turn of the loop each."""
    yield from texts(devices)
    yield shard_text(shards)


def _kinds_of(epoch: Epoch) -> dict[str, type[_Statistics]]:
    """The actors that hold units which run on devices, or tables."""
    return {
        holder: DeviceStatistics if isinstance(unit, MapUnit) else ShardStatistics
        for versions in epoch.servables.values()
        for version in versions.values()
        for name, unit in version.manifest.units.items()
        if isinstance(unit, MapUnit | TableUnit)
        for holders in version.placement[name]
        for holder in holders
    }
