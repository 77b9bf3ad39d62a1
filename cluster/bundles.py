"""`shardserve bundle`: bundles from store to store, into one file, and out of the way.

Reads a cluster's state to learn which versions it holds; talks to no cluster.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Final, TypeVar

import typer
from rich.console import Console

from batching.errors import FailedPrecondition, InvalidArgument
from cluster.declared import decode
from cluster.display import existing_store
from cluster.recordings import recorded_in, spread
from shards.bundle import Bundle
from shards.folding import fold
from shards.local import LocalStore
from shards.locations import is_url
from shards.progress import Progress
from shards.recorded import REQUESTS_MAX, Recorded
from shards.states import States
from shards.store import Store, open_store
from shards.sweeping import references_of, sweep
from shards.transfer import Transferred, open_source, transfer, versions_named
from shards.transfer import pack as pack_versions
from shards.warmups import add_warmups

__all__ = ["app", "parse_age"]

T = TypeVar("T")

app = typer.Typer(help="Pack, copy, warm up and clear away bundles.", no_args_is_help=True)

_out = Console(highlight=False, markup=False)
_err = Console(stderr=True, highlight=False, markup=False)

_AGE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd])")
_SECONDS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SHOW_S: Final = 0.2

Servables = Annotated[
    list[str] | None,
    typer.Argument(help="NAME (its newest version), NAME:VERSION or NAME:*; everything if none."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, last line of the output.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace versions that are other bundles.")
]
From = Annotated[str, typer.Argument(help="A directory, URL, or archive (.tar).")]
To = Annotated[str, typer.Argument(help="A directory or URL.")]


@app.command()
def pack(
    store: From,
    servable: Annotated[str, typer.Argument(help="NAME, NAME:VERSION or NAME:*.")],
    out: Annotated[str, typer.Argument(help="FILE.tar, or a directory that becomes a store.")],
    as_json: AsJson = False,
) -> None:
    """Put a bundle with everything it needs into one file or directory."""
    if is_url(out):
        raise InvalidArgument(f"{out} is not a path: use `shardserve bundle push`")
    source = open_source(store)
    versions = versions_named(source, [servable])
    _tell(_shown(f"packing {out}", lambda p: pack_versions(source, versions, out, p)), as_json)


@app.command()
def push(
    source: From,
    target: To,
    servables: Servables = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Copy bundles to another store: missing blobs only, manifests last."""
    _copy(source, target, servables or [], overwrite, as_json)


