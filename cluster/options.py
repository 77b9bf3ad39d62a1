"""Options that several commands have, and how a command knows which cluster is meant."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Final

import typer

from cluster.config import load

__all__ = [
    "DEFAULT_CONFIG",
    "AsJson",
    "ClusterName",
    "ConfigFile",
    "RayAddress",
    "cluster_of",
]

DEFAULT_CONFIG: Final = Path("servables.yaml")

ConfigFile = Annotated[
    Path, typer.Option("--config", "-c", help="The declaration: store, servables, cluster.")
]
ClusterName = Annotated[str, typer.Option("--cluster", help="Instead of naming a file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, last line of the output.")]
RayAddress = Annotated[
    str,
    typer.Option(
        "--ray",
        help="Address of a running Ray; `local` starts one; `auto` uses RAY_ADDRESS if it is set "
        "and starts one otherwise.",
    ),
]


def cluster_of(file: Path, name: str = "") -> str:
    """The cluster that is meant: by its name, by its file, or the one that there usually is."""
    if name:
        return name
    if file == DEFAULT_CONFIG and not file.exists():
        return os.environ.get("SHARDSERVE_CLUSTER", "default")
    return load(file).cluster.name
