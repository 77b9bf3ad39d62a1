"""The floor's device process: a JAX model behind a Unix socket, and nothing else.

Rows of float32 come in a row, 256 bytes each, and answers of the same size go back in the same
order. What has arrived when the device is free is one batch; every bucket was compiled ahead.
The wire has no header: one peer, one model, one order. This is half of a ceiling to measure
against, not a server: nothing is checked, and a peer that misbehaves ends it. `bench.floor` gives
it the environment that JAX reads.
"""

from __future__ import annotations

import argparse
import gc
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final

import jax
import numpy as np
import numpy.typing as npt

from bench.mlp import BUCKETS, WIDTH, forward, parameters

__all__ = ["Program", "compile_buckets", "main", "serve"]

_ROW_BYTES: Final = 4 * WIDTH
_ROWS_MAX: Final = BUCKETS[-1]

Row = npt.NDArray[np.float32]
Program = Callable[[Row], jax.Array]


def compile_buckets(seed: int) -> Program:
    """The model, compiled for every bucket.

    The parameters are constants of the program: one argument less to hand over at every call. The
    jitted function, not the ahead-of-time executable, since its dispatch is some microseconds
    shorter; all its shapes are called here, and `serve` has no others.
    """
    # A batch is wanted at once: computing it on this thread saves waking another. There is no
    # environment variable that JAX reads for it.
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # type: ignore[no-untyped-call]
    params = parameters(seed)
    program = jax.jit(lambda x: forward(params, x))
    for bucket in BUCKETS:
        # Twice, since the first call of a shape takes a slower path than the others.
        for _ in range(2):
            program(np.zeros((bucket, WIDTH), np.float32)).block_until_ready()
    return program


def serve(peer: socket.socket, program: Program) -> None:
    """Answer the peer until it hangs up.

    A plain blocking loop: the one peer is a router that reads at all times, so a blocking send
    cannot lock both up, and an event loop would only add a turn to every batch.
    """
    arena = {bucket: np.zeros((bucket, WIDTH), np.float32) for bucket in BUCKETS}
    inbox = memoryview(bytearray(_ROWS_MAX * _ROW_BYTES))
    inbox_rows: Row = np.frombuffer(inbox, np.float32).reshape(_ROWS_MAX, WIDTH)
    bucket_of = [min(b for b in BUCKETS if b >= rows) for rows in range(1, _ROWS_MAX + 1)]
    filled = 0
    while received := peer.recv_into(inbox[filled:]):
        filled += received
        rows, rest = divmod(filled, _ROW_BYTES)
        if rows:
            batch = arena[bucket_of[rows - 1]]
            # Rows beyond these hold what an earlier batch left there: finite, and not sent back.
            batch[:rows] = inbox_rows[:rows]
            answer = np.asarray(program(batch))
            peer.sendall(answer[:rows].data)
            inbox[:rest] = inbox[rows * _ROW_BYTES : filled]
            filled = rest


def main() -> None:
    """Listen at a path, serve the one router that connects, end when it leaves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    arguments = parser.parse_args()
    program = compile_buckets(arguments.seed)
    # JAX holds a million objects that never die, and nothing here makes cycles.
    gc.freeze()
    gc.disable()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(arguments.socket))
        listener.listen(1)
        print("device ready", flush=True)
        peer, _ = listener.accept()
    with peer:
        serve(peer, program)


if __name__ == "__main__":
    main()
