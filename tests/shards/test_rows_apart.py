"""What a row's answer, a served version and the staging memory do not depend on: everybody else.

Random histories through the real executor on a CPU: rows of several servables in any order, with
any padding and any company; and a whole device host that serves, sheds, cancels and loses peers,
and compiles and leaks nothing.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from msgspec.structs import replace

from batching import DEFAULT_POLICY
from shards.device_host import make_device_host
from shards.hosting import Hosting
from shards.orders import ActorSpec
from shards.saving import save
from shards.specs import Spec
from shards.wire import CallHeader
from tests.shards.loading import Actor, unit_of
from tests.shards.serving import (
    Array,
    DeviceRig,
    FakeLink,
    call,
    compiled,
    eventually,
    map_unit,
)

WIDTH = 48


def two_layers(w: Any, x: Any) -> Any:
    return (jnp.tanh(x @ w) @ w.T,)


def encode(params: Any, x: Any, keep: Any) -> Any:
    each = jnp.tanh(x @ params["w"]) * keep[..., None].astype(x.dtype)
    return {"total": each.sum(1)}


def owned(owner: str, unit: str, rows: dict[int, int], *arrays: Array, **changes: Any) -> Any:
    """A call in a servable's name."""
    frame = call(unit, rows, *arrays, **changes)
    assert isinstance(frame.header, CallHeader)
    return replace(frame, header=replace(frame.header, owner=owner))


def test_a_row_is_the_same_bits_in_any_order_padding_and_company_of_its_bucket() -> None:
    """Each of twelve rows is asked for many times, in batches that chance puts together.

    Within a compiled size all its answers are one bit pattern; between sizes they are close.
    """
    chance = np.random.default_rng(11)
    w = chance.standard_normal((WIDTH, WIDTH)).astype(np.float32)
    known = chance.standard_normal((12, WIDTH)).astype(np.float32)
    patterns: dict[int, list[set[bytes]]] = {}
    answers: dict[int, Array] = {}
    with DeviceRig() as rig:
        for size in (4, 16, 64):
            unit = map_unit(
                f"of {size}",
                inputs={"x": Spec(("b", WIDTH))},
                outputs={"y": Spec(("b", WIDTH))},
                batch_buckets=(size,),
            )
            rig.install(unit, compiled(two_layers, unit, [w]))
            seen = patterns[size] = [set() for _ in known]
            links = [FakeLink(f"router {number}") for number in range(3)]
            asked: list[dict[int, Array]] = [{} for _ in links]
            for turn in range(40):
                frames = []
                for place, link in enumerate(links):
                    picks = chance.integers(0, len(known), int(chance.integers(1, size + 1)))
                    asked[place][turn] = picks
                    # Strangers in every batch: rows that nobody else asks for.
                    strange = chance.standard_normal((1, WIDTH)).astype(np.float32) * 1000
                    rows = np.concatenate([known[picks], strange])
                    owner = f"servable {place}"
                    frames.append((link, owned(owner, unit.id, {turn: len(rows)}, rows)))
                for link, frame in frames:
                    rig.call(link, frame)
            for place, link in enumerate(links):
                link.wait_for(40)
                assert not link.errors
                for turn, picks in asked[place].items():
                    [found] = link.answers[turn]
                    for row, pick in zip(found, picks, strict=False):
                        seen[pick].add(row.tobytes())
                        answers[size * 100 + int(pick)] = row
        assert rig.watch.count == 0
    for size, seen in patterns.items():
        assert [len(bits) for bits in seen] == [1] * len(known), f"in batches of {size}"
    for pick, row in enumerate(known):
        expected = np.tanh(row @ w) @ w.T
        for size in patterns:
            np.testing.assert_allclose(answers[size * 100 + pick], expected, rtol=1e-4, atol=1e-3)


def _has_ended(link: FakeLink, requests: set[int]) -> bool:
    return requests <= link.ended


@pytest.mark.slow
def test_a_device_host_compiles_and_leaks_nothing_whatever_happens_to_its_requests(
    tmp_path: Path,
) -> None:
    """Lengths, sizes, deadlines, cancels and lost peers by chance; then everything is as before."""
    chance = np.random.default_rng(12)
    unit = unit_of(
        save(
            encode, {"w": np.eye(4, 3, dtype=np.float32)}, tmp_path, "model", 1,
            inputs={"x": Spec(("b", "t", 4)), "keep": Spec(("b", "t"), "int32")},
            batch_buckets=(1, 4, 8), length_buckets={"t": (4, 8)},
        )
    )  # fmt: skip
    with DeviceRig() as rig:
        spec = ActorSpec(
            kind="device", name="device-0", directory="", capacity_bytes=1 << 30,
            policy=DEFAULT_POLICY,
        )  # fmt: skip
        host = rig.io.call(make_device_host, spec, rig.io, 7)
        actor = Actor(rig, tmp_path)
        actor.opener = host.opener
        actor.books = rig.io.call(Hosting, host.opener, "device-0", 1 << 30)
        actor.load()
        staging = host.engine.staging_bytes
        links = [FakeLink(f"router {number}") for number in range(4)]
        sent: list[set[int]] = [set() for _ in links]
        cancelled: list[set[int]] = [set() for _ in links]
        lost: set[int] = set()
        for number in range(400):
            place = int(chance.integers(0, len(links)))
            link = links[place]
            if place in lost:
                continue
            count, length = int(chance.integers(1, 20)), int(chance.integers(1, 9))
            x = chance.standard_normal((count, length, 4)).astype(np.float32)
            frame = owned(
                f"servable {number % 3}", unit.id, {number: count}, x,
                np.ones((count, length), np.int32),
                remaining_us=int(chance.choice([50, 2_000, 3_600_000_000])),
            )  # fmt: skip
            sent[place].add(number)
            rig.io.call(host.engine.on_call, link, frame)
            if chance.random() < 0.1:
                cancelled[place].add(number)
                rig.io.call(host.engine.on_cancel, link, [number])
            if chance.random() < 0.005:
                lost.add(place)
                rig.io.call(host.engine.on_link_closed, link)
        for place, link in enumerate(links):
            if place not in lost:
                # Who was cancelled may have been answered already, and is never answered twice.
                eventually(partial(_has_ended, link, sent[place] - cancelled[place]))
                assert link.ended <= sent[place]
        stats = rig.io.call(host.batcher.stats)
        assert sum(lane.batches for lane in stats.lanes.values()) > 50
        eventually(lambda: rig.io.call(host.batcher.stats).in_flight == 0)
        rig.io.call(host.batcher.check_invariants)
        engine = host.engine
        assert not any(engine._tickets.values())
        assert not engine._pieces
        assert not engine._running
        assert engine._staging.free == len(engine._staging._buffers)
        assert engine.staging_bytes == staging
        assert host.compiles_after_available() == 0
        actor.unload()
        assert engine.staging_bytes == 0
        host.close()
