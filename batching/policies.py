"""The policies by name, as a declaration, a simulation and a bench call them.

`effsafe` is what device actors run unless told otherwise; the others are there to compare with. All
but two give up rows that cannot be in time (`batching.window`): `fifo-late` drops only what has
expired, as a server without a scheduler would, and `shrink` makes batches smaller instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from batching.baselines import (
    EarliestDeadline,
    FairShare,
    FirstCome,
    LeastSlack,
    RoundRobin,
    Shrink,
)
from batching.effsafe import EffSafe
from batching.errors import InvalidArgument
from batching.policy import Policy

__all__ = ["DEFAULT_POLICY", "POLICIES", "policy_named"]

DEFAULT_POLICY: Final = "effsafe"

#: Makes a policy of each name. A policy belongs to one batcher, so each gets its own.
POLICIES: Final[Mapping[str, Callable[[], Policy]]] = {
    "effsafe": EffSafe,
    "round-robin": lambda: RoundRobin(early_drop=True),
    "fifo": FirstCome,
    "fifo-late": lambda: FirstCome(early_drop=False),
    "shrink": Shrink,
    "edf": EarliestDeadline,
    "least-slack": LeastSlack,
    "fair-share": FairShare,
}


def policy_named(name: str, *, guard_s: float | None = None) -> Policy:
    """A new policy.

    Args:
        name: one of `POLICIES`.
        guard_s: seconds by which protected batches are to be early, see `EffSafe`; the other
            policies protect nobody, and know no guard.

    Raises:
        InvalidArgument: there is no such policy, or it takes no such guard.
    """
    if name not in POLICIES:
        raise InvalidArgument(f"no policy {name!r}: {', '.join(POLICIES)}")
    if guard_s is None:
        return POLICIES[name]()
    if name != "effsafe":
        raise InvalidArgument(f"policy {name!r} has no guard; only effsafe has")
    return EffSafe(guard_s)
