"""``shardserve buckets``: counts of lengths or measured costs in, a ladder worth compiling out.

Reads what people have (JSON, comma-separated values, a length a line) and tells what
`batching.learning` makes of it, beside what the usual ladders would cost. Decides nothing itself.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from batching import Ladder
from batching.errors import InvalidArgument
from batching.learning import (
    advise,
    fixed_width,
    learn_batch_buckets,
    learn_buckets,
    powers_of_two,
    slowdown_of,
    waste_of,
)

__all__ = ["compare_batches", "compare_lengths", "read_histogram", "read_sizes"]

#: Beyond this a length is a mistake, and the search would take minutes.
_LENGTH_MAX: Final = 1 << 20


def read_histogram(text: str) -> dict[int, int]:
    """How often each length occurs.

    Args:
        text: a JSON object of counts by length (or one that holds such an object), a JSON list of
            lengths, ``length,count`` lines with or without a heading, or a length a line.

    Raises:
        InvalidArgument: it is none of these; says where.
    """
    stripped = text.strip()
    if stripped[:1] in ("{", "["):
        try:
            return _from_json(json.loads(stripped))
        except ValueError as error:
            raise InvalidArgument(f"the lengths are no JSON: {error}") from None
    found: Counter[int] = Counter()
    for number, row in enumerate(csv.reader(stripped.splitlines()), start=1):
        cells = [cell.strip() for cell in row if cell.strip()]
        if not cells:
            continue
        try:
            if len(cells) > 2:
                raise ValueError("more than a length and a count")
            found[_length(cells[0])] += int(cells[1]) if len(cells) == 2 else 1
        except ValueError as error:
            if number > 1:
                raise InvalidArgument(f"line {number} of the lengths: {error}") from None
    if not found:
        raise InvalidArgument("there are no lengths")
    return dict(found)


def _from_json(value: Any) -> dict[int, int]:
    if isinstance(value, list):
        return dict(Counter(_length(each) for each in value))
    inner = [each for each in value.values() if isinstance(each, dict)]
    if len(inner) == 1:
        value = inner[0]
    return {_length(length): int(times) for length, times in value.items()}


def _length(value: Any) -> int:
    length = int(value)
    if not 1 <= length <= _LENGTH_MAX:
        raise ValueError(f"a length of {length}: from 1 to {_LENGTH_MAX}")
    return length


def read_sizes(text: str) -> Ladder | None:
    """A ladder from ``16,32,64``; None from nothing.

    Raises:
        InvalidArgument: these are no ascending sizes.
    """
    if not text:
        return None
    try:
        return Ladder(int(size) for size in text.split(","))
    except ValueError:
        raise InvalidArgument(f"{text!r} is no list of sizes such as 16,32,64") from None


def compare_lengths(
    histogram: Mapping[int, int],
    *,
    count: int | None,
    waste: float | None,
    current: Ladder | None,
) -> dict[str, Any]:
    """The best ladder for these lengths, and what others waste, as plain data.

    Raises:
        InvalidArgument: see `batching.learning.learn_buckets`.
    """
    largest = current.largest if current is not None else None
    ladder = learn_buckets(histogram, count=count, waste=waste, largest=largest)
    top = ladder.largest
    others = {
        "powers of two": powers_of_two(top),
        "fixed width": fixed_width(-(-top // len(ladder.sizes)), top),
    }
    found = {"learned": ladder, **others, **({"current": current} if current else {})}
    told: dict[str, Any] = {
        "buckets": list(ladder.sizes),
        "ladders": {
            name: {"buckets": list(each.sizes), "waste": round(waste_of(histogram, each), 4)}
            for name, each in found.items()
        },
    }
    if current is not None:
        advice = advise(histogram, current, count=len(ladder.sizes))
        told["saving"] = round(advice.saving, 4)
        told["change"] = advice.is_worth_it
    return told


def compare_batches(
    costs: Mapping[int, float], *, within: float, current: Ladder | None
) -> dict[str, Any]:
    """The batch sizes that pay at these costs, and what others cost, as plain data.

    Args:
        costs: mean seconds of a batch by size.
        within: how much longer than with all sizes a batch may take on average.
        current: sizes in use.

    Raises:
        InvalidArgument: see `batching.learning.learn_batch_buckets`.
    """
    ladder = learn_batch_buckets(costs, within=within)
    every = Ladder(sorted(costs))
    found = {"learned": ladder, "all": every, **({"current": current} if current else {})}
    return {
        "buckets": list(ladder.sizes),
        "ladders": {
            name: {"buckets": list(each.sizes), "slower": round(slowdown_of(each, costs), 4)}
            for name, each in found.items()
        },
    }
