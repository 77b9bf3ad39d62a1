"""LitServe with a model of ``ingress``: ``python -m bench.peer_litserve PORT MODEL SEED FOLDER``.

Runs in LitServe's own environment. One worker on the CPU, batches of up to 32, which wait for 1 ms.
"""

from __future__ import annotations

import sys
from typing import Any

import litserve
import numpy as np

from bench.ingress_model import MODELS, Compiled

__all__ = ["Api"]


class Api(litserve.LitAPI):  # type: ignore[misc, unused-ignore]
    """What LitServe calls.

    Args:
        model: its name.
        seed: of its parameters.
    """

    def __init__(self, model: str, seed: int) -> None:
        super().__init__(max_batch_size=32, batch_timeout=0.001)
        self._asked = model, seed

    def setup(self, device: str) -> None:
        """Compile; runs in the worker."""
        del device
        name, seed = self._asked
        self._compiled = Compiled(MODELS[name], seed)

    # These two say nothing of their types, which LitServe would check bodies against.
    def decode_request(self, request):  # type: ignore[no-untyped-def]
        """The rows of a request."""
        return np.asarray(request["instances"], np.float32)

    def batch(self, inputs: list[Any]) -> list[Any]:
        """Left apart: a request may have several rows."""
        return inputs

    def predict(self, requests: list[Any]) -> list[Any]:
        """The answers to a batch of requests."""
        return self._compiled.together(requests)

    def unbatch(self, output: list[Any]) -> list[Any]:
        """Apart already."""
        return output

    def encode_response(self, output):  # type: ignore[no-untyped-def]
        """The body of an answer."""
        return {"predictions": output.tolist()}


if __name__ == "__main__":
    port, name, seed, _ = sys.argv[1:]
    server = litserve.LitServer(Api(name, int(seed)), accelerator="cpu")
    print(f"serving at http://127.0.0.1:{port}", flush=True)
    server.run(host="127.0.0.1", port=int(port), generate_client_file=False, log_level="warning")
