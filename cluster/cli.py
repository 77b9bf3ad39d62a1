"""The command line.

Each command says what it does in `--help`. A mistake that a user is likely to make ends with one
line on standard error that says what to do, and exit status 1; a wrong call with status 2. Ray is
imported by the commands that need it, after its environment is set.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from batching.errors import FailedPrecondition, NotFound, ServingError
from cluster import bundles, node_commands, planning, versioning
from cluster._version import __version__
from cluster.config import load
from cluster.options import (
    DEFAULT_CONFIG,
    AsJson,
    ClusterName,
    ConfigFile,
    RayAddress,
    cluster_of,
)
from cluster.ownership import check_ownership
from shards.calls import under_way

__all__ = ["app", "main"]

app = typer.Typer(
    name="shardserve",
    help="Serve JAX models of any size on a Ray cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(bundles.app, name="bundle")
planning.add_to(app)
versioning.add_to(app)
node_commands.add_to(app)

# Names, paths and messages are data: what looks like markup in them is none.
_out = Console(highlight=False, markup=False)
_err = Console(stderr=True, highlight=False, markup=False)


def main() -> None:
    """Entry point: errors of ours become one line."""
    # Serving code logs through `logging`; on the command line only trouble is of interest.
    logging.basicConfig(level=logging.ERROR)
    try:
        check_ownership()
        app()
    except ServingError as error:
        # A terminal wraps a long line by itself; a log should find it whole.
        _err.print(f"shardserve: {_one_line(error.message)}", soft_wrap=True)
        if under_way():
            # A store that trickles would keep the process from ending for as long as it likes.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        sys.exit(1)


def _one_line(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    head, *rest = lines or ["for no known reason"]
    joined = "; ".join(rest)
    return f"{head} {joined}" if joined and head.endswith(":") else "; ".join(lines) or head


def _show_version(value: bool) -> None:
    if value:
        _out.print(f"shardserve {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="And exit.")
    ] = False,
) -> None:
    """Serve JAX models of any size on a Ray cluster."""


@app.command()
def up(
    config: ConfigFile = DEFAULT_CONFIG,
    ray: RayAddress = "auto",
    timeout_s: Annotated[float, typer.Option(help="How long to wait until ready.")] = 300.0,
    cpus: Annotated[int | None, typer.Option(help="CPUs of a Ray that is started here.")] = None,
    serve: Annotated[
        bool, typer.Option("--serve/--no-serve", help="Also open the Ray Serve door.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Start everything on this machine, apply the declaration, wait until it is served."""
    declared = load(config)
    from cluster import bringup

    found = bringup.up(
        declared, ray=ray, cpus=cpus, timeout_s=timeout_s, with_serve=serve, console=_err
    )
    if as_json:
        print(json.dumps(found), flush=True)  # noqa: T201 - for programs, not for a terminal
        return
    _out.print(f"REST      {found['rest']}")
    if serve:
        _out.print(f"Ray Serve {found['serve']}")
    _out.print("Try: shardserve status; shardserve predict NAME --data '{\"instances\": [...]}'")


@app.command()
def down(
    config: ConfigFile = DEFAULT_CONFIG,
    cluster: ClusterName = "",
    keep_logs: Annotated[bool, typer.Option(help="Keep Ray's log directory.")] = False,
    with_ray: Annotated[
        bool,
        typer.Option("--with-ray", help="Also end the Ray that RAY_ADDRESS names, everywhere."),
    ] = False,
) -> None:
    """End what `up` or `deploy` started, and nothing else."""
    from cluster import bringup

    name = cluster_of(config, cluster)
    ended = bringup.down(name, keep_logs=keep_logs, with_ray=with_ray)
    _out.print(f"cluster {name!r} is down: {ended}")


@app.command()
def apply(
    config: ConfigFile = DEFAULT_CONFIG,
    ray: RayAddress = "auto",
    wait_s: Annotated[float, typer.Option(help="0 returns at once.")] = 300.0,
) -> None:
    """Declare what a running cluster serves."""
    declared = load(config)
    from cluster import bringup

    bringup.apply(declared, ray=ray, wait_s=wait_s, console=_err)
    _out.print(f"applied {config}")


@app.command()
def deploy(
    config: ConfigFile = DEFAULT_CONFIG,
    ray: RayAddress = "auto",
    timeout_s: Annotated[float, typer.Option(help="How long to wait until ready.")] = 300.0,
    serve: Annotated[
        bool, typer.Option("--serve/--no-serve", help="Also open the Ray Serve door.")
    ] = True,
) -> None:
    """Put the application and the declaration onto a Ray that runs."""
    declared = load(config)
    from cluster import bringup

    found = bringup.deploy(declared, ray=ray, timeout_s=timeout_s, with_serve=serve, console=_err)
    _out.print(f"REST      {found['rest']}")
    if serve:
        _out.print(f"Ray Serve {found['serve']}")


