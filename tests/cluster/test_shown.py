"""What a status shows of loads, added up over the actors of a version."""

from __future__ import annotations

from typing import Any

import msgspec

from batching.errors import Internal
from cluster.control import ActorUp, Load, ReadManifest
from shards.orders import Loading
from tests.cluster.control_fakes import (
    FOUR_SHARDS,
    Shell,
    begun,
    config,
    loading,
    manifest,
    of,
    report,
    table_unit,
)


def tell(shell: Shell, name: str, version: int = 1, **of_load: Any) -> None:
    """An actor reports how far it is."""
    told = Loading(servable="m", version=version, **of_load)
    shell.send(ActorUp(report=msgspec.structs.replace(report(name), loading=(told,))))


def progress(shell: Shell, version: int = 1) -> Any:
    rows = shell.core.status()["servables"]["m"]["versions"]
    return next(row["progress"] for row in rows if row["version"] == version)


def test_a_load_of_which_nobody_has_told_yet_has_come_nowhere() -> None:
    shell = begun()
    loading(shell, 1)
    assert progress(shell) == {
        "actors_done": 0,
        "actors": 1,
        "bytes_done": 0,
        "bytes_total": 0,
        "buckets_done": 0,
        "buckets_total": 0,
        "eta_s": None,
    }


def test_bytes_buckets_and_seconds_are_what_the_actor_says() -> None:
    shell = begun()
    loading(shell, 1)
    tell(
        shell, "device-0",
        bytes_done=7, bytes_total=9, buckets_done=1, buckets_total=4, eta_s=2.5,
    )  # fmt: skip
    found = progress(shell)
    assert (found["bytes_done"], found["bytes_total"]) == (7, 9)
    assert (found["buckets_done"], found["buckets_total"]) == (1, 4)
    assert found["eta_s"] == 2.5
    actor = shell.core.status()["actors"]["device-0"]["loading"]["m:1"]
    assert actor == {
        "bytes_done": 7,
        "bytes_total": 9,
        "buckets_done": 1,
        "buckets_total": 4,
        "eta_s": 2.5,
        "note": "",
    }


def test_over_several_actors_the_slowest_counts_and_who_is_done_is_counted() -> None:
    shell = begun(FOUR_SHARDS)
    [read] = of(ReadManifest, shell.listed("m", 1))
    model = manifest("m", 1, words=table_unit("w", [8] * 4))
    loads = of(Load, shell.send(read.done(model)))
    tell(shell, "shard-0", bytes_done=1, bytes_total=8, eta_s=7.0)
    tell(shell, "shard-1", bytes_done=4, bytes_total=8, eta_s=1.0)
    tell(shell, "shard-2", bytes_done=2, bytes_total=8, eta_s=3.0)
    found = progress(shell)
    assert (found["bytes_done"], found["bytes_total"], found["eta_s"]) == (7, 24, None)
    shell.send(next(each for each in loads if each.actor == "shard-3").done())
    found = progress(shell)
    assert (found["actors_done"], found["actors"], found["eta_s"]) == (1, 4, 7.0)


def test_what_does_not_load_has_no_progress() -> None:
    shell = begun(config("m"))
    [load] = loading(shell, 1)
    tell(shell, "device-0", 2, bytes_done=1, bytes_total=2)
    assert progress(shell)["bytes_total"] == 0
    shell.send(load.done())
    assert progress(shell) is None
    [load] = loading(shell, 1, 2)
    shell.send(load.done(Internal("broken")))
    assert progress(shell, 2) is None
