"""Table and host units brought up on an actor: through its books, from a store, to an answer."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batching.errors import FailedPrecondition, ResourceExhausted
from shards import openers
from shards.bundle import Bundle
from shards.errors import BundleCorrupt
from shards.manifest import HostUnit, Manifest, TableUnit
from shards.openers import HostUnitOpener, TableOpener, import_entry_point
from shards.orders import HostedUnit
from shards.specs import STRING, Spec
from shards.tables import HostedTable
from shards.worker import WorkerEngine
from tests.shards.opening import Actor, run
from tests.shards.serving import DEADLINE_S, Array, eventually

HERE = "tests.shards.test_openers"
ROWS = np.arange(24, dtype=np.float32).reshape(12, 2)
PART_BYTES = 3 * 2 * 4


# --- tables ------------------------------------------------------------------------------------


def save_table(path: Path, version: int, name: str = "model", given: Array = ROWS) -> TableUnit:
    with Bundle.create(path, name, version) as bundle:
        rows = bundle.table("words", given, partitions=4)

        @bundle.signature(inputs={"ids": Spec(("b",), "int64")})
        def answer(ids: Any) -> Any:
            return {"rows": rows.rows(ids)}

    unit = bundle.manifest.units["words"]
    assert isinstance(unit, TableUnit)
    return unit


@pytest.fixture
def table(tmp_path: Path) -> TableUnit:
    """Versions 1 and 2 of a model with one table of four partitions of three rows."""
    first, second = save_table(tmp_path, 1), save_table(tmp_path, 2)
    assert first == second
    return first


def parts(*partitions: int) -> HostedUnit:
    return HostedUnit(name="words", partitions=partitions)


def ids(*numbers: int) -> Array:
    return np.array(numbers, np.int64)


async def holds(actor: Actor, unit: TableUnit) -> set[int]:
    """The partitions that answer."""
    found = set()
    for index, part in enumerate(unit.partitions):
        answer = await actor.ask(unit.id, ids(part.first_row))
        if isinstance(answer, list):
            assert answer[0].tolist() == ROWS[[part.first_row]].tolist()
            found.add(index)
    return found


def test_rows_come_from_the_partitions_that_were_ordered(tmp_path: Path, table: TableUnit) -> None:
    async def scenario(actor: Actor) -> None:
        await actor.load(1, parts(0, 2))
        asked = ids(8, 0, 7, 0)
        answer = await actor.ask(table.id, asked)
        assert isinstance(answer, list)
        np.testing.assert_array_equal(answer[0], ROWS[asked])
        assert actor.books.reserved_bytes == 2 * PART_BYTES
        code, message = await actor.ask(table.id, ids(3))
        assert (code, message) == (
            "STALE_EPOCH",
            "id 3 is in no partition held by this shard",
        )

    run(tmp_path, TableOpener, scenario)


@pytest.fixture
def _all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openers, "_COMPILED_BYTES_MIN", 0)


@pytest.mark.usefixtures("_all_are_large")
def test_a_large_table_is_looked_up_by_compiled_code(
    tmp_path: Path, table: TableUnit, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    make = openers._make_crew

    def make_one() -> Any:
        made.append(make())
        return made[-1]

    monkeypatch.setattr(openers, "_make_crew", make_one)

    async def scenario(actor: Actor) -> None:
        # Two loads at once wait for the same compilation.
        await asyncio.gather(actor.load(1, parts(0, 2)), actor.load(2, parts(1), name="other"))
        assert len(made) == 1
        assert made[0] is not None
        asked = ids(8, 0, 4, 0)
        answer = await actor.ask(table.id, asked)
        assert isinstance(answer, list)
        np.testing.assert_array_equal(answer[0], ROWS[asked])
        code, message = await actor.ask(table.id, ids(0, 9))
        assert (code, message) == ("STALE_EPOCH", "id 9 is in no partition held by this shard")

    assert save_table(tmp_path, 2, name="other") == table
    run(tmp_path, TableOpener, scenario)


def test_tables_that_are_large_together_are_all_looked_up_by_compiled_code(
    tmp_path: Path, table: TableUnit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openers, "_COMPILED_BYTES_MIN", ROWS.nbytes + 1)
    other = save_table(tmp_path, 1, "other", ROWS + 1)
    compiled: dict[str, bool] = {}

    class Watched(HostedTable):
        def __init__(self, unit: TableUnit, *arguments: Any) -> None:
            super().__init__(unit, *arguments)
            compiled[unit.id] = self.resident is not None

    monkeypatch.setattr(openers, "HostedTable", Watched)

    async def scenario(actor: Actor) -> None:
        await actor.load(1, parts(0, 1, 2, 3))
        assert compiled == {table.id: False}
        await actor.load(1, parts(2), name="other")
        assert compiled == {table.id: True, other.id: True}
        assert await holds(actor, table) == {0, 1, 2, 3}
        np.testing.assert_array_equal(await actor.ask(other.id, ids(7)), [ROWS[[7]] + 1])

    run(tmp_path, TableOpener, scenario)


@pytest.mark.usefixtures("_all_are_large")
def test_without_a_compiler_numpy_looks_rows_up_and_a_line_is_logged(
    tmp_path: Path,
    table: TableUnit,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "shards.resident", None)

    async def scenario(actor: Actor) -> None:
        await actor.load(1, parts(0, 1, 2, 3))
        assert await holds(actor, table) == {0, 1, 2, 3}

    run(tmp_path, TableOpener, scenario)
    assert "rows are looked up by NumPy" in caplog.text


def test_look_ups_go_on_while_another_load_waits_for_the_compiler(
    tmp_path: Path, table: TableUnit, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling, may_end = threading.Event(), threading.Event()

    def make() -> None:
        compiling.set()
        may_end.wait(DEADLINE_S)

    monkeypatch.setattr(openers, "_make_crew", make)

    async def scenario(actor: Actor) -> None:
        await actor.load(1, parts(0))
        monkeypatch.setattr(openers, "_COMPILED_BYTES_MIN", 0)
        load = asyncio.ensure_future(actor.load(2, parts(1)))
        await asyncio.to_thread(compiling.wait, DEADLINE_S)
        assert await holds(actor, table) == {0}
        assert not load.done()
        may_end.set()
        await load
        assert await holds(actor, table) == {0, 1}

    try:
        run(tmp_path, TableOpener, scenario)
    finally:
        may_end.set()


def test_two_versions_are_served_the_union_of_their_partitions(
    tmp_path: Path, table: TableUnit
) -> None:
    async def scenario(actor: Actor) -> None:
        await actor.load(1, parts(0, 1))
        await actor.load(2, parts(1, 3))
        assert await holds(actor, table) == {0, 1, 3}
        assert actor.books.reserved_bytes == 3 * PART_BYTES
        await actor.unload(1)
        assert await holds(actor, table) == {1, 3}
        # The shared partition is still here, and still counted.
        assert actor.books.reserved_bytes == 2 * PART_BYTES
        await actor.unload(2)
        assert actor.books.reserved_bytes == 0
        assert await actor.ask(table.id, ids(0)) == ("STALE_EPOCH", "the unit is not hosted here")

    run(tmp_path, TableOpener, scenario)


def test_a_partition_that_is_shared_takes_no_room_twice(tmp_path: Path, table: TableUnit) -> None:
    async def scenario(actor: Actor) -> None:
        await actor.load(1, parts(0, 1))
        await actor.load(2, parts(0, 1, 2))
        await actor.unload(2)
        with pytest.raises(ResourceExhausted, match="24 short"):
            await actor.load(2, parts(2, 3))
        assert await holds(actor, table) == {0, 1}

    run(tmp_path, TableOpener, scenario, capacity=3 * PART_BYTES)


@pytest.mark.parametrize("wrong", [4, -1])
def test_a_partition_that_the_table_does_not_have_is_refused(
    tmp_path: Path, table: TableUnit, wrong: int
) -> None:
    async def scenario(actor: Actor) -> None:
        with pytest.raises(FailedPrecondition, match=f"partition {wrong} of table 'words'.* has 4"):
            await actor.load(1, parts(0, wrong))
        assert actor.books.reserved_bytes == 0

    run(tmp_path, TableOpener, scenario)


def test_a_corrupt_partition_leaves_nothing_open(tmp_path: Path, table: TableUnit) -> None:
    blob = tmp_path / "blobs" / "blake3" / table.partitions[1].blob.digest
    size = blob.stat().st_size
    blob.chmod(0o600)
    blob.write_bytes(bytes(size))

    async def scenario(actor: Actor) -> None:
        with pytest.raises(BundleCorrupt):
            await actor.load(1, parts(0, 1))
        assert actor.books.reserved_bytes == 0
        assert await actor.ask(table.id, ids(0)) == ("STALE_EPOCH", "the unit is not hosted here")
        await actor.load(1, parts(0, 2))
        assert await holds(actor, table) == {0, 2}

    run(tmp_path, TableOpener, scenario)


@pytest.mark.parametrize(
    "arrays",
    [
        [np.array([1], np.int32)],
        [np.array([[1]], np.int64)],
        [np.array([1], np.int64), np.array([1], np.int64)],
    ],
    ids=["dtype", "rank", "too many"],
)
def test_a_look_up_takes_one_tensor_of_ids(
    tmp_path: Path, table: TableUnit, arrays: list[Array]
) -> None:
    async def scenario(actor: Actor) -> None:
        await actor.load(1, parts(0))
        assert await actor.ask(table.id, *arrays) == (
            "INVALID_ARGUMENT",
            "a look-up takes one tensor of int64 ids",
        )

    run(tmp_path, TableOpener, scenario)


def test_partitions_are_mapped_where_they_lie_and_unmapped_at_the_end(
    tmp_path: Path, table: TableUnit
) -> None:
    digests = {part.blob.digest for part in table.partitions}
    gc.collect()  # engines of other tests, which unmap what they hold only when they are collected

    def mapped() -> set[str]:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return {line.rsplit("/", 1)[-1] for line in lines if "/" in line} & digests

    async def scenario(actor: Actor) -> None:
        await actor.load(1, parts(0, 1))
        await actor.load(2, parts(1, 2))
        assert await actor.ask(table.id, ids(0))
        assert mapped() == {table.partitions[index].blob.digest for index in (0, 1, 2)}
        await actor.unload(1)
        await asyncio.to_thread(eventually, lambda: len(mapped()) == 2)
        await actor.unload(2)
        await asyncio.to_thread(eventually, lambda: not mapped())

    run(tmp_path, TableOpener, scenario)


# --- host units --------------------------------------------------------------------------------


Inputs = Mapping[str, Array]


def shout(files: dict[str, bytes], options: dict[str, Any]) -> Callable[[Inputs], Any]:
    """An entry point that uses what it was given."""
    ending = files["ending"] * options["times"]

    def run_it(inputs: Inputs) -> dict[str, Array]:
        texts = [text.upper() + ending for text in inputs["text"].tolist()]
        loud = np.empty(len(texts), object)
        loud[:] = texts
        return {"loud": loud, "size": np.array([len(text) for text in texts], np.int32)}

    return run_it


def misbehave(files: dict[str, bytes], options: dict[str, Any]) -> Callable[[Inputs], Any]:
    """An entry point that breaks its specs in the way that its options say."""
    text = np.array([b"x"], object)
    size = np.array([1], np.int32)
    answers: dict[str, Any] = {
        "names": {"loud": text},
        "dtype": {"loud": text, "size": size.astype(np.int64)},
        "rank": {"loud": text, "size": size[:, None]},
        "rows": {"loud": np.array([b"x", b"y"], object), "size": np.array([1, 2], np.int32)},
        "uneven": {"loud": text, "size": np.array([1, 2], np.int32)},
        "text": {"loud": np.array(["x"], object), "size": size},
        "none": None,
    }
    if options["how"] == "load":
        raise RuntimeError("the index is damaged\nbeyond repair")
    return lambda inputs: answers[options["how"]]


def save_host(path: Path, entry_point: str, files: Mapping[str, bytes], **options: Any) -> Manifest:
    inputs = {"text": Spec(("b",), STRING)}
    outputs = {"loud": Spec(("b",), STRING), "size": Spec(("b",), "int32")}
    with Bundle.create(path, "model", 1) as bundle:
        unit = bundle.host(
            "text", entry_point, inputs=inputs, outputs=outputs, files=files, options=options
        )

        @bundle.signature(inputs=inputs)
        def answer(text: Any) -> Any:
            return unit(text=text)

    return bundle.manifest


def allowing(*patterns: str) -> Callable[[WorkerEngine], HostUnitOpener]:
    return lambda engine: HostUnitOpener(engine, patterns)


def texts(*values: bytes) -> Array:
    array = np.empty(len(values), object)
    array[:] = values
    return array


TEXT = HostedUnit(name="text")


def test_a_host_unit_is_called_with_its_files_and_options(tmp_path: Path) -> None:
    manifest = save_host(tmp_path, f"{HERE}:shout", {"ending": b"!?"}, times=2)
    unit = manifest.units["text"]
    assert isinstance(unit, HostUnit)

    async def scenario(actor: Actor) -> None:
        await actor.load(1, TEXT)
        assert actor.books.reserved_bytes == 2
        answer = await actor.ask(unit.id, texts(b"hey", b"you"))
        assert isinstance(answer, list)
        loud, size = answer
        assert loud.tolist() == [b"HEY!?!?", b"YOU!?!?"]
        assert size.tolist() == [7, 7]
        await actor.unload(1)
        assert actor.books.reserved_bytes == 0
        assert (await actor.ask(unit.id, texts(b"x")))[0] == "STALE_EPOCH"

    run(tmp_path, allowing(f"{HERE}:*"), scenario)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("names", "output size does not match signature: 1!=2"),
        ("dtype", "output 'size' must be int32, got int64"),
        ("rank", "output 'size' must have shape [b], got [1,1]"),
        ("rows", "the unit answered [2] for 1 rows"),
        ("uneven", "output 'size' must have shape [b], got [2]: b is 1, not 2"),
        ("text", "cannot be sent"),
        ("none", "AttributeError"),
    ],
)
def test_a_unit_that_breaks_its_specs_is_at_fault_and_not_the_request(
    tmp_path: Path, how: str, said: str
) -> None:
    manifest = save_host(tmp_path, f"{HERE}:misbehave", {}, how=how)

    async def scenario(actor: Actor) -> None:
        await actor.load(1, TEXT)
        code, message = await actor.ask(manifest.units["text"].id, texts(b"x"))
        assert code == "INTERNAL"
        assert said in str(message)

    run(tmp_path, allowing("*"), scenario)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ([np.zeros(1, np.int32)], "input 'text' must be string, got int32"),
        ([texts(b"x"), texts(b"y")], "2 tensors came, the unit takes text"),
    ],
)
def test_inputs_that_break_the_specs_are_the_callers_mistake(
    tmp_path: Path, arrays: list[Array], said: str
) -> None:
    manifest = save_host(tmp_path, f"{HERE}:shout", {"ending": b"!"}, times=1)

    async def scenario(actor: Actor) -> None:
        await actor.load(1, TEXT)
        answer = await actor.ask(manifest.units["text"].id, *arrays)
        assert answer == ("INVALID_ARGUMENT", said)

    run(tmp_path, allowing("*"), scenario)


def test_an_entry_point_that_fails_leaves_nothing_open(tmp_path: Path) -> None:
    manifest = save_host(tmp_path, f"{HERE}:misbehave", {}, how="load")

    async def scenario(actor: Actor) -> None:
        with pytest.raises(RuntimeError, match="the index is damaged"):
            await actor.load(1, TEXT)
        assert actor.books.loaded == ()
        assert actor.books.reserved_bytes == 0
        assert (await actor.ask(manifest.units["text"].id, texts(b"x")))[0] == "STALE_EPOCH"

    run(tmp_path, allowing("*"), scenario)


# --- entry points ------------------------------------------------------------------------------


def test_what_the_owner_did_not_list_is_not_even_imported(tmp_path: Path) -> None:
    module = "antigravity"  # importing it would open a browser
    save_host(tmp_path, f"{module}:fly", {})

    async def scenario(actor: Actor) -> None:
        with pytest.raises(FailedPrecondition, match=r"'antigravity:fly' is not allowed .*allow_"):
            await actor.load(1, TEXT)
        assert module not in sys.modules

    run(tmp_path, allowing("mine:*", "anti:*", "*:run"), scenario)


@pytest.mark.parametrize(
    ("pattern", "allowed"),
    [
        ("json:loads", True),
        ("json:*", True),
        ("*", True),
        ("js*:lo?ds", True),
        ("json:load", False),
        ("JSON:loads", False),
        ("json", False),
        ("", False),
    ],
)
def test_a_pattern_stands_for_the_whole_entry_point(pattern: str, allowed: bool) -> None:
    if allowed:
        assert import_entry_point("json:loads", [pattern])(b"[1]") == [1]
    else:
        with pytest.raises(FailedPrecondition, match="not allowed"):
            import_entry_point("json:loads", [pattern])


def test_no_pattern_allows_nothing() -> None:
    with pytest.raises(FailedPrecondition):
        import_entry_point("json:loads", [])


@pytest.mark.parametrize(
    ("entry_point", "said"),
    [
        ("no.such.module:f", "No module named 'no'"),
        ("json:no_such_function", "no_such_function"),
        ("json", "cannot be imported"),
        (":loads", "cannot be imported"),
    ],
)
def test_what_cannot_be_imported_is_refused_with_the_reason(entry_point: str, said: str) -> None:
    with pytest.raises(FailedPrecondition, match=said) as refused:
        import_entry_point(entry_point, ["*"])
    assert repr(entry_point) in str(refused.value)
