"""The commands about nodes: `shardserve drain`, `undrain` and `nodes`.

Only words are read here; what draining is, `cluster.draining` says.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cluster.edits import DrainNode
from cluster.options import (
    DEFAULT_CONFIG,
    AsJson,
    ClusterName,
    ConfigFile,
    RayAddress,
    cluster_of,
)

__all__ = ["add_to", "drain", "nodes", "undrain"]

_out = Console(highlight=False, markup=False)
_err = Console(stderr=True, highlight=False, markup=False)

Node = Annotated[str, typer.Argument(help="A node's id, or the beginning of it.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (drain, undrain, nodes):
        app.command()(command)


def drain(
    node: Node,
    config: ConfigFile = DEFAULT_CONFIG,
    cluster: ClusterName = "",
    ray: RayAddress = "auto",
    wait_s: Annotated[
        float, typer.Option(help="How long to wait until nothing is there; 0 returns at once.")
    ] = 600.0,
) -> None:
    """Move what actors of a node hold to other nodes while it is served; start none there."""
    from cluster import bringup

    edit = DrainNode(node=node)
    name = cluster_of(config, cluster)
    told, found = bringup.edit_node(name, edit, ray=ray, wait_s=wait_s, console=_err)
    _tell(told, found)


def undrain(
    node: Node,
    config: ConfigFile = DEFAULT_CONFIG,
    cluster: ClusterName = "",
    ray: RayAddress = "auto",
) -> None:
    """Let actors be started on a node again; what has moved stays where it is."""
    from cluster import bringup

    edit = DrainNode(node=node, undo=True)
    name = cluster_of(config, cluster)
    _tell(*bringup.edit_node(name, edit, ray=ray, wait_s=0.0, console=_err))


def nodes(
    config: ConfigFile = DEFAULT_CONFIG,
    cluster: ClusterName = "",
    ray: RayAddress = "auto",
    as_json: AsJson = False,
) -> None:
    """Show nodes with their actors, and which are drained."""
    from cluster import bringup

    found = bringup.status(cluster_of(config, cluster), ray=ray)["nodes"]
    if as_json:
        print(json.dumps(found))  # noqa: T201
    else:
        _show(found)


def _tell(told: tuple[str, ...], found: dict[str, Any]) -> None:
    for line in told or ("nothing to change",):
        _out.print(line, soft_wrap=True)
    _show(found)


def _show(found: dict[str, Any]) -> None:
    table = Table("node", "state", "actors", title="Nodes")
    for node, row in found.items():
        table.add_row(node[:12], row["state"], ", ".join(row["actors"]))
    _out.print(table)
