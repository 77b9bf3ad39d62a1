"""Requests for simulation and benches: when they come, for whom, of how many rows and what length.

All are drawn from a seed, and none knows what serves it. Inter-arrival times are exponential (a
Poisson process) or gamma distributed with a coefficient of variation above one, which is what
bursts of real traffic look like (AlpaServe and Clockwork use 1 to 8). Rates may change with time:
then the same draw is made in a time that runs faster while the rate is higher.
"""

from __future__ import annotations

import csv
import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from math import inf
from random import Random
from typing import Final, TypeAlias

from batching.allowance import DEFAULT, criticality_named
from batching.errors import InvalidArgument
from batching.outcomes import Arrival
from batching.values import LaneKey

__all__ = [
    "LaneOf",
    "Schedule",
    "bursting",
    "gamma",
    "maf_style",
    "merged",
    "paced",
    "poisson",
    "power_law",
    "sampled",
    "switching",
    "trace",
    "with_criticalities",
    "with_lengths",
]

#: Consecutive spans of time: (seconds, requests a second).
Schedule: TypeAlias = Sequence[tuple[float, float]]
#: Where rows of an owner wait, by their length; 0 where lengths are of no interest.
LaneOf: TypeAlias = Callable[[str, int], LaneKey]

#: What the columns of a trace are called here, and in traces that others publish.
_COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {
    "at": ("at", "time", "TIMESTAMP"),
    "owner": ("owner", "model"),
    "rows": ("rows",),
    "length": ("length", "ContextTokens"),
    "budget_ms": ("budget_ms", "deadline_ms"),
    "criticality": ("criticality",),
}
#: Of traces that name no model.
_OWNER: Final = "model-0"


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
    return paced(lane, owner, [(seconds, rate)], cv=cv, budget_s=budget_s, rows=rows, seed=seed)


def paced(
    lane: LaneKey,
    owner: str,
    schedule: Schedule,
    *,
    cv: float = 1.0,
    budget_s: float = inf,
    rows: int = 1,
    seed: int = 0,
) -> Iterator[Arrival]:
    """Requests whose rate changes with time: steps, floods, quiet hours.

    Args:
        lane: where they wait.
        owner: whose they are.
        schedule: rates, one after the other; 0 for none.
        cv: coefficient of variation of the time between two, if the rate stood still.
        budget_s: seconds until each one's deadline.
        rows: of each.
        seed: of the draw; two owners of one seed draw differently.

    Raises:
        InvalidArgument: a rate is negative, or a time or the coefficient is not positive.
    """
    if not cv > 0 or not all(seconds > 0 and rate >= 0 for seconds, rate in schedule):
        raise InvalidArgument(f"cv {cv} and the times of a schedule must be positive: {schedule}")
    random = Random(f"{seed} {owner}")
    shape = 1.0 / cv**2
    scale = 1.0 / shape
    # How many requests of mean distance the next one is away.
    ahead = random.gammavariate(shape, scale)
    begin = 0.0
    for seconds, rate in schedule:
        at = begin
        end = begin + seconds
        while rate > 0 and at + ahead / rate < end:
            at += ahead / rate
            yield Arrival(at, lane, owner, rows, budget_s)
            ahead = random.gammavariate(shape, scale)
        ahead -= (end - at) * rate
        begin = end


def switching(rates: Sequence[float], dwell_s: float, seconds: float, *, seed: int = 0) -> Schedule:
    """A rate that jumps among several, staying an exponential time at each (MMPP, with Poisson).

    Raises:
        InvalidArgument: there are no rates, or a time is not positive.
    """
    if not rates or not (dwell_s > 0 and seconds > 0):
        raise InvalidArgument(f"rates {rates}, dwell {dwell_s} s, for {seconds} s")
    random = Random(f"{seed} switching")
    schedule: list[tuple[float, float]] = []
    left, rate = seconds, random.choice(rates)
    while left > 0:
        stay = min(random.expovariate(1.0 / dwell_s), left)
        if stay > 0:
            schedule.append((stay, rate))
        left -= stay
        rate = random.choice([other for other in rates if other != rate] or rates)
    return schedule


def bursting(rate: float, seconds: float, *, at: float, factor: float, length_s: float) -> Schedule:
    """A steady rate with one flood of so many times as much.

    Raises:
        InvalidArgument: the flood is not within the time.
    """
    if not (at >= 0 and length_s > 0 and at + length_s <= seconds):
        raise InvalidArgument(f"a flood of {length_s} s at {at} s is not within {seconds} s")
    spans = [(at, rate), (length_s, rate * factor), (seconds - at - length_s, rate)]
    return [span for span in spans if span[0] > 0]


