"""What a process still holds after it has loaded and unloaded a servable many times.

A servable with a table and a program comes, answers and goes, in a process made of what device and
shard actors are made of (`bench.cycles_actor`). Two versions take turns whose weights, and so whose
units, differ: of one, its programs alone serve the other. `run_cycles` saves them, runs the
process, and says what it held before and after every cycle. Decides nothing: marks are for who
asks.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np

import shards
from bench.errors import LoadFailed
from bench.processes import python
from bench.report import ROOT
from shards.specs import Spec

if TYPE_CHECKING:
    import jax

__all__ = [
    "COUNTED", "GROWTH_MAX", "INPUT", "SERVABLE", "Cycles", "Footprint", "Model", "run_cycles",
    "save",
]  # fmt: skip

SERVABLE: Final = "cycled"
INPUT: Final = "ids"
#: Figures of a `Footprint` that must not grow from cycle to cycle.
COUNTED: Final = (
    "books_bytes", "handles", "sockets", "blobs", "threads", "mappings", "executables", "arrays",
)  # fmt: skip
_POOLED: Final = ("threads", "mappings")
#: By which part memory may be larger at the end.
GROWTH_MAX: Final = 0.05
_DIM: Final = 64
_WIDTH: Final = 512
_PARTITIONS: Final = 2
_FLOAT_BYTES: Final = 4


class Footprint(msgspec.Struct, frozen=True, kw_only=True):
    """What the process holds.

    Attributes:
        pss_bytes: its memory; of what it shares with others, its part. Without libraries: how
            many others have those open changes from one moment to the next.
        children_pss_bytes: of its compile process; 0 where there is none.
        books_bytes: what device and shard say that they have promised.
        handles: open descriptors.
        sockets: those of them that are sockets.
        blobs: those of them that are files of the store.
        threads: of the process.
        mappings: areas of its address space.
        executables: programs that JAX's client has.
        arrays: arrays that JAX's client has.
        load_s: seconds that the latest load took, on device and shard together.
    """

    pss_bytes: int
    children_pss_bytes: int
    books_bytes: int
    handles: int
    sockets: int
    blobs: int
    threads: int
    mappings: int
    executables: int
    arrays: int
    load_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The servable that comes and goes.

    Attributes:
        parameter_bytes: of its program, about.
        table_bytes: of its table, about.
        buckets: batch sizes that it is compiled for.
    """

    parameter_bytes: int = 16 << 20
    table_bytes: int = 16 << 20
    buckets: tuple[int, ...] = (1, 8, 32)


