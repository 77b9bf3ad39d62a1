"""A whole serving path in one process: actors' engines, router and REST door, without Ray.

Everything but Ray is real: bundles in a store, compiled programs, sockets between router and
engines, HTTP. Each engine and the router run on one `LoopThread`; the tests are clients.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from cluster.device_reports import DeviceReports
from cluster.doors.rest import RestDoor
from cluster.doors.service import Service
from cluster.doors.settings import DoorLimits
from cluster.epochs import Epoch, ServableVersion, VersionStatus
from cluster.metrics import Metrics
from cluster.router import Router
from shards.custom import CustomUnitOpener
from shards.device_host import make_device_host
from shards.errors import FrameRefused
from shards.forwarding import Forwarder
from shards.hosting import Hosting, UnitOpener
from shards.kinds import OpenerByKind
from shards.loop import LoopThread
from shards.manifest import CustomUnit, HostUnit, MapUnit, TableUnit
from shards.openers import HostUnitOpener, TableOpener
from shards.orders import ActorSpec, Endpoint, HostedUnit, LoadOrder
from shards.references import bound
from shards.store import LocalStore
from shards.transport import Link, LinkHandler, Listener, connect, listen
from shards.wire import CancelHeader, Frame, FrameKind, Header
from shards.worker import WorkerEngine

__all__ = ["Answer", "Cluster", "dial", "request"]

SECRET = b"only these tests know it"
NODE = "node"
KINDS = {MapUnit: "device", TableUnit: "shard", CustomUnit: "shard", HostUnit: "host"}


class Answer(NamedTuple):
    """An HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return str(self.json["error"])


