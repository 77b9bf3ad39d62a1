"""One actor as a router sees it: frames, links, and what happens when either fails."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest

from batching.allowance import BEST_EFFORT, CRITICAL
from batching.errors import ServingError, Unavailable
from cluster.peers import Peer
from shards.errors import FrameCorrupt, FrameRefused, LinkClosed, LinkFull, SpecMismatch
from shards.together import TOGETHER_MAX
from shards.wire import Frame, FrameKind, Item
from tests.cluster.routing_actors import FakeActors
from tests.cluster.routing_fakes import (
    VirtualLoop,
    endpoint,
    floats,
    run_virtually,
    sleep_ms,
    turns,
)


class Owner:
    """Notes what a peer reports."""

    def __init__(self) -> None:
        self.replies: list[Frame] = []
        self.unsent: dict[int, ServingError] = {}
        self.losses: list[Exception] = []

    def on_reply(self, peer: Peer, frame: Frame) -> None:
        self.replies.append(frame)

    def on_unsent(self, peer: Peer, requests: list[int], error: ServingError) -> None:
        for number in requests:
            assert number not in self.unsent, "told twice"
            self.unsent[number] = error

    def on_peer_lost(self, peer: Peer, error: Exception) -> None:
        self.losses.append(error)


class Scene:
    """A peer, and the actor at the other end."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.owner = Owner()
        self.actors = FakeActors()
        self.actor = self.actors["a"]
        self.peer = Peer(endpoint("a"), self.owner, self.actors.dial, loop)

    async def up(self) -> Scene:
        assert await self.peer.wait_up(1.0)
        return self

    def send(
        self,
        number: int,
        *arrays: Any,
        unit: str = "u",
        merge: bool = True,
        criticality: int = CRITICAL,
        op: str = "run",
    ) -> None:
        """As the router does: an item counts as under way before it is sent."""
        self.peer.in_flight += 1
        item = Item(number, len(arrays[0]), 1000)
        key = (unit, *[array.shape[1:] for array in arrays]) if merge else None
        self.peer.send("model", unit, op, 1, item, arrays, key, criticality=criticality)

    def is_up(self) -> bool:
        return self.peer.is_up

    @property
    def frames(self) -> list[list[int]]:
        """The requests of every frame that came."""
        return [[item.request for item in header.items] for header, _ in self.actor.link.calls]


# Frames


def test_rows_of_one_turn_share_frames_and_every_item_keeps_its_own() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = await Scene(loop).up()
        sizes = [random.Random(7).randint(1, 4) for _ in range(60)]
        for number, size in enumerate(sizes):
            scene.send(number, np.full((size, 3), number, np.float32), np.full(size, -number))
        await turns()
        assert [asked.item.request for asked in scene.actor.asked] == list(range(60))
        for number, asked in enumerate(scene.actor.asked):
            first, second = asked.arrays
            assert first.tolist() == [[number] * 3] * sizes[number]
            assert second.tolist() == [-number] * sizes[number]
        assert len(scene.frames) < 20, "hardly anything shares a frame"
        scene.peer.retire()

    run_virtually(scenario)


@pytest.mark.parametrize("dtype", ["bool", "int8", "float16", "bfloat16", "float64", "uint64"])
@pytest.mark.parametrize("width", [1, 7, 5000])
def test_tensors_of_shared_frames_lie_aligned_whatever_their_size(dtype: str, width: int) -> None:
    """The fake link decodes with the real code, which refuses what is not aligned."""

    async def scenario(loop: VirtualLoop) -> None:
        scene = await Scene(loop).up()
        ones = np.ones((2, width), np.dtype(dtype) if dtype != "bfloat16" else _bfloat16())
        given = [ones, np.zeros_like(ones)] * 3
        for number, array in enumerate(given):
            scene.send(number, array, floats(number, number), ones)
        await turns()
        assert max(map(len, scene.frames)) > 1
        for number, asked in enumerate(scene.actor.asked):
            assert asked.arrays[0].dtype == ones.dtype
            assert asked.arrays[0].tolist() == given[number].tolist()
            assert asked.arrays[1].tolist() == [number, number]
        scene.peer.retire()

    run_virtually(scenario)


