"""Links from shards to devices: opened once, kept, bounded; what cannot be sent is told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from batching.errors import ServingError
from shards.errors import FrameRefused, LinkClosed, LinkFull
from shards.forwarding import Forwarder
from shards.orders import Endpoint
from shards.replies import UNJOINED
from shards.transport import Link, LinkHandler, PeerInfo
from shards.wire import (
    CHUNK_BYTES,
    Buffer,
    CallHeader,
    Continuation,
    Frame,
    FrameKind,
    Header,
    Item,
    decode_tensors,
    encode_tensors,
)
from shards.worker import WorkerEngine
from tests.shards.serving import HOUR_US, FakeLink, VirtualLoop, run_virtual, until
from tests.shards.workers import double, ints, no_negatives, run

HEADER = CallHeader(1, "table", "part", [], [])


def device(generation: int = 1, actor: str = "device-0") -> Endpoint:
    return Endpoint(actor=actor, generation=generation, node="node", path="/there")


class OutLink:
    """A link to a device, that keeps what is sent."""

    def __init__(self, handler: LinkHandler) -> None:
        self.peer = PeerInfo(name="device-0", generation=1, node="node")
        self.waiting_bytes = 0
        self.refuses: ServingError | None = None
        self.sent: list[tuple[CallHeader, bytes]] = []
        self.closed: list[str] = []
        self._handler = handler

    def flush(self) -> None:
        """What is sent is there at once."""

    def send(
        self,
        kind: FrameKind,
        header: Header,
        buffers: Sequence[Buffer] = (),
    ) -> None:
        assert kind is FrameKind.CALL
        assert isinstance(header, CallHeader)
        if self.refuses is not None:
            raise self.refuses
        self.sent.append((header, b"".join(bytes(buffer) for buffer in buffers)))

    def close(self, reason: str = "") -> None:
        self.closed.append(reason)

    def refuse_last(self) -> None:
        self._handler.on_refused(self, self.sent[-1][0], FrameRefused("no room"))

    def break_off(self) -> None:
        self.refuses = LinkClosed("closed")
        self._handler.on_closed(self, None)


class Dialled:
    """A dial that succeeds when told."""

    def __init__(self) -> None:
        self.endpoints: list[Endpoint] = []
        self.links: list[OutLink] = []
        self.go = asyncio.Event()
        self.go.set()
        self.fails: Exception | None = None

    async def __call__(self, endpoint: Endpoint, handler: LinkHandler) -> Link:
        self.endpoints.append(endpoint)
        await self.go.wait()
        if self.fails is not None:
            raise self.fails
        self.links.append(OutLink(handler))
        return self.links[-1]


class Scene:
    def __init__(self, loop: VirtualLoop, **bounds: int) -> None:
        self.dial = Dialled()
        self.forwarder = Forwarder(self.dial, loop, **bounds)
        self.failed: list[str] = []

    def send(self, endpoint: Endpoint | None = None, body: bytes = b"rows") -> None:
        self.forwarder.send(endpoint or device(), HEADER, [body], self.failed.append)

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)


def virtually(scenario: Callable[[VirtualLoop, Scene], Awaitable[None]], **bounds: int) -> None:
    async def begin(loop: VirtualLoop) -> None:
        await scenario(loop, Scene(loop, **bounds))

    run_virtual(begin)


def test_frames_wait_for_their_link_and_go_out_in_order_over_one() -> None:
    async def scenario(loop: VirtualLoop, scene: Scene) -> None:
        scene.dial.go.clear()
        scene.send(body=b"one")
        scene.send(body=b"two")
        scene.dial.go.set()
        await scene.settle()
        scene.send(body=b"three")
        [link] = scene.dial.links
        assert [body for _, body in link.sent] == [b"one", b"two", b"three"]
        assert scene.failed == []

    virtually(scenario)


def test_every_generation_of_a_device_has_a_link_of_its_own() -> None:
    async def scenario(loop: VirtualLoop, scene: Scene) -> None:
        for generation in (1, 2, 1):
            scene.send(device(generation))
            await scene.settle()
        assert [endpoint.generation for endpoint in scene.dial.endpoints] == [1, 2]
        assert [len(link.sent) for link in scene.dial.links] == [2, 1]

    virtually(scenario)


def test_a_device_that_cannot_be_reached_is_told_at_once_and_not_dialled_for_a_moment() -> None:
    async def scenario(loop: VirtualLoop, scene: Scene) -> None:
        scene.dial.fails = LinkClosed("nobody listens")
        scene.send()
        scene.send()
        await scene.settle()
        assert len(scene.failed) == 2
        assert "nobody listens" in scene.failed[0]
        scene.send()
        assert len(scene.failed) == 3
        assert len(scene.dial.endpoints) == 1
        loop.now += 1.01
        scene.dial.fails = None
        scene.send()
        await scene.settle()
        assert len(scene.dial.links[0].sent) == 1

    virtually(scenario)


def test_a_link_that_broke_is_opened_again_for_the_next_frame() -> None:
    async def scenario(loop: VirtualLoop, scene: Scene) -> None:
        scene.send()
        await scene.settle()
        scene.dial.links[0].break_off()
        scene.send()
        await scene.settle()
        assert [len(link.sent) for link in scene.dial.links] == [1, 1]

    virtually(scenario)


def test_a_frame_that_a_link_does_not_take_is_told_and_costs_no_other() -> None:
    async def scenario(loop: VirtualLoop, scene: Scene) -> None:
        scene.send()
        await scene.settle()
        [link] = scene.dial.links
        link.refuses = LinkFull("full")
        scene.send()
        link.refuses = None
        scene.send()
        assert len(scene.failed) == 1
        assert "full" in scene.failed[0]
        link.refuses = LinkClosed("closing")
        scene.send()
        scene.send()
        await scene.settle()
        assert len(scene.failed) == 2, "the second found a link that was known to be closing"
        assert len(scene.dial.links) == 2

    virtually(scenario)


def test_a_large_frame_that_the_device_refuses_later_is_told_once() -> None:
    async def scenario(loop: VirtualLoop, scene: Scene) -> None:
        scene.forwarder.send(device(), msgspec.structs.replace(HEADER), [bytes(CHUNK_BYTES + 1)],
                             scene.failed.append)  # fmt: skip
        await scene.settle()
        [link] = scene.dial.links
        link.refuse_last()
        link.refuse_last()
        assert len(scene.failed) == 1
        assert "no room" in scene.failed[0]
        scene.send()
        assert not scene.forwarder._routes["device-0", 1].refusable, "a small frame is kept"

    virtually(scenario)


def test_what_waits_for_a_link_is_bounded_in_bytes() -> None:
    async def scenario(loop: VirtualLoop, scene: Scene) -> None:
        scene.dial.go.clear()
        for size in (100, 60, 41):
            scene.send(body=bytes(size))
        assert len(scene.failed) == 2
        scene.dial.go.set()
        await scene.settle()
        assert [len(body) for _, body in scene.dial.links[0].sent] == [100]

    virtually(scenario, waiting_bytes_max=120)


def test_beyond_the_bound_the_link_not_used_for_longest_is_closed() -> None:
    async def scenario(loop: VirtualLoop, scene: Scene) -> None:
        for name in ("a", "b", "a", "c"):
            scene.send(device(actor=name))
            await scene.settle()
        assert [bool(link.closed) for link in scene.dial.links] == [False, True, False]
        assert scene.failed == []

    virtually(scenario, routes_max=2)


def test_closing_closes_every_link_and_tells_who_waits() -> None:
    async def scenario(loop: VirtualLoop, scene: Scene) -> None:
        scene.send(device(actor="a"))
        await scene.settle()
        scene.dial.go.clear()
        scene.send(device(actor="b"))
        await scene.settle()
        scene.forwarder.close()
        await scene.settle()
        assert scene.dial.links[0].closed
        assert len(scene.failed) == 1

    virtually(scenario)


# --- a worker's answers that go on -------------------------------------------------------------


def onward(*asked: tuple[int, int, int], plan: str = "", unit: str = "unit") -> Frame:
    """A call whose answers go to a device: (request, rows, number), ids 0, 1, 2, ..."""
    items = [
        Item(request, rows, HOUR_US, b"", Continuation("device-0", 50 + request, slot, "place"))
        for slot, (request, rows, _) in enumerate(asked)
    ]
    ids = np.concatenate([np.full(rows, number, np.int64) for _, rows, number in asked])
    headers, buffers = encode_tensors([ids])
    header = CallHeader(9, unit, "rows", items, headers, plan, device())
    return Frame(FrameKind.CALL, 0, header, memoryview(b"".join(buffers)))


def forwarding(
    scenario: Callable[[WorkerEngine, Dialled], Awaitable[None]],
) -> None:
    async def begin(engine: WorkerEngine) -> None:
        dial = Dialled()
        engine._forwarder = Forwarder(dial, asyncio.get_running_loop())
        await scenario(engine, dial)

    run(begin)


def test_answers_go_on_as_parts_with_epoch_plan_and_slot_and_the_asker_hears_nothing() -> None:
    async def scenario(engine: WorkerEngine, dial: Dialled) -> None:
        link = FakeLink()
        engine.install("unit", double, plan="p")
        engine.on_call(link, onward((1, 2, 10), (2, 1, 20), plan="p"))
        await until(lambda: bool(dial.links and dial.links[0].sent))
        [(header, body)] = dial.links[0].sent
        assert (header.epoch, header.unit, header.op, header.plan) == (9, "unit", "part", "p")
        assert [(item.rows, item.continuation) for item in header.items] == [
            (2, Continuation("device-0", 51, 0, "place")),
            (1, Continuation("device-0", 52, 1, "place")),
        ]
        assert all(0 < item.remaining_us <= HOUR_US for item in header.items)
        [rows] = decode_tensors(header.tensors, memoryview(body))
        assert rows.tolist() == [20, 20, 40]
        assert link.sent == []

    forwarding(scenario)


def test_what_cannot_be_sent_on_is_told_to_the_asker_as_unjoined() -> None:
    async def scenario(engine: WorkerEngine, dial: Dialled) -> None:
        dial.fails = LinkClosed("nobody listens")
        link = FakeLink()
        engine.install("unit", double)
        engine.on_call(link, onward((1, 2, 10), (2, 1, 20)))
        await until(lambda: len(link.ended) == 2)
        assert link.codes == {1: UNJOINED, 2: UNJOINED}

    forwarding(scenario)


def test_a_request_that_fails_is_told_to_the_asker_and_the_others_go_on() -> None:
    async def scenario(engine: WorkerEngine, dial: Dialled) -> None:
        link = FakeLink()
        engine.install("unit", no_negatives)
        engine.on_call(link, onward((1, 1, -1), (2, 1, 20)))
        await until(lambda: bool(link.ended and dial.links and dial.links[0].sent))
        assert link.codes == {1: "INTERNAL"}
        [(header, _)] = dial.links[0].sent
        assert [item.continuation.request for item in header.items if item.continuation] == [52]

    forwarding(scenario)


def test_another_plan_is_refused_as_out_of_date_and_counted() -> None:
    async def scenario(engine: WorkerEngine, dial: Dialled) -> None:
        link = FakeLink()
        engine.install("unit", double, plan="p")
        engine.on_call(link, onward((1, 1, 3), plan="q"))
        assert link.codes == {1: "STALE_EPOCH"}
        assert engine.plans_mismatched == 1

    forwarding(scenario)


def test_answers_say_the_plan_that_they_were_made_by() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        link: Any = FakeLink()
        engine.install("unit", double, plan="p")
        headers, buffers = encode_tensors([ints(4)])
        header = CallHeader(9, "unit", "rows", [Item(1, 1, HOUR_US)], headers, "p")
        engine.on_call(link, Frame(FrameKind.CALL, 0, header, memoryview(b"".join(buffers))))
        await until(lambda: bool(link.sent))
        assert [header.plan for header, _ in link.replies] == ["p"]

    run(scenario)


def test_an_actor_that_cannot_send_on_refuses_to() -> None:
    async def scenario(engine: WorkerEngine) -> None:
        link = FakeLink()
        engine.install("unit", double)
        engine.on_call(link, onward((1, 1, 3)))
        assert link.codes == {1: "INVALID_ARGUMENT"}

    run(scenario)