@dataclass(frozen=True, slots=True)
class Cycles:
    """What was held before the first cycle, and after each.

    Attributes:
        footprints: the first is of the process that has loaded nothing yet, and has no compile
            process.
    """

    footprints: tuple[Footprint, ...]

    @property
    def pss_growth(self) -> float:
        """By which part the process and its children are larger at the end than at the beginning.

        The first cycles are the beginning: what is imported, started or mapped once is there by
        then. At both ends the smallest counts, since what waits for a collection is no leak.
        """
        first, last = self._ends()
        return min(map(_memory, last)) / min(map(_memory, first)) - 1

    @property
    def leaks(self) -> dict[str, int]:
        """Of what is counted, what was more in every late cycle than in any early one; by how much.

        Pools of threads fill up over the first dozen cycles: threads and mappings, of which each
        has a few, leak where they grow in every other cycle.
        """
        first, last = self._ends()
        distance = len(self.footprints) - 1 - len(last)
        found: dict[str, int] = {}
        for name in COUNTED:
            late = min(getattr(each, name) for each in last)
            more = late - max(getattr(each, name) for each in first)
            if more > (distance // 2 if name in _POOLED else 0):
                found[name] = more
        return found

    def _ends(self) -> tuple[Sequence[Footprint], Sequence[Footprint]]:
        few = max(3, (len(self.footprints) - 1) // 5)
        return self.footprints[1 : 1 + few], self.footprints[-few:]


def _memory(footprint: Footprint) -> int:
    return footprint.pss_bytes + footprint.children_pss_bytes


def run_cycles(
    cycles: int, model: Model | None = None, *, keep_executables: bool = False, timeout_s: float
) -> Cycles:
    """Load and unload a servable so many times, in a process of its own.

    Args:
        cycles: how often; at least 6, so that the last are not the first.
        model: what comes and goes.
        keep_executables: whether what was compiled is kept on disk, as in a cluster, so that
            cycles after the first compile nothing, and after the first two try nothing. Otherwise
            every cycle compiles: no executable outlives the last unit that runs it.
        timeout_s: what all of it may take.

    Raises:
        LoadFailed: a load, a request or an unload failed, or there was not time enough.
    """
    assert cycles >= 6, cycles
    with tempfile.TemporaryDirectory(prefix="shardserve-") as name:
        store, cache = Path(name, "store"), Path(name, "cache")
        save(store, model or Model())
        command = python(
            "bench.cycles_actor", "--store", str(store), "--directory", name,
            "--cache", str(cache) if keep_executables else "", "--cycles", str(cycles),
        )  # fmt: skip
        try:
            ran = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise LoadFailed(f"{cycles} cycles took more than {timeout_s:g} s") from error
    if ran.returncode:
        raise LoadFailed(f"the process of the cycles ended: {ran.stderr[-2000:]}")
    lines = ran.stdout.splitlines()
    return Cycles(tuple(msgspec.json.decode(line, type=Footprint) for line in lines))


def save(store: Path, model: Model) -> None:
    """Save the two versions of `SERVABLE`."""
    for version in (1, 2):
        generator = np.random.default_rng(version)
        rows = max(1024, model.table_bytes // (_DIM * _FLOAT_BYTES))
        layers = max(1, model.parameter_bytes // (_WIDTH * _WIDTH * _FLOAT_BYTES))
        weights = {"w": generator.standard_normal((_DIM, _WIDTH), np.float32)} | {
            f"w{number}": generator.standard_normal((_WIDTH, _WIDTH), np.float32)
            for number in range(layers)
        }
        with shards.Bundle.create(store, SERVABLE, version) as bundle:
            table = bundle.table(
                "table",
                generator.standard_normal((rows, _DIM), np.float32),
                partitions=_PARTITIONS,
            )
            trunk = bundle.unit(
                "trunk", _forward, weights, inputs={"rows": Spec(("b", 1, _DIM))},
                batch_buckets=model.buckets, platforms=("cpu",),
            )  # fmt: skip

            def serving(ids: Any, table: Any = table, trunk: Any = trunk) -> Any:
                return trunk(rows=table.rows(ids))

            bundle.signature("serving_default", inputs={INPUT: Spec(("b", 1), "int64")})(serving)


def _forward(params: Mapping[str, jax.Array], rows: jax.Array) -> dict[str, jax.Array]:
    import jax.numpy as jnp

    hidden = rows[:, 0] @ params["w"]
    for number in range(len(params) - 1):
        hidden = jnp.tanh(hidden @ params[f"w{number}"])
    return {"y": hidden.mean(-1)}


def main() -> None:
    """Fifty cycles of a model of 64 MiB, each compiled anew; ends with 1 where anything stays."""
    cycles = run_cycles(50, Model(parameter_bytes=32 << 20, table_bytes=32 << 20), timeout_s=900.0)
    for number, each in enumerate(cycles.footprints):
        sys.stdout.write(f"{number:3} {msgspec.json.encode(each).decode()}\n")
    sys.stdout.write(f"memory grew by {cycles.pss_growth:.2%}; leaks: {cycles.leaks or 'none'}\n")
    sys.exit(cycles.pss_growth > GROWTH_MAX or bool(cycles.leaks))


if __name__ == "__main__":
    main()