def _bfloat16() -> Any:
    from shards.specs import dtype_of

    return dtype_of("bfloat16")


def test_rows_that_do_not_lie_contiguously_arrive_whole() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = await Scene(loop).up()
        wide = np.arange(40_000, dtype=np.float32).reshape(20, 2000)
        for number in range(3):
            scene.send(number, wide[::2, ::2])
        await turns()
        assert max(map(len, scene.frames)) > 1
        assert all(np.array_equal(asked.arrays[0], wide[::2, ::2]) for asked in scene.actor.asked)
        scene.peer.retire()

    run_virtually(scenario)


def test_rows_of_other_units_epochs_shapes_or_criticality_never_share_a_frame() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = await Scene(loop).up()
        for number in range(3):
            scene.send(number, floats(1))
            scene.send(100 + number, floats(1), unit="v")
            scene.send(200 + number, np.ones((1, 2), np.float32))
            scene.send(300 + number, floats(1), criticality=BEST_EFFORT)
        await turns()
        told = {header.items[0].request: header.criticality for header, _ in scene.actor.link.calls}
        assert (told[0], told[300]) == (CRITICAL, BEST_EFFORT)
        assert all(len({number // 100 for number in frame}) == 1 for frame in scene.frames)
        scene.peer.retire()

    run_virtually(scenario)


def test_look_ups_in_several_tables_leave_in_one_frame_and_nothing_else_does() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = await Scene(loop).up()
        ids = np.arange(3)
        for number, (unit, op) in enumerate(
            [("t1", "rows"), ("t2", "rows"), ("u", "run"), ("t1", "rows"), ("t3", "sum")]
        ):
            counts = (np.array([1, 2], np.int32),) if op == "sum" else ()
            scene.send(number, *counts, ids + number, unit=unit, op=op)
        await turns()
        assert scene.frames == [[2], [0, 3], [1], [4]]
        units = [(header.unit, header.op) for header, _ in scene.actor.link.calls]
        assert units == [("u", "run"), ("t1", "rows"), ("t2", "rows"), ("t3", "sum")]
        assert len(scene.actor.link.body_bytes) == 2
        for header, arrays in scene.actor.link.calls:
            expected = [ids + item.request for item in header.items]
            assert arrays[-1].tolist() == np.concatenate(expected).tolist()
        assert scene.peer.sent_bytes == 5 * 24 + 8
        scene.peer.retire()

    run_virtually(scenario)


def test_a_frame_of_several_tables_is_bounded_in_bytes_and_calls() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = await Scene(loop).up()
        for number in range(5):
            scene.send(number, np.zeros(50_000, np.int64), unit=f"t{number}", op="rows")
        await turns()
        assert scene.actor.link.body_bytes == [2 * 400_000, 2 * 400_000, 400_000]
        for number in range(TOGETHER_MAX + 1):
            scene.send(10 + number, np.zeros(1, np.int64), unit=f"t{number}", op="rows")
        await turns()
        assert len(scene.actor.link.body_bytes) == 5
        scene.peer.retire()

    run_virtually(scenario)


def test_what_a_full_link_refuses_is_told_for_every_table_of_the_frame() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = await Scene(loop).up()
        scene.actor.link.refuses = LinkFull("full")
        for number in range(3):
            scene.send(number, np.zeros(1, np.int64), unit=f"t{number}", op="rows")
        await turns()
        assert scene.owner.unsent.keys() == {0, 1, 2}
        assert scene.peer.sent_bytes == 0
        scene.peer.retire()

    run_virtually(scenario)


def test_items_that_must_not_merge_travel_alone() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = await Scene(loop).up()
        for number in range(4):
            scene.send(number, np.array([b"text"], object), merge=False)
        await turns()
        assert sorted(scene.frames) == [[0], [1], [2], [3]]
        scene.peer.retire()

    run_virtually(scenario)


def test_a_frame_is_bounded_in_bytes_and_a_larger_item_travels_alone() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = await Scene(loop).up()
        small, big = np.zeros((1, 100_000), np.float32), np.zeros((8, 100_000), np.float32)
        for number in range(20):
            scene.send(number, big if number % 5 == 3 else small)
        await turns()
        sizes = dict(zip(map(tuple, scene.frames), scene.actor.link.body_bytes, strict=True))
        assert all(len(frame) == 1 for frame, size in sizes.items() if size > 1 << 20)
        assert sum(size > 1 << 20 for size in sizes.values()) == 4
        assert sorted(number for frame in scene.frames for number in frame) == list(range(20))
        scene.peer.retire()

    run_virtually(scenario)


def test_requests_of_a_call_that_the_actor_does_not_take_are_told_and_no_others() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = await Scene(loop).up()
        for number in range(3):
            scene.send(number, floats(number, 1), merge=number < 2)
        await turns()
        calls = [header for header, _ in scene.actor.link.calls]
        refused = FrameRefused("a: a body of 9 bytes is over the bound of 8")
        scene.peer.on_refused(scene.actor.link, calls[0], refused)
        assert list(scene.owner.unsent) == [item.request for item in calls[0].items] == [0, 1]
        assert scene.owner.unsent[0] is refused
        assert scene.peer.is_up
        scene.peer.retire()

    run_virtually(scenario)


def test_a_burst_leaves_in_frames_of_bounded_length() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = await Scene(loop).up()
        for number in range(3000):
            scene.send(number, floats(number))
        await turns()
        assert max(map(len, scene.frames)) <= 1024
        assert sum(map(len, scene.frames)) == 3000
        scene.peer.retire()

    run_virtually(scenario)


# Cancels


def test_cancels_of_one_turn_leave_together() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = await Scene(loop).up()
        for number in (3, 1, 2):
            scene.peer.cancel(number)
        assert scene.actor.link.cancelled == []
        await turns()
        assert scene.actor.link.cancelled == [3, 1, 2]
        scene.peer.retire()

    run_virtually(scenario)


def test_a_cancel_that_a_full_link_does_not_take_is_forgotten() -> None:
    """`run_virtually` fails the test if the flush raises into the loop."""

    async def scenario(loop: VirtualLoop) -> None:
        scene = await Scene(loop).up()
        scene.actor.link.refuses = LinkFull("full")
        scene.peer.cancel(1)
        await turns()
        scene.actor.link.refuses = None
        scene.peer.cancel(2)
        await turns()
        assert scene.actor.link.cancelled == [2]
        scene.peer.retire()

    run_virtually(scenario)


# Failures


def test_what_a_full_link_refuses_is_reported_once_and_the_rest_goes_on() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = await Scene(loop).up()
        scene.actor.link.refuses = LinkFull("full")
        for number in range(3):
            scene.send(number, floats(1))
        await turns()
        scene.actor.link.refuses = None
        scene.send(9, floats(1))
        await turns()
        assert scene.owner.unsent.keys() == {0, 1, 2}
        assert {type(error) for error in scene.owner.unsent.values()} == {LinkFull}
        assert scene.frames == [[9]]
        assert scene.is_up()
        scene.peer.retire()

    run_virtually(scenario)


def test_rows_that_cannot_travel_fail_their_own_item_and_no_other() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = await Scene(loop).up()
        texts = [b"fine", 17, b"fine"]
        for number, text in enumerate(texts):
            scene.send(number, np.array([text], object), merge=False)
        await turns()
        assert scene.owner.unsent.keys() == {1}
        assert type(scene.owner.unsent[1]) is SpecMismatch
        assert scene.frames == [[0], [2]]
        scene.peer.retire()

    run_virtually(scenario)


def test_a_peer_that_is_away_refuses_at_once_and_queues_nothing() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        scene.actor.is_away = True
        assert not await scene.peer.wait_up(0.01)
        with pytest.raises(Unavailable, match="actor a is away"):
            scene.send(1, floats(1))
        scene.peer.cancel(1)
        scene.actor.is_away = False
        await sleep_ms(3000)
        assert scene.is_up()
        assert scene.frames == []
        assert scene.actor.link.cancelled == []
        scene.peer.retire()

    run_virtually(scenario)


def test_a_loss_is_reported_and_the_rows_that_waited_are_dropped() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = await Scene(loop).up()
        for number in range(3):
            scene.send(number, floats(1))
        scene.peer.cancel(7)
        before = list(scene.frames)
        scene.actor.link.break_off(FrameCorrupt("nonsense"))
        assert [str(error) for error in scene.owner.losses] == ["nonsense"]
        await turns()
        assert scene.actor.links[0].cancelled == []
        assert [[i.request for i in h.items] for h, _ in scene.actor.links[0].calls] == before
        assert not scene.owner.unsent
        scene.peer.retire()

    run_virtually(scenario)


def test_a_lost_link_is_opened_again() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = await Scene(loop).up()
        scene.actor.link.break_off()
        assert not scene.is_up()
        await turns()
        assert scene.is_up()
        scene.send(1, floats(1))
        await turns()
        assert scene.frames == [[1]]
        scene.peer.retire()

    run_virtually(scenario)


def test_tries_to_reach_an_actor_back_off_up_to_a_bound() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        scene.actor.is_away = True
        await sleep_ms(20_000)
        at = scene.actor.dialled_at
        gaps = [later - earlier for earlier, later in itertools.pairwise(at)]
        assert gaps[:4] == pytest.approx([0.05, 0.1, 0.2, 0.4])
        assert gaps[-1] == pytest.approx(2.0)
        scene.peer.retire()

    run_virtually(scenario)


def test_a_link_that_dies_before_it_was_looked_at_is_not_taken_for_open() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        scene.actor.dies_at_once = True
        await turns(10)
        assert not scene.is_up()
        scene.actor.dies_at_once = False
        await sleep_ms(60)
        assert scene.is_up()
        assert len(scene.actor.links) == 2, "it was dialled by two tasks"
        scene.peer.retire()

    run_virtually(scenario)


def test_a_closing_link_counts_as_down_before_its_end_is_told() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = await Scene(loop).up()
        scene.actor.link.refuses = LinkClosed("closing")
        scene.send(1, floats(1))
        await turns()
        assert not scene.is_up()
        assert type(scene.owner.unsent[1]) is LinkClosed
        scene.actor.link.break_off()
        await turns()
        assert scene.is_up()
        scene.peer.retire()

    run_virtually(scenario)


# The end


def test_a_retired_peer_closes_its_link_and_stays_away() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = await Scene(loop).up()
        scene.peer.retire()
        await sleep_ms(60_000)
        assert not scene.actor.link.is_open()
        assert len(scene.actor.links) == 1

    run_virtually(scenario)


@pytest.mark.parametrize("after", range(4))
def test_a_peer_that_is_retired_while_it_dials_leaves_no_link_open(after: int) -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = Scene(loop)
        await turns(after)
        scene.peer.retire()
        await sleep_ms(60_000)
        assert not scene.is_up() or not scene.actor.link.is_open()
        assert len(scene.actor.links) <= 1

    run_virtually(scenario)


def test_nothing_of_ended_sends_is_kept() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = await Scene(loop).up()
        for number in range(100):
            scene.send(number, floats(1), unit=f"unit-{number % 7}")
        await turns()
        assert not scene.peer._groups
        scene.send(200, floats(1))
        scene.peer.retire()
        await turns()
        assert not scene.peer._groups
        assert not scene.peer._cancels

    run_virtually(scenario)


def test_frames_that_are_no_replies_are_ignored() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        scene = await Scene(loop).up()
        link = scene.actor.link
        scene.peer.on_frame(link, Frame(FrameKind.CALL, 0, b"", memoryview(b"")))
        assert scene.owner.replies == []
        link.reply([], (), "u")
        assert len(scene.owner.replies) == 1
        scene.peer.retire()

    run_virtually(scenario)
