"""What the bench of look-ups makes of its rounds, and that rows go the way that it names."""

from __future__ import annotations

import argparse
import json

import pytest

from bench import look_ups
from bench.look_ups import IDS, LINKS, WAYS, Case
from bench.registry import Options
from bench.report import json_line


def outcomes(straight: float) -> dict[tuple[str, str, int], list[Case]]:
    """Rounds in which the straight way takes so much of what the other takes."""
    return {
        (links, way, count): [
            Case(*(each * (straight if way == "straight" else 1.0) for each in (100, 50, 8, 20)))
            for _ in range(3)
        ]
        for links in LINKS
        for way in WAYS
        for count in IDS
    }


def test_ratios_are_the_straight_way_over_the_routers() -> None:
    result = look_ups._result(outcomes(0.5), {"quick": True}, seed=0)
    assert set(result.ratios.values()) == {0.5}
    assert result.figures["node_router_256_p50_us"] == 100
    assert result.figures["tcp_straight_64_bytes"] == 4
    told = json.loads(json_line(result))
    assert told["figures"]["intervals"]["ratio_node_16_rate"] == [0.5, 0.5]
    assert [len(table.rows) for table in result.tables] == [len(IDS)] * 2
    assert len(result.samples["rounds"].rows) == 3 * len(LINKS) * len(WAYS) * len(IDS)


@pytest.mark.timeout(150)
def test_rows_go_the_way_that_is_measured_between_real_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bench itself checks every sum, and that rows went as they should."""
    monkeypatch.setattr(look_ups, "IDS", (256,))
    monkeypatch.setattr(look_ups, "LINKS", {"tcp": LINKS["tcp"]})
    monkeypatch.setattr(look_ups, "_TABLE_ROWS", 4000)
    options = Options(quick=True, rounds=1, own=argparse.Namespace())
    result = look_ups.BENCH.run(options)
    assert set(result.ratios) == {
        f"tcp_256_{name}" for name in ("p50_us", "rate", "bytes", "router_us")
    }
    assert result.ratios["tcp_256_bytes"] < 0.2, "the rows passed the router"
