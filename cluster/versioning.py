"""The commands that change which versions are served: load, unload, label, split, rollback.

Each is one edit of what a running cluster declares (`cluster.edits`), and waits until the cluster
is as declared. A later `apply` of a file declares everything anew.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console

from batching.errors import InvalidArgument
from cluster.edits import (
    Edit,
    LoadVersion,
    LookAgain,
    RollBack,
    SetLabel,
    SetSplit,
    UnloadVersion,
)
from cluster.options import (
    DEFAULT_CONFIG,
    AsJson,
    ClusterName,
    ConfigFile,
    RayAddress,
    cluster_of,
)

__all__ = ["add_to", "label", "load", "rollback", "split", "unload", "versions"]

_out = Console(highlight=False, markup=False)
_err = Console(stderr=True, highlight=False, markup=False)

Target = Annotated[str, typer.Argument(help="NAME or NAME:VERSION.")]
Name = Annotated[str, typer.Argument(help="The servable.")]
Wait = Annotated[float, typer.Option(help="How long to wait until it is so; 0 returns at once.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (load, unload, label, split, rollback, versions):
        app.command()(command)


def load(
    target: Target,
    only: Annotated[bool, typer.Option("--only", help="Unload the others after that.")] = False,
    name_it: Annotated[
        str, typer.Option("--label", help="Given to it in the moment it is available.")
    ] = "",
    config: ConfigFile = DEFAULT_CONFIG,
    cluster: ClusterName = "",
    ray: RayAddress = "auto",
    wait_s: Wait = 300.0,
) -> None:
    """Load a version beside what serves; without one, the newest and whatever follows it."""
    name, version = _parsed(target)
    edit = LoadVersion(servable=name, version=version, only=only, label=name_it)
    _carry_out(edit, name, cluster_of(config, cluster), ray, wait_s, version)


def unload(
    target: Target,
    config: ConfigFile = DEFAULT_CONFIG,
    cluster: ClusterName = "",
    ray: RayAddress = "auto",
    wait_s: Wait = 60.0,
) -> None:
    """Unload a version; without one, the servable."""
    name, version = _parsed(target)
    edit = UnloadVersion(servable=name, version=version)
    _carry_out(edit, name, cluster_of(config, cluster), ray, wait_s)


def label(
    servable: Name,
    name: Annotated[str, typer.Argument(metavar="LABEL", help="The label.")],
    version: Annotated[int | None, typer.Argument(help="Its version, one that serves.")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take the label away.")] = False,
    when_available: Annotated[
        bool,
        typer.Option("--when-available", help="Move it as soon as the version is available."),
    ] = False,
    config: ConfigFile = DEFAULT_CONFIG,
    cluster: ClusterName = "",
    ray: RayAddress = "auto",
    wait_s: Wait = 60.0,
) -> None:
    """Give a label to a version, or move it there."""
    if (version is None) != remove:
        raise InvalidArgument("give a version, or --remove")
    edit = SetLabel(servable=servable, label=name, version=version, when_available=when_available)
    _carry_out(edit, servable, cluster_of(config, cluster), ray, wait_s)


def split(
    servable: Name,
    weights: Annotated[
        list[str] | None, typer.Argument(help="LABEL=WEIGHT or VERSION=WEIGHT, several.")
    ] = None,
    off: Annotated[bool, typer.Option("--off", help="All to the newest version.")] = False,
    config: ConfigFile = DEFAULT_CONFIG,
    cluster: ClusterName = "",
    ray: RayAddress = "auto",
    wait_s: Wait = 60.0,
) -> None:
    """Send requests that name no version to several, by weight."""
    if bool(weights) == off:
        raise InvalidArgument("give weights, as stable=95 canary=5, or --off")
    edit = SetSplit(servable=servable, weights=_weights(weights or []))
    _carry_out(edit, servable, cluster_of(config, cluster), ray, wait_s)


def rollback(
    servable: Name,
    to: Annotated[int | None, typer.Option(help="Older version; else the next older.")] = None,
    config: ConfigFile = DEFAULT_CONFIG,
    cluster: ClusterName = "",
    ray: RayAddress = "auto",
    wait_s: Wait = 300.0,
) -> None:
    """Give the newest version up for an older one; labels and shares of requests go along."""
    edit = RollBack(servable=servable, to=to)
    _carry_out(edit, servable, cluster_of(config, cluster), ray, wait_s)


def versions(
    servable: Annotated[str, typer.Argument(help="One servable; all if none.")] = "",
    look: Annotated[
        bool,
        typer.Option("--look", help="Look into the store now; try again what has failed."),
    ] = False,
    config: ConfigFile = DEFAULT_CONFIG,
    cluster: ClusterName = "",
    ray: RayAddress = "auto",
    as_json: AsJson = False,
) -> None:
    """Show versions, with their labels and shares of requests."""
    from cluster import bringup

    if look and not servable:
        raise InvalidArgument("--look needs a servable")
    edit = LookAgain(servable=servable) if look else None
    found = bringup.versions(cluster_of(config, cluster), servable, edit, ray=ray)
    _show(found, as_json=as_json)


def _carry_out(
    edit: Edit, name: str, cluster: str, ray: str, wait_s: float, version: int | None = None
) -> None:
    from cluster import bringup

    told, found = bringup.edit(cluster, edit, name, version, ray=ray, wait_s=wait_s, console=_err)
    for line in told:
        _out.print(line)
    if not told:
        _out.print("nothing to change")
    _show(found, as_json=False)


def _show(servables: dict[str, Any], *, as_json: bool) -> None:
    from cluster import display

    if as_json:
        print(json.dumps(servables), flush=True)  # noqa: T201 - for programs
    else:
        display.show_versions(servables, _out)


def _parsed(target: str) -> tuple[str, int | None]:
    name, colon, number = target.partition(":")
    if not name or (colon and not (number.isascii() and number.isdigit())):
        raise InvalidArgument(f"{target!r} is not NAME or NAME:VERSION")
    return name, int(number) if colon else None


def _weights(words: list[str]) -> dict[str, int]:
    weights: dict[str, int] = {}
    for word in words:
        target, equals, weight = word.partition("=")
        if not (equals and target and weight.isascii() and weight.isdigit()):
            raise InvalidArgument(f"{word!r} is not LABEL=WEIGHT or VERSION=WEIGHT")
        if target in weights:
            raise InvalidArgument(f"{target!r} is given twice")
        weights[target] = int(weight)
    return weights
