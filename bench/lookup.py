"""``lookup``: bags of random ids pooled from one mapped file, here and by torch's `EmbeddingBag`.

A shard's own look-up, in process, against the peer in a process of its own: the same file in the
page cache, the same ids, drawn anew for every call, the same number of threads, in turns. Ids that
come again stay in the cache, and memory of another kind has larger pages: either way the contest
would be about something else. Rows hold small whole numbers, so both must give the same sums.

Then many tables behind a router, which `lookup_routed` measures and `lookup_result` tells.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from bench import lookup_routed
from bench.errors import AnswersDiffer, ContenderFailed, ToolMissing
from bench.lookup_result import figures_of, plot_of, ratios_of, samples_of, tables_of
from bench.processes import tail
from bench.registry import Bench, Options
from bench.report import Figure, Result, Samples, Table, machine
from bench.stats import Estimate, bootstrap, paired_ratio
from shards.manifest import BlobRef, Partition, TableUnit
from shards.resident import Crew
from shards.stored_rows import viewed
from shards.tables import HostedTable

__all__ = ["BENCH"]

_DIM: Final = 64
_THREADS: Final = 2
_TORCH: Final = "torch==2.13.0"
_PEER: Final = "torch"
#: Rows of int8 behind a scale each.
_SCALED: Final = "int8"
#: Bags and ids of each, by the name of the shape.
SHAPES: Final[Mapping[str, tuple[int, int]]] = {"10000x20": (10_000, 20), "64x520": (64, 520)}
#: Floats in a file that was written in small pieces: it lies in small pages. The other files lie in
#: huge ones (that of int8 in part), torch's, too, where kernel and file system have those.
_SMALL: Final = "small"
_SMALL_BYTES: Final = 1 << 16
#: Ours, by name: the file, the ids' dtype, and in how many partitions the file is held.
OURS: Final[Mapping[str, tuple[str, str, int]]] = {
    "shard": ("float32", "int64", 1),
    "int32 ids": ("float32", "int32", 1),
    "small pages": (_SMALL, "int64", 1),
    "8 partitions": ("float32", "int64", 8),
    "float16 rows": ("float16", "int64", 1),
    "bfloat16 rows": ("bfloat16", "int64", 1),
    "int8 rows": (_SCALED, "int64", 1),
}
_START_S: Final = 60.0
_BLOCK_ROWS: Final = 1 << 16
#: Of the elements of each file.
_DTYPES: Final = {
    "float32": np.dtype(np.float32),
    _SMALL: np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    _SCALED: np.dtype(np.int8),
}


@dataclass(frozen=True, slots=True)
class Turn:
    """What one contender is asked for in one round.

    Attributes:
        bags: of a call.
        length: ids of each bag.
        seed: of the ids of all its calls.
        calls: how many.
    """

    bags: int
    length: int
    seed: int
    calls: int


@dataclass(frozen=True, slots=True)
class Told:
    """Seconds of every call, and the sum of all that was answered."""

    seconds: Sequence[float]
    digest: float


class _Shard:
    """A shard's look-ups in a mapped file."""

    def __init__(self, path: Path, rows: int, file: str, ids: str, parts: int) -> None:
        self._rows, self._ids = rows, np.dtype(ids)
        mapped = np.memmap(path, np.uint8, "r").view(np.ndarray)
        mapped[::4096].sum()  # every page is mapped
        self.huge = _huge_share(mapped)
        edges = [rows * index // parts for index in range(parts + 1)]
        unit = TableUnit(
            id="table", dim=_DIM, rows=rows, stored="int8" if file == _SCALED else None,
            dtype="float32" if file in (_SCALED, _SMALL) else file,
            partitions=tuple(
                Partition(first_row=a, rows=b - a, blob=BlobRef(digest="0" * 64, size=0))
                for a, b in itertools.pairwise(edges)
            ),
        )  # fmt: skip
        table = viewed(unit, mapped)
        held = {i: table[edges[i] : edges[i + 1]] for i in range(parts)}
        self._table = HostedTable(unit, held, crew=Crew(_THREADS))

    def take(self, turn: Turn) -> Told:
        """All calls of a turn."""
        random = np.random.default_rng(turn.seed)
        offsets = np.arange(turn.bags + 1, dtype=np.int64) * turn.length
        seconds: list[float] = []
        digest = 0.0
        for _ in range(turn.calls):
            drawn = random.integers(0, self._rows, turn.bags * turn.length)
            ids = drawn.astype(self._ids, copy=False)
            began = time.perf_counter()
            found = self._table.pool(ids, offsets, "sum")
            seconds.append(time.perf_counter() - began)
            digest += float(found.sum(dtype=np.float64))
        return Told(seconds, digest)


class _Torch:
    """The peer's process."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self._log = log
        self.version = str(self._read()["torch"])

    def take(self, turn: Turn) -> Told:
        """All calls of a turn.

        Raises:
            ContenderFailed: it ended.
        """
        asked = {name: getattr(turn, name) for name in ("bags", "length", "seed", "calls")}
        sink = self._process.stdin
        assert sink is not None
        with contextlib.suppress(BrokenPipeError):  # the missing answer tells why
            sink.write(json.dumps(asked) + "\n")
            sink.flush()
        told = self._read()
        return Told(told["seconds"], told["digest"])

    def _read(self) -> dict[str, Any]:
        source: IO[str] | None = self._process.stdout
        assert source is not None
        line = source.readline()
        if not line:
            raise ContenderFailed(f"torch's process ended:\n{tail(self._log)}")
        found: dict[str, Any] = json.loads(line)
        return found


@contextlib.contextmanager
def _torch(python: str, path: Path, rows: int, log: Path) -> Iterator[_Torch]:
    script = Path(__file__).with_name("lookup_torch.py")
    command = [python, str(script), str(path), str(rows), str(_DIM), str(_THREADS)]
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        yield _Torch(process, log)
    finally:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()  # it ends with its input
        try:
            process.wait(_START_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def torch_python(folder: Path) -> str:
    """An interpreter that has torch; its environment is made in the folder if it is not there.

    Raises:
        ToolMissing: torch could not be installed.
    """
    python = folder / "bin" / "python"
    done = folder / "complete"
    if not done.exists():
        print(f"installing {_TORCH} into {folder}", file=sys.stderr)
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [str(python), "-m", "pip", "install", "--quiet", _TORCH, "numpy"],
        ):
            told = subprocess.run(command, capture_output=True, text=True)
            if told.returncode:
                raise ToolMissing(f"{_TORCH} cannot be installed: {told.stderr[-500:]}")
        done.touch()
    return str(python)


def _write(path: Path, rows: int, dtype: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    with path.open("wb") as sink:
        for start in range(0, rows, _BLOCK_ROWS):
            count = min(_BLOCK_ROWS, rows - start)
            # Sums of 520 of them are below 2048: exact in any order, and in 16 bits, too.
            block: npt.NDArray[np.generic] = random.integers(-3, 4, (count, _DIM), np.int8)
            values: npt.NDArray[Any] = block.astype(_DTYPES[dtype])
            if dtype == _SCALED:
                # A scale of one: nothing is lost, and sums are as exact as of the others.
                scales = np.ones((count, 1), np.float32).view(np.int8)
                values = np.concatenate((scales, values), axis=1)
            data = memoryview(values.tobytes())
            size = _SMALL_BYTES if dtype == _SMALL else len(data)
            for at in range(0, len(data), size):
                sink.write(data[at : at + size])


def _huge_share(mapped: npt.NDArray[np.uint8]) -> float:
    """The share of a mapped file that this process has in huge pages."""
    address, kib = f"{mapped.ctypes.data:x}-", 0
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in itertools.dropwhile(lambda line: not line.startswith(address), lines):
        if line.startswith("FilePmdMapped:"):
            kib = int(line.split()[1])
            break
    return kib * 1024 / mapped.nbytes


#: Contender and shape to the median milliseconds of every round.
Outcomes = Mapping[tuple[str, str], Sequence[float]]


def _measure(options: Options) -> tuple[Outcomes, Mapping[str, Figure]]:
    """What was measured, and what else is to be told of it."""
    rows = (1 << 22) if options.quick else (1 << 23)
    rounds = options.rounds_or(quick=5, full=15)
    python = options.own.torch_python or torch_python(options.own.torch_folder.expanduser())
    outcomes: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="shardserve-") as name, contextlib.ExitStack() as stack:
        paths = {dtype: Path(name, dtype) for dtype in _DTYPES}
        for dtype, path in paths.items():
            _write(path, rows, dtype, options.seed)
        peer = stack.enter_context(_torch(python, paths["float32"], rows, Path(name, "torch.log")))
        ours = {
            label: _Shard(paths[file], rows, file, ids, parts)
            for label, (file, ids, parts) in OURS.items()
        }
        contenders: dict[str, _Shard | _Torch] = {_PEER: peer, **ours}
        for number in range(-1, rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
            for shape, (bags, length) in SHAPES.items():
                calls = max(5, (600_000 if options.quick else 1_200_000) // (bags * length))
                turn = Turn(bags, length, options.seed + 1 + number, calls)
                told = {
                    label: contenders[label].take(turn)
                    for label in list(contenders)[:: 1 if number % 2 else -1]
                }
                _check(told)
                if number >= 0:  # the first is the warm-up
                    for label, each in told.items():
                        median = float(np.median(each.seconds)) * 1e3
                        outcomes.setdefault((label, shape), []).append(median)
        shares = {f"{label}_huge_share": ours[label].huge for label in ("shard", "small pages")}
        return outcomes, {"torch": peer.version, **shares}


def _check(told: Mapping[str, Told]) -> None:
    expected = told[_PEER].digest
    for label, each in told.items():
        if each.digest != expected:
            raise AnswersDiffer(f"{label} sums up to {each.digest}, torch to {expected}")


def _result(
    outcomes: Outcomes,
    routed: lookup_routed.Outcomes,
    conditions: Mapping[str, Figure],
    *,
    seed: int,
) -> Result:
    """All that is told of the outcomes."""
    behind = ratios_of(routed, seed)
    times = {key: bootstrap(values, seed=seed) for key, values in outcomes.items()}
    leads: dict[tuple[str, str], Estimate] = {
        (label, shape): paired_ratio(outcomes[_PEER, shape], outcomes[label, shape], seed=seed)
        for label in OURS
        for shape in SHAPES
    }
    return Result(
        bench=BENCH.name,
        ratios={
            **{f"shard_vs_torch_{shape}": leads["shard", shape].value for shape in SHAPES},
            **{name: each.value for name, each in behind.items()},
        },
        figures={
            **figures_of(routed, behind, seed),
            **{f"{label}_{shape}_ms": each.value for (label, shape), each in times.items()},
            **{
                f"{label}_vs_torch_{shape}": [each.value, each.low, each.high]
                for (label, shape), each in leads.items()
            },
            **conditions,
        },
        tables=(
            Table(
                title=f"milliseconds a call, {_THREADS} threads, {_DIM} floats a row",
                columns=("", *(f"{shape}{what}" for shape in SHAPES for what in (" ms", " lead"))),
                rows=tuple(
                    (
                        label,
                        *(
                            cell
                            for shape in SHAPES
                            for cell in (
                                times[label, shape],
                                leads.get((label, shape), 1.0),
                            )
                        ),
                    )
                    for label in (_PEER, *OURS)
                ),
            ),
            *tables_of(routed, seed),
        ),
        samples={
            "routed": samples_of(routed),
            "rounds": Samples(
                columns=("contender", "shape", "round", "median_ms"),
                rows=[
                    (*key, number, value)
                    for key, values in outcomes.items()
                    for number, value in enumerate(values)
                ],
            ),
        },
        plot=plot_of(routed),
        notes=(
            "A lead is torch's time over ours, in the same round.",
            "Per core: processor time of one thread in one process over that of router and shards.",
        ),
    )


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--torch-python", default="", help="an interpreter that has torch")
    parser.add_argument(
        "--torch-folder",
        type=Path,
        default=Path("~/.cache/shardserve/bench-torch"),
        help="where else an environment with torch is, or will be made (800 MB)",
    )


def _run(options: Options) -> Result:
    conditions: dict[str, Figure] = {
        "quick": options.quick,
        "seed": options.seed,
        "machine": machine(),
    }
    with tempfile.TemporaryDirectory(prefix="ssv-") as name:
        routed = lookup_routed.measure(Path(name), options)
    outcomes, told = _measure(options)
    return _result(outcomes, routed, {**conditions, **told}, seed=options.seed)


BENCH: Final = Bench(
    name="lookup",
    summary="bags of ids pooled by a shard against torch's EmbeddingBag, and behind a router",
    run=_run,
    add_arguments=_arguments,
)
