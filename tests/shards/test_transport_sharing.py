"""Links whose large bodies go through shared memory: when they do, and when they do not."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from shards.errors import FrameCorrupt, LinkClosed
from shards.transport import Limits, Link, sockets
from shards.transport._session import Session
from shards.transport._sharing import STEP_BYTES, Sharing
from shards.wire import CallHeader, CancelHeader, Frame, FrameFlag, FrameKind, encode_prefix
from tests.shards.transport_planes import Plane, Recorder, call, prove, run, serving, until

MIB = 1 << 20
SIZE = 16 * MIB
LIMITS = Limits(close_timeout_s=1.0, shared_bytes_max=SIZE)


def body_of(nbytes: int, seed: int = 0) -> memoryview:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8).data


def sharing_of(link: Link) -> Sharing:
    assert isinstance(link, Session)
    return link._sharing


def lent_bytes(link: Link) -> int:
    return sharing_of(link)._lender.lent_bytes


class Counting(Recorder):
    count = 0

    def on_frame(self, link: Link, frame: Frame) -> None:
        self.count += 1
        super().on_frame(link, frame)


async def shared(link: Link, there: Counting) -> None:
    """Send bodies that could be lent until one may be; the server has dropped them then."""
    while not sharing_of(link)._lender.is_taken_up:
        link.send(FrameKind.CALL, call(0), [bytes(100_000)])
        await asyncio.sleep(0.001)
    count = link_frames_sent(link)
    await until(lambda: there.count == count)
    there.frames.clear()


def link_frames_sent(link: Link) -> int:
    """Calls that were sent; there is nothing else but one offer."""
    assert isinstance(link, Session)
    return link._counters.frames_sent - _HANDSHAKE_FRAMES - 1


_HANDSHAKE_FRAMES = 2  # HELLO and PROOF


def with_link(
    scenario: Callable[[Plane, Link, Counting], Awaitable[None]], loop: str = "unix"
) -> None:
    """Run on a link that has agreed on shared memory from the caller to the server."""

    async def main(untaken: list[Any]) -> None:
        there = Counting()
        async with serving(loop, there, LIMITS) as served:
            link = await served.connect(Recorder(), limits=LIMITS)
            await shared(link, there)
            await scenario(served, link, there)

    run(loop, main)


def test_a_large_body_does_not_go_through_the_socket() -> None:
    async def scenario(served: Plane, link: Link, there: Counting) -> None:
        before = served.counters.bytes_received
        body = body_of(MIB)
        link.send(FrameKind.CALL, call(1), [body[:10], body[10:]])
        await until(lambda: bool(there.frames))
        assert served.counters.bytes_received - before < 1000
        received = there.frames[0]
        assert received.header == call(1)
        assert received.body == body
        assert received.body.readonly

    with_link(scenario)


def test_an_answer_is_lent_as_well() -> None:
    async def main(untaken: list[Any]) -> None:
        here = Recorder()
        async with serving("unix", Recorder(echo=True), LIMITS) as served:
            link = await served.connect(here, limits=LIMITS)
            body = body_of(MIB)
            for number in range(20):
                before = served.counters.bytes_sent
                link.send(FrameKind.CALL, call(number), [body])
                await until(lambda: bool(here.frames))
                assert here.frames.pop().body == body
            assert served.counters.bytes_sent - before < 1000

    run("unix", main)


def test_a_small_body_goes_through_the_socket() -> None:
    async def scenario(served: Plane, link: Link, there: Counting) -> None:
        link.send(FrameKind.CALL, call(1), [bytes(LIMITS.shared_body_bytes_min - 1)])
        assert lent_bytes(link) == 0
        await until(lambda: bool(there.frames))

    with_link(scenario)


def test_a_place_is_not_used_again_while_anybody_views_it() -> None:
    async def scenario(served: Plane, link: Link, there: Counting) -> None:
        sent = [body_of(MIB, seed) for seed in range(8)]
        for number, body in enumerate(sent):
            link.send(FrameKind.CALL, call(number), [body])
        await until(lambda: len(there.frames) == len(sent))
        kept = [np.frombuffer(there.frames[number].body, np.uint8) for number in (1, 4)]
        there.frames.clear()
        await until(lambda: lent_bytes(link) == 2 * MIB)
        for number in range(40):
            link.send(FrameKind.CALL, call(number), [body_of(MIB, 100 + number)])
            await until(lambda: bool(there.frames))
            there.frames.clear()
        assert [array.data for array in kept] == [sent[1], sent[4]]
        kept.clear()
        await until(lambda: lent_bytes(link) == 0)

    with_link(scenario)


def test_what_finds_no_room_goes_through_the_socket() -> None:
    async def scenario(served: Plane, link: Link, there: Counting) -> None:
        sent = [body_of(5 * MIB, seed) for seed in range(6)]
        for number, body in enumerate(sent):
            link.send(FrameKind.CALL, call(number), [body])
        assert lent_bytes(link) == 15 * MIB
        await until(lambda: len(there.frames) == len(sent))
        found = {frame.header.items[0].request: frame.body for frame in calls(there)}
        assert [found[number] for number in range(6)] == sent
        found.clear()
        there.frames.clear()
        await until(lambda: lent_bytes(link) == 0)

    with_link(scenario)


def calls(recorder: Recorder) -> list[Any]:
    assert all(isinstance(frame.header, CallHeader) for frame in recorder.frames)
    return list(recorder.frames)


def test_a_view_that_dies_on_another_thread_gives_its_place_back() -> None:
    async def scenario(served: Plane, link: Link, there: Counting) -> None:
        link.send(FrameKind.CALL, call(1), [body_of(MIB)])
        await until(lambda: bool(there.frames))
        assert lent_bytes(link) == MIB
        thread = threading.Thread(target=there.frames.clear)
        thread.start()
        await until(lambda: lent_bytes(link) == 0)
        thread.join()

    with_link(scenario)


def test_a_small_frame_overtakes_a_body_that_is_being_placed() -> None:
    async def scenario(served: Plane, link: Link, there: Counting) -> None:
        body = body_of(10 * STEP_BYTES)
        link.send(FrameKind.CALL, call(1), [body])
        link.send(FrameKind.CALL, call(2), [body_of(5 * STEP_BYTES)])
        link.send(FrameKind.CALL, call(3))
        assert link.waiting_bytes > 13 * STEP_BYTES
        await until(lambda: len(there.frames) == 3)
        # Bodies that are being placed take turns, so the shorter one is there first.
        assert [frame.header for frame in there.frames] == [call(3), call(2), call(1)]
        assert there.frames[2].body == body

    with_link(scenario)


def test_a_cancelled_body_is_placed_no_further() -> None:
    async def scenario(served: Plane, link: Link, there: Counting) -> None:
        link.send(FrameKind.CALL, call(1), [body_of(5 * MIB)])
        link.send(FrameKind.CALL, call(2, 3), [body_of(4 * MIB)])
        link.send(FrameKind.CANCEL, CancelHeader([1, 2]))
        assert lent_bytes(link) == 4 * MIB
        await until(lambda: len(there.frames) == 2)
        assert [frame.header for frame in there.frames] == [CancelHeader([1, 2]), call(2, 3)]

    with_link(scenario)


def test_closing_waits_for_what_is_being_placed() -> None:
    async def scenario(served: Plane, link: Link, there: Counting) -> None:
        body = body_of(10 * MIB)
        link.send(FrameKind.CALL, call(1), [body])
        link.close()
        await until(lambda: bool(there.closed))
        assert there.errors == [None]
        assert there.frames[0].body == body, "the view outlives the link"
        assert sharing_of(link)._lender._map is None

    with_link(scenario)


def test_views_outlive_a_peer_that_dies_and_all_else_is_forgotten() -> None:
    async def main(untaken: list[Any]) -> None:
        here = Recorder()
        async with serving("unix", Recorder(echo=True), LIMITS) as served:
            link = await served.connect(here, limits=LIMITS)
            body = body_of(MIB)
            for number in range(4):
                link.send(FrameKind.CALL, call(number), [body])
                await until(lambda number=number: len(here.frames) > number)  # type: ignore[misc]
            sharing = sharing_of(link)
            assert sharing._borrower.borrowed
            served.kill()
            await until(lambda: bool(here.closed))
            assert isinstance(here.errors[0], LinkClosed)
            assert sharing._lender._map is None
            assert sharing._borrower._bytes is None
            assert all(frame.body == body for frame in here.frames)
            here.frames.clear()
            gc.collect()
            assert sharing._borrower.borrowed == 0

    run("unix", main)


def test_a_peer_out_of_sight_is_served_through_the_socket_and_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in another pid namespace, where the kernel calls the peer process 0."""
    monkeypatch.setattr(sockets, "_peer_process", lambda _: (0, ""))

    async def main(untaken: list[Any]) -> None:
        there = Recorder()
        async with serving("unix", there, LIMITS) as served:
            link = await served.connect(Recorder(), limits=LIMITS)
            for number in range(3):
                link.send(FrameKind.CALL, call(number), [bytes(MIB)])
                await until(lambda number=number: len(there.frames) > number)  # type: ignore[misc]
            assert sharing_of(link)._lender.is_taken_up is False
            assert sharing_of(link)._lender._map is None

    with caplog.at_level(logging.INFO):
        run("unix", main)
    assert caplog.text.count("no shared memory with") == 1


