"""Inputs per request on a device: laid out once, repeated there, whatever shares a batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batching.errors import InvalidArgument
from shards.executor import LoadedUnit
from shards.exporting import ExportedUnit, export_unit
from shards.leaves import put_leaves
from shards.manifest import MapUnit, Program
from shards.programs import bucket_key, buckets_of, load_program, zero_inputs
from shards.specs import REQUESTS, Spec
from shards.store import LocalStore
from tests.shards.serving import (
    Array,
    Bench,
    DeviceRig,
    FakeLink,
    VirtualLoop,
    call,
    map_unit,
    run_virtual,
)

W = np.random.default_rng(0).standard_normal((11, 7)).astype(np.float32)
USER, HISTORY = Spec(("b", 6), per="request"), Spec(("b", "t", 3), per="request")
ITEM = Spec(("b", 5))
MIXED = {"user": USER, "history": HISTORY, "item": ITEM}
PLAIN = {"user": Spec(("b", 6)), "history": Spec(("b", "t", 3)), "item": ITEM}


def rank(params: Any, user: Any, history: Any, item: Any) -> Any:
    """What rounds differently as soon as XLA sees that a row stands there once."""
    seen = history.sum(1)
    weights = jax.nn.softmax(user, -1)
    norm = jnp.sqrt((seen * seen).mean(-1) + 1e-6)
    deep = jnp.tanh(jnp.concatenate([user * weights, item], -1) @ params)
    return {"score": deep.sum(-1) / norm + (user[:, :5] * item).sum(-1), "deep": deep}


def exported(inputs: dict[str, Spec], fn: Any = rank, **changes: Any) -> ExportedUnit:
    arguments: dict[str, Any] = {
        "batch_buckets": (8,), "length_buckets": {"t": (4,)}, "request_buckets": (1, 3),
        "platforms": ("cpu",),
    }  # fmt: skip
    return export_unit(fn, W, inputs, **(arguments | changes))


def as_unit(found: ExportedUnit, store: Path) -> MapUnit:
    programs = tuple(
        Program(blob=LocalStore(store).put(each.data), platforms=each.platforms, batch=each.batch)
        for each in found.programs
    )
    return MapUnit(
        id="unit",
        inputs=found.inputs,
        outputs=found.outputs,
        programs=programs,
        params=put_leaves(LocalStore(store), list(found.leaves)),
        batch_buckets=found.batch_buckets,
        length_buckets=found.length_buckets,
        request_buckets=found.request_buckets,
    )


def compiled(found: ExportedUnit, unit: MapUnit) -> LoadedUnit:
    programs = {each.batch: load_program(each.data, "cpu") for each in found.programs}
    ready = {
        bucket_key(unit, batch, sizes): (programs.get(None) or programs[batch]).compile(
            batch, sizes, unit
        )
        for batch, sizes in buckets_of(unit)
    }
    return LoadedUnit(
        unit=unit.id,
        leaves=tuple(jax.device_put(leaf) for leaf in found.leaves),
        compiled=dict(ready),
        costs=dict.fromkeys(ready, 0.0),
        pads=tuple(spec.pad for spec in unit.program_inputs),
        per_request=unit.per_request,
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store")
    LocalStore(path).create()
    return path


@pytest.fixture(scope="module")
def rig(store: Path) -> Iterator[DeviceRig]:
    found = exported(MIXED)
    unit = as_unit(found, store)
    with DeviceRig() as made:
        made.install(unit, compiled(found, unit), rows_max=1 << 20)
        yield made
        assert made.watch.count == 0


@pytest.fixture(scope="module")
def oracle(store: Path) -> Any:
    """The same function over inputs that are repeated before they are sent."""
    found = exported(PLAIN)
    unit = as_unit(found, store)
    loaded = compiled(found, unit)

    def answer(user: Array, history: Array, item: Array) -> list[Array]:
        """Of rows of one request, in batches of 8."""
        rows = []
        for at in range(0, len(item), 8):
            batch = zero_inputs(unit, 8, {"t": 4})
            batch[0][:] = np.repeat(user, 8, axis=0)
            batch[1][:, : history.shape[1]] = np.repeat(history, 8, axis=0)
            count = len(item[at : at + 8])
            batch[2][:count] = item[at : at + 8]
            outputs = loaded.compiled[8, (4,)](*loaded.leaves, *batch)
            rows.append([np.asarray(output)[:count] for output in outputs])
        return [np.concatenate(column) for column in zip(*rows, strict=True)]

    return answer


#: Frames of one turn: the length of their histories, and the rows of each of their requests.
FRAMES = st.lists(
    st.tuples(st.integers(1, 4), st.lists(st.integers(1, 21), min_size=1, max_size=6)),
    min_size=1, max_size=4,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(frames=FRAMES, seed=st.integers(0, 1 << 30))
def test_answers_are_bit_equal_to_those_for_repeated_inputs_in_the_same_bucket(
    rig: DeviceRig, oracle: Any, frames: list[tuple[int, list[int]]], seed: int
) -> None:
    chance = np.random.default_rng(seed)

    def drawn(*shape: int) -> Array:
        return chance.standard_normal(shape).astype(np.float32)

    asked: dict[int, tuple[Array, Array, Array]] = {}
    sent = []
    for length, requests in frames:
        numbers = range(len(asked), len(asked) + len(requests))
        parts = [(drawn(1, 6), drawn(1, length, 3), drawn(rows, 5)) for rows in requests]
        asked.update(zip(numbers, parts, strict=True))
        arrays = [np.concatenate(column) for column in zip(*parts, strict=True)]
        sent.append(call("unit", dict(zip(numbers, requests, strict=True)), *arrays))
    link = FakeLink()
    rig.call(link, *sent)
    link.wait_for(len(asked))
    assert link.errors == {}
    for number, inputs in asked.items():
        for found, expected in zip(link.answers[number], oracle(*inputs), strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, user, item: jax.nn.softmax(user, -1).sum(-1) * jnp.exp(item).sum(-1),
        lambda p, user, item: (user / jnp.sqrt((user**2).mean(-1, keepdims=True))).sum(-1),
        lambda p, user, item: (user[:, :32] * item).sum(-1),
    ],
    ids=["softmax", "norm", "inner product"],
)
def test_one_request_in_a_large_batch_rounds_as_if_it_were_repeated(fn: Any) -> None:
    """What XLA does otherwise with a row that it knows to be there once differs in the last bit."""
    chance = np.random.default_rng(1)
    user = chance.standard_normal((1, 64)).astype(np.float32)
    item = chance.standard_normal((128, 32)).astype(np.float32)

    def of(per: Any, *arrays: Array, **sizes: int) -> Array:
        inputs = {"user": Spec(("b", 64), per=per), "item": Spec(("b", 32))}
        found = exported(inputs, fn, batch_buckets=(128,), length_buckets=None)
        program = load_program(found.programs[0].data, "cpu").compile(128, sizes)
        return np.asarray(program(*found.leaves, *arrays)[0])

    once = of("request", user, item, np.zeros(128, np.int32), **{REQUESTS: 1})
    np.testing.assert_array_equal(once, of("row", np.repeat(user, 128, axis=0), item))


def test_every_number_of_requests_up_to_the_rows_has_a_program(rig: DeviceRig) -> None:
    link = FakeLink()
    for number in range(1, 9):
        frame = {100 * number + request: 1 for request in range(number)}
        shapes = ((number, 6), (number, 2, 3), (number, 5))
        rig.call(link, call("unit", frame, *(np.ones(shape, np.float32) for shape in shapes)))
    link.wait_for(sum(range(1, 9)))
    assert link.errors == {}


def test_a_function_that_needs_a_program_a_batch_leaves_the_requests_open(store: Path) -> None:
    def asks_for_its_batch(params: Any, user: Any, item: Any) -> Any:
        total = user.sum(-1) + item.sum(-1)
        return total * 2 if item.shape[0] > 2 else total + total + 0 * params.sum()

    inputs = {"user": USER, "item": ITEM}
    found = exported(inputs, asks_for_its_batch, batch_buckets=(2, 4), length_buckets=None)
    assert [each.batch for each in found.programs] == [2, 4]
    unit = as_unit(found, store)
    loaded = compiled(found, unit)
    assert sorted(loaded.compiled) == [(2, (1,)), (2, (2,)), (4, (1,)), (4, (3,)), (4, (4,))]
    user = np.arange(18, dtype=np.float32).reshape(3, 6)
    item = np.arange(20, dtype=np.float32).reshape(4, 5)
    index = np.array([0, 2, 2, 1], np.int32)
    [y] = loaded.compiled[4, (3,)](*loaded.leaves, user, item, index)
    np.testing.assert_array_equal(y, (user[index].sum(-1) + item.sum(-1)) * 2)


def test_a_buckets_staging_slot_has_room_for_its_requests_and_no_more(store: Path) -> None:
    unit = as_unit(exported(MIXED), store)
    shapes = {
        sizes[REQUESTS]: [array.shape for array in zero_inputs(unit, batch, sizes)]
        for batch, sizes in buckets_of(unit)
    }
    assert shapes == {count: [(count, 6), (count, 4, 3), (8, 5), (8,)] for count in (1, 3, 8)}


def test_a_unit_of_nothing_but_what_is_per_request_is_refused_with_advice() -> None:
    with pytest.raises(InvalidArgument, match="leave that out, and give the unit values that are"):
        export_unit(lambda p, user: user, W, {"user": USER})


# --- in virtual time: which rows meet which request's row ----------------------------------------

SUMMED = map_unit(
    inputs={"user": Spec(("b", 1), per="request"), "item": Spec(("b", 1))},
    outputs={"y": Spec(("b", 2))}, batch_buckets=(1, 4), request_buckets=(1,),
)  # fmt: skip


def paired(user: Array, item: Array, index: Array) -> list[Array]:
    """Shows whose row every item met; a batch with a negative item in it fails."""
    if (item < 0).any():
        raise ValueError("a bad row")
    return [np.concatenate([user[index], item], axis=1)]


def frame(requests: dict[int, list[float]]) -> Any:
    """Each request's user is its number."""
    user = np.array(list(requests), np.float32)[:, None]
    item = np.array([value for items in requests.values() for value in items], np.float32)[:, None]
    return call("unit", {number: len(items) for number, items in requests.items()}, user, item)


