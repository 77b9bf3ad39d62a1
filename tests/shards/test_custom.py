"""Units of registered kinds on an actor: opened, counted, asked, closed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batching.errors import FailedPrecondition, InvalidArgument
from shards.bundle import Bundle
from shards.combines import COMBINES
from shards.custom import CustomUnitOpener, UnitKind, UnitPart
from shards.errors import BundleCorrupt
from shards.functions import UnitFunction
from shards.identity import custom_identity
from shards.manifest import BlobRef, CustomUnit, Manifest
from shards.orders import HostedUnit, part_address
from shards.registry import Registry
from shards.specs import Spec
from shards.worker import WorkerEngine
from tests.shards.opening import Actor
from tests.shards.serving import GENERATION, Array

SPECS = {"x": Spec(("b",), "int64")}
PARTS = ({"n": b"1"}, {"n": b"20"}, {"n": b"300"})


def add(part: UnitPart) -> UnitFunction:
    """Adds the number that is the partition's file."""
    number = int(part.files["n"].tobytes())

    def run(inputs: dict[str, Array]) -> Mapping[str, Array]:
        return {"x": inputs["x"] + number}

    return run


def refuse(part: UnitPart) -> UnitFunction:
    raise InvalidArgument(f"partition {part.index} of {part.count} is not to my taste")


def break_down(part: UnitPart) -> UnitFunction:
    raise KeyError("nothing")


def answer_too_much(part: UnitPart) -> UnitFunction:
    return lambda inputs: {"x": inputs["x"], "y": inputs["x"]}


KINDS: Mapping[str, UnitKind] = {
    "add": add, "refuse": refuse, "break-down": break_down, "too-much": answer_too_much,
}  # fmt: skip


def save(store: Path, kind: str = "add", combine: str = "sum") -> Manifest:
    with Bundle.create(store, "model", 1) as bundle:
        unit = bundle.custom("u", kind, PARTS, inputs=SPECS, outputs=SPECS, combine=combine)

        @bundle.signature(inputs=SPECS)
        def answer(x: Any) -> Any:
            return unit(x)

    return bundle.manifest


def hosted(*partitions: int) -> HostedUnit:
    return HostedUnit(name="u", partitions=partitions)


def run(store: Path, scenario: Callable[[Actor], Awaitable[None]]) -> None:
    async def main() -> None:
        engine = WorkerEngine(asyncio.get_running_loop(), GENERATION)
        kinds: Registry[UnitKind] = Registry("shardserve.nowhere", "unit kind", KINDS)
        try:
            await scenario(Actor(store, engine, CustomUnitOpener(engine, kinds, COMBINES), 1000))
        finally:
            engine.close()

    asyncio.run(main())


async def numbers(actor: Actor, address: str, array: Array) -> list[int]:
    """The one output's numbers."""
    answer = await actor.ask(address, array)
    assert isinstance(answer, list), answer
    found: list[int] = answer[0].tolist()
    return found


def test_each_partition_is_asked_by_an_address_of_its_own(tmp_path: Path) -> None:
    unit = save(tmp_path).units["u"].id

    async def scenario(actor: Actor) -> None:
        await actor.load(1, hosted(0, 2))
        ones = np.array([1, 2])
        assert await numbers(actor, part_address(unit, 0), ones) == [2, 3]
        assert await numbers(actor, part_address(unit, 2), ones) == [301, 302]
        refused = await actor.ask(part_address(unit, 1), ones)
        assert refused[0] == "STALE_EPOCH"

    run(tmp_path, scenario)


def test_bytes_of_the_files_are_in_the_books_until_the_unit_is_closed(tmp_path: Path) -> None:
    save(tmp_path)

    async def scenario(actor: Actor) -> None:
        await actor.load(1, hosted(0, 2))
        assert actor.books.reserved_bytes == len(b"1") + len(b"300")
        await actor.unload(1)
        assert actor.books.reserved_bytes == 0

    run(tmp_path, scenario)


