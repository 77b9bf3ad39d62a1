"""Routers of this process over actors that are processes of their own, for the parts of ``fanout``.

No Ray, no HTTP: an actor is `bench.look_ups_actor`, a router the product's core. This file does not
know what is compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from bench.look_ups_actor import NODE, READY, SECRET_VARIABLE, SERVABLE
from bench.processes import child, python
from cluster.epochs import Epoch, ServableVersion
from cluster.router import Router
from shards.orders import Endpoint, HostedUnit
from shards.store import LocalStore
from shards.transport import Link, LinkHandler, connect

__all__ = ["Actor", "percentile_ms", "routers"]

_START_S: Final = 90.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """An actor to start.

    Attributes:
        name: its kind and number.
        units: that it loads.
        options: of `bench.look_ups_actor`, beside.
    """

    name: str
    units: Sequence[HostedUnit]
    options: Sequence[str] = ()

    def command(self, folder: Path, store: Path) -> list[str]:
        """What starts it."""
        return python(
            "bench.look_ups_actor", "--name", self.name, "--directory", str(folder),
            "--node", NODE, "--store", str(store),
            "--units", msgspec.json.encode(list(self.units)).decode(), *self.options,
        )  # fmt: skip


@contextlib.asynccontextmanager
async def routers(
    folder: Path,
    store: Path,
    actors: Sequence[Actor],
    placement: Mapping[str, tuple[tuple[str, ...], ...]],
    count: int,
) -> AsyncIterator[list[Router]]:
    """So many routers over the same actors, which are started side by side.

    Args:
        folder: for sockets and logs.
        store: with version 1 of `SERVABLE`.
        actors: who load its units.
        placement: unit to partition to replicas.
        count: of routers.
    """
    secret = secrets.token_hex(16)
    with contextlib.ExitStack() as stack:
        said = [
            stack.enter_context(
                child(
                    actor.command(folder, store),
                    log=folder / f"{actor.name}.log",
                    ready=READY,
                    timeout_s=_START_S,
                    environment={SECRET_VARIABLE: secret, "JAX_PLATFORMS": "cpu"},
                )
            )
            for actor in actors
        ]
        endpoints = [msgspec.json.decode(line, type=Endpoint) for line in said]

        async def dial(endpoint: Endpoint, handler: LinkHandler) -> Link:
            return await connect(
                endpoint, name="router", node=NODE, secret=secret.encode(), handler=handler
            )

        manifest = LocalStore(store).read_manifest(SERVABLE, 1)
        version = ServableVersion(manifest=manifest, placement=dict(placement))
        epoch = Epoch(
            term=1,
            number=1,
            servables={SERVABLE: {1: version}},
            endpoints={endpoint.actor: endpoint for endpoint in endpoints},
        )
        made = [Router(asyncio.get_running_loop(), dial) for _ in range(count)]
        try:
            for router in made:
                await router.adopt(epoch)
            yield made
        finally:
            for router in made:
                router.close()


def percentile_ms(latencies_ms: npt.NDArray[np.float64], percent: float) -> float:
    """Nearest rank."""
    return float(np.percentile(latencies_ms, percent, method="higher"))
