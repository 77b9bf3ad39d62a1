"""``doors``: the direct port under thousands of clients that mean harm, beside some that do not.

Waves of connections that drip, stall, lie about lengths, take no answers or say nothing, held
against a product as its users start it. What counts is what everybody else notices, what the
harmful are told, and what the router's memory is like after each wave.
"""

from __future__ import annotations

import argparse
import http.client
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np
import orjson

from bench.doors_attack import EXPECTED
from bench.errors import ContenderFailed
from bench.floor import predict_request
from bench.mlp import rows
from bench.product import declaration, save_mlp, start_product, status
from bench.registry import Bench, Options
from bench.report import ROOT, Figure, Result, Table, machine

__all__ = ["BENCH", "pss_mib"]

#: Shorter than the defaults, so that a wave sees every time-out.
_LIMITS: Final = {"head_s": 4.0, "body_s": 4.0, "read_s": 4.0, "idle_s": 6.0}
_CLIENTS: Final = 4
#: Each client pauses, so that what is measured is not how fast it can ask.
_PAUSE_S: Final = 0.005
_SETTLE_S: Final = 30.0


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--connections", type=int, default=5000, help="harmful ones at one time")


def _run(options: Options) -> Result:
    conditions = machine()
    connections: int = options.own.connections
    waves, wave_s = options.rounds_or(quick=2, full=4), 10.0 if options.quick else 15.0
    with tempfile.TemporaryDirectory(prefix="shardserve-") as name:
        folder = Path(name)
        save_mlp(folder / "store", options.seed)
        config = folder / "servables.yaml"
        cluster = {"http": {"port": 0, "limits": _LIMITS}}
        config.write_text(declaration(folder / "store", [{"name": "mlp"}], cluster=cluster))
        with start_product(config, folder=folder) as url:
            pid = int(status(config)["doors"][0]["pid"])
            quiet = _Others(url, options.seed)
            time.sleep(3.0)
            quiet.end()
            others = _Others(url, options.seed)
            pss = [pss_mib(pid)]
            told: dict[str, Counter[str]] = {kind: Counter() for kind in EXPECTED}
            open_max = 0
            for wave in range(waves):
                print(f"wave {wave + 1} of {waves}", file=sys.stderr)
                found = _wave(url, wave_s, connections, options.seed + wave)
                open_max = max(open_max, int(found["open_max"]))
                for kind, counts in found["told"].items():
                    told[kind].update(counts)
                _await_quiet(url)
                pss.append(pss_mib(pid))
            others.end()
            counters = _counters(url)
    return _result(quiet, others, told, open_max, pss, counters, conditions)


