"""Both load tools against a server that does what the test says."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.errors import LoadFailed, ToolMissing
from bench.load import (
    Outcome,
    Request,
    closed_loop,
    open_loop,
    own_closed_loop,
    parse_wrk,
    poisson_arrivals,
    run_wrk,
    tool,
)
from bench.stats import Histogram
from tests.bench.fakes import TinyServer

needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")

_A = Request(path="/a", body=b"first")
_B = Request(path="/b'\\ü", body=b"sec'\nond\0")


def _ascii(request: Request) -> Request:
    """The request with a path that HTTP allows."""
    return Request(path=request.path.replace("ü", "u"), body=request.body)


def test_closed_loop_answers_are_what_the_server_saw() -> None:
    server = TinyServer()
    with server.running() as url:
        outcome = own_closed_loop(url, [_A], connections=3, duration_s=0.2)
    assert outcome.answered == outcome.latency_us.total > 0
    # At the end each connection may have one under way, which counts for nothing.
    assert outcome.answered <= len(server.bodies) <= outcome.answered + 3
    assert outcome.failed == 0
    # The timers of event loops have millisecond steps.
    assert 0.19 <= outcome.elapsed_s < 5
    assert outcome.rate == outcome.answered / outcome.elapsed_s
    assert server.connections == 3
    assert set(server.bodies) == {b"first"}


def test_closed_loop_sends_requests_in_turn() -> None:
    server = TinyServer()
    with server.running() as url:
        own_closed_loop(url, [_A, _ascii(_B)], connections=1, duration_s=0.1)
    assert server.bodies[:4] == [_A.body, _B.body, _A.body, _B.body]
    assert server.paths[:2] == [b"/a", b"/b'\\u"]


def test_bad_status_is_an_error_and_no_latency() -> None:
    with TinyServer(status=503).running() as url:
        outcome = own_closed_loop(url, [_A], connections=1, duration_s=0.1)
    assert outcome.answered == outcome.latency_us.total == 0
    assert outcome.errors["status"] == outcome.failed > 0
    with pytest.raises(LoadFailed, match="503 test: 0 answered well; errors: status"):
        outcome.must_be_clean("503 test")


def test_answer_that_fails_its_check_is_wrong() -> None:
    right = {0: b"tsrif", 1: b"not this"}
    with TinyServer().running() as url:
        outcome = own_closed_loop(
            url,
            [_A, _ascii(_B)],
            connections=1,
            duration_s=0.1,
            check=lambda index, body: body == right[index],
        )
    assert outcome.answered > 0
    assert abs(outcome.errors["wrong"] - outcome.answered) <= 1


def test_connection_that_the_server_drops_is_counted_and_replaced() -> None:
    server = TinyServer(hang_up_on=2)
    with server.running() as url:
        outcome = own_closed_loop(url, [_A], connections=1, duration_s=0.3)
    assert outcome.errors["read"] == outcome.failed == 1
    assert outcome.answered > 2
    assert server.connections == 2


def test_connection_that_the_server_ends_politely_is_no_error() -> None:
    server = TinyServer(close=True)
    with server.running() as url:
        outcome = own_closed_loop(url, [_A], connections=1, duration_s=0.2)
    assert outcome.failed == 0
    assert outcome.answered > 1
    assert server.connections >= outcome.answered


def test_silence_times_out_and_the_load_goes_on() -> None:
    server = TinyServer(silent_on=1)
    with server.running() as url:
        outcome = own_closed_loop(url, [_A], connections=1, duration_s=0.6, timeout_s=0.1)
    assert outcome.errors["timeout"] == outcome.failed >= 1, "more where the machine is busy"
    assert outcome.answered > 1


def test_nobody_listening_is_refused() -> None:
    with TinyServer().running() as url:
        pass
    with pytest.raises(LoadFailed, match="cannot connect"):
        own_closed_loop(url, [_A], connections=1, duration_s=0.1)


def test_open_loop_sends_each_arrival_once() -> None:
    server = TinyServer()
    arrivals = poisson_arrivals(2000, 0.2, seed=5)
    with server.running() as url:
        outcome = open_loop(url, [_A], arrivals_s=arrivals, connections=4)
    assert outcome.answered == len(server.bodies) == arrivals.size
    assert outcome.failed == 0
    assert outcome.lag_us is not None
    assert 0 < outcome.lag_us.total <= arrivals.size
    assert outcome.elapsed_s >= arrivals[-1] - 0.005  # the pacer may be a tick early


def test_open_loop_charges_a_stall_to_all_who_waited() -> None:
    """One connection, whose first answer takes 0.3 s: who came meanwhile waited, too."""
    arrivals = np.array([0.0, 0.05, 0.1, 0.2])
    with TinyServer(stall_first_s=0.3).running() as url:
        outcome = open_loop(url, [_A], arrivals_s=arrivals, connections=1)
    waited_s = sorted(np.repeat(outcome.latency_us.values, outcome.latency_us.counts) / 1e6)
    assert len(waited_s) == 4
    assert all(
        waited >= least for waited, least in zip(waited_s, [0.1, 0.2, 0.25, 0.3], strict=True)
    )


def test_open_loop_gives_up_who_waits_for_a_connection_too_long() -> None:
    arrivals = np.array([0.0, 0.01, 0.02])
    with TinyServer(stall_first_s=30.0).running() as url:
        outcome = open_loop(url, [_A], arrivals_s=arrivals, connections=1, timeout_s=0.2)
    # The first is given up on its connection; the others while queued, or once a new one is made.
    assert outcome.errors["timeout"] + outcome.answered == 3
    assert outcome.errors["timeout"] >= 1


@pytest.mark.parametrize("arrivals", [[], [0.2, 0.1], [-0.1, 0.2]])
def test_open_loop_refuses_instants_out_of_order(arrivals: list[float]) -> None:
    with pytest.raises(ValueError, match="ascend"):
        open_loop("http://127.0.0.1:1", [_A], arrivals_s=np.array(arrivals), connections=1)


def test_poisson_arrivals_have_the_rate_and_the_scatter_of_a_poisson_process() -> None:
    arrivals = poisson_arrivals(500, 20, seed=1)
    assert np.array_equal(arrivals, poisson_arrivals(500, 20, seed=1))
    gaps = np.diff(arrivals)
    assert np.all(gaps >= 0)
    assert 0 <= arrivals[0] <= arrivals[-1] < 20
    assert gaps.mean() == pytest.approx(1 / 500, rel=0.05)
    # Exponential gaps scatter as much as they are long.
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.05)


def _wrk_text(latencies: dict[int, int], *, spent_us: int, errors: str = "0 0 0 0 0") -> str:
    """What our script prints of samples; the total includes the late answers in the errors."""
    total = sum(latencies.values()) + int(errors.split()[3])
    lines = [f"shardserve-wrk-latency {value} {n}" for value, n in sorted(latencies.items())]
    return "\n".join(["Running 1s test @ x", f"shardserve-wrk {total} {spent_us} {errors}", *lines])


def _as_wrk_corrects(latencies: dict[int, int], interval: int) -> dict[int, int]:
    """wrk's `stats_correct`, as a loop over samples."""
    corrected = Counter(latencies)
    for value, count in latencies.items():
        if value >= 2 * interval:
            for added in range(value - interval, interval, -interval):
                corrected[added] += count
    return dict(corrected)


