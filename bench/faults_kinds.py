"""The faults: whom each strikes, which doors it may break, and how one sees that all is back.

Each is done to a running cluster by a signal, a command or a file, as it would happen to it, and
never through an interface of ours.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from bench.errors import ContenderFailed
from bench.faults_cluster import Site, Status, available

__all__ = ["DEVICE_KILLED", "DIRECT", "ONE_HOST", "QUICK", "SERVE", "Fault", "Struck"]

DIRECT: Final = "direct"
SERVE: Final = "serve"
_LOADING_S: Final = 30.0


class Struck(NamedTuple):
    """What a fault has done.

    Attributes:
        touched: actors that must be other processes afterwards; all others must not.
        is_back: whether what was struck is there again, by the cluster's own word.
        mend: brings back what cannot come back by itself, for the faults that follow.
    """

    touched: frozenset[str]
    is_back: Callable[[Status], bool]
    mend: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault.

    Attributes:
        name: in tables.
        strike: does it; given the status from before.
        breaks: doors whose connections it may break.
        holds: doors at which a proxy may hold requests while it lasts.
    """

    name: str
    strike: Callable[[Site, Status], Struck]
    breaks: frozenset[str] = frozenset()
    holds: frozenset[str] = frozenset()


def _nothing(site: Site, before: Status) -> Struck:
    return Struck(frozenset(), lambda status: True)


def _kill_controller(site: Site, before: Status) -> Struck:
    [pid] = site.running(_CONTROLLER_TITLE)
    site.signal(pid, signal.SIGKILL)
    return Struck(frozenset(), lambda status: bool(status["term"] > before["term"]))


def _kill_router(site: Site, before: Status) -> Struck:
    # The one that the clients use.
    host = urlsplit(site.rest).hostname
    near = [door for door in before["doors"] if before["addresses"].get(door["node"]) == host]
    # On one host clients come over loopback, and there is but one door.
    [door] = near or before["doors"]
    site.signal(site.process(door["node"], door["pid"]), signal.SIGKILL)

    def is_back(status: Status) -> bool:
        found = {each["node"]: each["pid"] for each in status["doors"]}
        return bool(found.get(door["node"], door["pid"]) != door["pid"])

    return Struck(frozenset(), is_back)


def _strike_actor(
    kind: str, number: signal.Signals = signal.SIGKILL
) -> Callable[[Site, Status], Struck]:
    """Kill, or stop, one of a kind without which ``chain`` cannot be answered."""

    def strike(site: Site, before: Status) -> Struck:
        name = _needed(before, kind)
        actor = before["actors"][name]
        site.signal(site.process(actor["node"], actor["pid"]), number)
        return Struck(frozenset({name}), _replaced(name, before))

    return strike


def _needed(status: Status, kind: str) -> str:
    """The last actor of a kind that the newest version of ``chain`` is placed on."""
    newest = max(status["servables"]["chain"]["versions"], key=lambda each: each["version"])
    return str(max(name for name in newest["actors"] if name.startswith(f"{kind}-")))


def _replaced(name: str, before: Status) -> Callable[[Status], bool]:
    generation = before["actors"][name]["generation"]

    def is_back(status: Status) -> bool:
        now = status["actors"].get(name, {}).get("generation", 0)
        return now not in (0, generation)

    return is_back


def _kill_process(words: bytes) -> Callable[[Site, Status], Struck]:
    """Kill all processes of a kind that is Ray Serve's to restart."""

    def strike(site: Site, before: Status) -> Struck:
        gone = set(site.running(words))
        if not gone:
            raise ContenderFailed(f"the cluster has no process like {words.decode()!r}")
        for pid in gone:
            site.signal(pid, signal.SIGKILL)
        return Struck(frozenset(), lambda status: bool(set(site.running(words)) - gone))

    return strike


def _kill_device_while_a_version_loads(site: Site, before: Status) -> Struck:
    """The new version's load is cut short, with the old one's weights."""
    version = max(available(before, "chain")) + 1
    site.publish(version)

    def is_loading(status: Status) -> bool:
        versions = status["servables"]["chain"]["versions"]
        return any(each["version"] == version and each["actors"] for each in versions)

    found = site.watch.until("the new version to load", is_loading, 0.0, _LOADING_S).status
    name = _needed(found, "device")
    device = found["actors"][name]
    site.signal(site.process(device["node"], device["pid"]), signal.SIGKILL)
    back = _replaced(name, before)
    return Struck(
        frozenset({name}),
        lambda status: back(status) and available(status, "chain") == [version],
    )


def _deploy(site: Site, before: Status) -> Struck:
    """Ray Serve replaces the replicas, one after the other."""
    gone = set(site.running(_REPLICA))
    site.command("deploy")
    return Struck(frozenset(), lambda status: not gone & set(site.running(_REPLICA)))


#: The titles that Ray gives to processes, and a program's name.
_CONTROLLER_TITLE: Final = b"ray::Controller"
_REPLICA: Final = b"ServeReplica:shardserve"
_HAPROXY: Final = b"haproxy\0"

_NOTHING: Final = Fault(name="nothing", strike=_nothing)
_CONTROLLER: Final = Fault(name="controller killed", strike=_kill_controller)
DEVICE_KILLED: Final = Fault(name="device actor killed", strike=_strike_actor("device"))
_SHARD: Final = Fault(name="shard actor killed", strike=_strike_actor("shard"))
_HOST: Final = Fault(name="host actor killed", strike=_strike_actor("host"))
_ROUTER: Final = Fault(name="router killed", strike=_kill_router, breaks=frozenset({DIRECT}))

ONE_HOST: Final = (
    _NOTHING,
    _CONTROLLER,
    DEVICE_KILLED,
    _SHARD,
    _HOST,
    _ROUTER,
    Fault(
        name="Serve replica killed",
        strike=_kill_process(_REPLICA),
        breaks=frozenset({SERVE}),
        holds=frozenset({SERVE}),
    ),
    Fault(
        name="HAProxy killed",
        strike=_kill_process(_HAPROXY),
        breaks=frozenset({SERVE}),
        holds=frozenset({SERVE}),
    ),
    # It lives on and says nothing: until that is noticed, requests wait for their deadline.
    Fault(name="device actor stopped", strike=_strike_actor("device", signal.SIGSTOP)),
    Fault(name="device actor killed, mid-load", strike=_kill_device_while_a_version_loads),
    Fault(name="shardserve deploy", strike=_deploy),
)
QUICK: Final = (_NOTHING, _CONTROLLER, DEVICE_KILLED, _SHARD, _ROUTER)
