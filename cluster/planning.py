"""The commands that plan: `shardserve plan`, `buckets`, `costs` and `simulate`.

Only words are read here; `cluster.plans`, `bucketing`, `measured` and `simulating` do what is
asked. Only `costs` needs a cluster.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from batching import DEFAULT_POLICY, POLICIES
from batching.errors import InvalidArgument
from cluster.options import (
    DEFAULT_CONFIG,
    AsJson,
    ClusterName,
    ConfigFile,
    RayAddress,
    cluster_of,
)

if TYPE_CHECKING:
    from cluster.layout_costs import Host
    from cluster.simulating import Sweep

__all__ = ["add_to", "buckets", "costs", "plan", "simulate"]

_out = Console(highlight=False, markup=False)

Policies = Annotated[list[str], typer.Option(help=f"{', '.join(POLICIES)}; repeatable.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(plan)
    app.command()(buckets)
    app.command()(costs)
    app.command()(simulate)


def plan(
    tables: Annotated[
        str,
        typer.Argument(
            help="An example (dlrm-v2, dlrm-v3), a YAML file, or with --store NAME[:VERSION]."
        ),
    ],
    store: Annotated[str, typer.Option(help="A store's directory or URL.")] = "",
    signature: Annotated[str, typer.Option(help="Of the bundle: whose look-ups.")] = "",
    hosts: Annotated[
        int | None, typer.Option(help="Equal nodes; 8, or those that the YAML file has.")
    ] = None,
    memory: Annotated[str, typer.Option(help="Of a node, for tables.")] = "256GiB",
    nic: Annotated[str, typer.Option(help="Of a node, a second and direction.")] = "12.5GB",
    bandwidth: Annotated[
        str, typer.Option(help="Of a node's memory, a second, at random rows.")
    ] = "200GB",
    cores: Annotated[int, typer.Option(help="Of a node.")] = 32,
    strategy: Annotated[
        str, typer.Option(help="Made even or few: capacity, load or messages.")
    ] = "load",
    copies: Annotated[int, typer.Option(help="Of every part, on different nodes.")] = 1,
    ids: Annotated[
        list[str] | None, typer.Option(help="Ids of a row, as items=20; repeatable.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows of a request.")] = 1,
    rate: Annotated[
        float, typer.Option(help="Requests a second: latencies are for it, too many are refused.")
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Lay tables out on nodes that need not exist; say what that costs and what is the limit."""
    from cluster import asked_rows, plans
    from cluster.layout_costs import Traffic
    from cluster.plans_shown import show_plan

    nodes: list[Host] = []
    if store:
        from cluster import display
        from shards.store import read

        name, _, version = tables.partition(":")
        number = int(version) if version.isdecimal() else None
        shapes = asked_rows.shapes_in(read(display.existing_store(store), name, number), signature)
    elif tables in plans.EXAMPLES:
        shapes = list(plans.EXAMPLES[tables])
    else:
        shapes, nodes = plans.read_file(Path(tables))
    if hosts is not None or not nodes:
        nodes = plans.hosts_of(8 if hosts is None else hosts, memory, nic, bandwidth, cores)
    found = plans.plan(
        plans.with_ids(shapes, ids or ()), nodes, strategy,
        copies=copies, traffic=Traffic(rows=rows, requests_s=rate),
    )  # fmt: skip
    if as_json:
        print(json.dumps(plans.as_json(found)))  # noqa: T201
    else:
        show_plan(found, _out)
    found.layout.check_rate()


