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
from pathlib import Path
from typing import Any

import ray

from batching.errors import Code
from cluster.doors.rest import RestDoor
from cluster.doors.service import Service
from cluster.metrics import Metrics
from cluster.names import CONTROLLER, namespace, router_name
from cluster.peers import Dial
from cluster.router import Router
from cluster.specs import RouterAddress, RouterSpec
from cluster.subscription import Subscription, Watch
from shards.loop import LoopThread
from shards.orders import Endpoint, Outcome, TlsFiles, decode, encode
from shards.transport import Link, LinkHandler, TlsContexts, connect

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
        self._name = router_name(self._node)
        self._secret = secret
        self._error = ""
        self._port = 0
        self._io = LoopThread("router-io")
        self._io.run(self._open())

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        dial = dialer(self._name, self._node, self._secret, self._spec.tls)
        self._router = Router(loop, dial)
        self._door = RestDoor(Service(self._router, Metrics()))
        watch = controller_watch(self._spec.cluster)
        subscription = Subscription(self._name, self._router, watch)
        self._subscription = loop.create_task(subscription.run())
        await subscription.wait_epoch(_FIRST_EPOCH_S)
        if not await self._open_door():
            self._reopening = loop.create_task(self._reopen_door())
        # What exists now stays: the collector need not look at it again.
        gc.collect()
        gc.freeze()

    async def _open_door(self) -> bool:
        host, port = self._spec.host, self._spec.port
        # A port that the system chose is chosen again: clients know it by now.
        kept = Path(self._spec.directory, f"{self._name}.port")
        for wanted in [port] if port else [*_read_port(kept), 0]:
            try:
                self._port = await self._door.open(host, wanted)
            except OSError as error:
                # Told, not raised: the rest of the cluster, the Serve door included, works without.
                self._error = f"cannot listen on {host}:{wanted}: {error.strerror}"
                logger.error("%s: %s", self._name, self._error)
            else:
                self._error = ""
                if not port:
                    _write_port(kept, self._port)
                return True
        return False

    async def _reopen_door(self) -> None:
        is_open = False
        while not is_open:
            await asyncio.sleep(_PORT_RETRY_S)
            is_open = await self._open_door()

    async def address(self) -> bytes:
        """A `RouterAddress`."""
        return encode(
            RouterAddress(
                router=self._name,
                node=self._node,
                host=self._spec.host,
                port=self._port,
                pid=os.getpid(),
                error=self._error,
            )
        )

    async def watch(self) -> bytes:
        """A `RouterAddress`, after a while: meanwhile, an error tells of this process's end."""
        await asyncio.sleep(_WATCH_S)
        return await self.address()

    async def stop(self, term: int) -> bytes:
        """Let requests end for a moment, then end this process.

        Answers an `Outcome` only if the order is of a reign that is over.
        """
        known = self._router.routes.epoch.term
        if term < known:
            text = f"order of term {term} refused: {self._name} has seen term {known}"
            return encode(Outcome(code=Code.FAILED_PRECONDITION, message=text))
        await self._io.wait(self._door.close())
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


def dialer(name: str, node: str, secret: bytes, files: TlsFiles | None) -> Dial:
    """How a router opens links to actors.

    Raises:
        FailedPrecondition: the files for TLS cannot be used on this node.
    """
    tls = TlsContexts(files) if files is not None else None

    async def dial(endpoint: Endpoint, handler: LinkHandler) -> Link:
        return await connect(
            endpoint, name=name, node=node, secret=secret, handler=handler, tls=tls
        )

    return dial


def controller_watch(cluster: str) -> Watch:
    """The long poll over Ray. The controller is looked up again after every failure."""
    handle: Any = None

    async def watch(router: str, have: tuple[int, int], oldest_live: int) -> bytes:
        nonlocal handle
        try:
            if handle is None:
                handle = await asyncio.to_thread(
                    ray.get_actor, CONTROLLER, namespace=namespace(cluster)
                )
            data: bytes = await handle.watch_epoch.remote(router, have, oldest_live)
        except Exception:
            handle = None
            raise
        return data

    return watch
