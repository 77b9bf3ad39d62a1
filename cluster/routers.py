"""The routers of all nodes, as the controller keeps them: opened, watched, forgotten.

Every node has one, and more where its processors are good for them: these share the port of the
first, so they are opened when it is known. Ray restarts a router; this finds it again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine
from typing import Any, Final

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, RayError

from cluster.names import namespace, router_name
from cluster.nodes import on_node
from cluster.reign import Deeds
from cluster.router_actor import RouterActor
from cluster.settings import ClusterConfig
from cluster.specs import ControllerSpec, RouterAddress, RouterSpec
from cluster.watching import SILENT_S, heard, reason_of
from shards.orders import encode

__all__ = ["Routers"]

logger = logging.getLogger(__name__)

#: Ray restarts a router within about a second.
_RETRY_S: Final = 0.2

#: Node, and which of its routers.
_Place = tuple[str, int]


class Routers:
    """Everything happens on the controller's loop.

    Args:
        spec: of the controller.
        secret: of the cluster.
        deeds: have Ray do things.
        spawn: runs something aside.
    """

    def __init__(
        self,
        spec: ControllerSpec,
        secret: bytes,
        deeds: Deeds,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._spec = spec
        self._secret = secret
        self._deeds = deeds
        self._spawn = spawn
        self._routers: dict[_Place, ActorHandle] = {}
        self._addresses: dict[_Place, RouterAddress] = {}
        self._stopping = False

    @property
    def handles(self) -> list[ActorHandle]:
        """All that are there."""
        return list(self._routers.values())

    @property
    def addresses(self) -> list[RouterAddress]:
        """Where they listen, or why they do not; of each node the first one first."""
        return [self._addresses[place] for place in sorted(self._addresses)]

    def stop(self) -> None:
        """Watch them no more."""
        self._stopping = True

    async def tend(self, nodes: Collection[str], config: ClusterConfig) -> None:
        """Open what is missing, forget what nodes have taken with them."""
        for node in nodes:
            if (node, 0) not in self._routers:
                await self._open((node, 0), config, config.http.port)
            first = self._addresses.get((node, 0))
            if first is None or not first.port or first.error:
                continue
            for index in range(1, first.processes):
                if (node, index) not in self._routers:
                    await self._open((node, index), config, first.port)
        for place in [place for place in self._routers if place[0] not in nodes]:
            self._forget(place)

    async def _open(self, place: _Place, config: ClusterConfig, port: int) -> None:
        node, index = place
        http = config.http
        spec = RouterSpec(
            cluster=self._spec.cluster,
            host=http.host,
            port=port,
            directory=self._spec.directory,
            tls=config.tls.files() if config.tls else None,
            transport=config.transport,
            limits=http.limits,
            certificates=http.tls,
            auth=config.auth,
            admin=http.admin,
            index=index,
            processes=0 if http.processes == "auto" else http.processes,
        )
        actor = ray.remote(RouterActor).options(
            name=router_name(node, index),
            namespace=namespace(self._spec.cluster),
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_concurrency=1000,
            num_cpus=0,
            enable_task_events=False,
            scheduling_strategy=on_node(node),
        )
        try:
            handle: ActorHandle = await self._deeds.create(
                lambda: actor.remote(encode(spec), self._secret)
            )
        except RayError as error:
            logger.error("router of node %s: %s", node[:12], reason_of(error))
            return
        self._routers[place] = handle
        self._spawn(self._watch(place, handle))

    async def _watch(self, place: _Place, handle: ActorHandle) -> None:
        """Know where a router listens; Ray restarts it, and this finds it again."""
        node = place[0]
        address, watch = handle.address, handle.watch
        call = address
        while self._routers.get(place) is handle and not self._stopping:
            try:
                self._addresses[place] = await heard(call.remote(), RouterAddress, SILENT_S)
                # Pending most of the time, so the end of the process is known at once.
                call = watch
            except ActorDiedError as error:
                logger.error("router of node %s: %s", node[:12], reason_of(error))
                self._forget(place)
            except TimeoutError as error:
                logger.error("router of node %s: %s; restarting it", node[:12], error)
                if await self._deeds.kill(lambda: ray.kill(handle, no_restart=False)):
                    call = address
            except RayError:
                call = address
                await asyncio.sleep(_RETRY_S)

    def _forget(self, place: _Place) -> None:
        self._routers.pop(place, None)
        self._addresses.pop(place, None)
