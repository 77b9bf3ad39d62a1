"""The life of one servable version: one literal table, and nothing moves outside it.

Decides which step may follow which. Does not know why a step is taken, which actors take part, or
what time it is. `diagram` prints the table, so that documents can be held against it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from enum import StrEnum
from typing import Final

__all__ = [
    "PUBLIC",
    "TABLE",
    "IllegalTransition",
    "Lifecycle",
    "State",
    "Step",
    "diagram",
    "public_state",
]

#: Steps that a story remembers.
_STORY_MAX: Final = 32


class State(StrEnum):
    """Where a version is in its life."""

    NEW = "NEW"  # it should be loaded; nothing is promised yet
    RESERVED = "RESERVED"  # every actor it needs has room promised to it
    LOADING = "LOADING"  # actors read weights
    WARMING = "WARMING"  # all weights are in place, programs compile and run once
    AVAILABLE = "AVAILABLE"  # every part was loaded; routing epochs name it
    DRAINING = "DRAINING"  # no new epoch names it, requests of older ones may still come
    UNLOADING = "UNLOADING"  # actors let go of it
    END = "END"  # nothing of it is left
    ERROR = "ERROR"  # it failed; what was loaded of it is being let go


class Step(StrEnum):
    """What happens to a version."""

    RESERVE = "reserve"
    LOAD = "load"
    WARM = "warm"
    SERVE = "serve"
    DRAIN = "drain"
    UNLOAD = "unload"
    FINISH = "finish"
    FAIL = "fail"


TABLE: Final[Mapping[tuple[State, Step], State]] = {
    (State.NEW, Step.RESERVE): State.RESERVED,
    (State.RESERVED, Step.LOAD): State.LOADING,
    (State.LOADING, Step.WARM): State.WARMING,
    (State.WARMING, Step.SERVE): State.AVAILABLE,
    (State.AVAILABLE, Step.DRAIN): State.DRAINING,
    # Aspired again while nothing has let go of it yet: a rollback that loads nothing.
    (State.DRAINING, Step.SERVE): State.AVAILABLE,
    (State.DRAINING, Step.UNLOAD): State.UNLOADING,
    # No longer wanted before it was available: no epoch named it, so there is nothing to drain.
    (State.NEW, Step.UNLOAD): State.UNLOADING,
    (State.RESERVED, Step.UNLOAD): State.UNLOADING,
    (State.LOADING, Step.UNLOAD): State.UNLOADING,
    (State.WARMING, Step.UNLOAD): State.UNLOADING,
    (State.UNLOADING, Step.FINISH): State.END,
    # What goes wrong, at any point of a life that has not ended.
    (State.NEW, Step.FAIL): State.ERROR,
    (State.RESERVED, Step.FAIL): State.ERROR,
    (State.LOADING, Step.FAIL): State.ERROR,
    (State.WARMING, Step.FAIL): State.ERROR,
    (State.AVAILABLE, Step.FAIL): State.ERROR,
    (State.DRAINING, Step.FAIL): State.ERROR,
    (State.UNLOADING, Step.FAIL): State.ERROR,
    (State.ERROR, Step.FINISH): State.END,
}

#: The states that TensorFlow Serving's users know.
PUBLIC: Final[Mapping[State, str]] = {
    State.NEW: "START",
    State.RESERVED: "START",
    State.LOADING: "LOADING",
    State.WARMING: "LOADING",
    State.AVAILABLE: "AVAILABLE",
    State.DRAINING: "UNLOADING",
    State.UNLOADING: "UNLOADING",
    State.END: "END",
    State.ERROR: "END",
}


class IllegalTransition(AssertionError):
    """A step that the table does not hold: our own bug. Carries the recent story."""

    def __init__(self, name: str, state: State, step: Step, story: tuple[str, ...]) -> None:
        super().__init__(name, state, step, story)
        self.name = name
        self.state = state
        self.step = step
        self.story = story

    def __str__(self) -> str:
        told = "\n  ".join(self.story) or "(nothing before)"
        return f"{self.name}: no step {self.step} from {self.state}; before that:\n  {told}"


class Lifecycle:
    """One version's place in the table and how it got there.

    Args:
        name: for messages, e.g. ``"minilm:3"``.
    """

    __slots__ = ("_story", "name", "state")

    def __init__(self, name: str) -> None:
        self.name = name
        self.state = State.NEW
        self._story: deque[str] = deque(maxlen=_STORY_MAX)

    @property
    def story(self) -> tuple[str, ...]:
        """The latest steps, oldest first."""
        return tuple(self._story)

    def may(self, step: Step) -> bool:
        """Whether the table holds this step."""
        return (self.state, step) in TABLE

    def take(self, step: Step, now: float, cause: str = "") -> State:
        """Move.

        Args:
            step: what happens.
            now: for the story.
            cause: for the story, in words.

        Raises:
            IllegalTransition: the table does not hold the step.
        """
        before = self.state
        after = TABLE.get((before, step))
        if after is None:
            raise IllegalTransition(self.name, before, step, self.story)
        self.state = after
        because = f" ({cause})" if cause else ""
        self._story.append(f"{now:.3f} {before} -{step}-> {after}{because}")
        return after


def public_state(state: State) -> str:
    """The state as a status request shows it."""
    return PUBLIC[state]


def diagram() -> str:
    """The table as a Mermaid state diagram; equal tables print equal diagrams."""
    failing = [state for state, step in TABLE if step is Step.FAIL]
    lines = ["stateDiagram-v2", f"    [*] --> {State.NEW}"]
    lines += [
        f"    {before} --> {after}: {step}"
        for (before, step), after in TABLE.items()
        if step is not Step.FAIL
    ]
    lines += [f"    {before} --> {State.ERROR}: {Step.FAIL}" for before in failing]
    lines.append(f"    {State.END} --> [*]")
    return "\n".join(lines) + "\n"