def buckets(
    file: Annotated[
        str,
        typer.Argument(
            help="Lengths: JSON counts or list, CSV length,count, or a length a line; - is stdin."
        ),
    ] = "-",
    count: Annotated[int | None, typer.Option(help="How many sizes; 8 if nothing is said.")] = None,
    waste: Annotated[
        str, typer.Option(help="Instead: as few sizes as keep padding below this, such as 10%.")
    ] = "",
    batch: Annotated[
        bool, typer.Option("--batch", help="FILE has costs of batches: which sizes pay?")
    ] = False,
    within: Annotated[
        str, typer.Option(help="With --batch: the most that fewer sizes may cost more.")
    ] = "5%",
    current: Annotated[
        str, typer.Option(help="Sizes in use, as 16,32,64: is a change worth it?")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Learn which sizes are worth compiling, from lengths that occurred or costs of batches."""
    from cluster import bucketing, display

    text = _text_of(file)
    now = bucketing.read_sizes(current)
    if batch:
        from cluster.measured import costs_in

        found = {
            " ".join([key.unit, *map(str, key.shape)]): bucketing.compare_batches(
                {size: cost.mean_s for size, cost in sizes.items()},
                within=_share(within),
                current=now,
            )
            for key, sizes in costs_in(text, file).items()
        }
    else:
        if count is None and not waste:
            count = 8
        told = bucketing.compare_lengths(
            bucketing.read_histogram(text),
            count=count,
            waste=_share(waste) if waste else None,
            current=now,
        )
        found = {"lengths": told}
    if as_json:
        print(json.dumps(found if batch else found["lengths"]))  # noqa: T201
    else:
        display.show_buckets(found, _out)


def _text_of(file: str) -> str:
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{file} cannot be read: {error}") from None


def _share(text: str) -> float:
    """A share such as ``10%`` or ``0.1``."""
    number = text.removesuffix("%")
    try:
        return float(number) / (100.0 if number != text else 1.0)
    except ValueError:
        raise InvalidArgument(f"{text!r} is no share such as 10% or 0.1") from None


def simulate(
    policy: Policies = [DEFAULT_POLICY],  # noqa: B006 - typer copies it
    models: Annotated[int, typer.Option(help="Servables, each with a unit of its own.")] = 1,
    shared: Annotated[bool, typer.Option("--shared", help="All use one (first) unit.")] = False,
    chain: Annotated[int, typer.Option(help="Units that each request goes through.")] = 1,
    devices: Annotated[int, typer.Option(help="Devices.")] = 1,
    replicas: Annotated[int, typer.Option(help="Devices that have a unit; 0: all.")] = 0,
    routers: Annotated[int, typer.Option(help="Routers before the devices; 0: none.")] = 0,
    delay_ms: Annotated[float, typer.Option(help="Mean time of a frame on its way.")] = 0.0,
    delay_cv: Annotated[float, typer.Option(help="How much that varies.")] = 0.0,
    router_us: Annotated[float, typer.Option(help="Of a router, for each request.")] = 0.0,
    host_us: Annotated[float, typer.Option(help="Of an event loop, for each request.")] = 0.0,
    batch_us: Annotated[float, typer.Option(help="Of it, for each frame and batch.")] = 0.0,
    rate: Annotated[float, typer.Option(help="Requests a second, all together.")] = 1000.0,
    power: Annotated[float, typer.Option(help="Exponent of a power law over servables.")] = 0.0,
    seconds: Annotated[float, typer.Option(help="How long requests come.")] = 10.0,
    cv: Annotated[float, typer.Option(help="Burstiness; 1 is Poisson.")] = 1.0,
    maf: Annotated[bool, typer.Option("--maf", help="Rates change, as of functions.")] = False,
    slo_ms: Annotated[float, typer.Option(help="Deadline of each request; 0: none.")] = 50.0,
    flood: Annotated[float, typer.Option(help="Factor on the last servable's rate.")] = 1.0,
    criticality: Annotated[
        str, typer.Option(help="Shares of the requests, as critical=0.1,sheddable=0.3.")
    ] = "",
    trace: Annotated[
        str,
        typer.Option(help="CSV: at (or TIMESTAMP), owner, rows, length, budget_ms, criticality."),
    ] = "",
    lengths: Annotated[
        bool, typer.Option("--lengths", help="Rows are as long as Europarl's sentences.")
    ] = False,
    buckets: Annotated[str, typer.Option(help="Lengths that are compiled, as 16,32,64.")] = "",
    costs: Annotated[
        Path | None, typer.Option(help="What `shardserve costs` saved, or unit to size to seconds.")
    ] = None,
    alpha_ms: Annotated[float, typer.Option(help="Cost of a batch, without --costs.")] = 4.0,
    beta_ms: Annotated[float, typer.Option(help="Cost of each row, without --costs.")] = 0.25,
    largest: Annotated[int, typer.Option(help="Largest batch, without --costs.")] = 64,
    noise: Annotated[
        float | None, typer.Option(help="How much batch times vary; else as was measured.")
    ] = None,
    loads: Annotated[str, typer.Option(help="Factors on the rate, as 0.5,0.8,1.1.")] = "",
    plot: Annotated[
        Path | None, typer.Option(help="Draw attainment and goodput over the load into this file.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Serve a made-up workload on imagined devices, with the scheduler that really decides."""
    from cluster import bucketing, simulating
    from cluster.measured import costs_of
    from cluster.scenarios import Scenario

    ladder = bucketing.read_sizes(buckets)
    scenario = Scenario(
        models=models, shared=shared, chain=chain, devices=devices, replicas=replicas,
        routers=routers, delay_ms=delay_ms, delay_cv=delay_cv, router_us=router_us,
        host_us=host_us, batch_us=batch_us, rate=rate, power=power, seconds=seconds, cv=cv,
        maf=maf, slo_ms=slo_ms, flood=flood, criticalities=_shares(criticality), trace=trace,
        lengths=lengths,
        buckets=ladder.sizes if ladder else (), alpha_ms=alpha_ms, beta_ms=beta_ms,
        largest=largest, noise=noise, seed=seed,
    )  # fmt: skip
    factors = _numbers(loads) if loads else simulating.LOADS if plot else (1.0,)
    table = None if costs is None else costs_of(costs)
    found = simulating.sweep(scenario, policy, factors, table)
    if plot is not None:
        simulating.draw(found, plot)
    _show(found, as_json=as_json)


def _show(found: Sweep, *, as_json: bool) -> None:
    """Print what policies came to: of one load in full, of several what they differ in."""
    from cluster import display

    loads = {load for each in found.values() for load in each}
    single = {name: each[next(iter(loads))] for name, each in found.items()}
    if as_json:
        print(json.dumps(found if len(loads) > 1 else single))  # noqa: T201
    elif len(loads) > 1:
        display.show_sweep(found, _out)
    else:
        display.show_simulation(single, _out)


def _shares(text: str) -> dict[str, float]:
    pairs = [part.partition("=") for part in text.split(",") if part]
    for name, sign, _ in pairs:
        if not sign:
            raise InvalidArgument(f"{name!r} is no share of a criticality such as critical=0.1")
    return {name.strip(): _share(share.strip()) for name, _, share in pairs}


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise InvalidArgument(f"{text!r} is no list of numbers such as 0.5,0.8") from None


def costs(
    out: Annotated[Path, typer.Argument(help="File to write.")],
    config: ConfigFile = DEFAULT_CONFIG,
    cluster: ClusterName = "",
    ray: RayAddress = "auto",
) -> None:
    """Save what batches take on a running cluster's devices, for `simulate --costs`."""
    from cluster import bringup, measured

    found = measured.from_status(bringup.status(cluster_of(config, cluster), ray=ray))
    measured.save(found, out)
    _out.print(f"{len(found.measured)} lanes of {', '.join(found.servables)} in {out}")