@app.command()
def status(
    config: ConfigFile = DEFAULT_CONFIG,
    cluster: ClusterName = "",
    ray: RayAddress = "auto",
    as_json: AsJson = False,
) -> None:
    """Show servables, versions, actors and doors."""
    from cluster import bringup, display

    found = bringup.status(cluster_of(config, cluster), ray=ray)
    if as_json:
        print(json.dumps(found), flush=True)  # noqa: T201
    else:
        display.show_status(found, _out)


@app.command()
def top(
    url: Annotated[
        list[str], typer.Option(help="Base URL of a node's router; repeatable, one for each node.")
    ] = ["http://127.0.0.1:8501"],  # noqa: B006 - typer copies it
    interval: Annotated[float, typer.Option(min=0.5, help="Seconds between two readings.")] = 1.0,
    sort: Annotated[
        str, typer.Option(help="attainment, device, drops, name, queue or requests.")
    ] = "requests",
    once: Annotated[bool, typer.Option("--once", help="One reading, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each.")] = False,
) -> None:
    """Show live what devices do: servables, lines, batches, drops, attainment."""
    from cluster import top as live

    live.run(url, _out, interval_s=interval, order=sort, is_once=once, as_json=as_json)


@app.command()
def predict(
    servable: Annotated[str, typer.Argument(help="Name, NAME:VERSION or NAME@LABEL.")],
    data: Annotated[
        str, typer.Option("--data", "-d", help="Request body as JSON; @FILE reads a file, - stdin.")
    ] = "-",
    url: Annotated[str, typer.Option(help="Base URL of a REST door.")] = "http://127.0.0.1:8501",
    method: Annotated[str, typer.Option(help="predict, classify or regress.")] = "predict",
    timeout_ms: Annotated[int, typer.Option(min=1, help="Deadline of the request.")] = 30_000,
) -> None:
    """Send one request to a REST door and print the answer."""
    from cluster import requesting

    if data.startswith("@"):
        try:
            body = Path(data[1:]).read_bytes()
        except OSError as error:
            raise FailedPrecondition(f"{data[1:]}: {error.strerror}") from error
    else:
        body = sys.stdin.buffer.read() if data == "-" else os.fsencode(data)
    answer = requesting.send(url, servable, method, body, timeout_ms)
    print(answer)  # noqa: T201 - the body as it came


@app.command()
def inspect(
    store: Annotated[str, typer.Argument(help="A store's directory or URL.")],
    servable: Annotated[str, typer.Argument(help="Name or NAME:VERSION; empty lists all.")] = "",
    verify: Annotated[bool, typer.Option(help="Read and hash every blob.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what is in a store, or one bundle in detail."""
    from cluster import display

    display.inspect_store(store, servable, verify=verify, as_json=as_json, console=_out)


@app.command()
def demo(
    query: Annotated[str, typer.Option("--query", "-q", help="Ask this too.")] = "",
    directory: Annotated[Path, typer.Option(help="For the store.")] = Path(".demo"),
    keep: Annotated[bool, typer.Option(help="Leave the cluster up.")] = False,
) -> None:
    """Save, serve and ask two real models: semantic search and digits."""
    from cluster import bringup
    from cluster.demo import run

    with _told("saving the models (MiniLM, digits)"):
        text = run.save_all(directory / "store")
    file = directory / "servables.yaml"
    file.write_text(text, encoding="utf-8")
    declared = load(file)
    shown = Console(highlight=False)  # the demo's report has colours
    try:
        found = bringup.up(declared, ray="local", timeout_s=300.0, console=_err)
        with _told(f"asking {found['rest']}"):
            report = run.check(found["rest"], query or None)
        run.show(report, shown)
        with _told(f"asking {found['serve']} (Ray Serve)"):
            through_serve = run.check(found["serve"])
        if through_serve.problems:
            run.show(through_serve, shown)
    finally:
        if not keep:
            bringup.down(declared.cluster.name)
    if report.problems or through_serve.problems:
        raise typer.Exit(1)
    if keep:
        _out.print(f"still up; end it with: shardserve down --cluster {declared.cluster.name}")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def bench(context: typer.Context) -> None:
    """Run a benchmark of the repository's bench/; --help lists them."""
    try:
        from bench.cli import main as bench_main
    except ImportError as error:
        raise NotFound(
            "the benches are part of the repository, not of the package: run this in a checkout, "
            f"with `pip install -e .[bench]` ({error})"
        ) from error
    raise typer.Exit(bench_main(context.args))


@contextmanager
def _told(what: str) -> Iterator[None]:
    with _err.status(what):
        yield
    _err.print(f"done: {what}")
