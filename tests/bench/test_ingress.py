"""What `bench ingress` asks its contenders, and what it makes of their answers and rates."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from bench import ingress, ingress_peers, ingress_result, peer_triton
from bench.errors import BenchError, ToolMissing
from bench.generator import ERRORS
from bench.ingress_doors import Door
from bench.ingress_model import MODELS, Compiled, draw
from bench.ingress_overload import good_share
from bench.ingress_peers import JsonPeer, TritonPeer, installed
from bench.load import Outcome, Request
from bench.registry import Options
from bench.stats import Histogram
from cluster.forms import raw

_MLP = MODELS["mlp"]


def _outcome(rate: float, *latencies_us: float) -> Outcome:
    return Outcome(
        answered=int(rate),
        elapsed_s=1.0,
        latency_us=Histogram.of(latencies_us or (1.0,)),
        errors=dict.fromkeys(ERRORS, 0),
    )


def test_answers_to_requests_in_one_batch_are_those_to_each_alone() -> None:
    compiled = Compiled(_MLP, 3)
    requests = [np.asarray(draw(_MLP, count, count), np.float32) for count in (1, 5, 130)]
    for found, request in zip(compiled.together(requests), requests, strict=True):
        np.testing.assert_allclose(found, compiled(request), atol=1e-5)
        assert found.shape == request.shape


def test_scaling_model_scales_each_number() -> None:
    params = MODELS["megabyte"].parameters(0)
    rows = np.asarray(draw(MODELS["megabyte"], 2, 0), np.float32)
    answers = Compiled(MODELS["megabyte"], 0)(rows)
    np.testing.assert_allclose(answers, rows * params["scale"] + params["shift"], atol=1e-5)


def test_raw_requests_are_what_the_product_reads_and_its_raw_answers_are_read() -> None:
    door = Door(name="product-binary", url="", model=_MLP, form="raw")
    asked = draw(_MLP, 3, 0)
    request = door.request(asked)
    head = int(request.headers["Inference-Header-Content-Length"])
    [(name, found)] = raw.read_request(request.body, head).arrays.items()
    assert name == "x"
    np.testing.assert_array_equal(found, np.asarray(asked, np.float32))
    answer = orjson.dumps({"outputs": [{"name": "y", "dtype": "float32", "shape": [3, 64]}]})
    body = answer + b"   " + np.asarray(asked, np.float32).tobytes()
    np.testing.assert_array_equal(door.answers(body), np.asarray(asked, np.float32))


def test_binary_requests_to_triton_carry_the_rows_behind_a_head() -> None:
    peer = TritonPeer(python="", model=_MLP, seed=0, binary=True)
    asked = draw(_MLP, 2, 0)
    request = peer.request(asked)
    size = int(request.headers["Inference-Header-Content-Length"])
    [tensor] = orjson.loads(request.body[:size])["inputs"]
    assert tensor["parameters"] == {"binary_data_size": 2 * 64 * 4}
    rows = np.frombuffer(request.body[size:], np.float32).reshape(tensor["shape"])
    np.testing.assert_array_equal(rows, np.asarray(asked, np.float32))
    body = b'{"outputs":[{"parameters":{"binary_data_size":512}}]}' + request.body[size:]
    np.testing.assert_array_equal(peer.answers(body), rows)


def test_headers_of_a_request_are_sent() -> None:
    request = Request(path="/x", body=b"{}", headers={"X-One": "1", "X-Two": "a"})
    wire = request.wire("h").lower()
    assert b"x-one: 1\r\n" in wire
    assert b"x-two: a\r\n" in wire


def test_ratio_is_to_the_best_of_several_and_absent_ones_have_none() -> None:
    outcomes = {
        ("product", "mlp_c32"): [_outcome(1000, 10), _outcome(2000, 20)],
        ("ray-serve", "mlp_c32"): [_outcome(10, 100), _outcome(10, 100)],
        ("ray-serve-haproxy", "mlp_c32"): [_outcome(100, 50), _outcome(100, 50)],
    }
    found = ingress_result.ratios([outcomes], seed=0)
    assert found["rps32_vs_ray_serve_best"].value == 15.0
    assert found["p99_32_vs_best_peer"].value == pytest.approx(0.3)
    assert "rps32_vs_mosec" not in found
    assert "p50_1_vs_ray_serve_best" not in found


def test_each_peer_is_compared_with_the_product_beside_it() -> None:
    casts = [
        {
            ("product", "mlp_c32"): [_outcome(ours, latency)],
            (name, "mlp_c32"): [_outcome(theirs, 8.0)],
        }
        for name, ours, theirs, latency in (("mosec", 300, 100, 4.0), ("triton", 400, 100, 16.0))
    ]
    found = ingress_result.ratios(casts, seed=0)
    assert found["rps32_vs_mosec"].value == 3.0
    assert found["rps32_vs_triton"].value == 4.0
    assert found["p99_32_vs_best_peer"].value == pytest.approx(0.5)


def test_rounds_of_the_product_beside_all_peers_are_pooled() -> None:
    casts = [{("product", "mlp_c32"): [_outcome(rate)]} for rate in (100, 300)]
    pooled = ingress_result.pooled(casts)
    assert [each.rate for each in pooled["product", "mlp_c32"]] == [100, 300]


def test_tables_and_plot_name_every_contender() -> None:
    outcomes = {("product", "mlp_c32"): [_outcome(1.0, 5)], ("mosec", "mlp_c32"): [_outcome(2, 9)]}
    [every] = ingress_result.tables([outcomes], {}, seed=0)
    assert {row[1] for row in every.rows} == {"product", "mosec"}
    plot = ingress_result.plot(outcomes)
    assert plot is not None
    assert {each.label for each in plot.series} == {"product", "mosec"}
    assert "mlp_c32" in plot.title
    assert ingress_result.plot({}) is None


def test_peer_is_asked_in_json_and_read() -> None:
    peer = JsonPeer(name="mosec", path="/inference", python="", model=_MLP, seed=0)
    request = peer.request([[1.0]])
    assert request.path == "/inference"
    assert orjson.loads(request.body) == {"instances": [[1.0]]}
    assert peer.answers(b'{"predictions":[[2.0]]}').tolist() == [[2.0]]


def test_peer_that_cannot_be_installed_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: Any, **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "no such distribution")

    monkeypatch.setattr(ingress_peers.subprocess, "run", fail)  # type: ignore[attr-defined]
    with pytest.raises(ToolMissing, match="mosec cannot be installed: no such distribution"):
        installed("mosec", tmp_path)


def test_environment_is_made_once_and_again_when_other_versions_are_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        (tmp_path / "mosec").mkdir(exist_ok=True)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(ingress_peers.subprocess, "run", run)  # type: ignore[attr-defined]
    python = installed("mosec", tmp_path)
    assert installed("mosec", tmp_path) == python
    assert len(calls) == 2
    monkeypatch.setattr(ingress_peers, "INSTALLED", {"mosec": ("mosec==0.9.9",)})
    installed("mosec", tmp_path)
    assert calls[-1][-1] == "mosec==0.9.9"


def test_triton_is_given_a_repository_and_its_backend(tmp_path: Path) -> None:
    server = tmp_path / "site" / "pytriton" / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for file in (
        "backends/python/x.so",
        f"python_backend_stubs/{version}/triton_python_backend_stub",
    ):
        (server / file).parent.mkdir(parents=True)
        (server / file).touch()
    peer_triton.lay_out(tmp_path / "own", "mlp", 7, tmp_path / "site")
    config = (tmp_path / "own" / "models" / "mlp" / "config.pbtxt").read_text()
    assert "max_batch_size: 128" in config
    assert "dims: [ 64 ]" in config
    compile((tmp_path / "own" / "models" / "mlp" / "1" / "model.py").read_text(), "model", "exec")
    found = {file.name for file in (tmp_path / "own" / "backends" / "python").iterdir()}
    assert found == {"x.so", "triton_python_backend_stub"}


def test_unknown_peer_is_refused_before_anything_starts() -> None:
    own = argparse.Namespace(peers="mosek", parts="", peers_folder=Path())
    with pytest.raises(BenchError, match="mosek"):
        ingress.BENCH.run(Options(quick=True, own=own))


def test_answers_after_the_deadline_are_not_good() -> None:
    assert good_share(_outcome(4, 1.0, 2.0, 3.0, 40.0), 3.0) == 0.75
    assert good_share(_outcome(1, 9.0), 3.0) == 0.0
