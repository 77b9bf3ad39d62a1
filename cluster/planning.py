"""The commands that plan without a cluster: `shardserve buckets` and `shardserve simulate`.

Only words are read here; `cluster.bucketing` and `cluster.simulating` do what is asked.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from batching import DEFAULT_POLICY, POLICIES
from batching.errors import InvalidArgument

__all__ = ["add_to", "buckets", "simulate"]

_out = Console(highlight=False, markup=False)

Policies = Annotated[list[str], typer.Option(help=f"{', '.join(POLICIES)}; repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, last line of the output.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(buckets)
    app.command()(simulate)


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
        from cluster.simulating import costs_in

        found = {
            unit: bucketing.compare_batches(table, within=_share(within), current=now)
            for unit, table in costs_in(text, file).items()
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
    shared: Annotated[bool, typer.Option("--shared", help="All use one unit.")] = False,
    rate: Annotated[float, typer.Option(help="Requests a second, all together.")] = 1000.0,
    power: Annotated[float, typer.Option(help="Exponent of a power law over servables.")] = 0.0,
    seconds: Annotated[float, typer.Option(help="How long requests come.")] = 10.0,
    cv: Annotated[float, typer.Option(help="Burstiness; 1 is Poisson.")] = 1.0,
    slo_ms: Annotated[float, typer.Option(help="Deadline of each request; 0: none.")] = 50.0,
    flood: Annotated[float, typer.Option(help="Factor on the last servable's rate.")] = 1.0,
    trace: Annotated[str, typer.Option(help="CSV with at, owner, rows, budget_ms.")] = "",
    costs: Annotated[Path | None, typer.Option(help="JSON: unit to size to seconds.")] = None,
    alpha_ms: Annotated[float, typer.Option(help="Cost of a batch, without --costs.")] = 4.0,
    beta_ms: Annotated[float, typer.Option(help="Cost of each row, without --costs.")] = 0.25,
    largest: Annotated[int, typer.Option(help="Largest batch, without --costs.")] = 64,
    noise: Annotated[float, typer.Option(help="How much batch times vary.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Serve a made-up workload on an imagined device, with the scheduler that really decides."""
    from cluster import display, simulating

    table = None if costs is None else simulating.costs_of(costs)
    reports = {}
    for name in policy:
        scenario = simulating.Scenario(
            policy=name, models=models, shared=shared, rate=rate, power=power, seconds=seconds,
            cv=cv, slo_ms=slo_ms, flood=flood, trace=trace, alpha_ms=alpha_ms, beta_ms=beta_ms,
            largest=largest, noise=noise, seed=seed,
        )  # fmt: skip
        reports[name] = simulating.summary(simulating.run_scenario(scenario, table))
    if as_json:
        _out.print_json(json.dumps(reports))
    else:
        display.show_simulation(reports, _out)
