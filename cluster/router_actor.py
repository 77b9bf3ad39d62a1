"""The Ray shell of a node's router: the direct REST port over a router core.

Ray restarts it when it dies: it keeps nothing that the controller cannot tell it again, but for
the number of a port that it chose itself. Its door closes its connections when it goes; the next
attempt of a client finds the new process, at the same port.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import ssl
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray

from batching.errors import Code, FailedPrecondition
from cluster.access import Keyring
from cluster.api import make_ready
from cluster.device_reports import DeviceReports
from cluster.dialing import Dial, Dialing
from cluster.doors.admin import Change
from cluster.doors.certificates import server_context
from cluster.doors.rest import RestDoor
from cluster.doors.service import Service
from cluster.doors.sharing import processes_on
from cluster.doors.siblings import Siblings
from cluster.doors.watched import Watched, follow
from cluster.keyfile import keys_of
from cluster.metrics import Metrics
from cluster.names import CONTROLLER, namespace, router_name
from cluster.ports import PortClaim
from cluster.rehearsing import Rehearsing
from cluster.router import Router
from cluster.specs import Membership, RouterAddress, RouterSpec, warnings_about
from cluster.subscription import Subscription, Watch
from shards.awake import stay_s
from shards.errors import LinkClosed
from shards.loop import LoopThread
from shards.orders import Endpoint, Outcome, decode, encode
from shards.transport import Link, LinkHandler, TlsContexts, connect
from shards.transport.raycalls import connect_actor

__all__ = ["RouterActor", "controller_watch", "dialer"]

logger = logging.getLogger(__name__)

_WATCH_S = 5.0
#: The port opens once it is known what is served, so that the first client of a router that was
#: started again is answered; without a controller it opens all the same.
_FIRST_EPOCH_S = 2.0
#: How often a port that is taken is tried again.
_PORT_RETRY_S = 2.0


class RouterActor:
    """One node's router. Methods are Ray calls."""

    def __init__(self, spec: bytes, secret: bytes) -> None:
        logging.basicConfig(level=os.environ.get("SHARDSERVE_LOG", "INFO"))
        self._spec = decode(spec, RouterSpec)
        self._node = ray.get_runtime_context().get_node_id()
        self._name = router_name(self._node, self._spec.index)
        self._processes = processes_on(self._spec.processes, len(os.sched_getaffinity(0)))
        self._secret = secret
        self._error = ""
        self._port = 0
        self._claim: PortClaim | None = None
        self._keys: Watched[Keyring] | None = None
        self._certificates: Watched[ssl.SSLContext] | None = None
        self._following: list[asyncio.Task[None]] = []
        self._io = LoopThread("router-io")
        self._io.run(self._open())

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        spec = self._spec
        member = Membership(secret=self._secret, tls=spec.tls, transport=spec.transport)
        dial = dialer(spec.cluster, self._name, self._node, member)
        self._router = Router(loop, dial, awake_s=stay_s())
        rehearsing = dialer(spec.cluster, f"{self._name}-rehearsing", self._node, member)
        self._rehearsing = Rehearsing(rehearsing)
        metrics = Metrics(router=str(spec.index) if self._processes > 1 else "")
        siblings = await self._siblings(metrics)
        devices = DeviceReports(self._router, self._node, loop, time.monotonic)
        least, most = spec.limits.compress_bytes_min, spec.limits.body_bytes_max
        self._service = Service(
            self._router,
            metrics,
            devices=devices,
            siblings=siblings,
            compress_bytes_min=least,
            body_bytes_max=most,
        )
        if spec.admin:
            self._service.open_admin(_controller_change(spec.cluster))
        self._door = RestDoor(self._service, self._spec.limits, metrics.door)
        await asyncio.to_thread(make_ready)
        watch = controller_watch(self._spec.cluster)
        subscription = Subscription(self._name, self._router, watch)
        self._subscription = loop.create_task(subscription.run())
        await subscription.wait_epoch(_FIRST_EPOCH_S)
        if not await self._open_door():
            self._reopening = loop.create_task(self._reopen_door())
        # What exists now stays: the collector need not look at it again.
        gc.collect()
        gc.freeze()

    async def _siblings(self, metrics: Metrics) -> Siblings | None:
        """The node's other routers, who are told what this one counts."""
        if self._processes == 1:
            return None
        folder = Path(self._spec.directory)
        sockets = {
            str(index): folder / f"{router_name(self._node, index)}.counters"
            for index in range(self._processes)
        }
        siblings = Siblings(str(self._spec.index), sockets)
        later = asyncio.get_running_loop().call_soon
        await siblings.open(partial(metrics.scrape, self._router, time.monotonic, later))
        return siblings

    async def _open_door(self) -> bool:
        # Told, not raised: the rest of the cluster, the Serve door included, works without.
        try:
            await self._read_files()
        except FailedPrecondition as error:
            self._error = error.message
            logger.error("%s does not open its door: %s", self._name, self._error)
            return False
        if not await self._listen():
            return False
        for warning in self._warnings():
            logger.warning("%s: %s", self._name, warning)
        return True

    async def _read_files(self) -> None:
        """Keys and certificates; from then on they are read again when they change."""
        auth, tls = self._spec.auth, self._spec.certificates
        loop = asyncio.get_running_loop()
        if auth is not None and self._keys is None:
            self._keys = await asyncio.to_thread(keys_of, auth)
            self._service.use_keys(self._keys.value)
            self._following.append(loop.create_task(follow(self._keys, self._service.use_keys)))
        if tls is not None and self._certificates is None:
            read = partial(server_context, tls)
            self._certificates = await asyncio.to_thread(Watched, read)
            use = self._door.use_certificates
            self._following.append(loop.create_task(follow(self._certificates, use)))

    def _warnings(self) -> tuple[str, ...]:
        spec = self._spec
        dangers = warnings_about(spec.host, spec.auth, has_tls=spec.certificates is not None)
        watched = (self._keys, self._certificates)
        return (*dangers, *(each.error for each in watched if each is not None and each.error))

    async def _listen(self) -> bool:
        context = None if self._certificates is None else self._certificates.value
        host, port = self._spec.host, self._spec.port
        # A port that the system chose is chosen again: clients know it by now.
        kept = Path(self._spec.directory, f"{self._name}.port")
        for wanted in [port] if port else [*_read_port(kept), 0]:
            try:
                self._port = await self._open_port(host, wanted, context)
            except OSError as error:
                self._error = (
                    f"cannot listen on {host}:{wanted} ({error.strerror}): end what listens "
                    "there, or set cluster.http.port"
                )
                logger.error("%s: %s", self._name, self._error)
            else:
                self._error = ""
                if not port:
                    _write_port(kept, self._port)
                return True
        return False

    async def _open_port(self, host: str, port: int, context: ssl.SSLContext | None) -> int:
        if self._processes == 1:
            return await self._door.open(host, port, context=context)
        owner = f"{self._spec.cluster} {self._spec.directory}"
        claim = PortClaim(port, owner) if port else None
        try:
            found = await self._door.open(host, port, context=context, shared=True)
        except BaseException:
            if claim is not None:
                claim.release()
            raise
        self._claim = claim or PortClaim(found, owner)  # kept: the end of the process releases it
        return found

    async def _reopen_door(self) -> None:
        is_open = False
        while not is_open:
            await asyncio.sleep(_PORT_RETRY_S)
            is_open = await self._open_door()

    async def address(self) -> bytes:
        """A `RouterAddress`."""
        return await self._io.wait(self._address())

    async def _address(self) -> bytes:
        # On the loop thread: a router whose loop no longer turns must not say that it is well.
        return encode(
            RouterAddress(
                router=self._name,
                node=self._node,
                host=self._spec.host,
                port=self._port,
                pid=os.getpid(),
                scheme="http" if self._spec.certificates is None else "https",
                error=self._error,
                warnings=self._warnings(),
                processes=self._processes,
            )
        )

    async def watch(self) -> bytes:
        """A `RouterAddress`, after a while: meanwhile, an error tells of this process's end."""
        await asyncio.sleep(_WATCH_S)
        return await self.address()

    async def rehearse(self, order: bytes) -> bytes:
        """Replay a version's warm-up requests (`cluster.rehearsing`); answers an `Outcome`."""
        return await self._io.wait(self._rehearsing.take(order))

    async def stop(self, term: int) -> bytes:
        """Let requests end for a moment, then end this process.

        Answers an `Outcome` only if the order is of a reign that is over.
        """
        known = self._router.routes.epoch.term
        if term < known:
            text = f"order of term {term} refused: {self._name} has seen term {known}"
            return encode(Outcome(code=Code.FAILED_PRECONDITION, message=text))
        await self._io.wait(self._door.close())
        self._io.call(self._service.close)
        os._exit(0)


