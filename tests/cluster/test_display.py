"""Tables for a terminal: what they say, and that data in them is never markup."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from batching.errors import DataLoss, InvalidArgument, NotFound
from cluster.display import inspect_store, show_status
from shards.store import LocalStore
from tests.shards.bundles import full_manifest


def loading(**changes: Any) -> dict[str, Any]:
    nothing: dict[str, Any] = {
        "bytes_done": 0,
        "bytes_total": 0,
        "buckets_done": 0,
        "buckets_total": 0,
        "eta_s": None,
        "note": "",
    }
    return nothing | changes


STATUS: dict[str, Any] = {
    "term": 3,
    "epoch": 42,
    "rebalance": {"wanted": True, "shifts": {"mlp:1": "words[0,2]: shard-0 -> shard-1"}},
    "policy": "effsafe",
    "servables": {
        "mlp": {
            "placement": "load",
            "listing": "ok",
            "versions": [
                {
                    "version": 2,
                    "state": "LOADING",
                    "actors": ["device-0", "device-1"],
                    "tables": None,
                    "error_message": "",
                    "note": "waits for memory",
                    "progress": None,
                },
                {
                    "version": 1,
                    "state": "END",
                    "actors": [],
                    "tables": None,
                    "error_message": "input 'x' must have shape [b,4] [/red]",
                    "note": "",
                    "progress": None,
                },
                {
                    "version": 3,
                    "state": "LOADING",
                    "actors": ["shard-0", "shard-1", "device-0"],
                    "tables": {
                        "messages": 2,
                        "actors": {
                            "shard-0": {"bytes": 3 << 20, "load": 0.75},
                            "shard-1": {"bytes": 1 << 20, "load": 0.25},
                        },
                    },
                    "error_message": "",
                    "note": "",
                    "progress": {
                        "actors_done": 1,
                        "actors": 3,
                        "bytes_done": 3 << 20,
                        "bytes_total": 8 << 20,
                        "buckets_done": 0,
                        "buckets_total": 4,
                        "eta_s": 12.4,
                    },
                },
            ],
        },
        "empty": {"listing": "not listed yet", "versions": []},
    },
    "actors": {
        "device-0": {
            "state": "UP",
            "pid": 4711,
            "node": "0123456789abcdef",
            "holds": {
                "mlp:2": "LOADED",
                "big:1": "LOADING",
                "new:1": "LOADING",
                "far:1": "LOADING",
            },
            "loading": {
                "big:1": loading(bytes_done=34 << 20, bytes_total=100 << 20),
                "new:1": loading(
                    bytes_done=5, bytes_total=5, buckets_done=1, buckets_total=8, eta_s=70.0
                ),
                "far:1": loading(note="waits for the store: away"),
            },
            "device": {
                "busy": 0.25,
                "in_flight": 2,
                "servables": [
                    {
                        "servable": "mlp",
                        "unit": "0123456789ab",
                        "requests_s": 120.0,
                        "waiting_rows": 7,
                        "queue_p99_s": 0.0025,
                        "share": 0.5,
                        "attainment": 0.995,
                        "drops_s": {"expired": 0.6},
                    }
                ],
            },
            "reserved_bytes": 3 << 20,
            "promised_bytes": 5 << 20,
            "capacity_bytes": 8 << 20,
            "reason": "",
            "units": [
                {"id": "a" * 64, "users": ["mlp:1"], "cache": None},
                {
                    "id": "0123456789abcdef",
                    "users": ["cold:1", "cold:2"],
                    "cache": {
                        "budget": 4 << 20,
                        "nbytes": 3 << 20,
                        "used": 2 << 20,
                        "hits": 3,
                        "misses": 1,
                        "reads": 17,
                        "read_bytes": 9 << 20,
                        "wait_s": 0.25,
                        "direct": True,
                    },
                },
            ],
        },
        "device-1": {
            "state": "DOWN",
            "pid": None,
            "node": "",
            "holds": {},
            "loading": {},
            "device": None,
            "reserved_bytes": 0,
            "promised_bytes": 0,
            "capacity_bytes": 0,
            "reason": "killed",
            "units": [],
        },
    },
    "shared": [
        {
            "where": "device-0",
            "kind": "device",
            "bytes": 3 << 20,
            "refs": 2,
            "users": ["mlp:1/trunk", "words:7/encoder"],
        }
    ],
    "compactions": [
        {"servable": "words", "version": 7, "running_s": 12.3, "again_s": None},
        {"servable": "rows", "version": 2, "running_s": None, "again_s": 30.0},
        {"servable": "ids", "version": 1, "running_s": None, "again_s": None},
    ],
    "doors": [
        {
            "router": "router-1",
            "scheme": "https",
            "host": "0.0.0.0",
            "port": 8501,
            "pid": 12,
            "error": "",
            "warnings": ["open to anybody"],
        }
    ],
}


def shown(status: dict[str, Any]) -> str:
    out = io.StringIO()
    show_status(status, Console(file=out, width=320))
    return out.getvalue()


def row_of(text: str, *cells: str) -> str:
    """The one line that has all of these."""
    [line] = [line for line in text.splitlines() if all(cell in line for cell in cells)]
    return line


def test_every_version_is_shown_with_what_it_waits_for() -> None:
    line = row_of(shown(STATUS), "mlp", "LOADING", "device-0, device-1")
    assert "waits for memory" in line


def test_a_servable_without_versions_says_why() -> None:
    row_of(shown(STATUS), "empty", "not listed yet")


def test_tables_are_shown_with_what_their_placement_comes_to() -> None:
    lines = shown(STATUS).splitlines()
    (line,) = (line for line in lines if "3.0 MiB" in line)
    assert "load" in line
    assert "│ 2 " in line
    assert "shard-0 3.0 MiB 75%, shard-1 1.0 MiB 25%" in line


def test_parts_that_are_moved_are_shown_with_where_they_go() -> None:
    row_of(shown(STATUS), "mlp:1 moves words[0,2]: shard-0 -> shard-1 (rebalance)")


def test_what_is_held_once_is_shown_with_its_users_and_their_number() -> None:
    row_of(shown(STATUS), "device-0", "3.0", "2", "mlp:1/trunk, words:7/encoder")
    assert "Held once" not in shown({**STATUS, "shared": []})


def test_what_is_cached_of_rows_on_disk_is_shown_where_there_are_any() -> None:
    users = "cold:1, cold:2"
    row_of(shown(STATUS), "device-0", "0123456789ab", users, "2.0", "4.0", "75.0%", "17", "9")
    quiet = {name: {**actor, "units": []} for name, actor in STATUS["actors"].items()}
    assert "Rows on disk" not in shown({**STATUS, "actors": quiet})


def test_brackets_in_a_message_are_shown_and_not_taken_for_markup() -> None:
    row_of(shown(STATUS), "END", "must have shape [b,4] [/red]")


def test_actors_are_shown_with_process_and_memory() -> None:
    line = row_of(shown(STATUS), "device-0", "4711")
    assert "0123456789ab " in line
    assert "3 of 8 MiB, 5 promised" in line
    row_of(shown(STATUS), "device-1", "DOWN", "killed")


def test_what_is_loading_is_shown_with_how_far_it_has_come_or_what_it_waits_for() -> None:
    row_of(
        shown(STATUS),
        "device-0",
        "mlp:2, big:1 (34 of 100 MiB), new:1 (1 of 8 buckets, 70 s left), "
        "far:1 (waits for the store: away)",
    )


def test_a_version_that_loads_is_shown_with_how_far_all_its_actors_have_come() -> None:
    row_of(shown(STATUS), "mlp", "3 of 8 MiB, 0 of 4 buckets, 1 of 3 actors, 12 s left")


def test_compactions_are_shown_as_they_are_under_way_or_wait() -> None:
    text = shown(STATUS)
    row_of(text, "words:7 is being compacted, for 12 s")
    row_of(text, "rows:2 could not be compacted; again in 30 s")
    row_of(text, "ids:1 waits to be compacted")


def test_what_a_device_did_lately_is_shown_by_servable() -> None:
    lines = [" ".join(line.replace("│", " ").split()) for line in shown(STATUS).splitlines()]
    assert "device-0 25.0% 2" in lines
    assert "mlp 0123456789ab 120.0 50% 7 2.5 ms 99.50% expired 0.6" in lines


def test_doors_and_the_epoch_are_shown() -> None:
    text = shown(STATUS)
    row_of(text, "router-1", "https://0.0.0.0:8501", "open to anybody")
    row_of(text, "term 3, epoch 42")


# Stores


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "store")
    store.create()
    for version in (1, 3):
        store.write_manifest(full_manifest(store, "ranker", version))
    store.write_manifest(full_manifest(store, "other", 1))
    return store


def inspected(
    store: LocalStore,
    servable: str = "",
    *,
    verify: bool = False,
    width: int = 240,
) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width)
    inspect_store(store.url, servable, verify=verify, as_json=False, console=console)
    return out.getvalue()


def test_a_store_is_listed(store: LocalStore) -> None:
    text = inspected(store)
    row_of(text, "ranker", "1, 3")
    row_of(text, "other", "1")


def test_a_bundle_is_described_the_newest_unless_a_version_is_named(store: LocalStore) -> None:
    assert inspected(store, "ranker") == inspected(store, "ranker:3")
    assert inspected(store, "ranker:1") != inspected(store, "ranker:3")


def test_a_description_is_not_folded_at_the_width_of_a_pipe(store: LocalStore) -> None:
    assert inspected(store, "ranker", width=40) == inspected(store, "ranker")


def test_json_is_for_programs(store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(width=40)
    inspect_store(store.url, "", verify=False, as_json=True, console=console)
    assert json.loads(capsys.readouterr().out) == {"other": [1], "ranker": [1, 3]}
    inspect_store(store.url, "ranker:1", verify=True, as_json=True, console=console)
    described = json.loads(capsys.readouterr().out)
    assert described["version"] == 1
    assert "verified" in described


def test_verify_finds_a_blob_that_was_changed(store: LocalStore) -> None:
    assert inspected(store, "ranker", verify=True)
    blob = max((store.path / "blobs").rglob("*"), key=lambda path: path.is_file())
    blob.chmod(0o600)
    blob.write_bytes(b"\0" * blob.stat().st_size)
    with pytest.raises(DataLoss):
        inspected(store, "ranker", verify=True)


@pytest.mark.parametrize("servable", ["ranker:x", "ranker:", "ranker:1.5", "ranker:²"])
def test_a_version_that_is_no_number_is_refused(store: LocalStore, servable: str) -> None:
    with pytest.raises(InvalidArgument, match="is not NAME or NAME:VERSION"):
        inspected(store, servable)


@pytest.mark.parametrize("servable", ["nope", "ranker:2"])
def test_a_bundle_that_is_not_there_is_not_found(store: LocalStore, servable: str) -> None:
    with pytest.raises(NotFound):
        inspected(store, servable)


def test_a_path_that_is_no_directory_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="is not a directory"):
        inspected(LocalStore(tmp_path / "nowhere"))
