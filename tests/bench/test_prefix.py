"""What `bench prefix` makes of its trials, its prediction, and its servables on a device."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching import EffSafe, LaneKey
from batching.workloads import merged, poisson
from bench import prefix
from bench.device_actor import GetUnits, OpenUnit, TimeUnit
from bench.device_scene import device_under_router
from bench.errors import LoadFailed
from bench.largest_load import STEP, Search, load_of, step_of
from bench.open_loop import OpenLoop
from bench.prefix import HALF, MOST, Case, Fit, Found, Trial, fit
from bench.prefix_model import BUCKETS, INPUT, KINDS, OUTPUT, Shapes, answer, names, rows, save
from bench.report import json_line
from bench.two_stages import attainment

# --- the search --------------------------------------------------------------------------------


@given(st.integers(-1, 120), st.integers(-5, 200))
def test_a_search_finds_the_edge_from_wherever_it_begins(edge: int, start: int) -> None:
    search = Search(start)
    tried: list[int] = []
    while (step := search.next) is not None:
        tried.append(step)
        search.tell(good=step <= edge)
    assert search.best == (edge if edge >= 0 else None)
    assert len(tried) == len(set(tried)) <= 15


def test_loads_are_steps_of_equal_ratio() -> None:
    assert load_of(8) / load_of(7) == pytest.approx(STEP)
    assert [step_of(load_of(step)) for step in range(60)] == list(range(60))
    assert step_of(load_of(20) * 1.01) == 21
    assert step_of(0.0) == 0


# --- what is fitted and predicted --------------------------------------------------------------


def test_a_line_is_fitted_through_both_units_together() -> None:
    trunk = {b: 0.0036 + 0.000225 * b for b in (*BUCKETS, 64, 128)}
    head = {b: 0.0004 + 0.000025 * b for b in BUCKETS}
    found = fit([trunk, head])
    assert (found.alpha_s, found.beta_s) == pytest.approx((0.004, 0.00025))
    assert found.objective_s == pytest.approx(0.05)
    with pytest.raises(LoadFailed, match="no such device"):
        fit([{b: 0.002 - 0.00001 * b for b in BUCKETS}])


def in_time(count: int, load: float, *, shared: bool, part: float) -> float:
    """Attainment at 4 + b/4 ms and 50 ms, with a trunk of this part of the cost."""
    sizes = [2**place for place in range(7)]
    more = [128, 256] if shared else []
    costs: dict[LaneKey, dict[int, float]] = {}
    heads, arrivals = {}, []
    for number, name in enumerate(names("it", count)):
        entry = LaneKey("trunk" if shared else f"trunk-{number}")
        heads[name] = LaneKey(f"head-{number}")
        costs[entry] = {b: part * (4 + b / 4) / 1e3 for b in (*sizes, *more)}
        costs[heads[name]] = {b: (1 - part) * (4 + b / 4) / 1e3 for b in sizes}
        arrivals.append(poisson(entry, name, load / count, 1.5, budget_s=0.05, seed=number))
    every = list(merged(*arrivals))
    return attainment(EffSafe(), costs, heads, every, hop_s=0.0005, lead_s=0.002)


def test_in_virtual_time_a_shared_trunk_serves_what_trunks_apart_cannot() -> None:
    assert in_time(8, 1400, shared=True, part=0.9) > 0.99
    assert in_time(8, 700, shared=False, part=0.9) < 0.98
    assert in_time(8, 100, shared=False, part=0.9) > 0.99


def test_in_virtual_time_half_a_trunk_of_two_is_worth_nothing() -> None:
    assert (in_time(2, 1800, shared=True, part=0.5) > 0.99) == (
        in_time(2, 1800, shared=False, part=0.5) > 0.99
    )
    assert in_time(2, 3000, shared=True, part=0.5) < 0.9


# --- what is told ------------------------------------------------------------------------------


def test_ratios_are_what_is_shared_over_each_other_kind_within_rounds() -> None:
    found = [
        Found(
            Case(4, MOST, KINDS),
            Fit(0.002, 0.0002),
            {"shared": 900.0, "apart": 400.0},
            {"shared": [200.0, 300.0, 400.0], "apart": [100.0] * 3, "whole": [200.0] * 3},
            1.0,
            128,
        ),
        Found(
            Case(4, HALF, ("shared", "apart")), Fit(0.002, 0.0002), {},
            {"shared": [90.0], "apart": [100.0]}, 1.0, 128,
        ),
    ]  # fmt: skip
    trials = [Trial("k4", "shared", 0, 200.0, 0.995, 0.001)]
    result = prefix._result(found, trials, seed=0)
    assert result.ratios == {
        "throughput_k4": 3.0,
        "throughput_k4_vs_whole": 1.5,
        "throughput_k4_half": 0.9,
        "weight_copies": 1.0,
    }
    told = json.loads(json_line(result))
    assert told["figures"]["predicted_k4_shared"] == 900
    assert told["figures"]["objective_ms_k4"] == 25
    assert len(result.tables[0].rows) == 5
    assert result.plot is not None
    assert [line.x for line in result.plot.series] == [(4.0,)] * 3


def test_trunks_are_the_part_of_the_weights_that_is_said() -> None:
    assert MOST.fraction == pytest.approx(0.9, abs=0.01)
    assert HALF.fraction == pytest.approx(0.5, abs=0.02)
    assert MOST.trunk_bytes >= 32 << 20


# --- on a device -------------------------------------------------------------------------------


@pytest.mark.timeout(150)
def test_servables_that_share_a_trunk_answer_right_and_hold_it_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        models = list(save(tmp_path / "store", 2, Shapes(0, 0), ("shared",), seed=1))
        async with device_under_router(tmp_path, [name for name, _, _ in models]) as (
            control, router, _,
        ):  # fmt: skip
            load = OpenLoop(router, [{INPUT: row[None]} for row in rows(8, 0)])
            for name, trunk, head in models:
                found = (await load.ask(name, {INPUT: rows(3, 0)[:1]}))[OUTPUT]
                np.testing.assert_allclose(found, answer(trunk, head, rows(3, 0)[:1]), atol=1e-4)
            units = control.tell(GetUnits(), list[OpenUnit])
            [trunk_unit] = [unit for unit in units if len(unit.users) == 2]
            assert trunk_unit.users == ("shared-0:1", "shared-1:1")
            assert max(trunk_unit.costs) == 2 * max(BUCKETS)
            assert len(units) == 1 + 2
            timed = control.tell(TimeUnit(trunk_unit.id, 2), dict[int, float])
            assert timed.keys() == trunk_unit.costs.keys()
            assert all(seconds > 0 for seconds in timed.values())
            arrivals = [
                each._replace(owner=name)
                for name in names("shared", 2)
                for each in poisson(LaneKey(""), name, 40, 0.4, budget_s=5.0)
            ]
            outcome = await load.offer(sorted(arrivals), warm_s=0.0)
            assert outcome.attainment == 1.0

    asyncio.run(scenario())
