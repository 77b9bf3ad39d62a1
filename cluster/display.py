"""Tables for a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from batching.errors import InvalidArgument, NotFound
from cluster.settling import shares
from shards import inspection
from shards.store import LocalStore, Store, open_store, read

__all__ = [
    "existing_store",
    "inspect_store",
    "show_buckets",
    "show_simulation",
    "show_status",
    "show_sweep",
    "show_versions",
]

_TIMES: Final = ("p50_ms", "p99_ms")


def show_status(status: dict[str, Any], console: Console) -> None:
    """Print a controller's status."""
    servables = Table("servable", "version", "state", "where", "why", title="Servables")
    for name, servable in status["servables"].items():
        if not servable["versions"]:
            _add(servables, name, "", "", "", servable["listing"])
        for version in servable["versions"]:
            _add(
                servables,
                name,
                str(version["version"]),
                version["state"],
                ", ".join(version["actors"]),
                _why(version),
            )
    actors = Table("actor", "state", "pid", "node", "holds", "memory", "why", title="Actors")
    for name, actor in status["actors"].items():
        _add(
            actors,
            name,
            actor["state"],
            str(actor["pid"] or ""),
            actor["node"][:12],
            ", ".join(_held(key, actor["loading"].get(key)) for key in actor["holds"]),
            _memory(actor),
            actor["reason"],
        )
    devices = Table(
        "device", "busy", "in flight", "servable", "unit", "req/s", "share", "in line", "wait p99",
        "in time", "drops/s", title="Devices, over the last seconds",
    )  # fmt: skip
    for name, actor in status["actors"].items():
        if actor["device"] is not None:
            _add_device(devices, name, actor["device"])
    doors = Table("router", "address", "pid", "trouble", title="Doors")
    for door in status["doors"]:
        address = f"{door['scheme']}://{door['host']}:{door['port']}"
        trouble = "; ".join(filter(None, [door["error"], *door["warnings"]]))
        _add(doors, door["router"], address, str(door["pid"]), trouble)
    for table in (servables, actors, devices, doors):
        console.print(table)
    _show_tables(status["servables"], console)
    if status["shared"]:
        shared = Table("where", "kind", "MiB", "refs", "users", title="Held once for several")
        for row in status["shared"]:
            _add(
                shared, row["where"][:12], row["kind"], f"{row['bytes'] / 2**20:.1f}",
                str(row["refs"]), ", ".join(row["users"]),
            )  # fmt: skip
        console.print(shared)
    _show_caches(status["actors"], console)
    for each in status["compactions"]:
        console.print(_compaction(each), soft_wrap=True)
    for name, shift in status["rebalance"]["shifts"].items():
        console.print(f"{name} moves {shift} (rebalance)", soft_wrap=True)
    console.print(f"term {status['term']}, epoch {status['epoch']}, policy {status['policy']}")


def show_versions(servables: dict[str, Any], console: Console) -> None:
    """Print versions with their labels and shares of requests, from a controller's status."""
    table = Table("servable", "version", "state", "aspired", "labels", "share", "why")
    notes: list[str] = []
    for name, servable in servables.items():
        parts = shares(servable)
        labels = servable["labels"].items()
        for version in servable["versions"]:
            number = version["version"]
            _add(
                table,
                name,
                str(number),
                version["state"],
                "yes" if version["aspired"] else "",
                ", ".join(sorted(label for label, at in labels if at == number)),
                f"{parts[number]:.1%}" if number in parts else "",
                _why(version),
            )
        if not servable["versions"]:
            _add(table, name, "", "", "", "", "", servable["listing"])
        complete = ", ".join(map(str, servable["complete"])) or "none"
        notes.append(
            f"{name}: complete in the store: {complete}; labels, split: {servable['rollout']}"
        )
    console.print(table)
    for note in notes:
        console.print(note, soft_wrap=True)


