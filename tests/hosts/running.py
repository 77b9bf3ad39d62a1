"""A cluster on the namespace hosts, handled as its users do: by commands, over ssh and HTTP."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

import yaml

from bench.hosts import Host, Hosts
from bench.report import ROOT
from tests.e2e.running import Answer, ask
from tests.hosts import looked_up

__all__ = ["NAME", "REST", "SERVE", "declare", "look_up", "succeed", "wheel", "with_ours"]

NAME: Final = "ranker"
REST: Final = 8501
SERVE: Final = 8000


def wheel(folder: Path) -> None:
    """Build our wheel into a folder's ``dist``."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir"]
    subprocess.run(
        [*build, str(folder / "dist"), str(ROOT)], check=True, capture_output=True, timeout=120.0
    )


def declare(folder: Path) -> Path:
    """Save the servable into the folder's store, and declare it on two hosts; gives the file."""
    looked_up.save(folder / "store", NAME, 1)
    file = folder / "servables.yaml"
    cluster = {
        "devices": 2,
        "shards": 2,
        "hosts": 0,
        "http": {"host": "0.0.0.0", "port": REST},
        "serve": {"host": "0.0.0.0", "port": SERVE},
        "poll_s": 0.5,
    }
    servables = [{"name": NAME, "shards": 2, "replicas": 2}]
    document = {"store": str(folder / "store"), "servables": servables, "cluster": cluster}
    file.write_text(yaml.safe_dump(document, sort_keys=False))
    return file


def with_ours(command: str) -> str:
    """A command in our environment on a node, as the head of `cluster.yaml` says to give it."""
    settings = "RAY_AUTH_MODE=token RAY_ADDRESS=auto"
    return f". ~/shardserve/bin/activate; {settings} {command}"


def succeed(
    net: Hosts, host: Host, command: str, *, timeout_s: float = 60.0, folder: Path | None = None
) -> str:
    """What a shell command prints on a host, once it has succeeded."""
    done = net.run(host, ["bash", "-c", command], timeout_s=timeout_s, folder=folder)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def look_up(host: Host, port: int) -> Answer:
    """One request to a door of a host."""
    url = f"http://{host.address}:{port}"
    return ask(url, f"/v1/models/{NAME}:predict", {"instances": looked_up.IDS}, deadline_ms=5000)