def test_a_partition_of_two_orders_stays_until_both_are_undone(tmp_path: Path) -> None:
    manifest = save(tmp_path)
    unit = manifest.units["u"]

    async def scenario(actor: Actor) -> None:
        opener: CustomUnitOpener = actor.opener
        await actor.load(1, hosted(0, 1))
        await actor.load(1, hosted(1, 2))
        assert opener.held_bytes == len(b"20") + len(b"300")
        assert await numbers(actor, part_address(unit.id, 1), np.array([1])) == [21]

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("unheard-of", "no unit kind 'unheard-of' here; known are: add"),
        ("break-down", "'break-down' could not open partition 0: KeyError: 'nothing'"),
    ],
)
def test_a_kind_that_cannot_open_fails_the_load_and_leaves_nothing(
    tmp_path: Path, kind: str, error: str
) -> None:
    save(tmp_path, kind)

    async def scenario(actor: Actor) -> None:
        with pytest.raises(FailedPrecondition, match=error):
            await actor.load(1, hosted(0))
        assert actor.books.reserved_bytes == 0

    run(tmp_path, scenario)


def test_a_kind_may_say_with_a_code_why_it_does_not_open(tmp_path: Path) -> None:
    save(tmp_path, "refuse")

    async def scenario(actor: Actor) -> None:
        with pytest.raises(InvalidArgument, match="partition 1 of 3 is not to my taste"):
            await actor.load(1, hosted(1))

    run(tmp_path, scenario)


def test_a_combine_that_is_not_installed_fails_the_load(tmp_path: Path) -> None:
    save(tmp_path, combine="median")

    async def scenario(actor: Actor) -> None:
        with pytest.raises(FailedPrecondition, match="no combine 'median' here"):
            await actor.load(1, hosted(0))

    run(tmp_path, scenario)


def test_an_answer_that_breaks_the_specs_is_the_units_fault(tmp_path: Path) -> None:
    unit = save(tmp_path, "too-much").units["u"].id

    async def scenario(actor: Actor) -> None:
        await actor.load(1, hosted(0))
        code, message = await actor.ask(part_address(unit, 0), np.array([1]))
        assert (code, "unit kind 'too-much' broke its specs" in str(message)) == ("INTERNAL", True)

    run(tmp_path, scenario)


def test_a_partition_that_is_not_there_is_refused(tmp_path: Path) -> None:
    save(tmp_path)

    async def scenario(actor: Actor) -> None:
        with pytest.raises(FailedPrecondition, match="partition 3 of unit 'u' is wanted, it has 3"):
            await actor.load(1, hosted(3))

    run(tmp_path, scenario)


def test_several_partitions_need_a_combine(tmp_path: Path) -> None:
    bundle = Bundle.create(tmp_path, "model", 1)
    with pytest.raises(InvalidArgument, match="'u' has 2 partitions, no combine"):
        bundle.custom("u", "add", PARTS[:2], inputs=SPECS, outputs=SPECS)


def test_a_manifest_of_several_partitions_without_a_combine_is_corrupt(tmp_path: Path) -> None:
    save(tmp_path)
    [manifest] = tmp_path.glob("model/1/servable.json")
    manifest.chmod(0o600)
    manifest.write_text(manifest.read_text().replace('"combine": "sum"', '"combine": ""'))
    with pytest.raises(BundleCorrupt, match="several partitions and no combine"):
        Bundle.create(tmp_path, "model", 2)._store.read_manifest("model", 1)


def test_units_differ_by_kind_combine_options_and_cut(tmp_path: Path) -> None:
    files = {"n": BlobRef(digest="0" * 64, size=1)}
    ids = {
        custom_identity(kind, combine, options, cut)
        for kind in ("add", "refuse")
        for combine in ("sum", "max")
        for options in ({}, {"missing": "zero"})
        for cut in ([files], [files, files])
    }
    assert len(ids) == 16
    saved = save(tmp_path).units["u"]
    assert isinstance(saved, CustomUnit)
    assert saved.id == custom_identity("add", "sum", {}, saved.partitions)
