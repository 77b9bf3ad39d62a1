"""Ray Serve as a peer of ``ingress``: a Ray of its own, with Serve's defaults or its fastest flags.

Ray is what this interpreter has, the version that the product runs on; the processes are apart
from those of the product. Imports no Ray itself.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import orjson

from bench.errors import ContenderFailed
from bench.ingress_model import ENVIRONMENT, Model, draw
from bench.ingress_peers import predictions
from bench.load import Request
from bench.peers import Answers, await_answer
from bench.processes import python, tail
from bench.product import free_port
from bench.report import ROOT
from cluster.environment import MARK, ray_environment
from cluster.processes import end_all

__all__ = ["RayServePeer", "deploy"]

_START_S: Final = 60.0
_DEPLOY_S: Final = 120.0
#: What turns its Python proxy into HAProxy.
_FAST: Final = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED")


@dataclass(frozen=True, slots=True, kw_only=True)
class RayServePeer:
    """A deployment with ``@serve.batch``.

    Attributes:
        model: what it serves.
        seed: of the model's parameters.
        fast: with HAProxy and the throughput flags.
    """

    model: Model
    seed: int
    fast: bool

    @property
    def name(self) -> str:
        """What tables call it."""
        return "ray-serve-haproxy" if self.fast else "ray-serve"

    @contextlib.contextmanager
    def running(self, folder: Path) -> Iterator[str]:
        """The server for as long as the context lasts; yields its URL."""
        mark = secrets.token_hex(8)
        # Short: Ray and HAProxy put their sockets' names behind it.
        own = Path(tempfile.mkdtemp(prefix="ssv-", dir="/tmp"))
        try:
            environment = self._environment(own, mark)
            address, port = _start_head(own, folder, environment), free_port()
            url = deploy(address, port, self.model.name, self.seed, folder, environment)
            asked = draw(self.model, 1, self.seed)
            await_answer(url, self.request(asked), timeout_s=_START_S)
            yield url
        finally:
            end_all(MARK, mark)
            shutil.rmtree(own, ignore_errors=True)

    def _environment(self, own: Path, mark: str) -> dict[str, str]:
        (own / "auth_token").write_text(secrets.token_hex(32))
        environment = {**ray_environment(own, mark), **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
        for name in (
            "RAY_SERVE_HAPROXY_STATS_PORT",
            "RAY_SERVE_HAPROXY_METRICS_PORT",
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
        ):
            environment[name] = str(free_port())
        for name in _FAST:
            environment[name] = "1" if self.fast else "0"
        return environment

    def request(self, instances: list[list[float]]) -> Request:
        """What asks for these rows."""
        return Request(path="/", body=orjson.dumps({"instances": instances}))

    def answers(self, body: bytes) -> Answers:
        """The rows in an answer."""
        return predictions(body)


def _start_head(own: Path, folder: Path, environment: Mapping[str, str]) -> str:
    """Start a Ray, which runs until its marked processes are ended.

    Returns:
        Its address.

    Raises:
        ContenderFailed: it does not start; with the end of its log.
    """
    port = free_port()
    command = [
        *python("ray.scripts.scripts", "start", "--head"),
        "--node-ip-address=127.0.0.1", f"--port={port}", "--include-dashboard=false",
        f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}",
        f"--runtime-env-agent-port={free_port()}", f"--temp-dir={own / 'ray'}",
        "--disable-usage-stats", f"--object-store-memory={256 << 20}",
    ]  # fmt: skip
    _run(command, folder / "ray.log", _START_S, environment)
    return f"127.0.0.1:{port}"


def deploy(
    address: str, port: int, name: str, seed: int, folder: Path, environment: Mapping[str, str]
) -> str:
    """Deploy a model, or ``noop``, on a Ray that runs.

    Returns:
        Scheme, host and port of Serve's door.

    Raises:
        ContenderFailed: it cannot be deployed; with the end of its log.
    """
    command = [sys.executable, "-m", "bench.peer_ray", address, str(port), name, str(seed)]
    _run(command, folder / f"deploy-{name}.log", _DEPLOY_S, environment)
    return f"http://127.0.0.1:{port}"


def _run(command: list[str], log: Path, timeout_s: float, environment: Mapping[str, str]) -> None:
    with log.open("wb") as sink:
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                timeout=timeout_s,
                env={**os.environ, **environment},
            )
        except subprocess.TimeoutExpired as error:
            raise ContenderFailed(f"{command[2]} did not end:\n{tail(log)}") from error
    if done.returncode:
        raise ContenderFailed(f"{command[2]} ended with {done.returncode}:\n{tail(log)}")
