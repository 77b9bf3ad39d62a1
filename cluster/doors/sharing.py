"""How many router processes of a node share one port (``SO_REUSEPORT``).

The kernel gives each new connection to one of those that listen, and to the others when one has
ended.
"""

from __future__ import annotations

from typing import Final

__all__ = ["processes_on"]

#: A router serves some 25,000 small requests a second with one processor, and what it asks needs
#: several times that: beyond so many of a node's processors another router finds work.
_PROCESSORS_EACH: Final = 8
_AUTO_MAX: Final = 8


def processes_on(declared: int, processors: int) -> int:
    """How many router processes a node has.

    Args:
        declared: 0 for as many as its processors are good for: one for each eight, eight at most.
        processors: of the node.
    """
    return declared or min(max(processors // _PROCESSORS_EACH, 1), _AUTO_MAX)
