"""The device engine as an actor has it: a loop thread, an executor and JAX on a CPU."""

from __future__ import annotations

import threading
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from shards.hosted import LaneBounds
from shards.programs import buckets_of
from shards.specs import Spec
from tests.shards.serving import (
    DEADLINE_S,
    Array,
    DeviceRig,
    FakeLink,
    call,
    compiled,
    loaded,
    map_unit,
)


def rows(*values: float) -> Array:
    return np.repeat(np.array(values, np.float32)[:, None], 2, axis=1)


SEQUENCES = map_unit(
    "sequences",
    inputs={"x": Spec(("b", "t", 3)), "keep": Spec(("b", "t"), "int32", 0)},
    outputs={"each": Spec(("b", "t", 5)), "total": Spec(("b", 5))},
    batch_buckets=(1, 2, 8),
    length_buckets={"t": (4, 16)},
)
W = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)


def encode(w: Any, x: Any, keep: Any) -> Any:
    each = jnp.tanh(x @ w) * keep[..., None].astype(x.dtype)
    return each, each.sum(1)


def sequence(chance: np.random.Generator, count: int, length: int) -> tuple[Array, Array]:
    x = chance.standard_normal((count, length, 3)).astype(np.float32)
    return x, np.ones((count, length), np.int32)


@pytest.mark.parametrize(
    ("cost_s", "run_now_s"),
    [(0.0, 0.1), (0.0, 0.0), (1.0, 0.1)],
    ids=["on the loop's thread", "short steps", "long steps"],
)
def test_many_links_are_answered_right_and_nothing_compiles(
    cost_s: float, run_now_s: float
) -> None:
    chance = np.random.default_rng(3)
    with DeviceRig(run_now_s=run_now_s) as rig:
        rig.install(SEQUENCES, compiled(encode, SEQUENCES, [W], cost_s))
        before = rig.watch.count
        links = [FakeLink(f"link {n}") for n in range(4)]
        asked: dict[tuple[int, int], Array] = {}
        for turn in range(60):
            mine = turn % len(links)
            count, length = int(chance.integers(1, 12)), int(chance.integers(1, 17))
            x, keep = sequence(chance, count, length)
            asked[mine, turn] = x
            rig.call(links[mine], call("sequences", {turn: count}, x, keep))
        for number, link in enumerate(links):
            link.wait_for(15)
            assert not link.errors
            for turn, (each, total) in link.answers.items():
                expected = np.tanh(asked[number, turn] @ W)
                np.testing.assert_allclose(each, expected, atol=1e-5)
                np.testing.assert_allclose(total, expected.sum(1), atol=1e-4)
        assert sum(len(link.answers) for link in links) == len(asked)
        assert rig.watch.count == before == 0


def test_no_bucket_compiles_once_it_is_installed() -> None:
    chance = np.random.default_rng(4)
    with DeviceRig() as rig:
        rig.install(SEQUENCES, compiled(encode, SEQUENCES, [W]))
        link = FakeLink()
        used = set()
        for number, (batch, sizes) in enumerate(buckets_of(SEQUENCES)):
            rig.call(link, call("sequences", {number: batch}, *sequence(chance, batch, sizes["t"])))
            link.wait_for(number + 1)
            used.add((batch, sizes["t"]))
        assert len(used) == 6
        assert rig.io.call(rig.batcher.stats).in_flight == 0
        assert rig.watch.count == 0


def test_a_row_is_the_same_bit_for_bit_whatever_its_neighbours_in_the_bucket() -> None:
    chance = np.random.default_rng(5)
    unit = map_unit(
        inputs={"x": Spec(("b", 64))}, outputs={"y": Spec(("b", 64))}, batch_buckets=(8,)
    )
    w = chance.standard_normal((64, 64)).astype(np.float32)

    def layer(w: Any, x: Any) -> Any:
        return (jnp.tanh(x @ w) @ w.T,)

    x = chance.standard_normal((1, 64)).astype(np.float32)
    with DeviceRig() as rig:
        rig.install(unit, compiled(layer, unit, [w]))
        link = FakeLink()
        for number in range(8):
            # The same row at every position, among strangers on either side.
            before = chance.standard_normal((number, 64)).astype(np.float32)
            after = chance.standard_normal((7 - number, 64)).astype(np.float32) * 100
            frame = call(
                "unit",
                {3 * number: number, 3 * number + 1: 1, 3 * number + 2: 7 - number},
                np.concatenate([before, x, after]),
            )
            rig.call(link, frame)
            link.wait_for(3 * (number + 1))
        alone = link.answers[1][0]
        rig.call(link, call("unit", {100: 1}, x))
        link.wait_for(25)
        assert link.answers[100][0].tobytes() == alone.tobytes()
        for number in range(8):
            assert link.answers[3 * number + 1][0].tobytes() == alone.tobytes()


def test_a_program_that_fails_for_one_row_on_the_device_fails_one_request() -> None:
    unit = map_unit(batch_buckets=(4,))
    run = compiled(lambda x: (x + 1,), unit).compiled[4, ()]

    def program(x: Array) -> Any:
        if np.isnan(x).any():
            raise ValueError("not a number\nat line 2")
        return run(x)

    with DeviceRig() as rig:
        rig.install(unit, loaded(unit, {(4, ()): program}))
        links = [FakeLink(), FakeLink()]
        rig.call(links[0], call("unit", {0: 1, 1: 1, 2: 1}, rows(0, np.nan, 2)))
        rig.call(links[1], call("unit", {3: 1}, rows(3)))
        links[0].wait_for(3)
        links[1].wait_for(1)
        assert links[0].answers.keys() == {0, 2}
        assert links[0].codes == {1: "INTERNAL"}
        assert links[0].errors[1].message.endswith("ValueError: not a number")
        assert links[1].answers[3][0].tolist() == [[4.0, 4.0]]


def test_short_steps_run_on_the_loops_thread_only_if_the_engine_is_told_to() -> None:
    unit = map_unit(batch_buckets=(4,))
    threads: list[str] = []

    def program(x: Array) -> Any:
        threads.append(threading.current_thread().name)
        return (x + 1,)

    for run_now_s in (0.1, 0.0):
        with DeviceRig(run_now_s=run_now_s) as rig:
            rig.install(unit, loaded(unit, {(4, ()): program}))
            link = FakeLink()
            rig.call(link, call("unit", {1: 1}, rows(1)))
            link.wait_for(1)
    assert threads == ["test-io", "executor"]


def test_a_removal_waits_for_the_device_and_the_next_unit_of_that_name_serves() -> None:
    unit = map_unit()
    with DeviceRig() as rig:
        rig.install(unit, compiled(lambda x: (x + 1,), unit, cost_s=1.0))
        link = FakeLink()
        rig.call(link, call("unit", dict.fromkeys(range(40), 1), rows(*range(40))))
        rig.io.run(rig.engine.lanes.remove("unit"), DEADLINE_S)
        assert link.answers.keys() == set(range(40))
        bounds = LaneBounds()
        rig.io.call(rig.engine.lanes.install, unit, compiled(lambda x: (x * 2,), unit), bounds)
        rig.call(link, call("unit", {50: 1}, rows(4)))
        link.wait_for(41)
        assert link.answers[50][0].tolist() == [[8.0, 8.0]]