def request(
    port: int,
    method: str,
    path: str,
    body: str | bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """One request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20.0)
    try:
        data = body.encode() if isinstance(body, str) else body
        connection.request(method, path, data, dict(headers or {}))
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, found, response.read())
    finally:
        connection.close()


class _Engine(Protocol):
    def on_call(self, link: Link, frame: Frame) -> None: ...

    def on_cancel(self, link: Link, requests: Sequence[int]) -> None: ...

    def on_link_closed(self, link: Link) -> None: ...


class _Frames:
    def __init__(self, engine: _Engine) -> None:
        self._engine = engine

    def on_frame(self, link: Link, frame: Frame) -> None:
        if frame.kind is FrameKind.CALL:
            self._engine.on_call(link, frame)
        elif isinstance(frame.header, CancelHeader):
            self._engine.on_cancel(link, frame.header.requests)

    def on_refused(self, link: Link, header: Header, error: FrameRefused) -> None:
        raise AssertionError("no test sends what a router does not take")

    def on_closed(self, link: Link, error: Exception | None) -> None:
        self._engine.on_link_closed(link)


class _Actor:
    """What an actor's process does, on the shared loop thread."""

    def __init__(self, kind: str, name: str, directory: str, io: LoopThread) -> None:
        self.name = name
        self._io = io
        self._workers: list[WorkerEngine] = []
        self._close: list[Any] = []
        engine, opener = io.call(lambda: self._make(kind, directory))
        self.hosting = io.call(lambda: Hosting(opener, name, 1 << 30))
        self.listener: Listener = io.run(
            listen(
                name=name, generation=1, node=NODE, secret=SECRET,
                handler=_Frames(engine), directory=directory,
            )
        )  # fmt: skip

    def _make(self, kind: str, directory: str) -> tuple[_Engine, UnitOpener]:
        if kind == "device":
            spec = ActorSpec(kind="device", name=self.name, directory=directory, capacity_bytes=0)
            host = make_device_host(spec, self._io, 1)
            self._close.append(host.close)
            return host.engine, host.opener
        if kind == "shard":
            forwarder = Forwarder(self._dial, self._io.loop)
            worker = WorkerEngine(self._io.loop, 1, forwarder=forwarder)
            self._close += [worker.close, lambda: self._io.call(forwarder.close)]
            return worker, OpenerByKind(
                {TableUnit: TableOpener(worker), CustomUnit: CustomUnitOpener(worker)}
            )
        worker = WorkerEngine(self._io.loop, 1)
        self._close.append(worker.close)
        return worker, HostUnitOpener(worker, ("tests.*",))

    async def _dial(self, endpoint: Endpoint, handler: LinkHandler) -> Link:
        return await connect(
            endpoint, name=self.name, node=NODE, secret=SECRET, handler=handler, generation=1
        )

    def close(self) -> None:
        self._io.run(self.listener.close())
        for close in self._close:
            close()


class Cluster:
    """Serves versions of a store on one device engine, one host engine and some shard engines.

    Args:
        store: a store's directory.
        directory: short enough for the path of a socket.
        shards: how many shard engines.
        limits: of the door.
    """

    def __init__(
        self, store: Path, directory: Path, *, shards: int = 2, limits: DoorLimits | None = None
    ) -> None:
        self.store = LocalStore(store)
        self.io = LoopThread("cluster-io")
        names = {"device": ["device-0"], "host": ["host-0"]}
        names["shard"] = [f"shard-{index}" for index in range(shards)]
        self._names = names
        #: of the epochs that are published from now on
        self.continuation_bytes_min: int | None = 0
        self.hot_rows_bytes = 0
        self.actors = {
            name: _Actor(kind, name, str(directory), self.io)
            for kind, group in names.items()
            for name in group
        }
        self.metrics = Metrics()
        self._versions: dict[str, dict[int, ServableVersion]] = {}
        self._labels: dict[str, dict[str, int]] = {}
        self._number = 0
        self.router, self.service, self.door, self.port = self.io.run(self._open(limits))

    async def _open(self, limits: DoorLimits | None) -> tuple[Router, Service, RestDoor, int]:
        router = Router(self.io.loop, dial)
        devices = DeviceReports(router, NODE, self.io.loop, time.monotonic)
        service = Service(router, self.metrics, devices=devices)
        door = RestDoor(service, limits)
        return router, service, door, await door.open("127.0.0.1", 0)

    def load(
        self, servable: str, version: int, refers: Mapping[str, tuple[str, int]] | None = None
    ) -> None:
        """Load a version onto the engines; `publish` makes it known.

        Args:
            servable: its name.
            version: its number.
            refers: where it refers to others: which loaded version each reference means.
        """
        manifest = self.store.read_manifest(servable, version)
        placement: dict[str, tuple[tuple[str, ...], ...]] = {}
        orders: dict[str, list[HostedUnit]] = {}
        for name, unit in manifest.units.items():
            group = self._names[KINDS[type(unit)]]
            if isinstance(unit, TableUnit | CustomUnit):
                holders = [group[index % len(group)] for index in range(len(unit.partitions))]
                placement[name] = tuple((holder,) for holder in holders)
                for actor in dict.fromkeys(holders):
                    held = tuple(i for i, holder in enumerate(holders) if holder == actor)
                    orders.setdefault(actor, []).append(HostedUnit(name=name, partitions=held))
            else:
                placement[name] = ((group[0],),)
                orders.setdefault(group[0], []).append(HostedUnit(name=name))
        for actor, units in orders.items():
            order = LoadOrder(
                term=1, store=self.store.url, servable=servable, version=version,
                units=tuple(units),
            )  # fmt: skip
            self.io.run(self.actors[actor].hosting.load(order))
        if refers:
            meant = {name: self.loaded(*key) for name, key in refers.items()}
            named = {name: manifest.references[name].unit for name in meant}
            placement |= {name: each.placement[named[name]] for name, each in meant.items()}
            manifest = bound(
                manifest, {name: each.manifest.units[named[name]] for name, each in meant.items()}
            )
        self._versions.setdefault(servable, {})[version] = ServableVersion(
            manifest=manifest, placement=placement
        )

    def loaded(self, servable: str, version: int) -> ServableVersion:
        """A version that was loaded, and where."""
        return self._versions[servable][version]

    @property
    def endpoints(self) -> dict[str, Endpoint]:
        """Where the engines listen."""
        return {name: actor.listener.endpoint for name, actor in self.actors.items()}

    def publish(
        self,
        labels: Mapping[str, Mapping[str, int]] | None = None,
        statuses: Sequence[VersionStatus] = (),
        without: Set[tuple[str, int]] = frozenset(),
    ) -> None:
        """Make the router use what was loaded, but for some versions."""
        self._number += 1
        servables = {
            name: {n: version for n, version in versions.items() if (name, n) not in without}
            for name, versions in self._versions.items()
        }
        available = [
            VersionStatus(servable=name, version=number, state="AVAILABLE")
            for name, versions in servables.items()
            for number in versions
        ]
        epoch = Epoch(
            term=1,
            number=self._number,
            servables=servables,
            labels={name: dict(found) for name, found in (labels or {}).items()},
            endpoints=self.endpoints,
            statuses=(*available, *statuses),
            continuation_bytes_min=self.continuation_bytes_min,
            hot_rows_bytes=self.hot_rows_bytes,
        )
        self.io.run(self.router.adopt(epoch))

    def ask(
        self,
        path: str,
        body: str | bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """POST a body to the door, or GET where there is none."""
        return request(self.port, "GET" if body is None else "POST", path, body, headers)

    def close(self) -> None:
        """End everything, whatever state it is in."""
        self.io.run(self.door.close())
        self.io.call(self.service.close)
        self.io.call(self.router.close)
        for actor in self.actors.values():
            actor.close()
        self.io.close()


async def dial(endpoint: Endpoint, handler: LinkHandler) -> Link:
    return await connect(endpoint, name="router", node=NODE, secret=SECRET, handler=handler)
