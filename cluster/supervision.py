"""How often an actor may crash before nobody starts it again.

Pure functions of crash times. Decides when the next start is due, or that there is none. Does not
know what an actor is or why it died; a start that never succeeds is a crash like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Intensity", "Verdict", "backoff_s", "judge"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Intensity:
    """Bounds on restarts.

    Attributes:
        crashes_max: crashes within the window that are answered by a restart; one more is not.
        window_s: a crash this old, or older, is forgotten.
        backoff_first_s: delay before the second restart of a window; the first is at once.
        backoff_s_max: no delay is longer.
    """

    crashes_max: int = 5
    window_s: float = 60.0
    backoff_first_s: float = 0.5
    backoff_s_max: float = 15.0

    def __post_init__(self) -> None:
        assert self.crashes_max >= 0
        assert self.window_s > 0
        assert 0 < self.backoff_first_s <= self.backoff_s_max


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What follows from a crash.

    Attributes:
        restart_at: when to start again, or None for never.
        recent: the crashes that still count, oldest first.
    """

    restart_at: float | None
    recent: tuple[float, ...]


def judge(crashes: Sequence[float], now: float, intensity: Intensity) -> Verdict:
    """Decide after a crash.

    Args:
        crashes: instants of all crashes that are remembered, the newest included.
        now: the present instant.
        intensity: the bounds.
    """
    recent = tuple(at for at in sorted(crashes) if now - at < intensity.window_s)
    count = len(recent)
    if count > intensity.crashes_max:
        return Verdict(restart_at=None, recent=recent)
    if count <= 1:
        # The usual crash is a lone one, and every second without the actor is a degraded answer.
        return Verdict(restart_at=now, recent=recent)
    delay_s = backoff_s(count - 2, intensity.backoff_first_s, intensity.backoff_s_max)
    return Verdict(restart_at=now + delay_s, recent=recent)


def backoff_s(attempt: int, first_s: float, s_max: float) -> float:
    """Exponential delay before attempt 0, 1, 2 ...; never above ``s_max``."""
    assert attempt >= 0
    # The exponent is bounded so that a long story cannot overflow a float.
    return min(s_max, first_s * 2.0 ** min(attempt, 60))
