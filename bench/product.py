"""The product as its users start it: ``shardserve up``, on a declaration, and ``shardserve down``.

By the command line alone: a benchmark that reached into the product would measure something that
nobody runs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import orjson
import yaml

from bench.errors import ContenderFailed, ToolMissing
from bench.floor import predict_answers, predict_request
from bench.load import Request
from bench.mlp import BUCKETS, WIDTH, forward, parameters, rows
from bench.peers import Answers, await_answer
from bench.processes import tail

__all__ = [
    "Product",
    "apply",
    "declaration",
    "free_port",
    "save_mlp",
    "start_doors",
    "start_product",
    "status",
]

_UP_S: Final = 180.0
_DOWN_S: Final = 60.0
_AVAILABLE_S: Final = 60.0


class Product:
    """A cluster of one device actor that serves the MLP.

    Args:
        seed: of the model's parameters.
    """

    name = "product"

    def __init__(self, seed: int) -> None:
        self._seed = seed

    @contextlib.contextmanager
    def running(self, folder: Path) -> Iterator[str]:
        """The cluster for as long as the context lasts; yields its direct REST door."""
        store = folder / "store"
        save_mlp(store, self._seed)
        config = folder / "servables.yaml"
        config.write_text(declaration(store, [{"name": "mlp"}]))
        with start_product(config, folder=folder) as url:
            await_answer(url, self.request(rows(1, self._seed)), timeout_s=_AVAILABLE_S)
            yield url

    def request(self, instances: list[list[float]]) -> Request:
        """What asks for these rows."""
        return predict_request(instances)

    def answers(self, body: bytes) -> Answers:
        """The rows in an answer."""
        return predict_answers(body)


def declaration(
    store: Path,
    servables: Sequence[Mapping[str, object]],
    *,
    cluster: Mapping[str, object] | None = None,
) -> str:
    """The text of a ``servables.yaml`` whose doors are on ports that are free now.

    Args:
        store: where the bundles are.
        servables: entries of its ``servables``.
        cluster: added to its ``cluster``, which has one device actor and no others.
    """
    doors = {"http": {"port": free_port()}, "serve": {"port": free_port()}}
    actors = {"devices": 1, "shards": 0, "hosts": 0}
    return yaml.safe_dump(
        {
            "store": str(store),
            "servables": [dict(servable) for servable in servables],
            "cluster": {"name": f"bench-{os.getpid()}", **doors, **actors, **(cluster or {})},
        },
        sort_keys=False,
    )


@contextlib.contextmanager
def start_product(
    config: Path, *, folder: Path, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Bring a cluster up on a declaration, and down at the end.

    Args:
        config: the ``servables.yaml``.
        folder: takes the log.
        environment: added to ours, for the cluster's processes.

    Yields:
        Scheme, host and port of the direct REST door.

    Raises:
        ToolMissing: the command is not installed beside this interpreter or on the path.
        ContenderFailed: it did not come up; with the end of its log.
    """
    with start_doors(config, folder=folder, environment=environment, serve=False) as doors:
        yield doors["rest"]


@contextlib.contextmanager
def start_doors(
    config: Path,
    *,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    serve: bool = True,
) -> Iterator[dict[str, str]]:
    """`start_product` with the Ray Serve door too.

    Yields:
        The URLs of ``rest`` and, with Serve, ``serve``.

    Raises:
        ToolMissing: the command is not installed beside this interpreter or on the path.
        ContenderFailed: it did not come up; with the end of its log.
    """
    command = _command()
    log = folder / "shardserve.log"
    try:
        yield _up(command, config, log, environment, serve=serve)
    finally:
        # Also after a start that failed half-way: what it left must not stay.
        _run([command, "down", "--config", str(config)], log=log, timeout_s=_DOWN_S)


def _up(
    command: str,
    config: Path,
    log: Path,
    environment: Mapping[str, str] | None,
    *,
    serve: bool,
) -> dict[str, str]:
    arguments = ["--config", str(config), *(() if serve else ("--no-serve",)), "--json"]
    printed = _run([command, "up", *arguments], log=log, timeout_s=_UP_S, environment=environment)
    try:
        found = orjson.loads(printed.splitlines()[-1])
        names = ("rest", "serve") if serve else ("rest",)
        return {name: str(found[name]).rstrip("/") for name in names}
    except (IndexError, KeyError, TypeError, orjson.JSONDecodeError) as error:
        raise ContenderFailed(
            f"shardserve up --json did not end in a line with its REST door:\n{tail(log)}"
        ) from error


def _run(
    command: Sequence[str],
    *,
    log: Path,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run a command to its end; its standard output, which goes to the log too."""
    name = " ".join(["shardserve", *command[1:2]])
    with log.open("a") as sink:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=sink,
                text=True,
                timeout=timeout_s,
                env={**os.environ, **(environment or {})},
            )
        except subprocess.TimeoutExpired as error:
            raise ContenderFailed(f"{name} took over {timeout_s:g} s:\n{tail(log)}") from error
        sink.write(done.stdout)
    if done.returncode:
        raise ContenderFailed(f"{name} ended with {done.returncode}:\n{tail(log)}")
    return done.stdout


def _command() -> str:
    beside = Path(sys.executable).with_name("shardserve")
    found = str(beside) if beside.exists() else shutil.which("shardserve")
    if found is None:
        raise ToolMissing("shardserve is not installed: pip install -e .")
    return found


def apply(config: Path) -> None:
    """Declare anew what a cluster that is up serves; returns when it serves that.

    Raises:
        ContenderFailed: the declaration is refused, or it does not come about.
    """
    log = config.with_name("shardserve.log")
    _run([_command(), "apply", "--config", str(config)], log=log, timeout_s=_UP_S)


def status(config: Path) -> dict[str, Any]:
    """What `shardserve status` knows of a cluster that is up.

    Raises:
        ContenderFailed: it does not answer.
    """
    log = config.with_name("shardserve.log")
    command = [_command(), "status", "--config", str(config), "--json"]
    found: dict[str, Any] = orjson.loads(_run(command, log=log, timeout_s=_DOWN_S).splitlines()[-1])
    return found


def save_mlp(store: Path, seed: int) -> None:
    """Save the model that all peers serve."""
    # Here, since it imports JAX.
    import shards

    shards.save(
        forward,
        parameters(seed),
        store,
        "mlp",
        version=1,
        inputs={"x": shards.Spec(("b", WIDTH))},
        batch_buckets=BUCKETS,
    )


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    assert isinstance(port, int)
    return port
