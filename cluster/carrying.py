"""In which order effects are carried out when keeping a state takes a while.

What follows a `Persist` rests on it: an order that nobody would remember must not be given. So it
waits until the store has the state, and so does what comes after it; the controller goes on taking
events meanwhile. Where the state cannot be kept, everything that waited goes back to the core.
Also how a reign begins while the store is away: it waits.

Decides the order alone. Does not know Ray, threads or what an effect does.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from batching.errors import Unavailable
from cluster.declared import DeclaredState, StateStore, claim
from cluster.signals import Effect, Persist, Publish

__all__ = ["Carrying", "claim_when_there", "merged"]

logger = logging.getLogger(__name__)

_RETRY_FIRST_S: Final = 0.5
_RETRY_S_MAX: Final = 10.0


class Carrying:
    """Effects that are due.

    Args:
        carry_out: does what an effect says; is given everything but `Persist`.
        keep: begins to keep a state, and calls `kept` or `not_kept` when that has ended.
        put_back: takes what was not carried out.
    """

    def __init__(
        self,
        carry_out: Callable[[Effect], None],
        keep: Callable[[Persist], None],
        put_back: Callable[[Sequence[Effect]], None],
    ) -> None:
        self._carry_out = carry_out
        self._keep = keep
        self._put_back = put_back
        # Bounded by what the core asks for once: nothing that is under way is asked for again.
        self._due: deque[Effect] = deque()
        self._keeping: Persist | None = None

    def take(self, effects: Iterable[Effect]) -> None:
        """Carry these out, after those that wait."""
        self._due.extend(effects)
        self._go_on()

    def kept(self) -> None:
        """The state is durable."""
        assert self._keeping is not None
        self._keeping = None
        self._go_on()

    def not_kept(self) -> None:
        """The state may not be there."""
        assert self._keeping is not None
        back = [self._keeping, *self._due]
        self._due.clear()
        self._keeping = None
        self._put_back(back)

    def _go_on(self) -> None:
        while self._due and self._keeping is None:
            effect = self._due.popleft()
            if isinstance(effect, Persist):
                self._keeping = effect
                self._keep(effect)
            else:
                self._carry_out(effect)


def claim_when_there(
    store: StateStore, cluster: str, sleep: Callable[[float], None] = time.sleep
) -> DeclaredState:
    """Begin a reign, as `cluster.declared.claim`, however long the store is away.

    Requests do not need a controller, and a constructor that fails is not tried again by Ray.

    Raises:
        ServingError: something that waiting does not change.
    """
    delay_s = _RETRY_FIRST_S
    while True:
        try:
            return claim(store, cluster)
        except (Unavailable, OSError) as error:
            logger.error("controller of %s: the store is away: %s", cluster, error)
        sleep(delay_s)
        delay_s = min(2 * delay_s, _RETRY_S_MAX)


def merged(earlier: Sequence[Effect], later: Sequence[Effect]) -> list[Effect]:
    """Both in order, each once; of states and of epochs the last, before everything else."""
    both = [*earlier, *later]
    states = [each for each in both if isinstance(each, Persist)]
    epochs = [each for each in both if isinstance(each, Publish)]
    others: list[Effect] = []
    for each in both:
        if not isinstance(each, Persist | Publish) and each not in others:
            others.append(each)
    return [*states[-1:], *epochs[-1:], *others]
