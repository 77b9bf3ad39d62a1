"""Requests for simulation and benches: when they come, for whom, of how many rows.

All are drawn from a seed, and none knows what serves it. Inter-arrival times are exponential (a
Poisson process) or gamma distributed with a coefficient of variation above one, which is what
bursts of real traffic look like (AlpaServe and Clockwork use 1 to 8).
"""

from __future__ import annotations

import csv
import heapq
from collections.abc import Iterable, Iterator, Mapping
from math import inf
from random import Random

from batching.errors import InvalidArgument
from batching.simulation import Arrival
from batching.values import LaneKey

__all__ = ["gamma", "merged", "poisson", "power_law", "sampled", "trace"]


def poisson(
    lane: LaneKey,
    owner: str,
    rate: float,
    seconds: float,
    *,
    budget_s: float = inf,
    rows: int = 1,
    seed: int = 0,
) -> Iterator[Arrival]:
    """Requests of one owner, independent of each other: `rate` a second for so many seconds."""
    return gamma(lane, owner, rate, seconds, cv=1.0, budget_s=budget_s, rows=rows, seed=seed)


def gamma(
    lane: LaneKey,
    owner: str,
    rate: float,
    seconds: float,
    *,
    cv: float,
    budget_s: float = inf,
    rows: int = 1,
    seed: int = 0,
) -> Iterator[Arrival]:
    """Requests that come in bursts: gamma distributed times between them.

    Args:
        lane: where they wait.
        owner: whose they are.
        rate: mean requests a second.
        seconds: how long.
        cv: coefficient of variation of the time between two; 1 is Poisson, 4 bursty.
        budget_s: seconds until each one's deadline.
        rows: of each.
        seed: of the draw; two owners of one seed draw differently.

    Raises:
        InvalidArgument: a rate, time or coefficient that is not positive.
    """
    if not (rate > 0 and seconds > 0 and cv > 0):
        raise InvalidArgument(f"rate {rate}, seconds {seconds} and cv {cv} must be positive")
    random = Random(f"{seed} {owner}")
    shape = 1.0 / cv**2
    scale = 1.0 / (rate * shape)
    at = random.gammavariate(shape, scale)
    while at < seconds:
        yield Arrival(at, lane, owner, rows, budget_s)
        at += random.gammavariate(shape, scale)


def power_law(total: float, count: int, exponent: float = 1.0) -> list[float]:
    """Rates of `count` servables that add up to `total`, the k-th proportional to k^-exponent.

    Raises:
        InvalidArgument: there is none.
    """
    if count < 1:
        raise InvalidArgument(f"{count} servables")
    parts = [(number + 1) ** -exponent for number in range(count)]
    return [total * part / sum(parts) for part in parts]


def sampled(histogram: Mapping[int, int], count: int, *, seed: int = 0) -> list[int]:
    """Sizes (lengths, rows) drawn from counts by size.

    Raises:
        InvalidArgument: nothing was counted.
    """
    sizes = sorted(histogram)
    weights = [histogram[size] for size in sizes]
    if sum(weights) <= 0:
        raise InvalidArgument("a histogram without counts")
    return Random(seed).choices(sizes, weights, k=count)


def merged(*workloads: Iterable[Arrival]) -> Iterator[Arrival]:
    """Several workloads as one, in order of time."""
    return heapq.merge(*workloads, key=lambda arrival: arrival.at)


def trace(lines: Iterable[str], lanes: Mapping[str, LaneKey]) -> Iterator[Arrival]:
    """Requests from comma-separated values with a heading.

    Columns: ``at`` (seconds) and ``owner``; ``rows`` (1) and ``budget_ms`` (none) may be left out.

    Args:
        lines: the text.
        lanes: where the rows of each owner wait.

    Raises:
        InvalidArgument: a column is missing, or a value is not one; says in which line.
    """
    reader = csv.DictReader(lines)
    missing = {"at", "owner"} - set(reader.fieldnames or ())
    if missing:
        raise InvalidArgument(f"a trace needs the column {', '.join(sorted(missing))}")
    for row in reader:
        try:
            budget_ms = row.get("budget_ms") or ""
            yield Arrival(
                float(row["at"]),
                lanes[row["owner"]],
                row["owner"],
                int(row.get("rows") or 1),
                float(budget_ms) / 1000 if budget_ms else inf,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidArgument(f"line {reader.line_num} of the trace: {error!r}") from None
