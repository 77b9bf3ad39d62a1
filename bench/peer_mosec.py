"""mosec with a model of ``ingress``: ``python -m bench.peer_mosec PORT MODEL SEED FOLDER``.

Runs in mosec's own environment. As its documentation has it: one worker, batches of up to 32,
which wait for 1 ms.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import orjson
from mosec import Server, Worker

from bench.ingress_model import MODELS, Compiled

__all__ = ["Inference"]

#: mosec reads the command line itself, and its workers are started anew: they are told by this.
_ASKED = "SHARDSERVE_BENCH_PEER"


class Inference(Worker):  # type: ignore[misc, unused-ignore]
    """One worker."""

    def __init__(self) -> None:
        super().__init__()
        name, seed = os.environ[_ASKED].split()
        self._compiled = Compiled(MODELS[name], int(seed))

    def deserialize(self, data: bytes) -> Any:
        """The rows of a request."""
        return np.asarray(orjson.loads(data)["instances"], np.float32)

    def forward(self, data: list[Any]) -> list[Any]:
        """The answers to a batch of requests."""
        return self._compiled.together(data)

    def serialize(self, data: Any) -> bytes:
        """The body of an answer."""
        return orjson.dumps(
            {"predictions": np.ascontiguousarray(data)}, option=orjson.OPT_SERIALIZE_NUMPY
        )


if __name__ == "__main__":
    if _ASKED not in os.environ:
        port, name, seed, _ = sys.argv[1:]
        os.environ[_ASKED] = f"{name} {seed}"
        sys.argv[1:] = ["--port", port, "--address", "127.0.0.1"]
        print(f"serving at http://127.0.0.1:{port}", flush=True)
    server = Server()
    server.append_worker(Inference, num=1, max_batch_size=32, max_wait_time=1)
    server.run()
