"""The demo's bundles: what is in them, and that their stored parts make the models' answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import shards
from cluster import config
from cluster.demo import classify, digits_data, minilm_files, run, saving, search, tokenizer
from shards.leaves import map_leaves
from shards.manifest import HostUnit, Manifest, MapUnit, TableUnit
from shards.programs import load_program
from shards.store import Store
from tests.cluster import demo_support as demo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The store's directory, and the declaration that serves it."""
    path = tmp_path_factory.mktemp("demo") / "store"
    return path, run.save_all(path)


@pytest.fixture(scope="module")
def store(saved: tuple[Path, str]) -> Store:
    return shards.open_store(saved[0])


@pytest.fixture(scope="module")
def minilm(saved: tuple[Path, str]) -> Manifest:
    return shards.read(saved[0], search.MODEL)


def test_the_encoder_is_a_split_table_a_host_unit_and_a_unit(minilm: Manifest) -> None:
    words, tokenize, encoder = (minilm.units[name] for name in ("words", "tokenize", "encoder"))
    assert isinstance(words, TableUnit)
    assert isinstance(tokenize, HostUnit)
    assert isinstance(encoder, MapUnit)

    assert (words.rows, words.dim) == (minilm_files.VOCABULARY, minilm_files.DIM)
    assert len(words.partitions) == saving.PARTITIONS == 4
    assert tokenize.entry_point == "cluster.demo.tokenizer:load"
    assert tokenize.options == {"limit": saving.TOKENS_MAX}
    assert len(encoder.params) == minilm_files.PARAMS


def test_one_program_serves_every_platform_batch_and_length(minilm: Manifest) -> None:
    encoder = minilm.units["encoder"]
    assert isinstance(encoder, MapUnit)
    (program,) = encoder.programs
    assert program.batch is None
    assert set(program.platforms) == {"cpu", "cuda", "tpu"}
    assert encoder.length_buckets == {"t": saving.LENGTH_BUCKETS}
    # The tokenizer never makes a row that has no bucket.
    assert saving.LENGTH_BUCKETS[-1] == saving.TOKENS_MAX


def test_signatures_are_what_the_clients_send(minilm: Manifest, store: Store) -> None:
    embed = minilm.signatures["serving_default"]
    assert (embed.method, list(embed.inputs), list(embed.outputs)) == (
        "predict",
        ["text"],
        ["embedding"],
    )
    label = store.read_manifest(classify.MODEL, 1).signatures["serving_default"]
    assert (label.method, list(label.inputs), list(label.outputs)) == (
        "classify",
        ["pixels"],
        ["scores"],
    )
    assert label.labels == digits_data.LABELS


def test_the_stored_parts_of_the_encoder_give_its_embeddings(
    minilm: Manifest, store: Store
) -> None:
    """What the cluster does with a request, without the cluster, from the store alone."""
    words, tokenize, encoder = (minilm.units[name] for name in ("words", "tokenize", "encoder"))
    assert isinstance(words, TableUnit)
    assert isinstance(tokenize, HostUnit)
    assert isinstance(encoder, MapUnit)
    sentences = ["The weather is lovely today.", "It's so sunny outside!"]

    files = {name: store.map(ref).tobytes() for name, ref in tokenize.files.items()}
    tokens = tokenizer.load(files, tokenize.options)(demo.texts(*sentences))
    ids, mask = demo.pad(tokens["ids"].astype(np.int32), tokens["mask"].astype(np.int32), 16)
    table = np.concatenate(
        [
            store.map(part.blob).view(np.float32).reshape(part.rows, words.dim)
            for part in words.partitions
        ]
    )
    compiled = load_program(store.map(encoder.programs[0].blob), "cpu").compile(
        2, {"t": 16}, encoder
    )
    (embedding,) = compiled(*map_leaves(store, encoder.params), table[ids], mask)

    np.testing.assert_allclose(embedding, demo.embed(sentences), rtol=0, atol=1e-5)
    assert list(encoder.inputs) == ["words", "mask"]


def test_the_stored_classifier_recognises_digits(store: Store) -> None:
    unit = next(iter(store.read_manifest(classify.MODEL, 1).units.values()))
    assert isinstance(unit, MapUnit)
    holdout = digits_data.read().holdout
    compiled = load_program(store.map(unit.programs[0].blob), "cpu").compile(
        len(holdout.labels), unit=unit
    )
    (scores,) = compiled(*map_leaves(store, unit.params), holdout.pixels)
    assert (scores.argmax(axis=1) == holdout.labels).mean() >= classify.ACCURACY_MIN


def test_the_declaration_is_one_that_the_cluster_accepts(saved: tuple[Path, str]) -> None:
    path, text = saved
    declared = config.parse(text)
    assert Path(declared.store) == path.resolve()
    assert [servable.name for servable in declared.servables] == [search.MODEL, classify.MODEL]
    assert declared.cluster.shards == saving.PARTITIONS
    assert declared.cluster.allow_entry_points == ("cluster.demo.*",)


def test_saving_again_makes_the_next_version_of_the_same_blobs(
    saved: tuple[Path, str], minilm: Manifest
) -> None:
    before = sorted((saved[0] / "blobs" / "blake3").iterdir())

    saving.save_minilm(saved[0])
    saving.save_digits(saved[0])

    assert sorted((saved[0] / "blobs" / "blake3").iterdir()) == before
    again = shards.read(saved[0], search.MODEL)
    assert again.version == minilm.version + 1
    assert {name: unit.id for name, unit in again.units.items()} == {
        name: unit.id for name, unit in minilm.units.items()
    }


def test_a_client_of_the_demo_does_not_import_jax_or_ray() -> None:
    code = (
        "import sys, cluster.demo.run, cluster.demo.tokenizer;"
        "print(sorted({'jax', 'ray', 'sklearn', 'tokenizers'} & set(sys.modules)))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=50
    )
    assert shown.stdout.strip() == "[]"
