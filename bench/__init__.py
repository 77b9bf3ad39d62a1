"""Benchmarks: ratios against a floor or a peer, taken in one run on one machine.

`main` is the command line, `shardserve bench` and ``python -m bench``. The package is not part of
the wheel: it is run from a checkout.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark that the arguments name.

    Args:
        argv: the arguments without the program's name; `sys.argv` when None.

    Returns:
        The exit status: 0, 1 when a mark was missed, 2 when the benchmark could not be run.
    """
    # The children that benches start import this package too, and must not pay for the rest.
    from bench.cli import main as run

    return run(argv)