class _Others:
    """Clients that ask for predictions and compare the answers, until they are told to end."""

    def __init__(self, url: str, seed: int) -> None:
        self._netloc = urlsplit(url).netloc
        self._request = predict_request(rows(1, seed))
        self._is_over = threading.Event()
        self.latencies_s: list[float] = []
        self.errors: Counter[str] = Counter()
        self._wanted = b""
        self._threads = [threading.Thread(target=self._ask) for _ in range(_CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        connection = http.client.HTTPConnection(self._netloc, timeout=10.0)
        count = 0
        while not self._is_over.wait(_PAUSE_S):
            count += 1
            began = time.perf_counter()
            try:
                connection.request("POST", self._request.path, self._request.body)
                response = connection.getresponse()
                body = response.read()
            except (OSError, http.client.HTTPException) as error:
                self.errors[type(error).__name__] += 1
                connection.close()
                continue
            self.latencies_s.append(time.perf_counter() - began)
            self._wanted = self._wanted or body
            if response.status != 200:
                self.errors[str(response.status)] += 1
            elif body != self._wanted:
                self.errors["another answer"] += 1
            if count % 10 == 0:
                connection.close()  # the next one is on a new connection
        connection.close()

    def end(self) -> None:
        """Let the last answers come."""
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def percentile_ms(self, percent: float) -> float:
        """Of the answers' latencies."""
        return float(np.percentile(self.latencies_s, percent)) * 1e3


def _wave(url: str, seconds: float, connections: int, seed: int) -> dict[str, Any]:
    parts = urlsplit(url)
    done = subprocess.run(
        [sys.executable, "-m", "bench.doors_attack", str(parts.hostname), str(parts.port),
         str(seconds), str(connections), str(seed)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        timeout=seconds + 60.0,
    )  # fmt: skip
    if done.returncode:
        raise ContenderFailed(f"the attack ended with {done.returncode}")
    found: dict[str, Any] = orjson.loads(done.stdout.splitlines()[-1])
    return found


def _counters(url: str) -> dict[str, float]:
    """The door's own, by name."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10.0)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    lines = (line.split() for line in text.splitlines() if line.startswith("serving_door_"))
    return {
        name.removeprefix("serving_door_").removesuffix("_total"): float(value)
        for name, value in lines
        if not name.endswith("_created")
    }


def _await_quiet(url: str) -> None:
    deadline = time.monotonic() + _SETTLE_S
    while _counters(url)["open"] > 2 * _CLIENTS:
        if time.monotonic() > deadline:
            raise ContenderFailed("connections stay open although their clients have gone")
        time.sleep(0.25)


def pss_mib(pid: int) -> float:
    """Memory of a process, its share of what it shares included.

    Raises:
        ContenderFailed: the process tells none.
    """
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise ContenderFailed(f"process {pid} has no Pss")


def _result(
    quiet: _Others,
    others: _Others,
    told: Mapping[str, Counter[str]],
    open_max: int,
    pss: list[float],
    counters: Mapping[str, float],
    conditions: Mapping[str, Figure],
) -> Result:
    wrong = sum(
        count
        for kind, counts in told.items()
        for ending, count in counts.items()
        if ending not in EXPECTED[kind]
    )
    table = Table(
        title="What each kind of harmful client was told, and how often",
        columns=("kind", "told"),
        rows=tuple(
            (kind, ", ".join(f"{ending}: {count}" for ending, count in sorted(counts.items())))
            for kind, counts in told.items()
        ),
    )
    latency = Table(
        title="Everybody else",
        columns=("when", "requests", "errors", "p50_ms", "p99_ms", "max_ms"),
        rows=tuple(
            (when, len(found.latencies_s), found.errors.total(), found.percentile_ms(50),
             found.percentile_ms(99), found.percentile_ms(100))
            for when, found in (("alone", quiet), ("under attack", others))
        ),
    )  # fmt: skip
    memory = Table(
        title="The router's memory (PSS, MiB)",
        columns=("when", "mib"),
        rows=tuple(
            ("before" if not index else f"after wave {index}", round(mib, 1))
            for index, mib in enumerate(pss)
        ),
    )
    return Result(
        bench="doors",
        ratios={
            "errors_of_others": float(others.errors.total()),
            "wrong_endings": float(wrong),
            "memory_last_vs_first_wave": pss[-1] / pss[1],
            "p99_vs_alone": others.percentile_ms(99) / quiet.percentile_ms(99),
        },
        figures={
            "open_max": open_max,
            "requests_of_others": len(others.latencies_s),
            "errors": dict(others.errors),
            "p50_ms": others.percentile_ms(50),
            "p99_ms": others.percentile_ms(99),
            "pss_mib": pss,
            "counters": dict(counters),
            "told": {kind: dict(counts) for kind, counts in told.items()},
            "machine": dict(conditions),
        },
        tables=(table, latency, memory),
        notes=(f"{open_max} harmful connections were open at one time.",),
    )


BENCH: Final = Bench(
    name="doors",
    summary="the direct port under thousands of harmful clients: others, endings, memory",
    run=_run,
    add_arguments=_add_arguments,
)
