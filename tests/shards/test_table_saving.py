"""What may be declared of a table, what may not, and what a manifest may say of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from batching.errors import InvalidArgument
from shards.bundle import Bundle
from shards.checking import check_manifest, decode_manifest, encode_manifest
from shards.errors import BundleCorrupt, SpecMismatch
from shards.inspection import describe
from shards.manifest import Manifest, TableUnit
from shards.sparse_rows import SparseRows
from shards.specs import Spec

ROWS = np.arange(40, dtype=np.float32).reshape(10, 4)


def save(store: Path, rows: Any = ROWS, **form: Any) -> Manifest:
    with Bundle.create(str(store), "model", overwrite=True) as bundle:
        table = bundle.table("users", rows, **form)
        ids = Spec(("b",), "string" if form.get("keys") == "string" else "int64")

        @bundle.signature(inputs={"ids": ids})
        def answer(ids: Any) -> Any:
            return {"rows": table.rows(ids)}

    return bundle.manifest


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ({"partitions": 0}, "0 partitions"),
        ({"partition": "rows"}, "partition='rows' is not one of 'range', 'hash', 'columns'"),
        ({"keys": "text"}, "keys='text' is not one of"),
        ({"missing": "zeros"}, "missing='zeros' is not one of 'error', 'zero', 'default'"),
        ({"missing": "default"}, "belong together"),
        ({"default": [0.0] * 4}, "belong together"),
        ({"keys": "hashed", "missing": "zero"}, "of hashed keys none is ever missing"),
        ({"partition": "columns", "partitions": 5}, "cannot be cut into 5 by columns"),
        ({"rows": ROWS[:0], "partition": "columns", "partitions": 2}, "cannot be cut into 2"),
        ({"rows": ROWS[:0], "keys": "hashed"}, "keys need at least one row"),
        ({"rows": lambda _: ROWS, "partition": "hash", "partitions": 2}, "give an array"),
        ({"rows": lambda _: ROWS, "partition": "columns", "partitions": 2}, "give an array"),
        (
            {"rows": SparseRows(rows=9, dim=4, given=[]), "partition": "columns", "partitions": 2},
            "sparse rows cannot be cut by columns",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path: Path, form: Any, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        save(tmp_path, **form)


@pytest.mark.parametrize(
    ("dtype", "default"),
    [
        (np.float32, [0.0] * 3),
        (np.float32, [0.0, 1.0, 2.0, np.inf]),
        (np.float16, [0.0, 1.0, 2.0, 1e6]),
        (np.int32, [0.0, 1.0, 2.0, 0.5]),
        (np.float32, ["a"] * 4),
    ],
)
def test_a_default_row_that_is_none_of_the_table_is_refused(
    tmp_path: Path, dtype: Any, default: Any
) -> None:
    with pytest.raises(SpecMismatch, match="default row"), np.errstate(over="ignore"):
        save(tmp_path, ROWS.astype(dtype), missing="default", default=default)


def test_a_table_of_one_partition_is_the_same_however_it_would_be_cut(tmp_path: Path) -> None:
    units = [save(tmp_path, partition=scheme).units for scheme in ("range", "hash", "columns")]
    assert units[0] == units[1] == units[2]


def test_how_a_table_is_cut_is_shown(tmp_path: Path) -> None:
    found = describe(save(tmp_path, partition="columns", partitions=3, keys="string"))
    told = found["units"]["users"]
    assert (told["keys"], told["partitioned_by"]) == ("string", "columns")
    assert told["columns"] == [1, 1, 2]
    assert "partitioned_by" not in describe(save(tmp_path, partitions=3))["units"]["users"]


def test_text_is_no_row_number_and_numbers_are_no_text(tmp_path: Path) -> None:
    bundle = Bundle.create(str(tmp_path), "model")
    words = bundle.table("words", ROWS, keys="string")
    users = bundle.table("users", ROWS)
    for table, dtype in ((words, "int64"), (users, "string"), (users, "uint64")):
        with pytest.raises(SpecMismatch, match="needs"):
            bundle.signature(f"s{dtype}", inputs={"ids": Spec(("b",), dtype)})(table.rows)


@pytest.mark.parametrize(
    "change",
    [
        {"columns": (2, 3)},
        {"columns": (4,)},
        {"columns": (4, 0)},
        {"columns": ()},
        {"scheme": "range"},
        {"missing": "default"},
        {"default": (0.0,) * 4},
        {"missing": "default", "default": (0.0,) * 3},
        {"columns": (1, 3)},
    ],
)
def test_a_manifest_that_contradicts_itself_about_a_table_is_corrupt(
    tmp_path: Path, change: Any
) -> None:
    manifest = save(tmp_path, partition="columns", partitions=2)
    check_manifest(manifest, "m/1")
    unit = manifest.units["users"]
    assert isinstance(unit, TableUnit)
    broken = msgspec.structs.replace(
        manifest, units={"users": msgspec.structs.replace(unit, **change)}
    )
    with pytest.raises(BundleCorrupt):
        check_manifest(broken, "m/1")


def test_a_table_of_an_older_schema_is_read_as_what_it_was(tmp_path: Path) -> None:
    manifest = save(tmp_path, partitions=2)
    plain = msgspec.json.decode(encode_manifest(manifest))
    plain["schema"] = 5
    for field in ("scheme", "columns", "keys", "default"):
        del plain["units"]["users"][field]
    assert decode_manifest(msgspec.json.encode(plain), "m/1").units == manifest.units
