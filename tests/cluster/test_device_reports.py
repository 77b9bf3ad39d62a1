"""How a router asks its node's devices about themselves; among fake actors, in virtual time."""

from __future__ import annotations

import msgspec
import numpy as np

from cluster.device_reports import DeviceReports
from shards.questions import STATISTICS
from tests.cluster.routing_actors import Asked
from tests.cluster.routing_fakes import (
    Bench,
    VirtualLoop,
    epoch,
    plain,
    run_virtually,
    sleep_ms,
    turns,
)
from tests.cluster.test_device_metrics import device

WRITTEN = 20  # turns of the loop in which the text is made


def give(asked: Asked, data: bytes | None = None) -> None:
    """Answer a question as a device does."""
    assert asked.header.op == STATISTICS
    data = msgspec.msgpack.encode(device()) if data is None else data
    asked.link.reply([(0, len(data))], [np.frombuffer(data, np.uint8)], "")


class Scene:
    """Two devices of this node, each with a model."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.bench = Bench(loop)
        self.reports = DeviceReports(self.bench.router, "node", loop, loop.time)
        self.told: list[str] = []

    async def open(self) -> None:
        versions = [
            (plain(f"model-{n}", unit_id=f"map-{n}"), {"unit": [[f"device-{n}"]]}) for n in range(2)
        ]
        await self.bench.router.adopt(epoch(1, *versions))

    def read(self) -> None:
        self.reports.read(lambda text: self.told.append(text.decode()))

    def asked(self, name: str) -> list[Asked]:
        return self.bench.actors[name].asked

    @property
    def up(self) -> dict[str, bool]:
        """Device to whether the last text says that it is up."""
        lines = [
            line for line in self.told[-1].splitlines() if line.startswith("shardserve_device_up{")
        ]
        return {line.split('"')[1]: line.endswith(" 1") for line in lines}


def test_devices_are_asked_when_somebody_reads_and_everybody_who_waits_gets_the_answer() -> None:
    async def run(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        await scene.open()
        assert scene.asked("device-0") == []
        scene.read()
        scene.read()
        await turns()
        assert scene.told == []
        for name in ("device-0", "device-1"):
            [asked] = scene.asked(name)
            give(asked)
        await turns(WRITTEN)
        assert len(scene.told) == 2
        assert scene.told[0] == scene.told[1]
        assert scene.up == {"device-0": True, "device-1": True}
        assert 'shardserve_device_accepted_requests_total{device="device-0"' in scene.told[0]

    run_virtually(run)


def test_what_was_told_just_now_is_told_again_and_then_asked_anew() -> None:
    async def run(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        await scene.open()
        for expected in (1, 1, 2):
            scene.read()
            await turns()
            for name in ("device-0", "device-1"):
                asked = scene.asked(name)
                assert len(asked) == expected
                give(asked[-1])
            await turns(WRITTEN)
            if expected == 1 and len(scene.told) == 2:
                loop._jumping.now += 0.3
        assert len(scene.told) == 3

    run_virtually(run)


def test_a_device_that_hangs_is_down_and_keeps_nobody_waiting_for_long() -> None:
    async def run(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        await scene.open()
        began = loop.time()
        scene.read()
        await turns()
        give(scene.asked("device-0")[0])
        await wait_told(scene, 1)
        assert loop.time() - began < 0.3
        assert scene.up == {"device-0": True, "device-1": False}
        assert '"device-1"' not in scene.told[0].replace('up{device="device-1"}', "")
        # It is not asked again, and not waited for again, before it has answered.
        loop._jumping.now += 1.0
        began = loop.time()
        scene.read()
        await turns()
        assert len(scene.asked("device-1")) == 1
        give(scene.asked("device-0")[1])
        await wait_told(scene, 2)
        assert loop.time() - began < 0.1
        # Its late answer is nobody's, and then it is asked like the other.
        give(scene.asked("device-1")[0])
        loop._jumping.now += 1.0
        scene.read()
        await turns()
        give(scene.asked("device-0")[2])
        give(scene.asked("device-1")[1])
        await wait_told(scene, 3)
        assert scene.up == {"device-0": True, "device-1": True}

    run_virtually(run)


def test_a_device_that_dies_while_it_is_asked_is_down_at_once() -> None:
    async def run(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        await scene.open()
        began = loop.time()
        scene.read()
        await turns()
        give(scene.asked("device-0")[0])
        scene.bench.actors["device-1"].is_away = True
        scene.bench.actors["device-1"].link.break_off()
        await turns(WRITTEN)
        assert loop.time() == began
        assert scene.up == {"device-0": True, "device-1": False}
        scene.bench.router.close()

    run_virtually(run)


def test_nonsense_is_no_answer() -> None:
    async def run(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        await scene.open()
        scene.read()
        await turns()
        give(scene.asked("device-0")[0], b"\xc1")
        give(scene.asked("device-1")[0])
        await turns(WRITTEN)
        assert scene.up == {"device-0": False, "device-1": True}

    run_virtually(run)


def test_devices_of_other_nodes_are_their_routers_to_ask() -> None:
    async def run(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        scene.reports = DeviceReports(scene.bench.router, "another", loop, loop.time)
        await scene.open()
        scene.read()
        await turns(WRITTEN)
        assert scene.told == [""]
        assert scene.asked("device-0") == scene.asked("device-1") == []

    run_virtually(run)


def test_answers_to_requests_pass_a_question_by() -> None:
    async def run(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        await scene.open()
        scene.read()
        asker = scene.bench.ask({"x": np.ones(1, np.float32)}, name="model-0")
        await turns()
        question, request = scene.asked("device-0")
        request.answer(np.ones(1, np.float32))
        assert asker.answer.tolist() == [1.0]
        give(question)
        give(scene.asked("device-1")[0])
        await turns(WRITTEN)
        assert scene.up == {"device-0": True, "device-1": True}

    run_virtually(run)


async def wait_told(scene: Scene, count: int) -> None:
    """Let the time pass that it takes."""
    for _ in range(10):
        if len(scene.told) < count:
            await sleep_ms(30)
            await turns(WRITTEN)
    assert len(scene.told) == count
