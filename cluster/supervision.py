"""How often an actor may crash, and how long it is left alone when it did so too often.

Pure functions of crash times. Decides when the next start is due. Does not know what an actor is or
why it died; a start that never succeeds is a crash like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Intensity", "Verdict", "backoff_s", "judge"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Intensity:
    """Bounds on restarts.

    Attributes:
        crashes_max: crashes within the window that are answered by a restart soon; after one more
            the actor is left alone for a pause.
        window_s: a crash this old, or older, is forgotten.
        backoff_first_s: delay before the second restart of a window; the first is at once.
        backoff_s_max: no such delay is longer.
        pause_first_s: the first pause. It is doubled until a process lives for a whole window.
        pause_s_max: no pause is longer.
    """

    crashes_max: int = 5
    window_s: float = 60.0
    backoff_first_s: float = 0.5
    backoff_s_max: float = 15.0
    pause_first_s: float = 5.0
    pause_s_max: float = 60.0

    def __post_init__(self) -> None:
        assert self.crashes_max >= 0
        assert self.window_s > 0
        assert 0 < self.backoff_first_s <= self.backoff_s_max
        assert 0 < self.pause_first_s <= self.pause_s_max


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What follows from a crash.

    Attributes:
        restart_at: when to start again.
        recent: the crashes that still count, oldest first, one more than the bound at most.
        pauses: how many pauses in a row this makes; 0 for a restart without one.
    """

    restart_at: float
    recent: tuple[float, ...]
    pauses: int = 0


def judge(crashes: Sequence[float], now: float, intensity: Intensity, pauses: int = 0) -> Verdict:
    """Decide after a crash.

    Args:
        crashes: instants of all crashes that are remembered, the newest included.
        now: the present instant.
        intensity: the bounds.
        pauses: since a process last lived for a whole window.
    """
    recent = tuple(at for at in sorted(crashes) if now - at < intensity.window_s)
    recent = recent[-intensity.crashes_max - 1 :]
    count = len(recent)
    if pauses or count > intensity.crashes_max:
        pause_s = backoff_s(pauses, intensity.pause_first_s, intensity.pause_s_max)
        return Verdict(restart_at=now + pause_s, recent=recent, pauses=pauses + 1)
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
