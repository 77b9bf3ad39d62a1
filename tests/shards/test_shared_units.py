"""Units that several servables use: one copy, one lane, and batches of all of them together."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from msgspec.structs import replace

from batching import LaneKey
from batching.errors import ResourceExhausted
from shards.compiling.compiler import Compiler
from shards.errors import ProgramRefused
from shards.saving import save
from shards.specs import Spec
from shards.wire import CallHeader
from tests.shards.loading import Actor, rows, unit_of
from tests.shards.serving import Array, DeviceRig, FakeLink, call

X = {"x": Spec(("b", 4))}
WORDS = {"x": Spec(("b", "t", 4))}
W = np.arange(12, dtype=np.float32).reshape(4, 3) / 10


@pytest.fixture
def rig() -> Iterator[DeviceRig]:
    with DeviceRig() as made:
        yield made


def layer(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["w"])


def pooled(params: Any, x: Any) -> Any:
    return (x @ params["w"]).sum(1)


def shared(store: Path, *names: str, buckets: Sequence[int] = (1, 4), w: Array = W) -> str:
    """Save servables, each by itself, that share one unit; returns its identity."""
    units = {
        unit_of(save(layer, {"w": w}, store, name, 1, inputs=X, batch_buckets=buckets)).id
        for name in names
    }
    (identity,) = units
    return identity


def sizes(rig: DeviceRig, unit: str, shape: tuple[int, ...] = ()) -> tuple[int, ...]:
    return rig.io.call(lambda: rig.batcher.costs[LaneKey(unit, shape)].ladder.sizes)


def check(rig: DeviceRig, actor: Actor, unit: str) -> None:
    for count in (1, 3, 8, 13):
        answer = actor.ask(unit, rows(count, 4))
        assert isinstance(answer, list)
        np.testing.assert_allclose(answer[0], np.tanh(rows(count, 4) @ W), atol=1e-5)
    assert rig.watch.count == 0


def test_batches_are_as_large_as_those_of_all_users_together_and_shrink_when_one_leaves(
    rig: DeviceRig, tmp_path: Path
) -> None:
    unit = shared(tmp_path, "a", "b", "c")
    actor = Actor(rig, tmp_path)
    found = []
    for name in "abc":
        actor.load(name)
        found.append(sizes(rig, unit))
        check(rig, actor, unit)
    for name in "bca":
        actor.unload(name)
        if name != "a":
            found.append(sizes(rig, unit))
            check(rig, actor, unit)
    assert found == [(1, 4), (1, 4, 8), (1, 4, 8, 12), (1, 4, 8), (1, 4)]
    assert actor.books.reserved_bytes == 0
    assert not rig.io.call(rig.batcher.stats).lanes


def test_rows_of_all_users_run_in_one_batch_over_one_copy_of_the_parameters(
    rig: DeviceRig, tmp_path: Path
) -> None:
    w = np.full((4, 779), 0.5, np.float32)  # a shape by which its arrays can be told
    names = [f"model-{number}" for number in range(4)]
    unit = shared(tmp_path, *names, w=w)
    actor = Actor(rig, tmp_path)
    for name in names:
        actor.load(name)
    gc.collect()
    arrays = jax.live_arrays()  # type: ignore[no-untyped-call]
    assert sum(array.shape == (4, 779) for array in arrays) == 1
    [state] = actor.books.units
    assert (state.id, state.batch_max, state.note) == (unit, 16, "")
    assert state.users == tuple(f"{name}:1" for name in names)
    assert w.nbytes < state.nbytes < 2 * w.nbytes + 16 * 779 * 4
    # Rows join while the device is busy: with one that is quick, not in every turn.
    runs: Mapping[int, tuple[int, int]] = {}
    turns = 0
    while 16 not in runs and turns < 200:
        turns += 1
        link = FakeLink()
        frames = []
        for number, name in enumerate(names):
            frame = call(unit, {number: 4}, rows(4, 4))
            assert isinstance(frame.header, CallHeader)
            frames.append(replace(frame, header=replace(frame.header, owner=name)))
        rig.call(link, call(unit, {9: 1}, rows(1, 4)), *frames)
        link.wait_for(5)
        lane = rig.io.call(rig.batcher.stats).lanes[LaneKey(unit)]
        runs = lane.runs
    assert runs[16][0] >= 1
    assert {owner: line.tally.rows_run for owner, line in lane.owners.items() if owner} == (
        dict.fromkeys(names, 4 * turns)
    )
    assert rig.watch.count == 0


def test_sizes_that_were_compiled_once_are_not_compiled_again(
    rig: DeviceRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = shared(tmp_path, "a", "b")
    actor = Actor(rig, tmp_path)
    actor.load("a")
    actor.load("b")
    actor.unload("b")
    monkeypatch.setattr(Compiler, "load", None)
    actor.load("b")
    assert sizes(rig, unit) == (1, 4, 8)


def test_what_a_user_declares_is_there_whatever_others_declared(
    rig: DeviceRig, tmp_path: Path
) -> None:
    units = [
        unit_of(
            save(
                pooled, {"w": W}, tmp_path, name, 1, inputs=WORDS, batch_buckets=buckets,
                length_buckets={"t": lengths},
            )
        ).id
        for name, buckets, lengths in (("a", (1, 4), (8, 16)), ("b", (2,), (8, 12, 16)))
    ]  # fmt: skip
    assert units[0] == units[1]
    actor = Actor(rig, tmp_path)
    actor.load("a")
    assert [shape for shape in ((8,), (12,), (16,)) if _has(rig, units[0], shape)] == [(8,), (16,)]
    actor.load("b")
    for shape in ((8,), (12,), (16,)):
        assert sizes(rig, units[0], shape) == (1, 2, 4, 6)
        answer = actor.ask(units[0], rows(5, shape[0] - 1, 4))
        assert isinstance(answer, list)
        np.testing.assert_allclose(answer[0], (rows(5, shape[0] - 1, 4) @ W).sum(1), atol=1e-4)
    actor.unload("b")
    assert not _has(rig, units[0], (12,))
    assert isinstance(actor.ask(units[0], rows(5, 11, 4)), list)
    assert rig.watch.count == 0


def _has(rig: DeviceRig, unit: str, shape: tuple[int, ...]) -> bool:
    return LaneKey(unit, shape) in rig.io.call(rig.batcher.stats).lanes


def test_where_there_is_no_memory_for_larger_batches_the_load_succeeds_without_them(
    rig: DeviceRig, tmp_path: Path
) -> None:
    unit = shared(tmp_path, "a", "b", "c", "d", buckets=(1, 64))
    roomy = Actor(rig, tmp_path)
    roomy.load("a")
    alone = roomy.books.reserved_bytes
    roomy.load("b")
    two = roomy.books.reserved_bytes
    assert two > alone
    roomy.unload("a")
    roomy.unload("b")
    actor = Actor(rig, tmp_path, capacity_bytes=two)
    for name in "abcd":
        actor.load(name)
        assert actor.books.reserved_bytes <= two
    [state] = actor.books.units
    assert state.batch_max == 128
    assert "batches of 256 rows take" in state.note
    assert sizes(rig, unit) == (1, 64, 128)
    assert len(state.users) == 4
    check(rig, actor, unit)


def test_larger_batches_that_cannot_be_compiled_are_done_without(
    rig: DeviceRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = shared(tmp_path, "a", "b")
    actor = Actor(rig, tmp_path)
    actor.load("a")

    def refusing(*_: Any) -> None:
        raise ProgramRefused("it cannot be compiled for batch 8")

    with monkeypatch.context() as patched:
        patched.setattr(Compiler, "load", refusing)
        actor.load("b")
    assert actor.books.units[0].note == "it cannot be compiled for batch 8"
    assert sizes(rig, unit) == (1, 4)
    check(rig, actor, unit)


def test_a_user_whose_own_sizes_do_not_fit_is_refused_and_others_keep_theirs(
    rig: DeviceRig, tmp_path: Path
) -> None:
    unit = shared(tmp_path, "a")
    shared(tmp_path, "b", buckets=(1, 4096))
    actor = Actor(rig, tmp_path)
    actor.load("a")
    held = actor.books.reserved_bytes
    tight = Actor(rig, tmp_path, capacity_bytes=held + 1000)
    actor.unload("a")
    tight.load("a")
    with pytest.raises(ResourceExhausted, match="b version 1 needs"):
        tight.load("b")
    assert tight.books.loaded == (("a", 1),)
    assert sizes(rig, unit) == (1, 4)
    check(rig, tight, unit)


def test_a_servable_that_shares_no_batches_beyond_its_own_says_so(
    rig: DeviceRig, tmp_path: Path
) -> None:
    unit = shared(tmp_path, "a", "b")
    actor = Actor(rig, tmp_path)
    actor.load("a")
    actor.load("b", shared_bucket_max=1)
    assert sizes(rig, unit) == (1, 4)
    [state] = actor.books.units
    assert (state.batch_max, state.note) == (4, "")


def test_a_load_gets_the_memory_of_batches_that_nobody_declares(
    rig: DeviceRig, tmp_path: Path
) -> None:
    unit = shared(tmp_path, "a", "b", buckets=(1, 4096))
    shared(tmp_path, "other", buckets=(1, 64), w=-W)
    actor = Actor(rig, tmp_path)
    actor.load("a")
    need = actor.books.reserved_bytes
    actor.unload("a")
    tight = Actor(rig, tmp_path, capacity_bytes=2 * need + 500)
    tight.load("a", shared_bucket_max=8192)
    tight.load("b", shared_bucket_max=8192)
    assert sizes(rig, unit) == (1, 4096, 8192)
    tight.load("other")
    assert sizes(rig, unit) == (1, 4096)
    assert [state.note for state in tight.books.units] == [
        "the memory of larger batches was needed by another load", "",
    ]  # fmt: skip
    assert len(tight.books.loaded) == 3
    check(rig, tight, unit)
