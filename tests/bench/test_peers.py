"""Rounds and the comparison of answers, on peers that are made up."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from bench import peers
from bench.errors import AnswersDiffer, ContenderFailed, LoadFailed
from bench.load import Outcome, Request
from bench.peers import Peer, Scenario, ask, await_answer, compare_answers, measure
from bench.stats import Histogram
from tests.bench.fakes import TinyServer


class Shifted:
    """A peer whose answers are the asked rows plus a constant."""

    def __init__(self, name: str, by: float = 0.0) -> None:
        self.name = name
        self._by = by
        self._asked: list[list[float]] = []

    @contextlib.contextmanager
    def running(self, folder: Path) -> Iterator[str]:
        with TinyServer().running() as url:
            yield url

    def request(self, instances: list[list[float]]) -> Request:
        self._asked = instances
        return Request(path=f"/{self.name}", body=b"x")

    def answers(self, body: bytes) -> peers.Answers:
        assert body == b"x"
        return np.asarray(self._asked, np.float32) + np.float32(self._by)


def _compare(found: Sequence[Peer], folder: Path) -> bool:
    with contextlib.ExitStack() as stack:
        urls = {peer.name: stack.enter_context(peer.running(folder)) for peer in found}
        return compare_answers(found, urls, seed=0)


def test_equal_answers_are_equal(tmp_path: Path) -> None:
    assert _compare([Shifted("a"), Shifted("b")], tmp_path)


def test_answers_within_the_tolerance_are_not_called_equal(tmp_path: Path) -> None:
    assert not _compare([Shifted("a"), Shifted("b", by=2e-6)], tmp_path)


@pytest.mark.parametrize("by", [1e-3, np.nan])
def test_answers_that_differ_end_the_benchmark(by: float, tmp_path: Path) -> None:
    with pytest.raises(AnswersDiffer, match="b and a differ by"):
        _compare([Shifted("a"), Shifted("b", by=by)], tmp_path)


def test_ask_says_what_the_server_refused() -> None:
    with (
        TinyServer(status=404).running() as url,
        pytest.raises(ContenderFailed, match="/x: 404: ydob"),
    ):
        ask(url, Request(path="/x", body=b"body"))


def test_await_answer_gives_the_last_refusal_when_the_time_is_over() -> None:
    server = TinyServer(status=503)
    with server.running() as url, pytest.raises(ContenderFailed, match="503"):
        await_answer(url, Request(path="/x", body=b"x"), timeout_s=0.2)
    assert len(server.bodies) > 1


_SCENARIOS = [
    Scenario(key=key, connections=connections, duration_s=1.0, warm_up_s=0.1)
    for key, connections in (("c1", 1), ("c32", 32))
]


def _outcome(answered: int) -> Outcome:
    return Outcome(
        answered=answered, elapsed_s=1.0, latency_us=Histogram.of([1.0]), errors={"read": 0}
    )


def test_measure_alternates_the_order_and_warms_up_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    story: list[tuple[str, str, int, float]] = []

    def load(what: str) -> object:
        def run(url: str, _: object, *, connections: int, duration_s: float) -> Outcome:
            story.append((what, url, connections, duration_s))
            return _outcome(len(story))

        return run

    monkeypatch.setattr(peers, "own_closed_loop", load("warm up"))
    monkeypatch.setattr(peers, "closed_loop", load("measure"))
    urls = {"a": "A", "b": "B"}
    outcomes = measure([Shifted("a"), Shifted("b")], urls, _SCENARIOS, rounds=2, seed=0)
    measured = [(url, connections) for what, url, connections, _ in story if what == "measure"]
    assert measured == [
        ("A", 1), ("B", 1), ("A", 32), ("B", 32),
        ("B", 1), ("A", 1), ("B", 32), ("A", 32),
    ]  # fmt: skip
    # Each measurement comes right after the warm-up of the same server under the same load.
    assert story[::2] == [("warm up", *where, 0.1) for where in measured]
    assert {key: len(found) for key, found in outcomes.items()} == {
        (name, key): 2 for name in "ab" for key in ("c1", "c32")
    }


def test_measure_refuses_a_load_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "own_closed_loop", lambda *_, **__: _outcome(0))
    monkeypatch.setattr(peers, "closed_loop", lambda *_, **__: _outcome(0))
    with pytest.raises(LoadFailed, match="a, c1: 0 answered well"):
        measure([Shifted("a")], {"a": "A"}, _SCENARIOS, rounds=1, seed=0)