def test_a_request_that_is_cut_takes_its_row_along_and_others_keep_theirs() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        bench.install(paired, SUMMED)
        link = FakeLink()
        requests = {1: [0.0] * 3, 2: [1.0] * 6, 3: [2.0]}
        bench.engine.on_call(link, frame(requests))
        await bench.settle()
        await bench.finish_all()
        assert {n: [row.tolist() for row in rows] for n, [rows] in link.answers.items()} == {
            number: [[number, item] for item in items] for number, items in requests.items()
        }
        bench.check_idle()

    run_virtual(scenario)


def test_a_bad_item_fails_its_request_alone_and_the_halves_keep_their_requests() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        bench.install(paired, SUMMED)
        link = FakeLink()
        bench.engine.on_call(link, frame({1: [1.0], 2: [-1.0], 3: [3.0], 4: [4.0, 5.0]}))
        await bench.settle()
        await bench.finish_all()
        assert link.codes == {2: "INTERNAL"}
        found = {n: [row.tolist() for row in rows] for n, [rows] in link.answers.items()}
        assert found == {1: [[1, 1]], 3: [[3, 3]], 4: [[4, 4], [4, 5]]}
        bench.check_idle()

    run_virtual(scenario)


@settings(max_examples=60, deadline=None)
@given(
    rounds=st.lists(
        st.tuples(st.lists(st.integers(1, 9), max_size=5), st.integers(0, 3), st.integers(0, 40)),
        min_size=1, max_size=8,
    ),
    bad=st.sets(st.integers(0, 39), max_size=3),
)  # fmt: skip
def test_whoever_is_cancelled_or_fails_the_others_meet_their_own_rows(
    rounds: list[tuple[list[int], int, int]], bad: set[int]
) -> None:
    """Frames come, steps end in any order, requests are given up, and batches are bisected."""

    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        bench.install(paired, SUMMED)
        link = FakeLink()
        asked: dict[int, list[float]] = {}
        cancelled = set()
        for counts, finished, victim in rounds:
            new = {
                len(asked) + n: [-1.0 if len(asked) + n in bad else float(i) for i in range(count)]
                for n, count in enumerate(counts)
            }
            asked |= new
            if new:
                bench.engine.on_call(link, frame(new))
            await bench.settle()
            for index in range(min(finished, len(bench.device.running))):
                await bench.finish(index % len(bench.device.running))
            if victim in asked and victim not in link.ended:
                cancelled.add(victim)
                bench.engine.on_cancel(link, [victim])
                await bench.settle()
        await bench.finish_all()
        assert link.ended == asked.keys() - cancelled
        assert set(link.codes) == {n for n in bad & link.ended if asked[n]}
        for number, [found] in link.answers.items():
            assert found.tolist() == [[number, item] for item in asked[number]]
        bench.check_idle()

    run_virtual(scenario)


