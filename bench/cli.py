"""The command line of the benchmarks: ``shardserve bench NAME`` and ``python -m bench NAME``.

The last line on standard output is the result as JSON; progress and complaints go to standard
error, so that a script may read the one and a person the other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from bench.errors import BenchError
from bench.marks import judge, read_marks
from bench.processes import ending_when_told
from bench.registry import MODULES, Bench, Options, find
from bench.report import ROOT, Result, json_line, print_result, print_verdicts, save

__all__ = ["main"]

_RESULTS: Final = ROOT / "bench" / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark that the arguments name.

    Returns:
        0; 1 when ``--marks`` is given and a mark was missed; 2 when it could not be run.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    named, _ = _common_parser(add_help=False).parse_known_args(arguments)
    if named.list:
        print("\n".join(f"{name:20} {find(name).summary}" for name in MODULES))
        return 0
    if named.name is None:
        parser = _common_parser(add_help=True)
        parser.parse_args(arguments)
        parser.error(f"name a benchmark: {', '.join(MODULES)}")
    bench = find(named.name)
    parser = _common_parser(add_help=True)
    parser.description = bench.summary
    bench.add_arguments(parser)
    try:
        with ending_when_told():
            return _run(bench, parser.parse_args(arguments))
    except BenchError as error:
        print(f"bench {bench.name}: {error}", file=sys.stderr)
        return 2


def _run(bench: Bench, arguments: argparse.Namespace) -> int:
    # Read first: a full run must not end in a complaint about the file it is compared with.
    marks = None if arguments.marks is None else read_marks(arguments.marks)
    if marks is not None and bench.name not in marks:
        raise BenchError(f"{arguments.marks} sets no marks for it")
    options = Options(
        quick=arguments.quick, rounds=arguments.rounds, seed=arguments.seed, own=arguments
    )
    result = bench.run(options)
    folder = save(result, parent=arguments.out)
    if arguments.plot is not None:
        _draw(result, arguments.plot)
    print_result(result)
    print(f"raw samples: {folder}", file=sys.stderr)
    verdicts = () if marks is None else judge(result.ratios, marks[bench.name])
    if verdicts:
        print_verdicts(bench.name, verdicts)
    print(json_line(result), flush=True)
    return 0 if all(verdict.met for verdict in verdicts) else 1


def _draw(result: Result, path: Path) -> None:
    # Here, since matplotlib is optional and slow to import.
    from bench.plot import draw

    if result.plot is None:
        print(f"bench {result.bench}: this result has no plot", file=sys.stderr)
        return
    draw(result.plot, path)


def _common_parser(*, add_help: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shardserve bench", add_help=add_help, description="Benchmarks of the cluster."
    )
    parser.add_argument("name", nargs="?", choices=tuple(MODULES), help="the benchmark")
    parser.add_argument("--list", action="store_true", help="list the benchmarks and end")
    parser.add_argument("--quick", action="store_true", help="end within 60 seconds")
    parser.add_argument("--rounds", type=_positive, help="how often contenders alternate")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything drawn")
    parser.add_argument(
        "--out", type=Path, default=_RESULTS, help="folder for results (default: %(default)s)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the result into FILE")
    parser.add_argument(
        "--marks", type=Path, metavar="FILE", help="compare; exit with 1 if a mark is missed"
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value
