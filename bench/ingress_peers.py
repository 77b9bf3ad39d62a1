"""The servers that ``ingress`` is held against, each in an environment of its own.

pip makes the environments, once. A peer that cannot be installed or started here is absent, and
the result says why; nothing is compared with it. How each serves the model is in
``bench/peer_NAME.py``, which runs under the peer's interpreter.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

import numpy as np
import orjson

from bench.errors import ToolMissing
from bench.ingress_model import ENVIRONMENT, Model, draw
from bench.load import Request
from bench.peers import Answers, await_answer
from bench.processes import child
from bench.product import free_port

__all__ = ["INSTALLED", "JsonPeer", "TritonPeer", "installed", "predictions"]

_START_S: Final = 60.0
_ANSWERS_S: Final = 90.0

#: What each peer's environment holds. Triton's Python backend comes with NumPy 1.
INSTALLED: Final[Mapping[str, tuple[str, ...]]] = {
    "mosec": ("mosec==0.9.8", "orjson", "jax=={jax}"),
    "litserve": ("litserve==0.2.19", "orjson", "jax=={jax}"),
    "triton": ("nvidia-pytriton==0.7.0", "numpy<2", "jax==0.4.35", "jaxlib==0.4.35"),
}


def installed(name: str, folder: Path) -> str:
    """The interpreter of a peer's environment, which is made in the folder if it is not there.

    Raises:
        ToolMissing: it cannot be installed; says why.
    """
    place = folder.expanduser() / name
    python, done = place / "bin" / "python", place / "complete"
    wanted = [each.format(jax=version("jax")) for each in INSTALLED[name]]
    if not done.exists() or done.read_text().split() != wanted:
        print(f"installing {', '.join(wanted)} into {place}", file=sys.stderr)
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(place)],
            [str(python), "-m", "pip", "install", "--quiet", *wanted],
        ):
            told = subprocess.run(command, capture_output=True, text=True)
            if told.returncode:
                raise ToolMissing(f"{name} cannot be installed: {told.stderr.strip()[-300:]}")
        done.write_text(" ".join(wanted))
    return str(python)


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonPeer:
    """A peer that takes ``{"instances": rows}`` and answers ``{"predictions": rows}``.

    Attributes:
        name: of the peer, and of the file that serves it.
        path: of a request.
        python: its interpreter.
        model: what it serves.
        seed: of the model's parameters.
    """

    name: str
    path: str
    python: str
    model: Model
    seed: int

    @contextlib.contextmanager
    def running(self, folder: Path) -> Iterator[str]:
        """The server for as long as the context lasts; yields its URL."""
        with _served(self.name, self.python, self.model, self.seed, folder) as url:
            asked = draw(self.model, 1, self.seed)
            await_answer(url, self.request(asked), timeout_s=_ANSWERS_S)
            yield url

    def request(self, instances: list[list[float]]) -> Request:
        """What asks for these rows."""
        return Request(path=self.path, body=orjson.dumps({"instances": instances}))

    def answers(self, body: bytes) -> Answers:
        """The rows in an answer."""
        return predictions(body)


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonPeer:
    """Triton, asked in JSON, or in binary tensors behind a head.

    Attributes:
        python: its interpreter.
        model: what it serves.
        seed: of the model's parameters.
        binary: whether tensors travel without JSON.
    """

    python: str
    model: Model
    seed: int
    binary: bool = False

    @property
    def name(self) -> str:
        """What tables call it."""
        return "triton-binary" if self.binary else "triton"

    @contextlib.contextmanager
    def running(self, folder: Path) -> Iterator[str]:
        """The server for as long as the context lasts; yields its URL."""
        with _served("triton", self.python, self.model, self.seed, folder) as url:
            asked = draw(self.model, 1, self.seed)
            await_answer(url, self.request(asked), timeout_s=_ANSWERS_S)
            yield url

    def request(self, instances: list[list[float]]) -> Request:
        """What asks for these rows."""
        rows = np.asarray(instances, np.float32)
        tensor: dict[str, object] = {"name": "x", "datatype": "FP32", "shape": [*rows.shape]}
        path = f"/v2/models/{self.model.name}/infer"
        if not self.binary:
            tensor["data"] = [number for row in instances for number in row]
            return Request(path=path, body=orjson.dumps({"inputs": [tensor]}))
        tensor["parameters"] = {"binary_data_size": rows.nbytes}
        output = {"name": "y", "parameters": {"binary_data": True}}
        head = orjson.dumps({"inputs": [tensor], "outputs": [output]})
        return Request(
            path=path,
            body=head + rows.tobytes(),
            content_type="application/octet-stream",
            headers={"Inference-Header-Content-Length": str(len(head))},
        )

    def answers(self, body: bytes) -> Answers:
        """The rows in an answer."""
        wide = self.model.widths[-1]
        if not self.binary:
            flat = orjson.loads(body)["outputs"][0]["data"]
            return np.asarray(flat, np.float32).reshape(-1, wide)
        # The head is JSON and says how many bytes follow it; nothing else is in the body.
        size = int(body.split(b'"binary_data_size":', 1)[1].split(b"}", 1)[0])
        return np.frombuffer(body[-size:], np.float32).reshape(-1, wide)


def predictions(body: bytes) -> Answers:
    """The rows in what TensorFlow Serving's REST answers."""
    return np.asarray(orjson.loads(body)["predictions"], np.float32)


@contextlib.contextmanager
def _served(name: str, python: str, model: Model, seed: int, folder: Path) -> Iterator[str]:
    arguments: Sequence[str] = (str(free_port()), model.name, str(seed), str(folder))
    with child(
        [python, "-m", f"bench.peer_{name}", *arguments],
        log=folder / f"{name}.log",
        ready="serving at",
        timeout_s=_START_S,
        environment=ENVIRONMENT,
    ) as url:
        yield url
