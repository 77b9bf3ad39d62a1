"""Search with the encoder itself, without a server: known questions find their topics."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from cluster.demo import classify, prose, run, search
from tests.cluster import demo_support as demo

#: Topics of the subset that is searched here: those that hold answers, and neighbours of theirs.
TOPICS = frozenset().union(*(question.topics for question in search.QUESTIONS)) | {
    "assert", "del", "global", "import", "raise", "return", "sequence-types", "strings", "with",
}  # fmt: skip


@pytest.fixture(scope="module")
def index() -> search.Index:
    found = [passage for passage in prose.passages() if passage.topic in TOPICS]
    return search.Index(demo.embed, found)


@pytest.mark.slow
def test_known_questions_find_their_topics_first(index: search.Index) -> None:
    assert len(index) > 50
    for answer in search.ask(index):
        best = answer.hits[0]
        assert answer.right, f"{answer.question.text} -> {best.passage.topic}: {best.passage.text}"
        scores = [hit.score for hit in answer.hits]
        assert scores == sorted(scores, reverse=True)
        assert len(scores) == 3


def test_the_users_question_comes_last_and_any_topic_is_right(index: search.Index) -> None:
    answers = search.ask(index, "When is the file closed that I opened in a block?")
    assert len(answers) == len(search.QUESTIONS) + 1
    assert answers[-1].question.topics == frozenset()
    assert answers[-1].right


def test_a_passage_finds_itself_first(index: search.Index) -> None:
    (passage, *_) = [p for p in prose.passages() if p.topic == "debugger"]
    (answer,) = index.search([search.Question(text=passage.text)])
    assert answer.hits[0].passage == passage
    assert answer.hits[0].score == pytest.approx(1, abs=1e-5)


def planted(*topics: str) -> search.Index:
    """An index whose passage i lies on axis i, so that every question finds ``topics[0]``."""
    found = [prose.Passage(topic=topic, text=f"text {i}") for i, topic in enumerate(topics)]

    def embed(texts: object) -> search.Floats:
        assert isinstance(texts, list)
        places = [int(t.removeprefix("text ")) if t.startswith("text ") else 0 for t in texts]
        return np.eye(len(topics), dtype=np.float32)[places]

    return search.Index(embed, found)


def test_a_wrong_topic_in_first_place_is_a_wrong_answer_even_if_the_right_one_is_second() -> None:
    question = search.Question(text="?", topics=frozenset({"right"}))
    (wrong,) = planted("wrong", "right").search([question])
    (right,) = planted("right", "wrong").search([question])
    assert (wrong.right, right.right) == (False, True)


def report(*, topic: str, right: int) -> run.DemoReport:
    asked = search.Question(text="Is this [bold]markup[/bold]?", topics=frozenset({"truth"}))
    return run.DemoReport(
        passages=2,
        answers=planted(topic, "other").search([asked]),
        digits=classify.Tally(sent=100, right=right),
    )


def shown(one: run.DemoReport) -> str:
    console = Console(file=io.StringIO(), width=200)
    run.show(one, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_report_without_problems_is_ok() -> None:
    good = report(topic="truth", right=95)
    assert good.ok
    assert "every known answer was found" in shown(good)


def test_a_report_tells_each_problem() -> None:
    bad = report(topic="lambda", right=94)
    assert not bad.ok
    assert [problem.split(" ")[0] for problem in bad.problems] == ["'Is", "digits:"]
    assert "found 'lambda' first, not one of truth" in bad.problems[0]
    assert "94.0% of 100" in bad.problems[1]
    text = shown(bad)
    assert "(wrong)" in text
    assert text.count("wrong: ") == 2


def test_text_that_looks_like_markup_is_shown_as_it_is() -> None:
    assert "Is this [bold]markup[/bold]?" in shown(report(topic="truth", right=100))
