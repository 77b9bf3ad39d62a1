"""What a benchmark is, and where each is found.

A benchmark is a module with a value `BENCH`. The registry names modules instead of importing
them, so that ``--help`` and the load generators do not wait for JAX or Ray.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Final

from bench.report import Result

__all__ = ["MODULES", "Bench", "Options", "find"]

#: Benchmark name to the module that holds its `BENCH`.
MODULES: Final[Mapping[str, str]] = {
    "doors": "bench.doors",
    "fanout": "bench.fanout",
    "faults": "bench.faults",
    "ingress": "bench.ingress",
    "ingress-floor": "bench.ingress_floor",
    "isolation": "bench.isolation",
    "isolation-load": "bench.isolation_load",
    "load": "bench.loads",
    "look-ups": "bench.look_ups",
    "lookup": "bench.lookup",
    "many": "bench.many",
    "overhead": "bench.overhead",
    "overload": "bench.overload",
    "predictability": "bench.predictability",
    "prefix": "bench.prefix",
    "recovery": "bench.recovery",
    "shared": "bench.shared",
    "simulator": "bench.simulator",
    "swap": "bench.swap",
    "terabyte": "bench.terabyte",
    "transport": "bench.transport",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What every benchmark is told.

    Attributes:
        quick: end within 60 seconds, at wider intervals.
        rounds: how often contenders alternate, or None for the benchmark's own number.
        seed: of everything that is drawn.
        own: the benchmark's own arguments.
    """

    quick: bool = False
    rounds: int | None = None
    seed: int = 0
    own: argparse.Namespace = field(default_factory=argparse.Namespace)

    def rounds_or(self, *, quick: int, full: int) -> int:
        """The number of rounds asked for, or else the benchmark's own."""
        return self.rounds or (quick if self.quick else full)


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One benchmark.

    Attributes:
        name: as on the command line and in the marks.
        summary: one line for the list.
        run: measures.
        add_arguments: declares arguments of its own, found in `Options.own`.
    """

    name: str
    summary: str
    run: Callable[[Options], Result]
    add_arguments: Callable[[argparse.ArgumentParser], None] = _no_arguments


def find(name: str) -> Bench:
    """The benchmark of that name.

    Raises:
        KeyError: there is none.
    """
    bench = import_module(MODULES[name]).BENCH
    assert isinstance(bench, Bench), f"{MODULES[name]}.BENCH is not a Bench"
    assert bench.name == name, f"{MODULES[name]}.BENCH is named {bench.name!r}, not {name!r}"
    return bench
