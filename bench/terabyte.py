"""``terabyte``: a table of a tebibyte, most of it holes, on a cluster of eight shard actors.

Rows are written at random ids over all partitions, and the bundle is brought into a cluster that
has never seen it. Every row is asked for through the router and held against what was written, and
so are rows of holes. What the actors then hold of the table is held against the pages that were
asked for. A table of a tenth of the size, and of a tenth of the rows, is loaded in turns with it:
how long a load takes must not depend on the size. At the end a delta takes its place, with other
rows in every partition. The second half is `bench.terabyte_nvme`: a dense table on disk, of four
times the memory that it may take.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from bench import terabyte_nvme
from bench.errors import ContenderFailed
from bench.operating import Operator
from bench.product import declaration, start_product, status
from bench.registry import Bench, Options
from bench.report import Figure, Plot, Result, Samples, Series, Table, machine
from bench.stats import bootstrap, paired_ratio
from bench.terabyte_memory import Memory, disk_bytes, memory_of
from bench.terabyte_model import DIM, ROW_BYTES, Ids, draw_ids, rows_of, save, save_delta
from cluster.client import Client
from cluster.ports import free_ports
from shards.store import LocalStore

__all__ = ["BENCH", "Sizes"]

_FULL, _TENTH = "full", "tenth"
_SHARDS: Final = 8
_TIB: Final = 1 << 40
_GB: Final = 1e9
_CALL_IDS: Final = 4096
_JSON_IDS: Final = 64
_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large everything is.

    Attributes:
        rows: of the whole table.
        partitions: that it is cut into.
        given: rows that are written.
        replaced: rows that the delta replaces, half of them holes before.
        holes: rows that nobody wrote and that are asked for.
    """

    rows: int = _TIB // ROW_BYTES
    partitions: int = 2 * _SHARDS
    given: int
    replaced: int
    holes: int

    @classmethod
    def of(cls, options: Options) -> Sizes:
        """Those of a full or a quick run."""
        if options.quick:
            return cls(given=100_000, replaced=4_000, holes=10_000)
        return cls(given=1_050_000, replaced=40_000, holes=50_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What was asked of one version.

    Attributes:
        rows: how many.
        wrong: rows that were not what was written.
        calls_ms: what each call took.
        took_s: all of them, one after the other.
    """

    rows: int
    wrong: int
    calls_ms: tuple[float, ...]
    took_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a run found.

    Attributes:
        seconds: of each step.
        ready_s: from the command until available, of the full and the small table, by round.
        asked: by what was asked.
        touched: bytes of the pages in which the rows lie that were asked for.
        before: what the actors held before they were asked.
        after: what they held then.
        disk: bytes of the store on the disk.
        logical: bytes of the table.
    """

    seconds: dict[str, float]
    ready_s: tuple[tuple[float, float], ...]
    asked: dict[str, Asked]
    touched: int
    before: Memory
    after: Memory
    disk: int
    logical: int
    cold: terabyte_nvme.Cold


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folder", type=Path, help="where the bundles go, which take 10 GB (default: temporary)"
    )


def _run(options: Options) -> Result:
    conditions = machine()
    sizes = Sizes.of(options)
    with tempfile.TemporaryDirectory(prefix="shardserve-", dir=options.own.folder) as name:
        found = _measure(Path(name), sizes, options)
    return _result(found, sizes, options, conditions)