def test_an_idle_link_gives_its_pages_back() -> None:
    async def main(untaken: list[Any]) -> None:
        there = Counting()
        limits = Limits(close_timeout_s=1.0, shared_bytes_max=SIZE, ping_after_s=0.05)
        async with serving("unix", there, limits) as served:
            link = await served.connect(Recorder(), limits=limits)
            await shared(link, there)
            link.send(FrameKind.CALL, call(1), [body_of(8 * MIB)])
            await until(lambda: bool(there.frames))
            places = sharing_of(link)._lender._places
            assert places.high == 8 * MIB
            there.frames.clear()
            await until(lambda: places.high == 0)

    run("unix", main)


LOAN = bytes(16)
CALL_BYTES = b"".join([b"\x96\x01\xa4unit\xa7predict\x90\x90\xa0"])


def lending_frame(kind: FrameKind, reference: bytes) -> bytes:
    prefix = encode_prefix(kind, FrameFlag.SHARED_MEMORY, 0, len(CALL_BYTES), len(reference))
    return prefix + CALL_BYTES + reference


def control(kind: FrameKind, header: bytes) -> bytes:
    return encode_prefix(kind, 0, 0, len(header), 0) + header


@pytest.mark.parametrize(
    "data",
    [
        lending_frame(FrameKind.CALL, LOAN),
        lending_frame(FrameKind.CALL, b""),
        lending_frame(FrameKind.CALL, bytes(65)),
        lending_frame(FrameKind.CANCEL, LOAN),
        control(FrameKind.OFFER, b"no offer"),
        control(FrameKind.TAKEN, b"\x01"),
        control(FrameKind.RETURN, bytes(8)),
        control(FrameKind.RETURN, b"x"),
    ],
    ids=[
        "a loan without an offer",
        "no loan",
        "more than a loan",
        "a cancel with a body",
        "no offer",
        "an answer to no offer",
        "a return of what was not lent",
        "no return",
    ],
)
@pytest.mark.parametrize("plane", ["unix", "tcp", "ray calls"])
def test_what_nobody_who_behaves_would_say_ends_the_link(plane: str, data: bytes) -> None:
    async def main(untaken: list[Any]) -> None:
        there = Recorder()
        async with serving(plane, there) as served:
            peer = await served.raw()
            await prove(peer)
            await peer.send(data)
            await until(lambda: bool(there.closed))
            assert isinstance(there.errors[0], FrameCorrupt)
            assert not there.frames

    run(plane, main)


def test_an_offer_over_a_plane_that_shares_nothing_is_declined() -> None:
    async def main(untaken: list[Any]) -> None:
        there = Recorder()
        async with serving("tcp", there) as served:
            peer = await served.raw()
            await prove(peer)
            await peer.send(control(FrameKind.OFFER, bytes(12)))
            assert await peer.receive() == control(FrameKind.TAKEN, b"\x00")

    run("tcp", main)
