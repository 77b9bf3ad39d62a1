"""Semantic search over Python's documentation, by a sentence encoder that is served elsewhere.

All passages are embedded once; a question finds the passages whose embeddings point the same way.
A few questions have known answers, none of which shares its decisive words with the question, so
that a broken model, tokenizer or table fails them.

This file does not know how an embedding is made: it is given a function, over HTTP in the demo.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from rich.table import Table

from cluster.demo.client import Client
from cluster.demo.errors import BadReply
from cluster.demo.prose import Passage

__all__ = [
    "MODEL",
    "QUESTIONS",
    "ROWS",
    "Answer",
    "Embed",
    "Floats",
    "Hit",
    "Index",
    "Question",
    "ask",
    "embed_over",
    "table",
]

#: The servable that embeds.
MODEL: Final = "minilm"
#: Passages sent in one request.
ROWS: Final = 32

Floats = npt.NDArray[np.float32]
#: Texts to their embeddings, ``[n, d]``, of length one.
Embed = Callable[[Sequence[str]], Floats]

_LENGTH_TOLERANCE: Final = 1e-3
#: Characters of a passage that the table shows.
_SHOWN: Final = 160


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked, and the topics of which one must come first; none means any may."""

    text: str
    topics: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A passage and the cosine of the angle between it and the question."""

    passage: Passage
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The best passages for a question, the best first."""

    question: Question
    hits: tuple[Hit, ...]

    @property
    def right(self) -> bool:
        """Whether a topic that must come first does."""
        wanted = self.question.topics
        return bool(self.hits) and (not wanted or self.hits[0].passage.topic in wanted)


def _question(text: str, *topics: str) -> Question:
    return Question(text=text, topics=frozenset(topics))


QUESTIONS: Final = (
    _question("Which values count as false in a condition?", "truth", "booleans"),
    _question("How do I write a small function without a name?", "lambda", "function"),
    _question("How can I step through my program to find a bug?", "debugger"),
    _question("May I write underscores in large numbers?", "integers", "floating", "numbers"),
    _question("What happens when a number is divided by zero?", "binary", "exceptions"),
    _question("How can I stop a loop early?", "break", "continue", "for", "while"),
    _question("How do I cut a piece out of a list?", "typesseq", "slicings", "subscriptions"),
    _question("Does my dictionary keep the order of its keys?", "dict", "typesmapping"),
)


class Index:
    """Passages with their embeddings, in memory.

    Args:
        embed: makes embeddings; called with at most `ROWS` texts at a time.
        passages: at least one.
    """

    def __init__(self, embed: Embed, passages: Sequence[Passage]) -> None:
        assert passages, "an index of nothing"
        self._embed = embed
        # Texts of like length travel together: a request is padded to its longest row.
        self._passages = sorted(passages, key=lambda passage: len(passage.text))
        texts = [passage.text for passage in self._passages]
        parts = [embed(texts[at : at + ROWS]) for at in range(0, len(texts), ROWS)]
        self._matrix = np.concatenate(parts)

    def __len__(self) -> int:
        return len(self._passages)

    def search(self, questions: Sequence[Question], best: int = 3) -> tuple[Answer, ...]:
        """Answer questions, at most `ROWS`, each with the ``best`` passages."""
        assert len(questions) <= ROWS
        scores = self._embed([question.text for question in questions]) @ self._matrix.T
        order = np.argsort(-scores, axis=1, kind="stable")[:, :best]
        return tuple(
            Answer(
                question=question,
                hits=tuple(Hit(passage=self._passages[i], score=float(row[i])) for i in places),
            )
            for question, row, places in zip(questions, scores, order, strict=True)
        )


def ask(index: Index, query: str | None = None) -> tuple[Answer, ...]:
    """Answer the known questions, and the user's own after them."""
    own = (Question(text=query),) if query else ()
    return index.search((*QUESTIONS, *own))


def embed_over(client: Client, model: str = MODEL) -> Embed:
    """An `Embed` that asks a server; it refuses what cannot be embeddings.

    Raises:
        ServingError: (when called) as `Client.predict`.
    """

    def embed(texts: Sequence[str]) -> Floats:
        outputs = client.predict(model, {"text": list(texts)})
        try:
            rows = np.asarray(outputs, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise BadReply(f"{model}: the embeddings are not a matrix: {error}") from error
        if rows.ndim != 2 or len(rows) != len(texts):
            raise BadReply(f"{model}: {len(texts)} texts, embeddings of shape {rows.shape}")
        lengths = np.linalg.norm(rows, axis=1)
        # Written so that a NaN, which is neither near nor far, is refused.
        if not np.all(np.abs(lengths - 1) <= _LENGTH_TOLERANCE):
            worst = float(lengths[np.argmax(np.abs(np.nan_to_num(lengths, nan=math.inf) - 1))])
            raise BadReply(f"{model}: an embedding has length {worst:g}, not 1")
        return rows

    return embed


def table(answers: Sequence[Answer]) -> Table:
    """The answers for a terminal."""
    shown = Table(title="Semantic search in the Python documentation")
    shown.add_column("question", ratio=2)
    shown.add_column("topic")
    shown.add_column("score", justify="right")
    shown.add_column("passage", ratio=5)
    for answer in answers:
        for place, hit in enumerate(answer.hits):
            mark = "" if place or answer.right else " [red](wrong)[/red]"
            shown.add_row(
                _plain(answer.question.text) + mark if place == 0 else "",
                hit.passage.topic,
                f"{hit.score:.3f}",
                _plain(textwrap.shorten(hit.passage.text, _SHOWN, placeholder=" ...")),
                end_section=place == len(answer.hits) - 1,
            )
    return shown


def _plain(text: str) -> str:
    """Text with what looks like rich's markup made harmless."""
    return text.replace("[", r"\[")
