"""Loads that wait for what cannot be interrupted: called off, they are over; the rest goes on."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batching.errors import Cancelled, Unavailable
from shards import openers
from shards.bundle import Bundle
from shards.custom import CustomUnitOpener, UnitKind, UnitPart
from shards.errands import Errands
from shards.manifest import Manifest
from shards.openers import HostUnitOpener, TableOpener
from shards.orders import HostedUnit
from shards.registry import Registry
from shards.specs import Spec
from shards.worker import WorkerEngine
from tests.shards.opening import Actor, run
from tests.shards.serving import DEADLINE_S, Array, until

X = {"x": Spec(("b",))}
UNIT = HostedUnit(name="unit")
PART = HostedUnit(name="unit", partitions=(0,))


class Gate:
    """Where others' code waits until a test says so."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.may_go_on = threading.Event()
        self.times = 0

    def enter(self) -> None:
        self.times += 1
        self.reached.set()
        assert self.may_go_on.wait(DEADLINE_S)


GATE = Gate()


@pytest.fixture(autouse=True)
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate()
    monkeypatch.setattr(f"{__name__}.GATE", made)
    yield made
    made.may_go_on.set()


def same(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
    return {"x": inputs["x"]}


def slow(files: dict[str, bytes], options: dict[str, Any]) -> Callable[..., Any]:
    """An entry point that waits at the gate."""
    GATE.enter()
    return same


def quick(files: dict[str, bytes], options: dict[str, Any]) -> Callable[..., Any]:
    """An entry point that does not."""
    return same


def saved_host(path: Path, version: int, entry_point: str) -> Manifest:
    with Bundle.create(path, "model", version) as bundle:
        unit = bundle.host("unit", f"{__name__}:{entry_point}", inputs=X, outputs=X)
        bundle.signature(inputs=X)(lambda x: unit(x=x))
    return bundle.manifest


def saved_custom(path: Path, version: int, kind: str) -> Manifest:
    with Bundle.create(path, "model", version) as bundle:
        unit = bundle.custom("unit", kind, [{"file": b"x"}], inputs=X, outputs=X)
        bundle.signature(inputs=X)(lambda x: unit(x=x))
    return bundle.manifest


def slow_kind(part: UnitPart) -> Callable[..., Any]:
    """A kind that waits at the gate."""
    GATE.enter()
    return same


def custom_opener(engine: WorkerEngine) -> CustomUnitOpener:
    kinds: dict[str, UnitKind] = {"slow": slow_kind, "quick": lambda part: same}
    return CustomUnitOpener(engine, Registry("shardserve.nowhere", "unit kind", kinds))


Case = tuple[Callable[[WorkerEngine], Any], Callable[..., Manifest], HostedUnit]
KINDS: dict[str, Case] = {
    "host": (lambda engine: HostUnitOpener(engine, ("*",)), saved_host, UNIT),
    "custom": (custom_opener, saved_custom, PART),
}


@pytest.mark.parametrize("kind", KINDS)
def test_others_code_that_hangs_is_left_to_itself_and_holds_up_no_other_load(
    tmp_path: Path, gate: Gate, kind: str
) -> None:
    make, save, wanted = KINDS[kind]
    save(tmp_path, 1, "slow")
    save(tmp_path, 2, "quick")

    async def scenario(actor: Actor) -> None:
        loading = asyncio.ensure_future(actor.load(1, wanted))
        await asyncio.to_thread(gate.reached.wait, DEADLINE_S)
        await actor.unload(1)
        with pytest.raises(Cancelled, match="version 1: unloaded while it was loading"):
            await loading
        assert (actor.books.loaded, actor.books.reserved_bytes) == ((), 0)
        await actor.load(2, wanted)
        assert list(actor.books.loaded) == [("model", 2)]
        # However often it is ordered, it takes one thread.
        for _ in range(3):
            with pytest.raises(Unavailable, match="still at work for a load that was called off"):
                await actor.load(1, wanted)
        assert gate.times == 1
        gate.may_go_on.set()
        while ("model", 1) not in actor.books.loaded:
            with contextlib.suppress(Unavailable):  # until its thread has ended
                await actor.load(1, wanted)
        assert list(actor.books.loaded) == [("model", 1), ("model", 2)]
        assert gate.times == 2

    run(tmp_path, make, scenario)


def test_a_load_that_waits_for_the_compiler_of_look_ups_can_be_called_off(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openers, "_COMPILED_BYTES_MIN", 0)
    monkeypatch.setattr(openers, "_make_crew", gate.enter)
    with Bundle.create(tmp_path, "model", 1) as bundle:
        table = bundle.table("unit", np.eye(4, dtype=np.float32), partitions=2)
        bundle.signature(inputs={"ids": Spec(("b",), "int64")})(lambda ids: table.rows(ids))

    async def scenario(actor: Actor) -> None:
        loading = asyncio.ensure_future(actor.load(1, PART))
        await asyncio.to_thread(gate.reached.wait, DEADLINE_S)
        await actor.unload(1)
        with pytest.raises(Cancelled):
            await loading
        assert (actor.books.loaded, actor.books.reserved_bytes) == ((), 0)
        again = asyncio.ensure_future(actor.load(1, PART))
        gate.may_go_on.set()
        await again
        assert gate.times == 1

    run(tmp_path, TableOpener, scenario)


def raising(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize("error", [SystemExit(3), StopIteration(), KeyboardInterrupt()])
def test_what_would_end_a_loop_is_an_error_like_any(error: BaseException) -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match=type(error).__name__):
            await Errands().run(("model", 1), "it", raising(error))

    asyncio.run(main())


def test_an_errand_that_fails_when_nobody_waits_any_more_is_logged_and_forgotten(
    gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    def work() -> None:
        gate.enter()
        raise ValueError("too late")

    async def main() -> None:
        errands = Errands()
        errand = asyncio.ensure_future(errands.run(("model", 1), "it", work))
        await asyncio.to_thread(gate.reached.wait, DEADLINE_S)
        errands.call_off(("other", 1), "not this one")
        errands.call_off(("model", 1), "unloaded")
        errands.call_off(("model", 1), "once is enough")
        with pytest.raises(Cancelled, match="model version 1: unloaded"):
            await errand
        gate.may_go_on.set()
        await until(lambda: "it has ended, for nobody: too late" in caplog.text)

    asyncio.run(main())
