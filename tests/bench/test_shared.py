"""What ``shared`` saves, what its answers tell, and how copies and processes are counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import orjson
import pytest

from bench import shared, shared_model
from bench.shared import Held, Round, copies_of, descendants
from bench.shared_model import TRUNK_BYTES, read, save
from bench.traffic import Attempt, Span
from shards.store import LocalStore

_MIB = 1 << 20


def held(pss: float, *, mapped: int = TRUNK_BYTES, own: int = 0, trunks: int = 1) -> Held:
    return Held(pss_mib={"device-0": pss / 2, "router": pss / 2}, mapped=mapped, own=own,
                trunks=trunks)  # fmt: skip


def a_round(one: Held, all_: Held, *, kind: str = "shared", failed: int = 0) -> Round:
    return Round(
        kind=kind,
        held={"one": one, "all": all_, "left": one},
        loads_s=[2.0, 0.5, 0.7],
        attempts=[
            Attempt("shared-0", 1.0, 0.01, 200, (1,)),
            Attempt("shared-7", 5.0, 0.02, 200, (1,)),
        ],
        failed=failed,
        quiet=Span(0.0, 3.0),
        unloading=Span(4.0, 6.0),
    )


def test_memory_of_all_is_held_against_that_of_one_round_by_round() -> None:
    rounds = [a_round(held(100.0), held(pss)) for pss in (104.0, 110.0, 106.0)]
    result = shared._result(rounds, {"servables": 8}, 0)
    assert result.ratios == {
        "pss_k8_vs_one": pytest.approx(1.06),
        "device_weight_copies": 1.0,
        "failed_requests": 0.0,
    }
    assert result.figures["pss_worst_vs_one"] == pytest.approx(1.1)
    assert result.figures["later_load_s"] == pytest.approx(0.6)
    assert result.figures["unloading_p99_ms"] == pytest.approx(20.0)


def test_the_worst_round_counts_for_copies_and_every_failure_counts() -> None:
    twice = held(200.0, trunks=2)
    rounds = [a_round(held(100.0), held(100.0)), a_round(held(100.0), twice, failed=3)]
    result = shared._result(rounds, {"servables": 8}, 0)
    assert result.ratios["device_weight_copies"] == 2.0
    assert result.ratios["failed_requests"] == 3.0


def test_servables_apart_are_figures_and_no_mark() -> None:
    apart = a_round(held(100.0), held(700.0, mapped=8 * TRUNK_BYTES, trunks=8), kind="apart")
    result = shared._result([a_round(held(100.0), held(104.0)), apart], {"servables": 8}, 0)
    assert result.ratios["device_weight_copies"] == 1.0
    assert result.figures["copies_apart"] == 8
    assert result.figures["pss_apart_vs_one"] == pytest.approx(7.0)


@pytest.mark.parametrize(
    ("mapped", "grown", "trunks", "copies"),
    [
        (TRUNK_BYTES, 0, 1, 1),
        (TRUNK_BYTES + 8 * _MIB, 20 * _MIB, 1, 1),
        (TRUNK_BYTES, 0, 3, 3),
        (8 * TRUNK_BYTES, 0, 1, 8),
        (TRUNK_BYTES, TRUNK_BYTES, 1, 2),
    ],
)
def test_copies_are_what_is_said_or_what_memory_tells(
    mapped: int, grown: int, trunks: int, copies: int
) -> None:
    one = held(1.0, own=5 * _MIB)
    assert copies_of(one, held(1.0, mapped=mapped, own=5 * _MIB + grown, trunks=trunks)) == copies


def test_descendants_are_found_through_every_generation() -> None:
    parents = {1: 0, 10: 1, 11: 10, 12: 11, 20: 1}
    assert descendants([10], parents) == {10, 11, 12}
    assert descendants([20], parents) == {20}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_model, "_TRUNK", (64, 32, 64))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("kind", "trunks"), [("shared", 1), ("apart", 2)])
def test_trunks_are_the_same_unit_only_where_they_are_shared(
    kind: str, trunks: int, tmp_path: Path
) -> None:
    asked = list(save(tmp_path, kind, 2, seed=1))
    store = LocalStore(tmp_path)
    units = [store.read_manifest(each.owner, 1).units for each in asked]
    assert len({each["trunk"].id for each in units}) == trunks
    assert len({each["head"].id for each in units}) == 2


def test_only_its_own_answer_is_one() -> None:
    expected = np.linspace(-1, 1, 8, dtype=np.float32)
    body = orjson.dumps({"predictions": [expected.tolist()]})
    assert read(expected, body) == (1,)
    with pytest.raises(ValueError, match="another servable"):
        read(expected + np.float32(0.01), body)
    for broken in (b"", b"{}", b'{"predictions": [["a"]]}', b'{"predictions": [[1.0]]}'):
        with pytest.raises(ValueError, match="answer"):
            read(expected, broken)