def test_parse_wrk_reads_every_latency_and_every_error() -> None:
    text = _wrk_text({90: 60, 110: 40}, spent_us=2_000_000, errors="1 2 3 4 5")
    outcome = parse_wrk(text, connections=2)
    assert (outcome.answered, outcome.elapsed_s, outcome.rate) == (95, 2.0, 47.5)
    assert outcome.errors == {
        "connect": 1, "read": 2, "write": 3, "timeout": 4, "status": 5, "wrong": 0,
    }  # fmt: skip
    assert outcome.latency_us.percentile(60) == 90
    assert outcome.latency_us.percentile(61) == 110


@given(
    st.dictionaries(st.integers(1, 200), st.integers(1, 5), min_size=1, max_size=30),
    st.integers(1, 4),
    st.integers(1, 60),
)
def test_parse_wrk_takes_away_the_samples_that_wrk_made_up(
    latencies: dict[int, int], connections: int, interval: int
) -> None:
    total = sum(latencies.values())
    rounds = total // connections
    corrected = latencies if rounds == 0 else _as_wrk_corrects(latencies, interval)
    lines = _wrk_text(corrected, spent_us=1).splitlines()
    # What wrk is told it took such that its interval is the one drawn; the total is the true one.
    lines[1] = f"shardserve-wrk {total} {max(1, rounds * interval)} 0 0 0 0 0"
    outcome = parse_wrk("\n".join(lines), connections=connections)
    found = zip(outcome.latency_us.values, outcome.latency_us.counts, strict=True)
    assert dict(found) == latencies


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("Running 1s test\n", "no summary"),
        ("shardserve-wrk 3 1000 0 0 0 0 0\nshardserve-wrk-latency 7 2", "3 answers and 2 lat"),
    ],
)
def test_parse_wrk_refuses_what_does_not_add_up(text: str, why: str) -> None:
    with pytest.raises(LoadFailed, match=why):
        parse_wrk(text, connections=1)


