"""The faults that need a second host, a disk of its own, or a store that can vanish.

As in `bench.faults_kinds`, whom each strikes and how one sees that all is back; what is lost with a
node for good is brought back by `Struck.mend`, for the faults that follow.
"""

from __future__ import annotations

import signal
import time
from typing import Final

from bench.errors import ContenderFailed
from bench.faults_cluster import Site, Status, is_whole
from bench.faults_hosts import TwoHosts
from bench.faults_kinds import DEVICE_KILLED, SERVE, Fault, Struck

__all__ = ["CACHE_FULL", "PARTITION", "RAYLET", "STORE_AWAY"]

_PARTITION_S: Final = 10.0
_STORE_AWAY_S: Final = 5.0
_JOINED_S: Final = 60.0


def _kill_raylet(site: Site, before: Status) -> Struck:
    """The worker host's raylet: with it go the actors that it has started."""
    hosts = _two(site)
    node = _worker_node(hosts, before)
    [pid] = hosts.running_on([hosts.worker], b"/raylet\0")
    site.signal(pid, signal.SIGKILL)
    return _lost(hosts, before, node)


def _cut(site: Site, before: Status) -> Struck:
    """Nothing comes through to the worker host or from it; its processes live on."""
    hosts = _two(site)
    node = _worker_node(hosts, before)
    hosts.hosts.cut(hosts.worker)
    time.sleep(_PARTITION_S)
    hosts.hosts.heal(hosts.worker)
    return _lost(hosts, before, node)


def _lost(hosts: TwoHosts, before: Status, node: str) -> Struck:
    """A node is gone: what was on it must be elsewhere, and its host can join again as another."""
    gone = frozenset(name for name, actor in before["actors"].items() if actor["node"] == node)

    def is_back(status: Status) -> bool:
        return node not in {actor["node"] for actor in status["actors"].values()} | {
            door["node"] for door in status["doors"]
        }

    def mend() -> None:
        hosts.join()
        hosts.watch.until(
            "two nodes",
            lambda status: is_whole(status) and len(status["doors"]) == len(hosts.hosts.hosts),
            time.monotonic(),
            _JOINED_S,
        )

    return Struck(gone, is_back, mend)


def _kill_device_with_full_cache(site: Site, before: Status) -> Struck:
    """What an actor compiles cannot be kept; it must serve all the same."""
    hosts = _two(site)
    hosts.fill_caches()
    struck = DEVICE_KILLED.strike(site, before)
    return struck._replace(mend=hosts.free_caches)


def _take_store_away(site: Site, before: Status) -> Struck:
    """What is served does not need the store, and what lists it must not take it for empty."""
    site.versions.take_away()
    time.sleep(_STORE_AWAY_S)
    site.versions.bring_back()
    return Struck(
        frozenset(),
        lambda status: all(each["listing"] == "ok" for each in status["servables"].values()),
    )


def _two(site: Site) -> TwoHosts:
    if not isinstance(site, TwoHosts):
        raise ContenderFailed("this fault needs a second host")
    return site


def _worker_node(hosts: TwoHosts, status: Status) -> str:
    addresses: dict[str, str] = status["addresses"]
    [node] = [node for node, address in addresses.items() if address == hosts.worker.address]
    return node


#: Ray Serve's replica may be on the host that is lost.
_MAY_HOLD: Final = frozenset({SERVE})

RAYLET: Final = Fault(
    name="raylet of a worker killed", strike=_kill_raylet, breaks=_MAY_HOLD, holds=_MAY_HOLD
)
PARTITION: Final = Fault(
    name="worker cut off for 10 s", strike=_cut, breaks=_MAY_HOLD, holds=_MAY_HOLD
)
CACHE_FULL: Final = Fault(
    name="device actor killed, disk full", strike=_kill_device_with_full_cache
)
STORE_AWAY: Final = Fault(name="store away for 5 s", strike=_take_store_away)