@app.command()
def pull(
    source: From,
    target: To,
    servables: Servables = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Copy bundles from another store: the same as `push`, said from the other side."""
    _copy(source, target, servables or [], overwrite, as_json)


@app.command()
def compact(
    store: To,
    servable: Annotated[str, typer.Argument(help="NAME (its newest version) or NAME:VERSION.")],
    version: Annotated[
        int | None, typer.Option("--as", help="Number of the new version; else the next.")
    ] = None,
    ahead: Annotated[
        bool, typer.Option("--ahead", help="Save no version: fold for deltas that will be saved.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Save a version anew with its overlays folded into its tables; the rows stay the same."""
    opened = existing_store(store)
    named = versions_named(opened, [servable])
    if len(named) != 1:
        raise InvalidArgument(f"{servable!r} names {len(named)} versions, not one")
    ((name, base),) = named
    if ahead:
        if version is not None:
            raise InvalidArgument("--ahead saves no version, so --as has nothing to name")
        _compact_ahead(opened, name, base, as_json)
        return
    delta = Bundle.delta(opened, name, base, version)
    tables = _shown(f"compacting {name}:{base}", delta.compact)
    if not tables:
        raise FailedPrecondition(f"{name}:{base} has no overlays: there is nothing to compact")
    delta.commit()
    if as_json:
        told = {"name": name, "base": base, "version": delta.version, "tables": list(tables)}
        print(json.dumps(told))  # noqa: T201
        return
    _out.print(
        f"{name}:{delta.version} is {name}:{base} without overlays: {', '.join(tables)}",
        soft_wrap=True,
    )


def _compact_ahead(store: Store, name: str, version: int, as_json: bool) -> None:
    manifest = store.read_manifest(name, version)
    count = _shown(f"compacting {name}:{version}", partial(fold, store, manifest, 1))
    if as_json:
        print(json.dumps({"name": name, "version": version, "partitions": count}))  # noqa: T201
        return
    _out.print(f"{name}:{version}: {count} partitions are folded for deltas upon it")


@app.command("add-warmup")
def add_warmup(
    store: To,
    servable: Annotated[str, typer.Argument(help="NAME (its newest version) or NAME:VERSION.")],
    files: Annotated[
        list[Path], typer.Argument(help="Files of a request log, or bodies of :predict (.json).")
    ],
    count: Annotated[
        int, typer.Option(help="At most so many, spread evenly over those in the files.")
    ] = REQUESTS_MAX,
    replace: Annotated[
        bool, typer.Option("--replace", help="Drop those that the version has.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Give a version requests that it answers, wherever it is loaded, before it is available."""
    opened = existing_store(store)
    named = versions_named(opened, [servable])
    if len(named) != 1:
        raise InvalidArgument(f"{servable!r} names {len(named)} versions, not one")
    ((name, version),) = named
    signatures = opened.read_manifest(name, version).signatures
    found: list[Recorded] = []
    for file in files:
        requests, damage = recorded_in(file, signatures)
        if damage:
            _err.print(f"{damage}; {len(requests)} requests before that are taken", soft_wrap=True)
        found += requests
    taken = spread(found, count)
    manifest = add_warmups(opened, name, version, taken, replace=replace)
    has = 0 if manifest.warmups is None else manifest.warmups.requests
    if as_json:
        told = {"name": name, "version": version, "added": len(taken), "warmups": has}
        print(json.dumps(told))  # noqa: T201
        return
    _out.print(f"{name}:{version}: {len(taken)} of {len(found)} added, {has} warm-up requests")


@app.command()
def gc(
    store: To,
    grace: Annotated[
        str, typer.Option(help="What is younger stays: 90s, 30m, 24h, 7d. No save may take longer.")
    ] = "24h",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Even if a cluster holds a version whose manifest is gone."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remove blobs that no manifest refers to; safe beside clusters and saves."""
    opened = existing_store(store)
    found = sweep(
        opened.shelf,
        lambda known: references_of(opened, known),
        grace_s=parse_age(grace),
        placed=() if force else _placed(opened),
        dry_run=dry_run,
    )
    left_over = 0
    if isinstance(opened, LocalStore) and not dry_run:
        left_over = opened.clear(parse_age(grace))
    if as_json:
        told = {name: getattr(found, name) for name in found.__dataclass_fields__}
        print(json.dumps({**told, "dry_run": dry_run, "left_over_bytes": left_over}))  # noqa: T201
        return
    done = "would be removed" if dry_run else "removed"
    _out.print(
        f"{len(found.removed)} of {found.blobs} blobs {done} ({_mib(found.removed_bytes)} of "
        f"{_mib(found.bytes)}); {found.young} unreferenced ones are younger than {grace}",
        soft_wrap=True,
    )
    if left_over:
        _out.print(f"{_mib(left_over)} of half-written files removed")


def parse_age(text: str) -> float:
    """Seconds from ``90s``, ``30m``, ``24h`` or ``7d``.

    Raises:
        InvalidArgument: the text is none of these.
    """
    match = _AGE.fullmatch(text.strip())
    if match is None:
        raise InvalidArgument(f"{text!r} is not an age: write 90s, 30m, 24h or 7d")
    return float(match[1]) * _SECONDS[match[2]]


def _placed(store: Store) -> set[tuple[str, int]]:
    """Versions that clusters on this store hold, by what they wrote down last."""
    found: set[tuple[str, int]] = set()
    for cluster in States(store.shelf).clusters():
        latest = store.latest_state(cluster)
        if latest is not None:
            found |= {(each.servable, each.version) for each in decode(latest[2]).placements}
    return found


def _copy(source: str, target: str, names: list[str], overwrite: bool, as_json: bool) -> None:
    opened = open_source(source)
    versions = versions_named(opened, names)
    to = open_store(target)
    _tell(
        _shown(
            f"copying to {to.url}",
            lambda progress: transfer(opened, to, versions, progress, overwrite=overwrite),
        ),
        as_json,
    )


def _shown(what: str, work: Callable[[Progress], T]) -> T:
    """Work, with how far it has come on the terminal."""
    progress = Progress(0)
    ended = threading.Event()
    with _err.status(what) as line:

        def show() -> None:
            while not ended.wait(_SHOW_S):
                line.update(f"{what}: {_mib(progress.done)} of {_mib(progress.total)}")

        shower = threading.Thread(target=show, name="progress", daemon=True)
        shower.start()
        try:
            return work(progress)
        finally:
            ended.set()
            shower.join()


def _tell(found: Transferred, as_json: bool) -> None:
    names = [f"{name}:{version}" for name, version in found.versions]
    if as_json:
        told = {"versions": names, "blobs": found.blobs, "bytes": found.bytes, "there": found.there}
        print(json.dumps(told))  # noqa: T201
        return
    _out.print(
        f"{', '.join(names) or 'nothing'}: {found.blobs} blobs copied ({_mib(found.bytes)}), "
        f"{found.there} were there",
        soft_wrap=True,
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
