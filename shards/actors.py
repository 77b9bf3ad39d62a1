"""The Ray shells of the actors that host units: device, shard and host actors.

An actor is a process with one event-loop thread of its own (`LoopThread`) on which its sockets,
its engine and its books live. Ray calls reach it on Ray's loop and are passed over; no request
does. JAX is imported by device actors only, when they start.

Restarting is the controller's decision, so Ray's own restarts stay off. A process that can no
longer vouch for itself ends; the controller notices and makes another.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

import ray

from batching.allowance import Allowance
from batching.errors import Code, ServingError
from shards.cache import NodeCache
from shards.errors import FrameRefused
from shards.faults import end_process_on_fault
from shards.figures import DeviceStatistics
from shards.hosting import Hosting, UnitOpener
from shards.loop import LoopThread
from shards.manifest import CustomUnit, TableUnit
from shards.orders import (
    ActorReport,
    ActorSpec,
    AllowOrder,
    Endpoint,
    LoadOrder,
    MeasuredLane,
    Outcome,
    decode,
    encode,
)
from shards.replies import refuse_answer
from shards.transport import Link, LinkHandler, Listener, TlsContexts, connect, listen
from shards.transport.raycalls import RayPlane
from shards.wire import CancelHeader, Frame, FrameKind, Header, ReplyHeader

__all__ = ["DeviceActor", "HostActor", "ShardActor"]

logger = logging.getLogger(__name__)

_WATCH_S = 5.0
_WATCH_LOADING_S = 1.0
#: Threads of the engines: when one is gone, what it had is never answered.
_ENGINE_THREADS = ("executor", "completion", "worker")


class _Engine(Protocol):
    def on_call(self, link: Link, frame: Frame) -> None: ...

    def on_cancel(self, link: Link, requests: Sequence[int]) -> None: ...

    def on_link_closed(self, link: Link) -> None: ...


class _Frames:
    """Passes a link's frames to the engine."""

    def __init__(self, engine: _Engine) -> None:
        self._engine = engine

    def on_frame(self, link: Link, frame: Frame) -> None:
        if frame.kind is FrameKind.CALL:
            self._engine.on_call(link, frame)
        elif frame.kind is FrameKind.CANCEL:
            assert isinstance(frame.header, CancelHeader)
            self._engine.on_cancel(link, frame.header.requests)

    def on_refused(self, link: Link, header: Header, error: FrameRefused) -> None:
        # An answer that its router does not take: the requests must still end.
        if isinstance(header, ReplyHeader):
            refuse_answer(link, header, error)

    def on_closed(self, link: Link, error: Exception | None) -> None:
        self._engine.on_link_closed(link)


