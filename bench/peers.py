"""Contenders of a benchmark, and the rounds in which they are measured against each other.

A peer is any server that can be started here and asked for the same rows: our product, our floor,
or somebody else's server. The rounds alternate their order, so that a machine that drifts favours
none; they first hold the answers against each other, since a fast wrong answer is worth nothing.
This file does not know which figure of an outcome a benchmark wants.
"""

from __future__ import annotations

import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from bench.errors import AnswersDiffer, ContenderFailed
from bench.load import Outcome, Request, closed_loop, own_closed_loop
from bench.mlp import rows

__all__ = ["Draw", "Peer", "Scenario", "ask", "await_answer", "compare_answers", "measure"]

_POLL_S: Final = 0.05
_ASK_TIMEOUT_S: Final = 10.0
#: Contenders batch differently, and another bucket is another program: not bit for bit the same.
_TOLERANCE: Final = 1e-5
#: Row counts that are compared: alone, within a bucket, at one, and beyond it.
_COMPARED_ROWS: Final = (1, 5, 8, 33)

Answers = npt.NDArray[np.float32]
#: As many rows to ask for, of a seed.
Draw = Callable[[int, int], list[list[float]]]


class Peer(Protocol):
    """A server that can be started here and asked for rows of the one model."""

    @property
    def name(self) -> str:
        """What tables and figures call it."""

    def running(self, folder: Path) -> AbstractContextManager[str]:
        """The server for as long as the context lasts; yields scheme, host and port.

        Args:
            folder: its own, empty, gone after the run; logs go there.

        Raises:
            ContenderFailed: it did not start.
        """

    def request(self, instances: list[list[float]]) -> Request:
        """What asks it for these rows."""

    def answers(self, body: bytes) -> Answers:
        """The rows in what it answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One load that every contender is put under.

    Attributes:
        key: in names of figures and files.
        connections: kept busy, with one row a request.
        duration_s: of one measurement.
        warm_up_s: of the load before it, whose outcome is dropped.
    """

    key: str
    connections: int
    duration_s: float
    warm_up_s: float


def ask(url: str, request: Request) -> bytes:
    """Send one request and wait for its answer.

    Raises:
        ContenderFailed: no answer, or one with a bad status; with the beginning of its body.
    """
    sent = urllib.request.Request(
        url + request.path,
        data=request.body or None,
        method=request.method,
        headers={"Content-Type": request.content_type, **request.headers},
    )
    try:
        with urllib.request.urlopen(sent, timeout=_ASK_TIMEOUT_S) as answer:
            body = answer.read()
            assert isinstance(body, bytes)
            return body
    except urllib.error.HTTPError as error:
        with error:
            text = error.read(500).decode(errors="replace")
        raise ContenderFailed(f"{url}{request.path}: {error.code}: {text}") from error
    except OSError as error:
        raise ContenderFailed(f"{url}{request.path}: {error}") from error


def await_answer(url: str, request: Request, *, timeout_s: float) -> bytes:
    """Ask until there is an answer: a server may listen before its model is available.

    Raises:
        ContenderFailed: the last refusal, when the time is over.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return ask(url, request)
        except ContenderFailed:
            if time.monotonic() > deadline:
                raise
        time.sleep(_POLL_S)


def compare_answers(
    peers: Sequence[Peer],
    urls: Mapping[str, str],
    *,
    seed: int,
    draw: Draw = rows,
    counts: Sequence[int] = _COMPARED_ROWS,
) -> bool:
    """Hold every contender's answers against the first's.

    Returns:
        Whether they are equal bit for bit; in any case they are equal within a tolerance.

    Raises:
        AnswersDiffer: with the contenders and by how much.
    """
    equal = True
    for count in counts:
        asked = draw(count, seed)
        found = {
            peer.name: peer.answers(ask(urls[peer.name], peer.request(asked))) for peer in peers
        }
        first = peers[0].name
        for name, answers in found.items():
            if answers.shape != found[first].shape:
                raise AnswersDiffer(f"{name} answered {answers.shape}, {first} otherwise")
            gap = float(np.max(np.abs(answers - found[first])))
            # Written so that a NaN in an answer is a difference.
            if not gap <= _TOLERANCE:
                raise AnswersDiffer(f"{name} and {first} differ by {gap:g} on {count} rows")
            equal = equal and bool(np.array_equal(answers, found[first]))
    return equal


def measure(
    peers: Sequence[Peer],
    urls: Mapping[str, str],
    scenarios: Sequence[Scenario],
    *,
    rounds: int,
    seed: int,
    draw: Draw = rows,
) -> dict[tuple[str, str], list[Outcome]]:
    """Put every contender under every scenario, once a round, in alternating order.

    Returns:
        Peer name and scenario key to one outcome a round.

    Raises:
        LoadFailed: errors were more than a stray one.
    """
    outcomes: dict[tuple[str, str], list[Outcome]] = {
        (peer.name, scenario.key): [] for peer in peers for scenario in scenarios
    }
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        order = list(peers) if number % 2 == 0 else list(reversed(peers))
        for scenario in scenarios:
            for peer in order:
                outcome = _one(urls[peer.name], peer.request(draw(1, seed)), scenario)
                outcome.must_be_clean(f"{peer.name}, {scenario.key}")
                outcomes[peer.name, scenario.key].append(outcome)
    return outcomes


def _one(url: str, request: Request, scenario: Scenario) -> Outcome:
    # By our own generator in any case: wrk counts in whole seconds.
    own_closed_loop(url, [request], connections=scenario.connections, duration_s=scenario.warm_up_s)
    return closed_loop(
        url, [request], connections=scenario.connections, duration_s=scenario.duration_s
    )
