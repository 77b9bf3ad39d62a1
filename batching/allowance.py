"""What an owner of rows is allowed: how critical they may be, how much may wait, of what weight.

Rows are of one of four criticalities, as in the practice that gRPC and Google's SRE book describe:

    critical      leave their line first and are given up last
    default       what nobody says anything of
    sheddable     leave after these; given up first where not all can be in time
    best-effort   wait for room: they fill what would be padding, and run by themselves where that
                  makes nobody late; their deadlines protect nothing, and they cost no share

A declaration says how critical a servable's requests are; a request may be made less critical by
whoever sends it, never more. One word is enough for both, so that no client can take from others
what nobody granted it: where some requests are to be critical, the servable is, and the others say
that they are less.

Numbers are on the hot path, names at its ends. Does not know who declares, or how.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from batching.errors import InvalidArgument

__all__ = [
    "BEST_EFFORT",
    "CRITICAL",
    "CRITICALITIES",
    "DEFAULT",
    "SHEDDABLE",
    "Allowance",
    "criticality_named",
    "priority_of",
]

CRITICAL: Final = 1
DEFAULT: Final = 0
SHEDDABLE: Final = -1
BEST_EFFORT: Final = -2

#: By name; the higher number goes first.
CRITICALITIES: Final[Mapping[str, int]] = {
    "critical": CRITICAL,
    "default": DEFAULT,
    "sheddable": SHEDDABLE,
    "best-effort": BEST_EFFORT,
}


def criticality_named(name: str) -> int:
    """The number of a criticality.

    Raises:
        InvalidArgument: there is none of this name.
    """
    found = CRITICALITIES.get(name)
    if found is None:
        raise InvalidArgument(f"no criticality {name!r}: {', '.join(CRITICALITIES)}")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """What an owner is allowed.

    Attributes:
        weight: an owner of weight 2 is in share with twice the device time of one of weight 1, and
            a row of it counts as two.
        criticality: the most that its rows may have; theirs where they say nothing.
        rows_max: the most rows of it in any lane's line.
        bytes_max: the most bytes.

    Raises:
        InvalidArgument: a weight or bound is not positive, or there is no such criticality.
    """

    weight: float = 1.0
    criticality: int = DEFAULT
    rows_max: int = 4096
    bytes_max: int = 256 << 20

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise InvalidArgument(f"a weight is positive, not {self.weight}")
        if self.criticality not in CRITICALITIES.values():
            raise InvalidArgument(f"no criticality {self.criticality}")
        if self.rows_max < 1 or self.bytes_max < 1:
            raise InvalidArgument(
                f"bounds must be positive; were {self.rows_max} rows, {self.bytes_max} bytes"
            )


def priority_of(allowance: Allowance | None, asked: int) -> int:
    """The criticality of rows: what was asked for, as far as their owner may have it.

    Args:
        allowance: of their owner; None where nothing was said.
        asked: the most that they may have.
    """
    return min(DEFAULT if allowance is None else allowance.criticality, asked)