def _add_device(table: Table, name: str, device: dict[str, Any]) -> None:
    """A line for the device, and one for each servable at each of its units."""
    _add(table, name, f"{device['busy']:.1%}", str(device["in_flight"]))
    for row in device["servables"]:
        share, wait_s, in_time = row["share"], row["queue_p99_s"], row["attainment"]
        _add(
            table, "", "", "", row["servable"], row["unit"], f"{row['requests_s']:.1f}",
            "" if share is None else f"{share:.0%}", str(row["waiting_rows"]),
            "" if wait_s is None else f"{wait_s * 1000:.3g} ms",
            "" if in_time is None else f"{in_time:.2%}",
            ", ".join(f"{cause} {rate:.1f}" for cause, rate in row["drops_s"].items()),
        )  # fmt: skip


def show_simulation(reports: dict[str, dict[str, Any]], console: Console) -> None:
    """Print what simulations came to: a table for each policy, a line for each servable.

    And one for each criticality, where there are several.
    """
    for policy, report in reports.items():
        table = Table(
            "servable", "good/s", "in time", "p50 ms", "p99 ms", "refused", "shed", "expired",
            title=f"{policy}: {report['goodput']:g} a second in time, {report['rows_a_batch']:g} "
            f"rows a batch, device busy {report['busy']:.0%}",
        )  # fmt: skip
        lines = dict(report["servables"])
        if len(report["criticalities"]) > 1:
            lines |= {f"all {name}": told for name, told in report["criticalities"].items()}
        for owner, found in lines.items():
            times = ["" if found[key] is None else f"{found[key]:.1f}" for key in _TIMES]
            counts = [str(found[key]) for key in ("refused", "shed", "expired")]
            _add(
                table, owner, f"{found['goodput']:g}", f"{found['attainment']:.1%}",
                *times, *counts,
            )  # fmt: skip
        console.print(table)


def show_buckets(found: dict[str, dict[str, Any]], console: Console) -> None:
    """Print learned ladders beside others: a table for the lengths, or for each unit."""
    for name, told in found.items():
        figure = "slower" if "slower" in told["ladders"]["learned"] else "waste"
        table = Table("ladder", "sizes", figure, title=name)
        for ladder, each in told["ladders"].items():
            sizes = each["buckets"]
            shown = ", ".join(map(str, sizes)) if len(sizes) <= 24 else f"{len(sizes)} sizes"
            _add(table, ladder, shown, f"{each[figure]:.1%}")
        console.print(table)
        if "change" in told:
            verdict = "change" if told["change"] else "keep the present buckets"
            console.print(f"predicted saving {told['saving']:.1%}: {verdict}")


def show_sweep(found: Mapping[str, Mapping[float, dict[str, Any]]], console: Console) -> None:
    """Print what policies came to at several loads: a line for each load."""
    for name, key in (("in time", "attainment"), ("a second in time", "goodput")):
        table = Table("load", *found, title=name)
        for load in next(iter(found.values())):
            cells = [loads[load][key] for loads in found.values()]
            shown = [f"{cell:.1%}" if key == "attainment" else f"{cell:g}" for cell in cells]
            _add(table, f"{load:g}", *shown)
        console.print(table)


def existing_store(name: str) -> Store:
    """The store that a path or URL means.

    Raises:
        NotFound: there is no such directory.
        ServingError: the URL means nothing.
    """
    store = open_store(name)
    if isinstance(store, LocalStore) and not store.path.is_dir():
        raise NotFound(f"{store.path} is not a directory")
    return store


def inspect_store(
    name_or_path: str, servable: str, *, verify: bool, as_json: bool, console: Console
) -> None:
    """Print what is in a store, or one bundle.

    Raises:
        NotFound: there is no such directory.
        ServingError: the bundle's own trouble.
    """
    store = existing_store(name_or_path)
    if not servable:
        found = {name: list(store.versions(name)) for name in store.servables()}
        if as_json:
            print(json.dumps(found))  # noqa: T201
            return
        table = Table("servable", "versions")
        for name, versions in found.items():
            _add(table, name, ", ".join(map(str, versions)))
        console.print(table)
        return
    name, colon, number = servable.partition(":")
    if colon and not (number.isascii() and number.isdigit()):
        raise InvalidArgument(f"{servable!r} is not NAME or NAME:VERSION")
    manifest = read(store, name, int(number) if colon else None)
    described = inspection.describe(manifest, store)
    if verify:
        described["verified"] = inspection.verify(store, name, manifest.version)
    if as_json:
        print(json.dumps(described))  # noqa: T201
    else:
        console.print(inspection.render(described), soft_wrap=True)