class _UnitActor:
    """What the three kinds share: a loop, a listener, books, and the control methods.

    Control methods take and return msgpack (`shards.orders`), so that what crosses Ray is data.
    """

    def __init__(self, spec: bytes, secret: bytes) -> None:
        self._spec = decode(spec, ActorSpec)
        logging.basicConfig(level=self._spec.log)
        if self._spec.platforms:
            # JAX reads it when it is imported, which is later.
            os.environ["JAX_PLATFORMS"] = self._spec.platforms
        self._generation = time.time_ns() // 1000
        self._node = ray.get_runtime_context().get_node_id()
        io_name = f"{self._spec.name}-io"
        self._io = LoopThread(io_name)
        end_process_on_fault(self._io.loop, (*_ENGINE_THREADS, io_name))
        self._compiles: Callable[[], int] = lambda: 0
        self._mismatches: Callable[[], int] = lambda: 0
        self._costs: Callable[[], tuple[MeasuredLane, ...]] = lambda: ()
        self._statistics: Callable[[], DeviceStatistics | None] = lambda: None
        self._is_loading = False
        self._secret = secret
        self._tls = TlsContexts(self._spec.tls) if self._spec.tls is not None else None
        engine, self._hosting = self._io.call(self._make)
        handler = _Frames(engine)
        self._listener: Listener = self._io.run(
            listen(
                name=self._spec.name,
                generation=self._generation,
                node=self._node,
                secret=secret,
                handler=handler,
                directory=self._spec.directory or None,
                tcp_host=_address(self._spec.tcp_host),
                tls=self._tls,
            )
        )
        self._plane = RayPlane(
            name=self._spec.name,
            generation=self._generation,
            node=self._node,
            secret=secret,
            handler=handler,
        )

    def _make(self) -> tuple[_Engine, Hosting]:
        """The engine and the books of this kind. Runs on the loop thread."""
        raise NotImplementedError

    def _books(
        self,
        opener: UnitOpener,
        on_allowance: Callable[[str, Allowance | None], None] = lambda servable, allowance: None,
    ) -> Hosting:
        spec = self._spec
        cache = NodeCache(spec.blob_cache, spec.blob_cache_bytes) if spec.blob_cache else None
        return Hosting(opener, spec.name, spec.capacity_bytes, cache, on_allowance)

    async def report(self) -> bytes:
        """An `ActorReport`."""
        return encode(await self._io.wait(self._report()))

    async def _report(self) -> ActorReport:
        # On the loop thread: that is where the books are kept, and a loop that no longer turns
        # must not be reported as well.
        loading = self._hosting.loading
        self._is_loading = bool(loading)
        return ActorReport(
            kind=self._spec.kind,
            endpoint=self._listener.endpoint,
            pid=os.getpid(),
            loaded=self._hosting.loaded,
            loading=loading,
            reserved_bytes=self._hosting.reserved_bytes,
            capacity_bytes=self._hosting.capacity_bytes,
            compiles_after_available=self._compiles(),
            mismatches=self._mismatches(),
            units=self._hosting.units,
            costs=self._costs(),
            statistics=self._statistics(),
        )

    async def load(self, order: bytes) -> bytes:
        """Carry out a `LoadOrder`; answers an `Outcome`."""
        return await self._outcome(self._hosting.load(decode(order, LoadOrder)))

    async def unload(self, term: int, servable: str, version: int) -> bytes:
        """Undo an order; answers an `Outcome`."""
        return await self._outcome(self._hosting.unload(term, servable, version))

    async def allow(self, order: bytes) -> bytes:
        """Carry out an `AllowOrder`; answers an `Outcome`."""
        return await self._outcome(self._allow(decode(order, AllowOrder)))

    async def _allow(self, order: AllowOrder) -> None:
        self._hosting.allow(order)

    async def watch(self) -> bytes:
        """An `ActorReport`, after a while: meanwhile, an error tells of this process's end."""
        # How far a load has come is looked at; one that is about to end moves quickly.
        await asyncio.sleep(_WATCH_LOADING_S if self._is_loading else _WATCH_S)
        return await self.report()

    async def stop(self, term: int) -> bytes:
        """End this process; answers an `Outcome` only if the order is of a reign that is over."""
        refusal = await self._outcome(self._close(term))
        if decode(refusal, Outcome).code == Code.FAILED_PRECONDITION:
            return refusal
        os._exit(0)

    async def _close(self, term: int) -> None:
        # Whoever was succeeded must not take away what the successor counts on.
        self._hosting.check_term(term)
        logger.info("%s: told to stop", self._spec.name)
        await self._listener.close()

    async def plane_send(self, link_id: str, number: int, data: bytes) -> None:
        """Ray-call data plane: bytes from a peer (`shards.transport.raycalls`)."""
        await self._io.wait(self._plane.send(link_id, number, data))

    async def plane_receive(self, link_id: str) -> bytes | None:
        """Ray-call data plane: bytes for a peer, when there are any."""
        return await self._io.wait(self._plane.receive(link_id))

    async def _outcome(self, work: Coroutine[Any, Any, None]) -> bytes:
        try:
            # An order that was begun is carried out to its end, whoever stops waiting for it.
            await asyncio.shield(self._io.wait(work))
        except ServingError as error:
            return encode(Outcome(code=error.code, message=error.message))
        except Exception as error:
            logger.exception("%s: an order failed", self._spec.name)
            text = f"{type(error).__name__}: {error}"
            return encode(Outcome(code=Code.INTERNAL, message=text[:2048]))
        return encode(Outcome())


class DeviceActor(_UnitActor):
    """Owns one device and everything that runs on it."""

    def _make(self) -> tuple[_Engine, Hosting]:
        from shards.device_host import make_device_host

        host = make_device_host(self._spec, self._io, self._generation)
        host.opener.prepare()
        self._compiles = host.compiles_after_available
        self._mismatches = lambda: host.engine.parts_mismatched
        self._costs = host.costs
        self._statistics = host.engine.meter.read
        return host.engine, self._books(host.opener, host.batcher.allow)


class ShardActor(_UnitActor):
    """Hosts partitions of tables, and of units of registered kinds."""

    def _make(self) -> tuple[_Engine, Hosting]:
        from shards.custom import CustomUnitOpener
        from shards.forwarding import Forwarder
        from shards.kinds import OpenerByKind
        from shards.openers import TableOpener
        from shards.shard_figures import shard_statistics
        from shards.worker import WorkerEngine

        forwarder = Forwarder(self._dial, self._io.loop)
        engine = WorkerEngine(self._io.loop, self._generation, forwarder=forwarder)
        self._mismatches = lambda: engine.plans_mismatched
        tables = TableOpener(engine)
        engine.statistics = lambda: encode(shard_statistics(tables.caches))
        opener = OpenerByKind({TableUnit: tables, CustomUnit: CustomUnitOpener(engine)})
        return engine, self._books(opener)

    async def _dial(self, endpoint: Endpoint, handler: LinkHandler) -> Link:
        return await connect(
            endpoint,
            name=self._spec.name,
            node=self._node,
            secret=self._secret,
            handler=handler,
            generation=self._generation,
            tls=self._tls,
        )


class HostActor(_UnitActor):
    """Runs host units: user Python, in a process of its own."""

    def _make(self) -> tuple[_Engine, Hosting]:
        from shards.openers import HostUnitOpener
        from shards.worker import WorkerEngine

        engine = WorkerEngine(self._io.loop, self._generation)
        opener = HostUnitOpener(engine, self._spec.allow_entry_points)
        return engine, self._books(opener)


def _address(host: str) -> str | None:
    """Where to listen for peers of other nodes: ``auto`` is where Ray reaches this node."""
    return ray.util.get_node_ip_address() if host == "auto" else host or None
