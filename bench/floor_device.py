"""The device process of both floors: a JAX model behind a Unix socket, and nothing else.

The model is compiled ahead for every bucket, and rows are computed in the smallest one that holds
them. How they come and go is a wire of its own: `bench.floor_framed`, which is the prototype's,
or `bench.floor_raw`. This is half of a ceiling to measure against, not a server. `bench.floor`
gives it the environment that JAX reads.
"""

from __future__ import annotations

import argparse
import functools
import gc
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import jax
import numpy as np

from bench import floor_framed, floor_raw
from bench.floor_link import Rows
from bench.mlp import BUCKETS, WIDTH, forward, parameters

__all__ = ["Padded", "Program", "main", "with_arguments", "with_constants"]

_ROWS_MAX: Final = BUCKETS[-1]

#: Exactly a bucket of rows to as many answers.
Program = Callable[[Rows], jax.Array]


def with_arguments(seed: int) -> dict[int, Program]:
    """The model for each bucket, compiled ahead of time, its parameters an argument.

    This is how a server that changes parameters without compiling must have it.
    """
    params = jax.device_put(parameters(seed))
    model = jax.jit(forward)
    programs: dict[int, Program] = {}
    for bucket in BUCKETS:
        rows = np.zeros((bucket, WIDTH), np.float32)
        programs[bucket] = functools.partial(model.lower(params, rows).compile(), params)
    return programs


def with_constants(seed: int) -> dict[int, Program]:
    """The model for each bucket, its parameters constants of the program.

    One argument less to hand over at every call. The jitted function, not the ahead-of-time
    executable, since its dispatch is some microseconds shorter; `Padded` calls all its shapes
    before it serves, and has no others.
    """
    params = parameters(seed)
    return dict.fromkeys(BUCKETS, jax.jit(lambda rows: forward(params, rows)))


class Padded:
    """Any number of rows by programs that take a bucket each.

    Args:
        programs: bucket to its program.
    """

    def __init__(self, programs: Mapping[int, Program]) -> None:
        self._staged = {
            bucket: (programs[bucket], np.zeros((bucket, WIDTH), np.float32)) for bucket in BUCKETS
        }
        self._bucket_of = [min(b for b in BUCKETS if b >= rows) for rows in range(_ROWS_MAX + 1)]
        for program, batch in self._staged.values():
            # Twice, since the first call of a shape takes a slower path than the others.
            for _ in range(2):
                program(batch).block_until_ready()

    def __call__(self, rows: Rows) -> Rows:
        """The answers to these rows."""
        count = len(rows)
        if count > _ROWS_MAX:
            starts = range(0, count, _ROWS_MAX)
            return np.concatenate([self(rows[start : start + _ROWS_MAX]) for start in starts])
        program, batch = self._staged[self._bucket_of[count]]
        # Rows beyond these hold what an earlier batch left there: finite, and not sent back.
        batch[:count] = rows
        answers: Rows = np.asarray(program(batch))[:count]
        return answers


def main() -> None:
    """Listen at a path, serve the one router that connects, end when it leaves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--wire", choices=("framed", "raw"), required=True)
    parser.add_argument("--seed", type=int, required=True)
    arguments = parser.parse_args()
    framed = arguments.wire == "framed"
    # A batch is wanted at once: computing it on this thread saves waking another. There is no
    # environment variable that JAX reads for it.
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # type: ignore[no-untyped-call]
    compute = Padded((with_arguments if framed else with_constants)(arguments.seed))
    # JAX holds a million objects that never die.
    gc.freeze()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(arguments.socket))
        listener.listen(1)
        print("device ready", flush=True)
        peer, _ = listener.accept()
    with peer:
        if framed:
            floor_framed.serve(peer, {floor_framed.UNIT: compute})
        else:
            # Nothing on the way of a row makes a cycle.
            gc.disable()
            floor_raw.serve(peer, compute)


if __name__ == "__main__":
    main()