def _read_port(file: Path) -> list[int]:
    """The port that was written down, if one was."""
    try:
        return [int(file.read_text())]
    except (OSError, ValueError):
        return []


def _write_port(file: Path, port: int) -> None:
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file.write_text(str(port))


def dialer(cluster: str, name: str, node: str, member: Membership) -> Dial:
    """How a router opens links to actors.

    Args:
        cluster: whose actors they are.
        name: of the router.
        node: of the router.
        member: what it knows as one of the cluster.

    Raises:
        FailedPrecondition: the files for TLS cannot be used on this node.
    """
    tls = TlsContexts(member.tls) if member.tls is not None else None
    secret = member.secret

    async def sockets(endpoint: Endpoint, handler: LinkHandler) -> Link:
        return await connect(
            endpoint, name=name, node=node, secret=secret, handler=handler, tls=tls
        )

    async def calls(endpoint: Endpoint, handler: LinkHandler) -> Link:
        try:
            handle = await asyncio.to_thread(
                ray.get_actor, endpoint.actor, namespace=namespace(cluster)
            )
        except ValueError:
            raise LinkClosed(f"Ray knows no {endpoint.actor}") from None
        return await connect_actor(
            handle, endpoint, name=name, node=node, secret=secret, handler=handler
        )

    return Dialing(member.planes, sockets, calls).dial


def controller_watch(cluster: str) -> Watch:
    """The long poll over Ray."""
    call = _controller_calls(cluster)

    async def watch(router: str, have: tuple[int, int], oldest_live: int) -> bytes:
        return await call("watch_epoch", router, have, oldest_live)

    return watch


def _controller_change(cluster: str) -> Change:
    """Edits of what is declared, over Ray."""
    call = _controller_calls(cluster)

    async def change(edit: bytes) -> bytes:
        return await call("edit", edit)

    return change


def _controller_calls(cluster: str) -> Callable[..., Awaitable[bytes]]:
    """Calls of the controller's methods. It is looked up again after every failure."""
    handle: Any = None

    async def call(method: str, *args: object) -> bytes:
        nonlocal handle
        try:
            if handle is None:
                handle = await asyncio.to_thread(
                    ray.get_actor, CONTROLLER, namespace=namespace(cluster)
                )
            data: bytes = await getattr(handle, method).remote(*args)
        except Exception:
            handle = None
            raise
        return data

    return call
