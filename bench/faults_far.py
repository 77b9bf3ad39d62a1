"""The faults that need a second host, disks that can be filled, or a store that can be silent.

As in `bench.faults_kinds`, whom each strikes and how one sees that all is back; what is lost with a
node for good is brought back by `Struck.mend`, for the faults that follow.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Final

from bench.errors import ContenderFailed
from bench.faults_cluster import Site, Status, available, is_whole
from bench.faults_hosts import TwoHosts
from bench.faults_kinds import SERVE, Fault, Struck
from bench.faults_model import SERVABLES

__all__ = ["DISKS_FULL", "PARTITION", "RAYLET", "STORE_SILENT", "STORE_SLOW"]

_PARTITION_S: Final = 10.0
_SILENT_S: Final = 10.0
_SLOW_S: Final = 5.0
_FULL_S: Final = 5.0
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


def _fill_disks(site: Site, before: Status) -> Struck:
    """A new version cannot come onto the nodes; the old one serves until it can."""
    hosts = _two(site)
    hosts.fill_caches()
    version = max(available(before, "chain")) + 1
    hosts.publish(version)
    time.sleep(_FULL_S)
    status = hosts.watch.until("a status", lambda _: True, time.monotonic(), _JOINED_S).status
    if version in available(status, "chain"):
        raise ContenderFailed("the disks are full, and a version that is not on them was loaded")
    hosts.free_caches()
    return Struck(frozenset(), _arrived(version))


def _freeze_store(site: Site, before: Status) -> Struck:
    """What is served does not need the store, and a silent one must not be taken for empty."""
    hosts = _two(site)
    hosts.bucket.freeze()
    time.sleep(_SILENT_S)
    hosts.bucket.thaw()
    return Struck(
        frozenset(),
        lambda status: all(each["listing"] == "ok" for each in status["servables"].values()),
    )


def _slow_store(site: Site, before: Status) -> Struck:
    """A new version trickles in; the old one serves meanwhile."""
    hosts = _two(site)
    version = max(available(before, "chain")) + 1
    with hosts.bucket.slow():
        hosts.publish(version)
        time.sleep(_SLOW_S)
    return Struck(frozenset(), _arrived(version))


def _arrived(version: int) -> Callable[[Status], bool]:
    return lambda status: all(available(status, name) == [version] for name in SERVABLES)


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
DISKS_FULL: Final = Fault(name="disks full, a version comes", strike=_fill_disks)
STORE_SILENT: Final = Fault(name="store silent for 10 s", strike=_freeze_store)
STORE_SLOW: Final = Fault(name="store slow, a version comes", strike=_slow_store)
