"""A link whose bytes go by calls of a real Ray actor."""

from __future__ import annotations

from typing import Any

import pytest

from shards.errors import HandshakeRefused, LinkClosed
from shards.transport import Limits
from shards.transport.raycalls import connect_actor
from shards.wire import CHUNK_BYTES, CancelHeader, FrameKind, ReplyHeader
from tests.e2e.running import ROOT
from tests.shards.test_transport_raycalls import ENDPOINT, serve
from tests.shards.transport_planes import NODE, SECRET, Recorder, call, run, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


def test_a_link_over_a_real_ray_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Echo, order, cancel, a refusal, and the death of the actor."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    import ray

    class Actor:
        """An actor whose handler answers every call with its body."""

        def __init__(self) -> None:
            self.plane = serve(Recorder(echo=True))

        async def plane_send(self, link_id: str, number: int, data: bytes) -> None:
            await self.plane.send(link_id, number, data)

        async def plane_receive(self, link_id: str) -> bytes | None:
            return await self.plane.receive(link_id)

    async def scenario(untaken: list[Any]) -> None:
        handle: Any = ray.remote(Actor).remote()
        here = Recorder()
        arguments: dict[str, Any] = {
            "name": "caller",
            "node": NODE,
            "handler": here,
            "limits": Limits(handshake_timeout_s=60),
        }
        with pytest.raises(HandshakeRefused):
            await connect_actor(handle, ENDPOINT, secret=b"another", **arguments)
        link = await connect_actor(handle, ENDPOINT, secret=SECRET, **arguments)
        link.send(FrameKind.CANCEL, CancelHeader([9]))
        sizes = [0, 10, 5000, 300_000, 8 << 20] + [100] * 200
        for number, size in enumerate(sizes):
            link.send(FrameKind.CALL, call(number), [bytes(size)])
        await until(lambda: len(here.frames) == len(sizes))
        found = []
        for frame in here.frames:
            assert isinstance(frame.header, ReplyHeader)
            found.append((frame.header.items[0][0], len(frame.body)))
        assert sorted(found) == list(enumerate(sizes))
        small = [number for number, size in found if size <= CHUNK_BYTES]
        assert small == sorted(small), "only large frames are overtaken"
        ray.kill(handle)
        await until(lambda: bool(here.closed))
        assert len(here.closed) == 1
        assert isinstance(here.errors[0], LinkClosed)

    # Named, since it joins a Ray that somebody else has on this machine otherwise.
    ray.init("local", num_cpus=1, include_dashboard=False)
    try:
        run("ray calls", scenario, timeout_s=120)
    finally:
        ray.shutdown()