def test_what_fills_a_bucket_points_at_the_first_rows_request() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        bench.install(paired, SUMMED)
        for _ in range(3):  # every staging slot has held an index of four requests
            bench.engine.on_call(FakeLink(), frame({n: [0.0] for n in range(4)}))
            await bench.settle()
            await bench.finish_all()
        bench.engine.on_call(FakeLink(), frame({7: [1.0], 8: [2.0]}))
        await bench.settle()
        [held] = bench.device.running
        user, item, index = held.views
        assert held.step.descriptor.lengths == (4,)
        assert user[:2].tolist() == [[7], [8]]
        assert (item.tolist(), index.tolist()) == ([[1], [2], [1], [1]], [0, 1, 0, 0])
        await bench.finish_all()

    run_virtual(scenario)


def test_one_request_alone_takes_the_bucket_of_one_request() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        bench.install(paired, SUMMED)
        bench.engine.on_call(FakeLink(), frame({7: [1.0, 2.0, 3.0]}))
        await bench.settle()
        [held] = bench.device.running
        assert [view.shape for view in held.views] == [(1, 1), (4, 1), (4,)]
        await bench.finish_all()

    run_virtual(scenario)


def test_a_requests_row_counts_once_against_the_bound_of_bytes() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        unit = map_unit(
            inputs={"user": Spec(("b", 1000), per="request"), "item": Spec(("b", 1))},
            batch_buckets=(4,), request_buckets=(1,),
        )  # fmt: skip
        bench.install(lambda user, item, index: [np.zeros((4, 2))], unit, bytes_max=4400)
        link = FakeLink()
        user = np.zeros((1, 1000), np.float32)
        bench.engine.on_call(link, call("unit", {1: 101}, user, np.zeros((101, 1), np.float32)))
        bench.engine.on_call(link, call("unit", {2: 100}, user, np.zeros((100, 1), np.float32)))
        await bench.settle()
        assert link.codes == {1: "INVALID_ARGUMENT"}
        await bench.finish_all()
        assert link.answers.keys() == {2}

    run_virtual(scenario)


@pytest.mark.parametrize(("users", "items"), [(1, 3), (3, 3), (2, 2)])
def test_a_frame_must_have_one_row_of_it_for_each_item(users: int, items: int) -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        bench.install(paired, SUMMED)
        link = FakeLink()
        arrays = np.zeros((users, 1), np.float32), np.zeros((items, 1), np.float32)
        bench.engine.on_call(link, call("unit", {1: 1, 2: 2}, *arrays))
        assert set(link.codes.values()) == {"INVALID_ARGUMENT"}

    run_virtual(scenario)
