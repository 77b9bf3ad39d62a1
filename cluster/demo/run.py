"""The demo as a whole: what to save and serve, and whether what is served answers rightly.

Starting and stopping a cluster in between is the command line's business. This file imports no
JAX until something is saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml
from rich.console import Console

from cluster.demo import classify, digits_data, prose, search
from cluster.demo.client import Client

__all__ = ["READY_S", "DemoReport", "check", "save_all", "show"]

#: How long `check` waits for the models to become available.
READY_S: Final = 120.0

#: Thirty-two passages take a second on two idle cores; a busy laptop may take its time.
_DEADLINE_MS: Final = 30_000


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """What a cluster answered.

    Attributes:
        passages: how many were searched.
        answers: to the known questions and to the user's.
        digits: how the classifier did.
    """

    passages: int
    answers: tuple[search.Answer, ...]
    digits: classify.Tally

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, in a sentence each; nothing if all is well."""
        found = [
            f"{answer.question.text!r} found {answer.hits[0].passage.topic!r} first, not one of "
            f"{', '.join(sorted(answer.question.topics))}"
            for answer in self.answers
            if not answer.right
        ]
        if self.digits.accuracy < classify.ACCURACY_MIN:
            found.append(
                f"digits: {self.digits.accuracy:.1%} of {self.digits.sent} recognised, "
                f"expected at least {classify.ACCURACY_MIN:.0%}"
            )
        return tuple(found)

    @property
    def ok(self) -> bool:
        """Whether all answers were as expected."""
        return not self.problems


def save_all(store: str | Path) -> str:
    """Save both models and return a ``servables.yaml`` that serves them.

    Raises:
        FilesMissing: a package that carries a model or data is not installed.
        ServingError: as the store's writer.
    """
    from cluster.demo import saving

    saving.save_minilm(store)
    saving.save_digits(store)
    servables = [
        # A shard actor for each part of the word table, so that a look-up really fans out.
        {"name": search.MODEL, "shards": saving.PARTITIONS, "deadline_ms": _DEADLINE_MS},
        {"name": classify.MODEL},
    ]
    cluster = {
        "name": "demo",
        "shards": saving.PARTITIONS,
        "allow_entry_points": ["cluster.demo.*"],
    }
    return yaml.safe_dump(
        {"store": str(Path(store).resolve()), "servables": servables, "cluster": cluster},
        sort_keys=False,
    )


def check(
    base_url: str, query: str | None = None, *, ready_s: float = READY_S, timeout_s: float = 60.0
) -> DemoReport:
    """Search and classify through a REST door.

    Args:
        base_url: such as ``http://127.0.0.1:8501``.
        query: a question of the user's, asked after the known ones.
        ready_s: how long to wait until both models are available.
        timeout_s: the longest one request may take.

    Raises:
        ServingError: the server does not answer, refuses, or answers nonsense. A wrong answer is
            no error: see `DemoReport.problems`.
    """
    holdout = digits_data.read().holdout
    with Client(base_url, timeout_s=timeout_s) as client:
        client.wait_available((search.MODEL, classify.MODEL), ready_s)
        index = search.Index(search.embed_over(client), prose.passages())
        return DemoReport(
            passages=len(index),
            answers=search.ask(index, query),
            digits=classify.classify(client, holdout),
        )


def show(report: DemoReport, console: Console) -> None:
    """Print a report, and what is wrong in it."""
    console.print(search.table(report.answers))
    console.print(classify.table(report.digits))
    for problem in report.problems:
        console.print(f"[red]wrong:[/red] {problem}", highlight=False)
    if report.ok:
        console.print(f"{report.passages} passages searched; every known answer was found.")