def maf_style(
    lanes: Mapping[str, LaneKey],
    total: float,
    seconds: float,
    *,
    exponent: float = 1.0,
    cv: float = 4.0,
    interval_s: float = 10.0,
    swing: float = 0.5,
    budget_s: float = inf,
    seed: int = 0,
) -> Iterator[Arrival]:
    """Synthetic requests in the style of traces of serverless functions; not such a trace.

    Rates of servables follow a power law, change from interval to interval, and requests come in
    bursts within it, as AlpaServe models the Azure function traces.

    Args:
        lanes: where each owner's rows wait, the most popular first.
        total: mean requests a second of all together.
        seconds: how long.
        exponent: of the power law.
        cv: coefficient of variation of the time between two requests of an owner.
        interval_s: how long a rate lasts.
        swing: coefficient of variation of an owner's rate over intervals.
        budget_s: seconds until each one's deadline.
        seed: of the draw.

    Raises:
        InvalidArgument: a number that means nothing.
    """
    if not (seconds > 0 and interval_s > 0 and swing > 0):
        raise InvalidArgument(f"{seconds} s in intervals of {interval_s} s, swing {swing}")
    rates = power_law(total, len(lanes), exponent)
    loads = []
    for (owner, lane), rate in zip(lanes.items(), rates, strict=True):
        random = Random(f"{seed} {owner} intervals")
        schedule: list[tuple[float, float]] = []
        left = seconds
        while left > 0:
            factor = random.gammavariate(swing**-2, swing**2)
            schedule.append((min(interval_s, left), rate * factor))
            left -= interval_s
        loads.append(paced(lane, owner, schedule, cv=cv, budget_s=budget_s, seed=seed))
    return merged(*loads)


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


def with_lengths(
    arrivals: Iterable[Arrival], lane_of: LaneOf, histogram: Mapping[int, int], *, seed: int = 0
) -> Iterator[Arrival]:
    """The same requests, each of a length drawn from a histogram and in the lane of that length.

    Raises:
        InvalidArgument: nothing was counted.
    """
    sizes = sorted(histogram)
    summed: list[int] = []
    for size in sizes:
        summed.append(histogram[size] + (summed[-1] if summed else 0))
    if not sizes or summed[-1] <= 0:
        raise InvalidArgument("a histogram without counts")
    random = Random(f"{seed} lengths")
    for arrival in arrivals:
        [length] = random.choices(sizes, cum_weights=summed)
        yield arrival._replace(lane=lane_of(arrival.owner, length))


def with_criticalities(
    arrivals: Iterable[Arrival], shares: Mapping[str, float], *, seed: int = 0
) -> Iterator[Arrival]:
    """The same requests, of which these shares have another criticality than they had.

    Args:
        arrivals: requests.
        shares: of the requests, by name of the criticality.
        seed: of the draw.

    Raises:
        InvalidArgument: there is no such criticality, a share is negative, or all are more than 1.
    """
    named = {criticality_named(name): share for name, share in shares.items()}
    if not all(share >= 0 for share in named.values()) or sum(named.values()) > 1 + 1e-9:
        raise InvalidArgument(f"shares are not negative, and 1 at most together: {dict(shares)}")
    random = Random(f"{seed} criticalities")
    for arrival in arrivals:
        drawn = random.random()
        for priority, share in named.items():
            drawn -= share
            if drawn < 0:
                yield arrival._replace(priority=priority)
                break
        else:
            yield arrival


def merged(*workloads: Iterable[Arrival]) -> Iterator[Arrival]:
    """Several workloads as one, in order of time."""
    return heapq.merge(*workloads, key=lambda arrival: arrival.at)


def trace(lines: Iterable[str], lane_of: LaneOf, *, budget_s: float = inf) -> Iterator[Arrival]:
    """Requests from comma-separated values with a heading.

    Columns: ``at`` in seconds (or ``time``, or ``TIMESTAMP`` as a date and time, from whose first
    the others count), ``owner`` (or ``model``), ``rows`` (1), ``length`` (or ``ContextTokens``, as
    in the Azure LLM inference traces), ``budget_ms`` (or ``deadline_ms``) and ``criticality`` by
    name. Only the first is needed.

    Args:
        lines: the text.
        lane_of: where rows of an owner and length wait; raises KeyError or InvalidArgument for what
            is not served.
        budget_s: of requests that have none.

    Raises:
        InvalidArgument: a column is missing, or a value is not one; says in which line.
    """
    reader = csv.DictReader(lines)
    names = {
        column: next((name for name in known if name in (reader.fieldnames or ())), "")
        for column, known in _COLUMNS.items()
    }
    if not names["at"]:
        raise InvalidArgument(f"a trace needs one of the columns {', '.join(_COLUMNS['at'])}")
    first: datetime | None = None
    for row in reader:
        try:
            if names["at"] == "TIMESTAMP":
                when = datetime.fromisoformat(row["TIMESTAMP"].strip())
                first = when if first is None else first
                at = (when - first).total_seconds()
            else:
                at = float(row[names["at"]])
            owner = row[names["owner"]] if names["owner"] else _OWNER
            budget_ms = (row.get(names["budget_ms"]) or "").strip()
            criticality = (row.get(names["criticality"]) or "").strip()
            yield Arrival(
                at,
                lane_of(owner, int(row.get(names["length"]) or 0)),
                owner,
                int(row.get(names["rows"]) or 1),
                float(budget_ms) / 1000 if budget_ms else budget_s,
                priority=criticality_named(criticality) if criticality else DEFAULT,
            )
        except (AttributeError, InvalidArgument, KeyError, TypeError, ValueError) as error:
            raise InvalidArgument(f"line {reader.line_num} of the trace: {error!r}") from None
