"""`shardserve buckets`: lengths in several forms, and the same answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from batching.errors import InvalidArgument
from batching.europarl import EUROPARL_LENGTHS
from cluster.bucketing import read_histogram, read_sizes
from cluster.cli import app


def told(text: str, *words: str) -> Any:
    found = CliRunner().invoke(app, ["buckets", "--json", *words], input=text)
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)


def test_europarl_through_the_command_line() -> None:
    found = told(json.dumps({"lengths": EUROPARL_LENGTHS, "n": 32144}), "--count", "8")
    assert found["buckets"] == [16, 24, 32, 41, 53, 71, 106, 257]
    assert found["ladders"]["learned"]["waste"] == pytest.approx(0.156, abs=0.001)
    assert found["ladders"]["powers of two"]["waste"] == pytest.approx(0.295, abs=0.001)


@pytest.mark.parametrize(
    "text", ['{"3": 2, "9": 1}', "[3, 9, 3]", "length,count\n3,2\n9,1\n", "3\n9\n\n3\n", "3,2\n9"]
)
def test_lengths_may_come_in_any_of_these_forms(text: str) -> None:
    assert read_histogram(text) == {3: 2, 9: 1}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "there are no lengths"),
        ("length", "there are no lengths"),
        ("3\nlong\n", "line 2 of the lengths: .*long"),
        ("3\n1,2,3\n", "line 2 of the lengths: more than"),
        ("3\n0\n", "line 2 of the lengths: a length of 0"),
        ("{", "no JSON"),
        ('{"x": 1}', "no JSON"),
        ("[99999999]", "a length of 99999999"),
    ],
)
def test_what_is_no_list_of_lengths_is_refused(text: str, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        read_histogram(text)


def test_a_ladder_in_use_is_kept_unless_a_change_saves_enough() -> None:
    text = json.dumps(EUROPARL_LENGTHS)
    assert told(text, "--current", "16,32,64,128,256,512")["change"] is True
    best = ",".join(map(str, told(text, "--waste", "20%")["buckets"]))
    assert told(text, "--waste", "20%", "--current", best)["change"] is False
    with pytest.raises(InvalidArgument, match="no list of sizes"):
        read_sizes("16;32")


def test_batch_sizes_are_proposed_for_every_unit_with_costs() -> None:
    table = {"flat": {1: 0.002, 8: 0.002, 64: 0.00201}, "steep": {1: 0.001, 8: 0.008, 64: 0.064}}
    found = told(json.dumps(table), "--batch")
    assert found["flat"]["buckets"] == [64]
    assert found["steep"]["buckets"] == [1, 8, 64]


def test_a_table_is_printed_for_people() -> None:
    found = CliRunner().invoke(
        app, ["buckets", "--count", "2"], input="3\n9\n", env={"COLUMNS": "99"}
    )
    assert "powers of two" in found.stdout
    assert "3, 9" in found.stdout


def test_a_share_that_is_none_is_refused() -> None:
    found = CliRunner().invoke(app, ["buckets", "--waste", "much"], input="3\n")
    assert isinstance(found.exception, InvalidArgument)
