"""The peers of a router by name: connected when an epoch names them, closed when none does.

Decides which of several actors that hold the same thing is asked, and whether any is worth asking.
Does not know requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from batching.busyness import Whose, soonest
from cluster.dialing import Dial
from cluster.pace import quickest
from cluster.peers import Peer, PeerOwner
from shards.orders import Endpoint

__all__ = ["Roster"]


class Roster:
    """Every actor that some epoch in use names.

    Args:
        owner: whom the peers report to.
        dial: opens a link to an endpoint.
        loop: the loop whose thread everything runs on.
    """

    def __init__(self, owner: PeerOwner, dial: Dial, loop: asyncio.AbstractEventLoop) -> None:
        self._owner = owner
        self._dial = dial
        self._loop = loop
        self._peers: dict[str, Peer] = {}

    def __getitem__(self, name: str) -> Peer:
        return self._peers[name]

    def __iter__(self) -> Iterator[Peer]:
        return iter(self._peers.values())

    def best(self, names: Sequence[str]) -> Peer | None:
        """Of the actors that can be reached, the one with the fewest calls under way."""
        if len(names) == 1:  # the usual case, once or more a request
            only = self._peers.get(names[0])
            return only if only is not None and only.is_up else None
        best: Peer | None = None
        for name in names:
            peer = self._peers.get(name)
            if (
                peer is not None
                and peer.is_up
                and (best is None or peer.in_flight < best.in_flight)
            ):
                best = peer
        return best

    def quickest(self, names: Sequence[str], rows: int, now: float) -> Peer | None:
        """Of the shards that can be reached, the one that would be done first with a part."""
        peers = self._peers
        return quickest(
            [peers[name] for name in names if name in peers and peers[name].is_up], rows, now
        )

    def holders(
        self, partitions: Iterable[tuple[str, ...]], rows: int, clock: Callable[[], float]
    ) -> list[str]:
        """Whom to ask for each partition, "" where nobody can be.

        Partitions of the same replicas go to the same one, so that they share a frame.

        Args:
            partitions: of each, the actors that hold it.
            rows: of a part, about.
            clock: the loop's.
        """
        chosen: dict[tuple[str, ...], str] = {}
        found: list[str] = []
        for names in partitions:
            if len(names) == 1:  # the usual case
                peer = self._peers.get(names[0])
                found.append(names[0] if peer is not None and peer.is_up else "")
                continue
            name = chosen.get(names)
            if name is None:
                peer = self.quickest(names, rows, clock())
                name = chosen[names] = peer.endpoint.actor if peer is not None else ""
            found.append(name)
        return found

    def soonest(
        self,
        names: Sequence[str],
        whose: Whose,
        rows: int,
        deadline: float,
        clock: Callable[[], float],
        *,
        asks_anyway: bool = False,
    ) -> Peer | None:
        """Of the devices that can be reached, the one that would begin first with these rows.

        Args:
            names: of the devices.
            whose: see `batching.busyness.soonest`.
            rows: likewise.
            deadline: of the unit that is asked.
            clock: the loop's.
            asks_anyway: choose one even if all would be late.

        Raises:
            ResourceExhausted: all would be late.
        """
        peers = self._peers
        if len(names) == 1:  # the usual case
            only = peers.get(names[0])
            if only is None or not only.is_up:
                return None
            news = only.busyness.get(whose)
            if news is None or (news.full_before <= deadline and news.begins_at <= deadline):
                return only
        reached = [peers[name] for name in names if name in peers and peers[name].is_up]
        return soonest(reached, whose, rows, deadline, clock(), asks_anyway=asks_anyway)

    async def connect(self, endpoints: Mapping[str, Endpoint], timeout_s: float) -> None:
        """Dial what is new or has another endpoint; wait until it is up, but not for long."""
        fresh: list[Peer] = []
        for name, endpoint in endpoints.items():
            peer = self._peers.get(name)
            if peer is None or peer.endpoint != endpoint:
                if peer is not None:
                    peer.retire()
                peer = self._peers[name] = Peer(endpoint, self._owner, self._dial, self._loop)
                fresh.append(peer)
        if fresh:
            await asyncio.gather(*(peer.wait_up(timeout_s) for peer in fresh))

    def retain(self, names: Collection[str]) -> None:
        """Close the links to every actor that is not among these."""
        for name in [name for name in self._peers if name not in names]:
            self._peers.pop(name).retire()
