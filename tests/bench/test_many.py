"""What ``many`` saves, what its answers tell, and what is made of its books."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from bench import many
from bench.errors import ContenderFailed
from bench.many import Costs, Spell
from bench.many_model import asked, named, read, save
from shards.manifest import MapUnit
from shards.store import LocalStore

COSTS = Costs(
    started_s={"alike": 2.0, "apart": 8.0},
    compiled={"alike": 2.0, "apart": 80.0},
    calls={"list": [1.0, 3.0, 2.0], "state": [1.0], "metrics": [40.0]},
    sizes={"list": 100, "state": 10, "metrics": 1000},
    swaps_s=[0.3, 0.1, 0.2],
    idle=0.01,
)


def test_ratios_are_of_the_rounds_percentiles() -> None:
    spells = [Spell(over_all=[3.0] * 10, over_one=[2.0] * 10)] * 3
    result = many._result(spells, COSTS, {}, 0)
    assert result.ratios == {
        "p50_all_vs_one": pytest.approx(1.5),
        "p99_all_vs_one": pytest.approx(1.5),
        "start_alike_vs_apart": pytest.approx(0.25),
    }
    assert result.figures["list_ms"] == 2.0
    assert result.figures["next_version_s"] == 0.2


def test_a_spell_without_answers_measures_nothing() -> None:
    with pytest.raises(ContenderFailed, match="without a single answer"):
        many._result([Spell(over_all=[], over_one=[1.0])], COSTS, {}, 0)


@pytest.mark.parametrize("number", [0, 7, 199])
def test_an_answer_of_another_servable_is_none(number: int) -> None:
    body = orjson.dumps({"predictions": [[1000.0 * (number + 1) + 3] * 2]})
    assert read(number, body) == (3, 3)
    with pytest.raises(ValueError, match="another servable"):
        read(number + 1, body)
    assert asked("apart", number).read(body) == (3, 3)


def test_the_kinds_differ_in_programs_or_in_weights_alone(tmp_path: Path) -> None:
    units: dict[tuple[str, int], MapUnit] = {}
    for kind in ("alike", "apart"):
        for number in (0, 1):
            save(tmp_path, kind, number, [1])
            manifest = LocalStore(tmp_path).read_manifest(named(kind, number), 1)
            [unit] = manifest.units.values()
            assert isinstance(unit, MapUnit)
            units[kind, number] = unit
    assert units["alike", 0].programs == units["alike", 1].programs
    assert units["alike", 0].params != units["alike", 1].params
    assert units["apart", 0].programs != units["apart", 1].programs
    assert len({unit.id for unit in units.values()}) == 4


def test_states_are_read_from_the_list() -> None:
    versions = [{"version": "2", "state": "LOADING"}, {"version": "1", "state": "AVAILABLE"}]
    body = orjson.dumps({"models": [{"name": "m", "versions": versions}]})
    assert many._listed(body) == {"m": {"LOADING", "AVAILABLE"}}
