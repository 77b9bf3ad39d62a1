"""What comes and goes leaves nothing: a few cycles of a real process, and how ends are compared."""

from __future__ import annotations

from typing import Any

import pytest

from bench.cycles import GROWTH_MAX, Cycles, Footprint, Model, run_cycles
from bench.errors import LoadFailed


def footprint(**changes: Any) -> Footprint:
    figures: dict[str, Any] = {
        "pss_bytes": 100, "children_pss_bytes": 0, "books_bytes": 0, "handles": 16, "sockets": 2,
        "blobs": 0, "threads": 24, "mappings": 500, "executables": 0, "arrays": 0, "load_s": 0.1,
    }  # fmt: skip
    return Footprint(**(figures | changes))


def test_unloading_gives_back_memory_handles_threads_and_programs() -> None:
    found = run_cycles(
        8,
        Model(parameter_bytes=2 << 20, table_bytes=2 << 20, buckets=(1, 8)),
        keep_executables=True,
        timeout_s=120.0,
    )
    assert found.leaks == {}
    assert found.pss_growth <= GROWTH_MAX
    assert len(found.footprints) == 9
    for each in found.footprints:
        assert (each.books_bytes, each.blobs, each.executables, each.arrays) == (0, 0, 0, 0)


def test_a_process_that_cannot_load_is_told_of() -> None:
    with pytest.raises(LoadFailed, match=r"took more than 0\.1 s"):
        run_cycles(6, Model(parameter_bytes=0, table_bytes=0, buckets=(1,)), timeout_s=0.1)


def test_a_handle_a_cycle_is_a_leak_and_one_that_is_open_for_a_moment_is_none() -> None:
    leaking = Cycles(tuple(footprint(handles=16 + number) for number in range(11)))
    assert leaking.leaks == {"handles": 8 - 3}
    passing = Cycles(tuple(footprint(sockets=2 + number % 2) for number in range(11)))
    assert passing.leaks == {}


def test_a_thread_in_every_cycle_is_a_leak() -> None:
    found = Cycles(tuple(footprint(threads=24 + number) for number in range(11)))
    assert found.leaks == {"threads": 5}


def test_a_pool_that_fills_up_in_the_first_cycles_is_no_leak() -> None:
    threads = (10, 24, 25, 26, 27, *[28] * 6)
    assert Cycles(tuple(footprint(threads=each) for each in threads)).leaks == {}


def test_memory_is_that_of_the_process_and_its_children_from_the_first_cycle_on() -> None:
    sizes = [(50, 0), (100, 100), (101, 99), (100, 110), *[(110, 110)] * 8]
    found = Cycles(tuple(footprint(pss_bytes=a, children_pss_bytes=b) for a, b in sizes))
    assert found.pss_growth == pytest.approx(0.1)
