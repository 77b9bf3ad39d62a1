"""The Ray contenders of ``bench transport``: a Ray of their own with one async actor.

The actor echoes plain calls, and hosts the product's data plane over Ray calls, whose far end is
the same `Echo` as over sockets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

from bench.own_ray import own_ray
from bench.transport_echo import GENERATION, LIMITS, NAME, NODE, Echo

__all__ = ["EchoActor", "echo_actor"]

#: Holds the largest arguments and answers of a call that are there at once: 512 MiB.
_STORE_BYTES: Final = 1 << 30
#: A link over Ray calls keeps one call waiting; the rest are for the echoes.
_CONCURRENCY: Final = 64


class EchoActor:
    """What runs in the actor's process.

    Args:
        secret: of the links.
    """

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()
        self._plane: Any = None

    async def echo(self, payload: Any) -> Any:
        """The payload back."""
        return payload

    async def plane_send(self, link_id: str, number: int, data: bytes) -> None:
        """Bytes of a link over Ray calls."""
        await self._get_plane().send(link_id, number, data)

    async def plane_receive(self, link_id: str) -> bytes | None:
        """Bytes for a link over Ray calls."""
        received: bytes | None = await self._get_plane().receive(link_id)
        return received

    def _get_plane(self) -> Any:
        # Made by the first call, since its links belong to the loop that calls run on.
        if self._plane is None:
            from shards.transport.raycalls import RayPlane

            self._plane = RayPlane(
                name=NAME,
                generation=GENERATION,
                node=NODE,
                secret=self._secret,
                handler=Echo(),
                limits=LIMITS,
            )
        return self._plane


@contextlib.contextmanager
def echo_actor(secret: str) -> Iterator[Any]:
    """A Ray of our own for as long as the context lasts; yields the handle of an `EchoActor`.

    Raises:
        ContenderFailed: Ray did not start.
    """
    with own_ray(1, _STORE_BYTES) as ray:
        yield ray.remote(EchoActor).options(max_concurrency=_CONCURRENCY).remote(secret)
