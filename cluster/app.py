"""The Ray Serve application: the door on 8000, and the methods of `DeploymentHandle`.

`serve.yaml` names `cluster.app:build`. A replica holds a router and no weights, so deploying,
scaling or losing it reloads nothing. Which models are served is not in here: that is declared to
the controller.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from pydantic import BaseModel, ConfigDict
from ray import serve

from batching.errors import Unavailable
from cluster.api import make_ready
from cluster.doors.asgi import AsgiDoor
from cluster.doors.calls import call
from cluster.doors.request_log import RequestLogs
from cluster.doors.service import Service
from cluster.doors.watched import follow
from cluster.keyfile import keys_of
from cluster.metrics import Metrics
from cluster.names import CONTROLLER, INGRESS, namespace
from cluster.router import Router
from cluster.router_actor import controller_watch, dialer
from cluster.specs import Membership, ServeDoorSpec, warnings_about
from cluster.subscription import Subscription
from shards.orders import decode

__all__ = ["AppArgs", "Ingress", "build"]

logger = logging.getLogger(__name__)

#: Serve sends nothing to a replica before it knows what is served, or this has passed.
_FIRST_EPOCH_S = 5.0
#: Serve notices the end of a replica when it next asks for its health: every 10 s by default.
_HEALTH_PERIOD_S = 1.0
_DECLARED_S = 30.0


class AppArgs(BaseModel):
    """Arguments of the application, as `serve.yaml` gives them.

    Attributes:
        cluster: whose controller to ask.
        num_replicas: ingress replicas.
        max_ongoing_requests: requests that a replica works on at once; beyond, Serve queues.
        max_queued_requests: beyond, Serve answers 503.
        access_log: whether Serve writes a line for each request. What was asked is in the metrics
            and, if declared, in the request log; the line costs a fifth of this door's requests.
    """

    model_config = ConfigDict(extra="forbid")

    cluster: str = "default"
    num_replicas: int = 1
    max_ongoing_requests: int = 1024
    max_queued_requests: int = 4096
    access_log: bool = False


class _Replica:
    """The one router of this process, shared by its HTTP door and its handle methods."""

    def __init__(self) -> None:
        self.cluster = "default"
        self.router: Router | None = None
        self.logs: RequestLogs | None = None
        self.body_bytes_max = 0

    @asynccontextmanager
    async def opening(self) -> AsyncIterator[Service]:
        """The service, for as long as the application lives."""
        context = ray.get_runtime_context()
        node = context.get_node_id()
        name = f"serve-{context.get_actor_id()[:16]}"
        controller = await asyncio.to_thread(
            ray.get_actor, CONTROLLER, namespace=namespace(self.cluster)
        )
        spec = await _door_spec(controller)
        self.body_bytes_max = spec.body_bytes_max
        member = decode(await controller.join.remote(), Membership)
        # Without its keys file the door does not open: rather no answers than answers to anybody.
        keys = None if spec.auth is None else await asyncio.to_thread(keys_of, spec.auth)
        for warning in warnings_about(spec.host, spec.auth, has_tls=False):
            logger.warning("the Ray Serve door: %s", warning)
        await asyncio.to_thread(make_ready)
        loop = asyncio.get_running_loop()
        router = self.router = Router(loop, dialer(self.cluster, name, node, member))
        subscription = Subscription(name, router, controller_watch(self.cluster))
        keyring = None if keys is None else keys.value
        least, most = spec.compress_bytes_min, spec.body_bytes_max
        service = Service(router, Metrics(), keyring, compress_bytes_min=least, body_bytes_max=most)
        self.logs = service.logs
        tasks = [loop.create_task(subscription.run())]
        if keys is not None:
            tasks.append(loop.create_task(follow(keys, service.use_keys)))
        try:
            await subscription.wait_epoch(_FIRST_EPOCH_S)
            yield service
        finally:
            for task in tasks:
                task.cancel()
            service.close()
            self.router = self.logs = None
            router.close()


async def _door_spec(controller: Any) -> ServeDoorSpec:
    """What was declared about this door.

    Raises:
        Unavailable: nothing is declared yet, and whether keys are needed is not known.
    """
    deadline = time.monotonic() + _DECLARED_S
    while not (data := await controller.serve_door.remote()):
        if time.monotonic() > deadline:
            raise Unavailable("nothing was declared to the controller yet", 1000)
        await asyncio.sleep(0.1)
    return decode(data, ServeDoorSpec)


_REPLICA = _Replica()


def _door() -> AsgiDoor:
    """The ASGI application of this process; Serve calls this in the replica."""
    return AsgiDoor(_REPLICA.opening, lambda: _REPLICA.body_bytes_max)


class Ingress:
    """What a `DeploymentHandle` calls. HTTP goes to the ASGI application beside it."""

    def __init__(self, cluster: str) -> None:
        _REPLICA.cluster = cluster

    async def predict(
        self,
        servable: str,
        inputs: Mapping[str, npt.ArrayLike],
        signature: str = "serving_default",
        version: int | None = None,
        label: str | None = None,
        split_key: str = "",
        timeout_s: float | None = None,
        criticality: str = "critical",
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Outputs of one request, by name; see `cluster.doors.calls.call`."""
        _, outputs = await call(
            _router(),
            servable,
            inputs,
            signature=signature,
            version=version,
            label=label,
            split_key=split_key,
            timeout_s=timeout_s,
            criticality=criticality,
            logs=_REPLICA.logs,
        )
        return outputs

    async def models(self) -> dict[str, list[int]]:
        """Available versions by servable."""
        epoch = _router().routes.epoch
        return {name: sorted(versions) for name, versions in epoch.servables.items()}


def _router() -> Router:
    router = _REPLICA.router
    if router is None:
        raise Unavailable("the router of this replica is not up yet", 500)
    return router


def _logging(args: AppArgs) -> dict[str, Any]:
    # Serve makes the record before it looks whether to keep it: only the level spares it.
    level = "INFO" if args.access_log else "WARNING"
    return {"enable_access_log": args.access_log, "log_level": level}


def build(args: AppArgs) -> serve.Application:
    """The application for these arguments."""
    deployment: Any = serve.deployment(
        serve.ingress(_door)(Ingress),
        name=INGRESS,
        num_replicas=args.num_replicas,
        max_ongoing_requests=args.max_ongoing_requests,
        max_queued_requests=args.max_queued_requests,
        health_check_period_s=_HEALTH_PERIOD_S,
        logging_config=_logging(args),
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": {"JAX_PLATFORMS": "cpu"}}},
    )
    application: serve.Application = deployment.bind(args.cluster)
    return application
