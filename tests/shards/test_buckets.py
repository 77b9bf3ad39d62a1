"""What is compiled is what is served: one rounding up, asked by both."""

from __future__ import annotations

import ast
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from batching import LaneKey, bucketize
from shards.hosted import Hosted
from shards.programs import buckets_of
from shards.specs import Spec
from tests.shards.serving import map_unit

ROOT = Path(__file__).resolve().parents[2]
sizes = st.sets(st.integers(1, 12), min_size=1, max_size=3).map(lambda found: tuple(sorted(found)))


@given(sizes, st.dictionaries(st.sampled_from("stu"), sizes, max_size=3), st.data())
@settings(derandomize=True, max_examples=60)
def test_whatever_a_request_is_rounded_up_to_was_compiled(
    batches: tuple[int, ...], lengths: dict[str, tuple[int, ...]], data: st.DataObject
) -> None:
    shape: tuple[str | int, ...] = ("b", *lengths, 2)
    unit = map_unit(inputs={"x": Spec(shape)}, batch_buckets=batches, length_buckets=lengths)
    hosted = Hosted(unit, {})
    compiled = {
        (batch, tuple(found[symbol] for symbol in sorted(found)))
        for batch, found in buckets_of(unit)
    }
    asked = {symbol: data.draw(st.integers(1, ladder[-1])) for symbol, ladder in lengths.items()}
    lane = bucketize(asked, hosted.ladders)
    assert all((batch, lane) in compiled for batch in batches)
    assert compiled == set(hosted.layouts)
    assert {LaneKey(unit.id, found) for _, found in compiled} == set(hosted.lanes)


def test_nothing_else_rounds_a_size_up() -> None:
    """Only `batching/buckets.py` defines it; no other file of the packages looks a bucket up."""
    defining, searching = [], []
    for room in ("batching", "shards", "cluster"):
        for file in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.FunctionDef) and node.name in ("bucketize", "bucket_of"):
                    defining.append(file.name)
                if (
                    isinstance(node, ast.Call)
                    and ast.unparse(node.func).startswith("bisect")
                    and "sizes" in ast.unparse(node.args[0])
                ):
                    searching.append(file.name)
    assert set(defining) == {"buckets.py"}
    assert set(searching) == {"buckets.py"}