def _measure(folder: Path, sizes: Sizes, options: Options) -> Found:
    store = folder / "store"
    seconds: dict[str, float] = {}
    ids = {
        name: draw_ids(rows, count, sizes.partitions, options.seed)
        for name, rows, count in (
            (_FULL, sizes.rows, sizes.given),
            (_TENTH, sizes.rows // 10, sizes.given // 10),
        )
    }
    for name, rows in ((_FULL, sizes.rows), (_TENTH, sizes.rows // 10)):
        with _timed(seconds, f"save {name}"):
            save(store, name, rows=rows, ids=ids[name], partitions=sizes.partitions)
    # As if another machine had written it: everything is verified when it is loaded first.
    shutil.rmtree(store / ".verified")
    with contextlib.ExitStack() as stack:
        operator, url, config = _bring_up(stack, folder, store)
        with _timed(seconds, "ingest full"):
            operator.load(_FULL, 1, only=False)
        operator.load(_TENTH, 1, only=False)
        ready = [_cycle(operator, turn) for turn in range(options.rounds_or(quick=3, full=9))]
        pids = _shard_pids(config)
        client = stack.enter_context(Client(url, timeout_s=_TIMEOUT_S))
        before = memory_of(pids)
        holes = _holes(ids[_FULL], sizes, options.seed)
        asked = {
            "rows": _ask(client, ids[_FULL], version=1, seed=options.seed),
            "holes": _ask(client, holes, version=0, seed=options.seed),
        }
        after = memory_of(pids)
        changed = np.unique(
            np.concatenate([ids[_FULL][:: len(ids[_FULL]) * 2 // sizes.replaced],
                            holes[: sizes.replaced // 2]])
        )  # fmt: skip
        with _timed(seconds, "save delta"):
            save_delta(store, _FULL, changed)
        _check_overlays(store)
        with _timed(seconds, "swap to delta"):
            operator.load(_FULL, 2, only=True)
        kept = np.setdiff1d(ids[_FULL], changed)[:: len(ids[_FULL]) // sizes.holes]
        asked["replaced"] = _ask(client, changed, version=2, seed=options.seed)
        asked["kept"] = _ask(client, kept, version=1, seed=options.seed)
        asked["JSON"] = _ask_json(client, kept[:_JSON_IDS], version=1)
        disk = disk_bytes(store)
        for name in (_FULL, _TENTH):
            operator.unload(name)
        cold_sizes = terabyte_nvme.ColdSizes.of(quick=options.quick)
        cold = terabyte_nvme.measure(
            store, url, config, pids, cold_sizes, partitions=sizes.partitions, seed=options.seed
        )
    return Found(
        seconds=seconds,
        ready_s=tuple(ready),
        asked=asked,
        touched=_pages(np.concatenate([ids[_FULL], holes])) * mmap.PAGESIZE,
        before=before,
        after=after,
        disk=disk + cold.disk,
        logical=sizes.rows * ROW_BYTES,
        cold=cold,
    )


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[name] = time.monotonic() - began


def _bring_up(stack: contextlib.ExitStack, folder: Path, store: Path) -> tuple[Operator, str, Path]:
    config = folder / "servables.yaml"
    (port,) = free_ports(1)
    cluster = {"http": {"port": port, "admin": True}, "devices": 0, "shards": _SHARDS}
    config.write_text(declaration(store, [], cluster=cluster))
    url = stack.enter_context(start_product(config, folder=folder))
    return Operator(url), url, config


def _cycle(operator: Operator, turn: int) -> tuple[float, float]:
    """Unload both and load them again, in an order that changes; what each took."""
    took = {}
    for name in (_FULL, _TENTH) if turn % 2 else (_TENTH, _FULL):
        operator.unload(name)
        began = time.monotonic()
        operator.load(name, 1, only=False)
        took[name] = time.monotonic() - began
    return took[_FULL], took[_TENTH]


def _shard_pids(config: Path) -> list[int]:
    actors = status(config)["actors"]
    found = [int(each["pid"]) for name, each in actors.items() if name.startswith("shard")]
    if len(found) != _SHARDS:
        raise ContenderFailed(f"{_SHARDS} shard actors were asked for, {len(found)} are up")
    return found


def _holes(ids: Ids, sizes: Sizes, seed: int) -> Ids:
    """Ids of which none was written, over the whole table."""
    drawn = np.random.default_rng(seed + 1).integers(sizes.rows, size=sizes.holes)
    found: Ids = np.setdiff1d(drawn, ids)
    return np.random.default_rng(seed + 2).permutation(found)


def _check_overlays(store: Path) -> None:
    unit = LocalStore(store).read_manifest(_FULL, 2).units["rows"]
    if not all(part.overlays for part in unit.partitions):  # type: ignore[union-attr]
        raise ContenderFailed("the delta does not reach every partition")


def _ask(client: Client, ids: Ids, *, version: int, seed: int) -> Asked:
    """Ask for rows in random order, as raw tensors. Version 0 of a row is zeros."""
    order = np.random.default_rng(seed).permutation(ids)
    calls_ms: list[float] = []
    wrong = 0
    for start in range(0, len(order), _CALL_IDS):
        part = order[start : start + _CALL_IDS]
        began = time.monotonic()
        rows = client.predict(_FULL, {"ids": part})["rows"]
        calls_ms.append((time.monotonic() - began) * 1e3)
        wrong += _wrong(rows, part, version)
    took_s = sum(calls_ms) / 1e3
    return Asked(rows=len(order), wrong=wrong, calls_ms=tuple(calls_ms), took_s=took_s)


def _ask_json(client: Client, ids: Ids, *, version: int) -> Asked:
    began = time.monotonic()
    answer = client.predict(_FULL, {"ids": ids.tolist()})
    took_ms = (time.monotonic() - began) * 1e3
    rows = np.asarray(answer["rows"], np.float32)
    wrong = _wrong(rows, ids, version)
    return Asked(rows=len(ids), wrong=wrong, calls_ms=(took_ms,), took_s=took_ms / 1e3)


def _wrong(rows: npt.NDArray[Any], ids: Ids, version: int) -> int:
    expected = rows_of(ids, version) if version else np.zeros((len(ids), DIM), np.float32)
    return int((rows != expected).any(axis=1).sum())


def _pages(ids: Ids) -> int:
    """Pages of the files in which these rows lie; a row of 1 KiB lies in one."""
    return len(np.unique(ids // (mmap.PAGESIZE // ROW_BYTES)))


def _result(found: Found, sizes: Sizes, options: Options, conditions: dict[str, Figure]) -> Result:
    full, tenth = ([pair[at] for pair in found.ready_s] for at in (0, 1))
    ready = paired_ratio(full, tenth, seed=options.seed)
    blobs = found.after.blobs - found.before.blobs
    wrong = sum(each.wrong for each in found.asked.values())
    figures: dict[str, Figure] = {
        "quick": options.quick,
        "seed": options.seed,
        "partitions": sizes.partitions,
        "shards": _SHARDS,
        "rows_written": sizes.given,
        "rows_asked": sum(each.rows for each in found.asked.values()),
        "seconds": dict(found.seconds),
        "ready_full_s": bootstrap(full, seed=options.seed).value,
        "ready_tenth_s": bootstrap(tenth, seed=options.seed).value,
        "touched_gb": found.touched / _GB,
        "pss_gb": blobs / _GB,
        "own_memory_grown_gb": (found.after.own - found.before.own) / _GB,
        "page_tables_gb": found.after.page_tables / _GB,
        "intervals": {"ready_time_full_vs_tenth": [ready.low, ready.high]},
        **found.cold.figures,
        "machine": conditions,
    }
    return Result(
        bench=BENCH.name,
        ratios={
            "logical_tib": found.logical / _TIB,
            "rows_wrong": float(wrong),
            "pss_vs_touched": blobs / found.touched,
            "ready_time_full_vs_tenth": ready.value,
            "disk_gb": found.disk / _GB,
            **found.cold.ratios,
        },
        figures=figures,
        tables=(*_tables(found, full, tenth), found.cold.table),
        samples={
            "ready": Samples(columns=("full_s", "tenth_s"), rows=found.ready_s),
            "calls": Samples(
                columns=("what", "ms"),
                rows=[
                    *((name, ms) for name, each in found.asked.items() for ms in each.calls_ms),
                    *(("nvme", ms) for ms in found.cold.calls_ms),
                ],
            ),
        },
        plot=_plot(found),
        notes=(
            f"{_SHARDS} actors; {_CALL_IDS} rows a call as raw tensors, {_JSON_IDS} as JSON.",
            "The first load verifies everything; the others do not.",
            "PSS is of mapped blobs, and without page tables, which are told beside it.",
        ),
    )


def _tables(found: Found, full: Sequence[float], tenth: Sequence[float]) -> tuple[Table, ...]:
    return (
        Table(
            title="Seconds of each step",
            columns=("step", "seconds"),
            rows=(
                *found.seconds.items(),
                ("load full, median", float(np.median(full))),
                ("load tenth, median", float(np.median(tenth))),
            ),
        ),
        Table(
            title="Rows asked for",
            columns=("what", "rows", "wrong", "rows a second", "p50 ms", "p99 ms"),
            rows=tuple(
                (
                    *(name, each.rows, each.wrong, each.rows / each.took_s),
                    *(float(np.percentile(each.calls_ms, percent)) for percent in (50, 99)),
                )
                for name, each in found.asked.items()
            ),
        ),
        Table(
            title="Memory of the shard actors, GB",
            columns=("", "before", "after"),
            rows=tuple(
                (name, getattr(found.before, name) / _GB, getattr(found.after, name) / _GB)
                for name in ("blobs", "own", "page_tables")
            ),
        ),
    )


def _plot(found: Found) -> Plot:
    """What each call took, in the order of asking."""
    return Plot(
        title="Calls for rows of a tebibyte",
        x_label="call",
        y_label="milliseconds",
        log_y=True,
        series=tuple(
            Series(label=name, x=tuple(map(float, range(len(each.calls_ms)))), y=each.calls_ms)
            for name, each in found.asked.items()
        ),
    )


BENCH: Final = Bench(
    name="terabyte",
    summary="a table of 1 TiB with holes: read back, swapped to a delta; and one beyond its memory",
    run=_run,
    add_arguments=_add_arguments,
)
