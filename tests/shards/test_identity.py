"""What makes two units the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shards.identity import host_identity, map_identity, table_identity
from shards.manifest import BlobRef, MapUnit, Partition
from shards.specs import Spec
from shards.store import LocalStore, read

X, Y = Spec(("b", 4)), Spec(("b", 3))
LEAF = ("float32", (4, 3), "d" * 64)
BLOB = BlobRef(digest="a" * 64, size=8)

MAP: dict[str, Any] = {
    "texts": ["program"],
    "inputs": [X],
    "outputs": [Y],
    "donate": [],
    "leaves": [LEAF],
}


@pytest.mark.parametrize(
    "change",
    [
        {"texts": ["another"]},
        {"texts": ["program", "program"]},
        {"inputs": [Spec(("b", 5))]},
        {"inputs": [Spec(("b", 4), "int32")]},
        {"inputs": [Spec(("b", 4), pad=1.0)]},
        {"inputs": [Spec(("b", 4), per="request")]},
        {"outputs": [Spec(("b", 4))]},
        {"inputs": [], "outputs": [X, Y]},
        {"donate": [0]},
        {"leaves": [("float32", (3, 4), "d" * 64)]},
        {"leaves": [("int32", (4, 3), "d" * 64)]},
        {"leaves": [("float32", (4, 3), "e" * 64)]},
        {"leaves": []},
    ],
)
def test_whatever_a_computation_depends_on_is_part_of_a_units_identity(
    change: dict[str, Any],
) -> None:
    assert map_identity(**MAP) == map_identity(**MAP)
    assert map_identity(**{**MAP, **change}) != map_identity(**MAP)


def test_a_units_identity_is_what_the_first_release_of_manifests_called_it() -> None:
    """Bundles of schema 1 are checked against the identity that they were saved with."""
    inputs = [X, Spec(("b", "t"), "int32", 1.0)]
    found = map_identity(["program"], inputs, [Y], [], [LEAF])
    assert found == "4cbae62f4fd92f3f13b8f62e4770ef2ea8dc742d9c9a7765095b6bb11295e270"


def test_a_tables_identity_is_its_rows_and_cuts() -> None:
    def table(dtype: str = "float32", dim: int = 2, rows: int = 1, blob: BlobRef = BLOB) -> str:
        return table_identity(dtype, dim, [Partition(first_row=0, rows=rows, blob=blob)])

    other = BlobRef(digest="b" * 64, size=8)
    different = {table(), table("int32"), table(dim=1), table(rows=2), table(blob=other)}
    assert len(different) == 5
    assert table() == table()


def test_a_host_units_identity_is_what_runs_whatever_the_order_it_was_written_in() -> None:
    one = host_identity("m:f", {"a": 1, "b": 2}, {"x": BLOB, "y": BLOB})
    assert one == host_identity("m:f", {"b": 2, "a": 1}, {"y": BLOB, "x": BLOB})
    others = {
        host_identity("m:g", {"a": 1, "b": 2}, {"x": BLOB, "y": BLOB}),
        host_identity("m:f", {"a": 1, "b": "2"}, {"x": BLOB, "y": BLOB}),
        host_identity("m:f", {"a": 1, "b": 2}, {"x": BLOB}),
        one,
    }
    assert len(others) == 4


FIRST = """
import sys
import jax, jax.numpy as jnp, numpy as np
import shards

@jax.jit
def activation(x):
    return jax.nn.gelu(x) * 2

def trunk(params, words, mask):
    hidden = activation(words @ params["kernel"] + params["bias"])
    hidden = jnp.where(mask[..., None] > 0, hidden, 0.0)
    return {"pooled": hidden.sum(1), "hidden": hidden}

random = np.random.default_rng(5)
kernel = random.random((8, 16), np.float32)
params = {"kernel": kernel, "bias": np.zeros(16, np.float32)}
text, mask = shards.Spec(("b", "t", 8)), shards.Spec(("b", "t"), "int32")
with shards.Bundle.create(sys.argv[1], "first", version=1) as bundle:
    unit = bundle.unit("trunk", trunk, params, inputs={"words": text, "mask": mask},
                       batch_buckets=(1, 8), length_buckets={"t": (8, 16)})

    @bundle.signature(inputs={"words": text, "mask": mask})
    def answer(words, mask):
        return {"pooled": unit(words, mask).pooled}
"""

# The same trunk by another hand: other names of everything, a class, a comment, a nested function,
# an unused weight, weights on the device, and another unit written before it.
SECOND = '''
"""A module of another team."""
import sys
import jax
import jax.numpy as np
import numpy
import shards


class Encoder:
    """Their encoder."""

    def forward(self, weights, tokens, keep):
        def _where(value):
            return jax.nn.gelu(value) * 2

        with jax.named_scope("their_scope"):
            projected = jax.jit(_where)(tokens @ weights["k"] + weights["b"])
        # Padding counts for nothing.
        kept = np.where(keep[..., None] > 0, projected, 0.0)
        return {"summary": kept.sum(1), "tokens": kept}


weights = {
    "b": jax.numpy.zeros(16),
    "k": jax.device_put(numpy.random.default_rng(5).random((8, 16), numpy.float32)),
}
inputs = {
    "tokens": shards.Spec(("b", "t", 8)),
    "keep": shards.Spec(("b", "t"), "int32"),
}
with shards.Bundle.create(sys.argv[1], "second") as bundle:
    bundle.unit("other", lambda p, z: z * p, numpy.float32(3), inputs={"z": shards.Spec(("b", 2))})
    encoder = bundle.unit(
        "encoder",
        Encoder().forward,
        {**weights, "unused": numpy.ones(7, numpy.float32)},
        inputs=inputs,
        batch_buckets=[32],
        length_buckets={"t": [16]},
    )

    @bundle.signature("serving_default", method="predict", inputs=inputs)
    def encode(tokens, keep):
        return encoder(tokens, keep)
'''


@pytest.mark.slow
def test_two_scripts_in_two_processes_that_save_one_trunk_share_its_identity_and_blobs(
    tmp_path: Path,
) -> None:
    store = tmp_path / "store"
    for directory, name, script in (("a", "train.py", FIRST), ("b/deep", "export_it.py", SECOND)):
        path = tmp_path / directory / name
        path.parent.mkdir(parents=True)
        path.write_text(script)
        done = subprocess.run(
            [sys.executable, str(path), str(store)],
            cwd=path.parent,
            env={
                **os.environ,
                "PYTHONPATH": str(Path(__file__).parents[2]),
                "JAX_PLATFORMS": "cpu",
            },
            capture_output=True,
            text=True,
            timeout=50,
        )
        assert done.returncode == 0, done.stderr
    one = read(store, "first").units["trunk"]
    two = read(store, "second").units["encoder"]
    assert isinstance(one, MapUnit)
    assert isinstance(two, MapUnit)
    assert one.id == two.id
    assert one.programs == two.programs
    assert one.params == two.params
    # Whatever names the two teams chose stays in their manifests.
    blobs = b"".join(
        path.read_bytes() for path in (LocalStore(store).path / "blobs" / "blake3").iterdir()
    )
    for word in (b"trunk", b"Encoder", b"their_scope", b"train.py", b"activation", b"tmp"):
        assert word not in blobs
    assert msgspec.json.encode(two.inputs) != msgspec.json.encode(one.inputs)
