"""Held-out digits sent to a served classifier, and the share it gets right.

This file does not know the model, only the interface and the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rich.table import Table

from cluster.demo.client import Client, Json
from cluster.demo.digits_data import LABELS, Digits
from cluster.demo.errors import BadReply

__all__ = ["ACCURACY_MIN", "MODEL", "ROWS", "Tally", "classify", "table"]

#: The servable that classifies.
MODEL: Final = "digits"
#: Images sent in one request.
ROWS: Final = 60
#: Below this share of right answers something is broken; training reaches about 0.98.
ACCURACY_MIN: Final = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """How many images were sent and how many were recognised."""

    sent: int
    right: int

    @property
    def accuracy(self) -> float:
        """The share recognised; 0 if none were sent."""
        return self.right / self.sent if self.sent else 0.0


def classify(client: Client, digits: Digits, model: str = MODEL) -> Tally:
    """Have a server label every image.

    Raises:
        ServingError: as `Client.classify`, or `BadReply` for what is not a list of known labels
            with scores for each image.
    """
    right = 0
    for at in range(0, len(digits.labels), ROWS):
        pixels = digits.pixels[at : at + ROWS]
        examples: list[dict[str, Json]] = [{"pixels": row} for row in pixels.tolist()]
        results = client.classify(model, examples)
        if not isinstance(results, list) or len(results) != len(examples):
            raise BadReply(f"{model}: the results are not a list of {len(examples)}")
        named = [_likeliest(model, result) for result in results]
        right += sum(
            label == LABELS[truth]
            for label, truth in zip(named, digits.labels[at : at + ROWS], strict=True)
        )
    return Tally(sent=len(digits.labels), right=right)


def table(tally: Tally) -> Table:
    """The tally for a terminal."""
    shown = Table(title="Handwritten digits, none of them seen in training")
    for column in ("sent", "right", "accuracy"):
        shown.add_column(column, justify="right")
    shown.add_row(str(tally.sent), str(tally.right), f"{tally.accuracy:.1%}")
    return shown


def _likeliest(model: str, result: Json) -> str:
    """The label with the highest score."""
    scores: dict[str, float] = {}
    for pair in result if isinstance(result, list) else ():
        match pair:
            case [str(label), int() | float() as score] if label in LABELS:
                scores[label] = score
            case _:
                raise BadReply(f"{model}: {pair!r} is not a pair of a label and a score")
    if len(scores) != len(LABELS):
        raise BadReply(f"{model}: scores for {len(scores)} of {len(LABELS)} labels")
    return max(scores, key=scores.__getitem__)
