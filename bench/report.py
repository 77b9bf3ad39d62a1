"""What a benchmark found, and the ways it is told: tables, samples, plot and one line of JSON.

The line of JSON is the contract with scripts, ``{"bench": ..., "ratios": ..., "figures": ...}``;
the rest is for people. Raw samples are kept beside it, so that a figure can be computed again.
This file does not know what was measured.
"""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import orjson
import rich.markup
import rich.table
from rich.console import Console

from bench.marks import Verdict
from bench.stats import Estimate, Histogram

__all__ = [
    "ROOT",
    "Cell",
    "Figure",
    "Plot",
    "Result",
    "Samples",
    "Series",
    "Table",
    "console",
    "histogram_samples",
    "json_line",
    "machine",
    "print_result",
    "print_verdicts",
    "save",
    "show",
]

#: The checkout that this package lies in; children are started there.
ROOT: Final = Path(__file__).resolve().parent.parent

Cell = float | int | str | Estimate
Figure = float | int | str | bool | None | Sequence["Figure"] | Mapping[str, "Figure"]

_PACKAGES: Final = ("shardserve", "ray", "jax", "numpy", "uvloop", "httptools")
#: Rich wraps at 80 columns where it cannot ask a terminal, which cuts a table in a log to pieces.
_WIDTH_OF_LOGS: Final = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table for people; cells are printed as `show` prints them."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"table {self.title!r}: every row needs {len(self.columns)} cells")


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Raw measurements for one CSV file."""

    columns: tuple[str, ...]
    rows: Sequence[Sequence[float | int | str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line of a plot."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """What a plot of the result shows. `uprights` are instants on its x axis, with their names."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    uprights: tuple[tuple[float, str], ...] = ()
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a benchmark found.

    Attributes:
        bench: its name.
        ratios: what marks are set on; the keys of the marks file.
        figures: everything else a script may want, of JSON's types.
        tables: what people read, in order.
        samples: file stem to raw measurements.
        plot: what ``--plot`` draws, or None.
        notes: sentences on the conditions of the run that the reader must know.
    """

    bench: str
    ratios: Mapping[str, float]
    figures: Mapping[str, Figure]
    tables: tuple[Table, ...] = ()
    samples: Mapping[str, Samples] = field(default_factory=dict)
    plot: Plot | None = None
    notes: tuple[str, ...] = ()


def machine() -> dict[str, Figure]:
    """The machine and the versions that a figure depends on."""
    return {
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_1min": round(os.getloadavg()[0], 2),
        "commit": _commit(),
        **{name: _version(name) for name in _PACKAGES},
    }


def json_line(result: Result) -> str:
    """The result as one line of JSON; a ratio that is not finite becomes null."""
    return orjson.dumps(
        {"bench": result.bench, "ratios": result.ratios, "figures": result.figures},
        option=orjson.OPT_SERIALIZE_NUMPY,
    ).decode()


def histogram_samples(histogram: Histogram, *, unit: str) -> Samples:
    """A histogram as raw samples: each value, in ``unit``, and how often it came."""
    values, counts = histogram.values.tolist(), histogram.counts.tolist()
    return Samples(columns=(unit, "count"), rows=list(zip(values, counts, strict=True)))


def show(cell: Cell) -> str:
    """A cell as text: three or more significant digits, thousands apart."""
    match cell:
        case str():
            return cell
        case Estimate():
            return f"{show(cell.value)} [{show(cell.low)}, {show(cell.high)}]"
        case int():
            return f"{cell:,}"
        case _ if abs(cell) >= 1000:
            return f"{cell:,.0f}"
        case _:
            return f"{cell:.3g}"


def console() -> Console:
    """Where tables go: standard output, at a width that logs can hold."""
    probe = Console()
    return probe if probe.is_terminal else Console(width=_WIDTH_OF_LOGS)


def print_result(result: Result) -> None:
    """Print the tables and the notes; the JSON line is the caller's to print last."""
    out = console()
    for table in result.tables:
        _print_table(out, table)
    for note in result.notes:
        out.print(f"• {note}", markup=False)


def print_verdicts(bench: str, verdicts: Sequence[Verdict]) -> None:
    """Print one row for each mark."""
    rows = tuple(
        (
            verdict.key,
            "not measured" if verdict.measured is None else show(verdict.measured),
            f"{verdict.mark.comparison} {verdict.mark.value:g}",
            "met" if verdict.met else "MISSED",
        )
        for verdict in verdicts
    )
    table = Table(title=f"{bench}: marks", columns=("key", "measured", "mark", ""), rows=rows)
    _print_table(console(), table)


def save(result: Result, *, parent: Path, now: datetime | None = None) -> Path:
    """Keep the JSON and the raw samples in a folder of their own under ``parent``.

    Args:
        result: what to keep.
        parent: the folder of all results; made if need be.
        now: the instant that names the folder; the current one when None.

    Returns:
        The new folder, ``<bench>-<timestamp>``.
    """
    stamp = (now or datetime.now(UTC)).strftime("%Y%m%dT%H%M%S.%fZ")
    folder = parent / f"{result.bench}-{stamp}"
    folder.mkdir(parents=True)
    for stem, samples in result.samples.items():
        with (folder / f"{stem}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(samples.columns)
            writer.writerows(samples.rows)
    (folder / "result.json").write_text(json_line(result) + "\n")
    return folder


def _print_table(out: Console, table: Table) -> None:
    drawn = rich.table.Table()
    for index, name in enumerate(table.columns):
        drawn.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*(rich.markup.escape(show(cell)) for cell in row))
    # Above the table and not in it, where it would wrap to the table's width.
    out.print(table.title, style="bold", markup=False)
    out.print(drawn)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
