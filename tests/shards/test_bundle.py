"""Bundles, written and read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shards
from batching.errors import FailedPrecondition, InvalidArgument, ServingError
from shards.errors import ExportFailed, SpecMismatch
from shards.leaves import map_leaves
from shards.manifest import HostUnit, Manifest, MapUnit, Node, TableUnit
from shards.programs import load_program
from shards.specs import Spec, check, dtype_of
from shards.store import LocalStore

W = np.arange(8, dtype=np.float32).reshape(4, 2)
X = {"x": Spec(("b", 4))}
TEXT = {"text": Spec(("b",), "string")}
TOKENS = {"ids": Spec(("b", "t"), "int32"), "mask": Spec(("b", "t"), "int32")}


def linear(params: Any, x: Any) -> Any:
    return x @ params["w"]


def mean(params: Any, words: Any, mask: Any) -> Any:
    kept = words * mask[..., None].astype(words.dtype)
    return {"embedding": kept.sum(1) / jnp.maximum(mask.sum(1), 1)[:, None]}


def answer(
    store: LocalStore,
    manifest: Manifest,
    inputs: dict[str, np.ndarray],
    host: Callable[..., dict[str, np.ndarray]] | None = None,
    signature: str = "serving_default",
) -> dict[str, np.ndarray]:
    """Run a signature as the cluster would, node by node, in this process."""
    asked = manifest.signatures[signature]
    check(asked.inputs, inputs)
    values = {f"in:{name}": array for name, array in inputs.items()}
    for index, node in enumerate(asked.nodes):
        unit = manifest.units[node.unit]
        given = {name: values[ref] for name, ref in node.inputs.items()}
        if isinstance(unit, TableUnit):
            rows = np.concatenate(
                [
                    store.map(part.blob).view(dtype_of(unit.dtype)).reshape(part.rows, unit.dim)
                    for part in unit.partitions
                ]
            )
            made = {"rows": rows[given["ids"]]}
        elif isinstance(unit, HostUnit):
            assert host is not None
            made = host(**given)
        else:
            assert isinstance(unit, MapUnit)
            sizes = check(unit.inputs, given)
            batch = sizes.pop(next(iter(unit.inputs.values())).batch or "")
            (program,) = unit.programs
            compiled = load_program(store.map(program.blob), "cpu").compile(batch, sizes, unit)
            outs = compiled(*map_leaves(store, unit.params), *(given[n] for n in unit.inputs))
            made = dict(zip(unit.outputs, map(np.asarray, outs), strict=True))
        values |= {f"{index}:{name}": array for name, array in made.items()}
    outputs = {name: values[ref] for name, ref in asked.returns.items()}
    check(asked.outputs, outputs)
    return outputs


# --- one line ----------------------------------------------------------------------------------


def test_a_function_is_saved_in_one_line_and_computes_what_it_computed(tmp_path: Path) -> None:
    manifest = shards.save(linear, {"w": W}, tmp_path / "store", "mlp", version=3, inputs=X)
    store = LocalStore(tmp_path / "store")
    assert manifest == shards.read(store, "mlp")
    assert (manifest.name, manifest.version) == ("mlp", 3)
    assert manifest.created.jax == jax.__version__
    x = np.random.default_rng(0).random((8, 4), np.float32)
    np.testing.assert_allclose(answer(store, manifest, {"x": x})["outputs"], x @ W, rtol=1e-6)


def test_without_a_version_the_next_one_is_taken(tmp_path: Path) -> None:
    versions = [
        shards.save(linear, {"w": W * n}, tmp_path, "mlp", inputs=X).version for n in (1, 2)
    ]
    assert versions == [1, 2]
    assert shards.save(linear, {"w": W}, tmp_path, "mlp", version=7, inputs=X).version == 7
    assert shards.save(linear, {"w": W}, tmp_path, "mlp", inputs=X).version == 8
    assert LocalStore(tmp_path).versions("mlp") == (1, 2, 7, 8)


def test_two_versions_of_the_same_weights_share_every_blob(tmp_path: Path) -> None:
    first = shards.save(linear, {"w": W}, tmp_path, "mlp", inputs=X)
    before = sorted(os.listdir(tmp_path / "blobs" / "blake3"))
    second = shards.save(lambda q, x: x @ q["w"], {"w": W}, tmp_path, "other", inputs=X)
    assert first.units == second.units
    assert sorted(os.listdir(tmp_path / "blobs" / "blake3")) == before


@pytest.mark.parametrize(
    ("fn", "method", "outputs"),
    [
        (linear, "predict", ["outputs"]),
        (linear, "classify", ["scores"]),
        (lambda p, x: {"scores": x @ p["w"]}, "classify", ["scores"]),
        (lambda p, x: {"scores": x @ p["w"], "hidden": x}, "classify", ["scores", "hidden"]),
        (lambda p, x: (x @ p["w"])[:, 0], "regress", ["outputs"]),
        (lambda p, x: {"embedding": x}, "predict", ["embedding"]),
        (lambda p, x: (x, x + 1), "predict", ["output_0", "output_1"]),
    ],
)
def test_outputs_are_named_by_the_function_or_else_the_method(
    tmp_path: Path, fn: Callable[..., Any], method: Any, outputs: list[str]
) -> None:
    labels = ("no", "yes") if method == "classify" else ()
    manifest = shards.save(
        fn, {"w": W}, tmp_path, "m", inputs=X, method=method, labels=labels, signature="s"
    )
    signature = manifest.signatures["s"]
    assert list(signature.outputs) == outputs
    assert (signature.method, signature.labels) == (method, labels)


# --- a graph -----------------------------------------------------------------------------------

WORDS = np.random.default_rng(1).random((10, 3)).astype(np.float32)


def save_encoder(store: LocalStore, **options: Any) -> Manifest:
    with shards.Bundle.create(store, "encoder", **options) as bundle:
        words = bundle.table("words", WORDS, partitions=4)
        tokenize = bundle.host(
            "tokenize",
            "somewhere.else:load",
            inputs=TEXT,
            outputs=TOKENS,
            files={"tokens.txt": b"a b c"},
            options={"limit": 8},
        )
        trunk = bundle.unit(
            "trunk",
            mean,
            None,
            inputs={"words": Spec(("b", "t", 3)), "mask": TOKENS["mask"]},
            batch_buckets=(1, 4),
            length_buckets={"t": (2, 4, 8)},
        )

        @bundle.signature("serving_default", method="predict", inputs=TEXT)
        def embed(text: Any) -> Any:
            tokens = tokenize(text)
            return {"embedding": trunk(words.rows(tokens["ids"]), tokens["mask"])}

        @bundle.signature("vectors")
        def vectors(ids: Spec(("b", "n"), "int64")) -> Any:  # type: ignore[valid-type]
            return {"rows": words.rows(ids)}

    return bundle.manifest


def test_units_of_every_kind_are_composed_and_answer_together(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    manifest = save_encoder(store)
    assert manifest.signatures["serving_default"].nodes == (
        Node(unit="tokenize", inputs={"text": "in:text"}),
        Node(unit="words", inputs={"ids": "0:ids"}),
        Node(unit="trunk", inputs={"words": "1:rows", "mask": "0:mask"}),
    )
    ids = np.array([[1, 9, 0, 0], [3, 4, 5, 6]], np.int32)
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1]], np.int32)
    text = np.array([b"two", b"four"], object)
    embedding = answer(
        store, manifest, {"text": text}, host=lambda text: {"ids": ids, "mask": mask}
    )["embedding"]
    np.testing.assert_allclose(embedding[0], WORDS[[1, 9]].mean(0), rtol=1e-6)
    np.testing.assert_allclose(embedding[1], WORDS[[3, 4, 5, 6]].mean(0), rtol=1e-6)


def test_annotations_may_say_what_the_inputs_are(tmp_path: Path) -> None:
    manifest = save_encoder(LocalStore(tmp_path))
    signature = manifest.signatures["vectors"]
    assert signature.inputs == {"ids": Spec(("b", "n"), "int64")}
    assert signature.outputs == {"rows": Spec(("b", "n", 3))}
    ids = np.array([[7, 0]])
    rows = answer(LocalStore(tmp_path), manifest, {"ids": ids}, signature="vectors")["rows"]
    np.testing.assert_array_equal(rows, WORDS[ids])


def test_a_table_is_cut_and_its_identity_is_that_of_its_rows(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    words = save_encoder(store).units["words"]
    assert isinstance(words, TableUnit)
    assert [(part.first_row, part.rows) for part in words.partitions] == [
        (0, 2), (2, 3), (5, 2), (7, 3),
    ]  # fmt: skip
    with shards.Bundle.create(store, "again") as bundle:
        edges = [0, 2, 5, 7, 10]
        bundle.table("w", lambda i: iter(WORDS[edges[i] : edges[i + 1]][:, None]), partitions=4,
                     missing="zero")  # fmt: skip

        @bundle.signature(inputs={"ids": Spec(("b",), "int32")})
        def same(ids: Any) -> Any:
            return ids

    again = bundle.manifest.units["w"]
    assert isinstance(again, TableUnit)
    assert (again.id, again.missing) == (words.id, "zero")


def test_host_units_carry_files_and_options_and_import_nothing(tmp_path: Path) -> None:
    (tmp_path / "tokens.txt").write_bytes(b"from a path")
    store = LocalStore(tmp_path / "store")
    with shards.Bundle.create(store, "m") as bundle:
        unit = bundle.host(
            "host", "no.such.module:load", inputs=TEXT, outputs=TOKENS,
            files={"a": tmp_path / "tokens.txt", "b": str(tmp_path / "tokens.txt"), "c": b"bytes"},
            options={"s": "x", "i": 1, "f": 0.5, "b": True},
        )  # fmt: skip
        bundle.signature(inputs=TEXT)(lambda text: unit(text))
    host = bundle.manifest.units["host"]
    assert isinstance(host, HostUnit)
    assert {name: store.map(ref).tobytes() for name, ref in host.files.items()} == {
        "a": b"from a path", "b": b"from a path", "c": b"bytes",
    }  # fmt: skip
    assert shards.read(store, "m").units["host"] == host
    assert [type(value) for value in host.options.values()] == [str, int, float, bool]


# --- all or nothing ----------------------------------------------------------------------------


def write_until_it_breaks(store: Path) -> None:
    with shards.Bundle.create(store, "mlp") as bundle:
        unit = bundle.unit("model", linear, {"w": W}, inputs=X)
        bundle.signature(inputs=X)(lambda x: unit(x))
        raise RuntimeError("in the middle")


def test_a_bundle_that_fails_leaves_nothing_to_be_seen(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="in the middle"):
        write_until_it_breaks(tmp_path)
    assert LocalStore(tmp_path).servables() == ()
    assert not (tmp_path / "mlp").exists()


def test_a_bundle_has_no_manifest_before_it_is_committed(tmp_path: Path) -> None:
    bundle = shards.Bundle.create(tmp_path, "mlp")
    with pytest.raises(FailedPrecondition, match="not committed"):
        _ = bundle.manifest


def test_a_bundle_without_a_signature_is_not_written(tmp_path: Path) -> None:
    bundle = shards.Bundle.create(tmp_path, "mlp")
    bundle.unit("model", linear, {"w": W}, inputs=X)
    with pytest.raises(FailedPrecondition, match="no signature"):
        bundle.commit()
    assert LocalStore(tmp_path).servables() == ()


def test_a_version_that_exists_is_refused_before_any_work_and_replaced_if_asked(
    tmp_path: Path,
) -> None:
    shards.save(linear, {"w": W}, tmp_path, "mlp", version=1, inputs=X)
    with pytest.raises(FailedPrecondition, match="mlp/1 exists"):
        shards.Bundle.create(tmp_path, "mlp", version=1)
    shards.save(linear, {"w": W}, tmp_path, "mlp", version=1, inputs=X, overwrite=True,
                signature="new")  # fmt: skip
    assert list(shards.read(tmp_path, "mlp").signatures) == ["new"]


def test_of_two_bundles_of_one_version_the_first_to_commit_wins(tmp_path: Path) -> None:
    first = shards.Bundle.create(tmp_path, "mlp")
    second = shards.Bundle.create(tmp_path, "mlp")
    for bundle in (first, second):
        bundle.signature(inputs=X)(lambda x: x)
    first.commit()
    with pytest.raises(FailedPrecondition, match="mlp/1 exists"):
        second.commit()


# --- refusals ----------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[shards.Bundle], object], type[ServingError], str]] = {
    "a unit's name twice": (
        lambda b: (b.table("t", W), b.table("t", W)), InvalidArgument, "unit 't' already"
    ),
    "a unit's odd name": (lambda b: b.table("a b", W), InvalidArgument, "not a unit name"),
    "a signature's name twice": (
        lambda b: [b.signature(inputs=X)(lambda x: x) for _ in "ab"], InvalidArgument, "already"
    ),
    "a signature's odd name": (
        lambda b: b.signature("a:b", inputs=X)(lambda x: x), InvalidArgument, "signature name"
    ),
    "an unknown method": (
        lambda b: b.signature(method="guess", inputs=X)(lambda x: x),  # type: ignore[arg-type]
        InvalidArgument, "'guess'"
    ),
    "a function without annotations": (
        lambda b: b.signature()(lambda x: x), InvalidArgument, "parameter 'x'.*annotated"
    ),
    "inputs that the function does not take": (
        lambda b: b.signature(inputs={"y": X["x"]})(lambda x: x), InvalidArgument, "not take"
    ),
    "no partitions": (lambda b: b.table("t", W, partitions=0), InvalidArgument, "0 partitions"),
    "an unknown policy": (
        lambda b: b.table("t", W, missing="maybe"),  # type: ignore[arg-type]
        InvalidArgument, "'maybe'"
    ),
    "a vector for a table": (lambda b: b.table("t", W[0]), SpecMismatch, "'t'"),
    "an entry point that is code": (
        lambda b: b.host("h", "os.system", inputs=TEXT, outputs=TOKENS), InvalidArgument, "'h'"
    ),
    "a host unit without outputs": (
        lambda b: b.host("h", "m:f", inputs=TEXT, outputs={}), InvalidArgument, "'h'"
    ),
    "an option that is no plain value": (
        lambda b: b.host("h", "m:f", inputs=TEXT, outputs=TOKENS, options={"o": []}),  # type: ignore[dict-item]
        InvalidArgument, "option 'o'"
    ),
    "a function that cannot be exported": (
        lambda b: b.unit("u", lambda p, x: jax.pure_callback(lambda v: v, x, x), None, inputs=X),
        ExportFailed, "host unit"
    ),
    "labels that do not fit": (
        lambda b: b.signature(method="classify", inputs=X, labels="ab")(lambda x: {"scores": x}),
        InvalidArgument, "2 labels"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_served_is_refused_when_it_is_written(tmp_path: Path, what: str) -> None:
    write, error, says = REFUSED[what]
    with pytest.raises(error, match=says):
        write(shards.Bundle.create(tmp_path, "m"))


@pytest.mark.parametrize(("name", "version"), [("a/b", 1), ("_x", 1), ("ok", 0), ("ok", -2)])
def test_names_and_versions_are_checked_first(tmp_path: Path, name: str, version: int) -> None:
    with pytest.raises(InvalidArgument):
        shards.Bundle.create(tmp_path, name, version)


def test_what_was_not_done_as_asked_is_told(tmp_path: Path) -> None:
    bundle = shards.Bundle.create(tmp_path, "m")
    bundle.unit("u", linear, {"w": W.astype(np.float64)}, inputs=X)
    assert bundle.notices == [
        "unit 'u': ['w'] is saved as float32, not float64: jax_enable_x64 is off"
    ]


def test_the_program_of_a_unit_is_among_its_blobs(tmp_path: Path) -> None:
    unit = shards.save(linear, {"w": W}, tmp_path, "m", inputs=X).units["model"]
    assert isinstance(unit, MapUnit)
    np.testing.assert_array_equal(map_leaves(LocalStore(tmp_path), unit.params)[0], W)
    assert load_program(LocalStore(tmp_path).map(unit.programs[0].blob), "cpu").platforms == (
        "cpu", "cuda", "tpu",
    )  # fmt: skip