@needs_wrk
def test_wrk_and_the_server_agree() -> None:
    server = TinyServer()
    with server.running() as url:
        outcome = run_wrk(url, [_A], connections=2, duration_s=0.5)
    assert outcome.answered == outcome.latency_us.total > 0
    assert outcome.answered <= len(server.bodies) <= outcome.answered + 2
    assert outcome.failed == 0
    assert set(server.bodies) == {b"first"}
    assert set(server.paths) == {b"/a"}


@needs_wrk
def test_wrk_sends_several_requests_in_turn_with_any_bytes() -> None:
    server = TinyServer()
    with server.running() as url:
        run_wrk(url, [_A, _ascii(_B)], connections=1, duration_s=1)
    assert set(server.bodies) == {_A.body, _B.body}
    assert all(a != b for a, b in zip(server.bodies[:50], server.bodies[1:51], strict=True))


@needs_wrk
def test_wrk_counts_bad_statuses() -> None:
    with TinyServer(status=500).running() as url:
        outcome = run_wrk(url, [_A], connections=1, duration_s=1)
    assert outcome.answered == 0
    assert outcome.errors["status"] > 0


@needs_wrk
def test_wrk_that_cannot_connect_is_refused() -> None:
    with TinyServer().running() as url:
        pass
    with pytest.raises(LoadFailed, match="unable to connect"):
        run_wrk(url, [_A], connections=1, duration_s=1)


def test_without_wrk_our_own_generator_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tool() == "own"
    with pytest.raises(ToolMissing, match="apt-get install wrk"):
        run_wrk("http://127.0.0.1:1", [_A], connections=1, duration_s=1)
    with TinyServer().running() as url:
        outcome = closed_loop(url, [_A], connections=1, duration_s=0.1)
    assert outcome.answered > 0


@pytest.mark.parametrize(
    ("answered", "failed", "clean"), [(10_000, 1, True), (10_000, 100, False), (0, 0, False)]
)
def test_stray_error_is_forgiven_and_many_are_not(
    answered: int, failed: int, *, clean: bool
) -> None:
    outcome = Outcome(
        answered=answered,
        elapsed_s=1.0,
        latency_us=Histogram.of([1.0]),
        errors={"read": failed},
    )
    if clean:
        outcome.must_be_clean("x")
    else:
        with pytest.raises(LoadFailed, match="x: "):
            outcome.must_be_clean("x")
