"""The floors: a bare router process and a bare device process, as contenders.

There are two. The *prototype* has the shape of the product, frames with request ids between event
loops, and is what ratios are taken against. The *raw* floor leaves that out too: it is the least
that two processes can do, measured beside, and no server could be made of it. What the processes
do is in `bench.floor_router` and `bench.floor_device`. They speak the product's REST, so that all
are sent the same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Final

import numpy as np
import orjson

from bench.load import Request
from bench.peers import Answers
from bench.processes import child, python

__all__ = ["PATH", "Prototype", "Raw", "noop", "predict_answers", "predict_request"]

PATH: Final = "/v1/models/mlp:predict"
_START_S: Final = 60.0

#: With a second Eigen thread, a product of 64 columns pays more for the hand-over than for the
#: arithmetic. Another contender may want the same accelerator, so its memory is not all taken.
_DEVICE_ENVIRONMENT: Final = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}


class _TwoProcesses:
    """A router process and a device process.

    Args:
        seed: of the model's parameters.
    """

    name: ClassVar[str]
    #: What is between them; both processes are told.
    _wire: ClassVar[str]

    def __init__(self, seed: int) -> None:
        self._seed = seed

    @contextlib.contextmanager
    def running(self, folder: Path) -> Iterator[str]:
        """The two processes for as long as the context lasts; yields their URL."""
        path = folder / "device.sock"
        both = ("--wire", self._wire, "--socket", str(path))
        device = python("bench.floor_device", *both, "--seed", str(self._seed))
        router = python("bench.floor_router", *both)
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


class Prototype(_TwoProcesses):
    """The floor that the product is held against.

    Each message between its processes is a frame: a length, a msgpack header with request ids, row
    counts and the unit's name, and raw rows. Both ends are protocols on uvloop. The buckets are
    compiled ahead of time with the parameters as arguments.
    """

    name = "prototype"
    _wire = "framed"


class Raw(_TwoProcesses):
    """The harder floor: what the prototype still has of a server is left out.

    No frames, request ids or unit's name: rows alone, whose order says whose they are. No event
    loop at the device, but a blocking socket. The parameters are constants of the program, and
    the garbage collector is off.
    """

    name = "raw"
    _wire = "raw"


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
