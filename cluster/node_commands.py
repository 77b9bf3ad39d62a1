"""The commands about nodes: `shardserve drain`, `undrain` and `nodes`; and `shardserve rebalance`.

Only words are read here; what they mean, `cluster.draining` and `cluster.rebalancing` say.
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

__all__ = ["add_to", "drain", "nodes", "rebalance", "undrain"]

_out = Console(highlight=False, markup=False)
_err = Console(stderr=True, highlight=False, markup=False)

Node = Annotated[str, typer.Argument(help="A node's id, or the beginning of it.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (drain, undrain, nodes, rebalance):
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


def rebalance(
    config: ConfigFile = DEFAULT_CONFIG,
    cluster: ClusterName = "",
    ray: RayAddress = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be moved.")
    ] = False,
    wait_s: Annotated[
        float, typer.Option(help="How long to wait until it is done; 0 returns at once.")
    ] = 600.0,
    as_json: AsJson = False,
) -> None:
    """Move parts of tables between shard actors, while they are served, until load is even."""
    from cluster import bringup

    name = cluster_of(config, cluster)
    found = bringup.rebalance(name, dry_run=dry_run, ray=ray, wait_s=wait_s, console=_err)
    if as_json:
        print(json.dumps(found))  # noqa: T201
        return
    for line in found["moves"] or ("nothing to move",):
        _out.print(line, soft_wrap=True)
    if found["more"]:
        _out.print("and more after these")
    for what, why in found["stays"].items():
        _out.print(f"{what} stays: {why}", soft_wrap=True)
    if found["waits"]:
        _out.print(found["waits"], soft_wrap=True)
    before, after = found["uneven"]
    title = f"The most loaded has {before:g} of the mean, {after:g} after"
    table = Table("actor", "bytes", "after", "load", "after", title=title)
    for actor, row in found["actors"].items():
        sizes, loads = row["bytes"], row["load"]
        table.add_row(
            actor, *(f"{each:,}" for each in sizes), *(f"{100 * each:.1f} %" for each in loads)
        )
    _out.print(table)


def _tell(told: tuple[str, ...], found: dict[str, Any]) -> None:
    for line in told or ("nothing to change",):
        _out.print(line, soft_wrap=True)
    _show(found)


def _show(found: dict[str, Any]) -> None:
    table = Table("node", "state", "actors", title="Nodes")
    for node, row in found.items():
        table.add_row(node[:12], row["state"], ", ".join(row["actors"]))
    _out.print(table)
