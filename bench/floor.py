"""The floor: the bare prototype of a router process and a device process, as a contender.

What the two do is in `bench.floor_router` and `bench.floor_device`. It speaks the product's REST,
so that both are sent the same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import orjson

from bench.load import Request
from bench.peers import Answers
from bench.processes import child, python

__all__ = ["PATH", "Prototype", "noop", "predict_answers", "predict_request"]

PATH: Final = "/v1/models/mlp:predict"
_START_S: Final = 60.0

#: With a second Eigen thread, a product of 64 columns pays more for the hand-over than for the
#: arithmetic. Another contender may want the same accelerator, so its memory is not all taken.
_DEVICE_ENVIRONMENT: Final = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}


class Prototype:
    """The two processes.

    Args:
        seed: of the model's parameters.
    """

    name = "prototype"

    def __init__(self, seed: int) -> None:
        self._seed = seed

    @contextlib.contextmanager
    def running(self, folder: Path) -> Iterator[str]:
        """The two processes for as long as the context lasts; yields their URL."""
        path = folder / "device.sock"
        device = python("bench.floor_device", "--socket", str(path), "--seed", str(self._seed))
        router = python("bench.floor_router", "--socket", str(path))
        with contextlib.ExitStack() as stack:
            stack.enter_context(
                child(
                    device,
                    log=folder / "device.log",
                    ready="device ready",
                    timeout_s=_START_S,
                    environment=_DEVICE_ENVIRONMENT,
                )
            )
            url = stack.enter_context(
                child(router, log=folder / "router.log", ready="router ready", timeout_s=_START_S)
            )
            yield url

    def request(self, instances: list[list[float]]) -> Request:
        """What asks for these rows."""
        return predict_request(instances)

    def answers(self, body: bytes) -> Answers:
        """The rows in an answer."""
        return predict_answers(body)


@contextlib.contextmanager
def noop(folder: Path) -> Iterator[str]:
    """The router alone, answering at once: what the load generator itself can do."""
    command = python("bench.floor_router", "--noop")
    with child(command, log=folder / "noop.log", ready="router ready", timeout_s=_START_S) as url:
        yield url


def predict_request(instances: list[list[float]]) -> Request:
    """The request of TensorFlow Serving's REST for these rows."""
    return Request(path=PATH, body=orjson.dumps({"instances": instances}))


def predict_answers(body: bytes) -> Answers:
    """The rows in what TensorFlow Serving's REST answers."""
    return np.asarray(orjson.loads(body)["predictions"], np.float32)