def _held(key: str, loading: dict[str, Any] | None) -> str:
    """What an actor holds, or how far it has come."""
    if loading is None:
        return key
    if loading["note"]:
        return f"{key} ({loading['note']})"
    return f"{key} ({_progress(loading)})"


def _why(version: Mapping[str, Any]) -> str:
    """Why a version is where it is, or how far it has come."""
    text: str = version["error_message"] or version["note"]
    return text or (_progress(version["progress"]) if version["progress"] else "")


def _show_tables(servables: Mapping[str, Any], console: Console) -> None:
    tables = Table("servable", "version", "placement", "messages", "shards", title="Tables")
    for name, servable in servables.items():
        for version in servable["versions"]:
            if version["tables"] is not None:
                _add(tables, name, str(version["version"]), servable["placement"],
                     str(version["tables"]["messages"]), _shards(version["tables"]))  # fmt: skip
    if tables.row_count:
        console.print(tables)


def _shards(tables: Mapping[str, Any]) -> str:
    """What each shard actor holds of a version's tables, and its share of the look-ups."""
    return ", ".join(
        f"{actor} {row['bytes'] / 2**20:,.1f} MiB"
        + ("" if row["load"] is None else f" {row['load']:.0%}")
        for actor, row in tables["actors"].items()
    )


def _progress(progress: Mapping[str, Any]) -> str:
    """How far a load has come, on one actor or on all."""
    told = []
    if progress["bytes_done"] < progress["bytes_total"] or not progress["buckets_total"]:
        done, total = progress["bytes_done"] / 2**20, progress["bytes_total"] / 2**20
        told.append(f"{done:.0f} of {total:.0f} MiB")
    if progress["buckets_total"]:
        told.append(f"{progress['buckets_done']} of {progress['buckets_total']} buckets")
    if progress.get("actors", 1) > 1:
        told.append(f"{progress['actors_done']} of {progress['actors']} actors")
    if progress["eta_s"] is not None:
        told.append(f"{progress['eta_s']:.0f} s left")
    return ", ".join(told)


def _show_caches(actors: Mapping[str, Any], console: Console) -> None:
    """Print a line for each table in the NVMe tier and actor, if there are any."""
    table = Table(
        "actor", "unit", "users", "MiB used", "of", "hits", "reads", "MiB read", "wait s",
        title="Rows on disk, and what is cached of them",
    )  # fmt: skip
    for name, actor in actors.items():
        for unit in actor["units"]:
            cache = unit["cache"]
            if cache is None:
                continue
            asked = cache["hits"] + cache["misses"]
            _add(
                table, name, unit["id"][:12], ", ".join(unit["users"]),
                f"{cache['used'] / 2**20:.1f}", f"{cache['budget'] / 2**20:.1f}",
                f"{cache['hits'] / asked:.1%}" if asked else "", str(cache["reads"]),
                f"{cache['read_bytes'] / 2**20:.0f}", f"{cache['wait_s']:.1f}",
            )  # fmt: skip
    if table.row_count:
        console.print(table)


def _memory(actor: Mapping[str, Any]) -> str:
    """What is measured, of what may be promised, and what is."""
    measured, most, promised = (
        f"{actor[name] / 2**20:.0f}"
        for name in ("reserved_bytes", "capacity_bytes", "promised_bytes")
    )
    return f"{measured} of {most} MiB, {promised} promised"


def _compaction(row: Mapping[str, Any]) -> str:
    name = f"{row['servable']}:{row['version']}"
    if row["running_s"] is not None:
        return f"{name} is being compacted, for {row['running_s']:.0f} s"
    if row["again_s"] is not None:
        return f"{name} could not be compacted; again in {row['again_s']:.0f} s"
    return f"{name} waits to be compacted"


def _add(table: Table, *cells: str) -> None:
    # As Text: "float32[b,4]" in a message is not markup.
    table.add_row(*map(Text, cells))
