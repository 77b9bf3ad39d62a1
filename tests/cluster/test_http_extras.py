"""What our HTTP says beyond TensorFlow Serving's: versions, deadlines, health and metrics."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from cluster.cli import app
from tests.cluster.half_plus_two import MODEL, PREDICT
from tests.cluster.serving import Answer, Cluster, request


@pytest.fixture
def cluster(half_plus_two_cluster: Cluster) -> Cluster:
    return half_plus_two_cluster


def check(answer: Answer, wanted: Any) -> None:
    assert (answer.status, answer.json) == (200, wanted)
    assert answer.headers["content-type"] == "application/json"


def test_every_answer_says_which_version_gave_it(cluster: Cluster) -> None:
    body = '{"instances":[1.0]}'
    assert cluster.ask(PREDICT, body).headers["x-servable-version"] == "123"
    old = cluster.ask(f"{MODEL}/labels/old:predict", body)
    assert old.headers["x-servable-version"] == "100"


def test_status_of_all_versions_and_of_one(cluster: Cluster) -> None:
    found = cluster.ask(MODEL)
    versions = found.json["model_version_status"]
    assert [one["version"] for one in versions] == ["123", "100", "99"]
    assert versions[0] == {
        "version": "123",
        "state": "AVAILABLE",
        "status": {"error_code": "OK", "error_message": ""},
    }
    for path in (f"{MODEL}/versions/99", f"{MODEL}/labels/old"):
        [one] = cluster.ask(path).json["model_version_status"]
        assert one["version"] == ("99" if "99" in path else "100")


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        ("/v1/models/foo", 404, "Could not find any versions of model foo"),
        (f"{MODEL}/versions/7", 404, "Could not find version 7 of model half_plus_two"),
        (f"{MODEL}/labels/nope", 400, "Unrecognized servable version label: nope"),
        ("/v1/models/foo/metadata", 404, "Servable not found for request: Latest(foo)"),
    ],
)
def test_status_and_metadata_of_what_is_not_there(
    cluster: Cluster, path: str, status: int, text: str
) -> None:
    answer = cluster.ask(path)
    assert (answer.status, answer.error) == (status, text)


def test_metadata_has_tensorflows_shape(cluster: Cluster) -> None:
    found = cluster.ask(f"{MODEL}/labels/stable/metadata").json
    assert found["model_spec"] == {
        "name": "half_plus_two", "signature_name": "", "version": "123",
    }  # fmt: skip
    signatures = found["metadata"]["signature_def"]["signature_def"]
    assert signatures["serving_default"]["inputs"] == {
        "x": {
            "dtype": "DT_FLOAT",
            "tensor_shape": {"dim": [{"size": "-1", "name": "b"}], "unknown_rank": False},
            "name": "x:0",
        }
    }
    assert signatures["regress_x_to_y"]["method_name"] == "tensorflow/serving/regress"


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "soon", "", "3600001", "9" * 5000])
def test_a_timeout_that_is_none_is_refused(cluster: Cluster, value: str) -> None:
    answer = cluster.ask(PREDICT, '{"instances":[1.0]}', {"x-request-timeout-ms": value})
    assert (answer.status, "x-request-timeout-ms" in answer.error) == (400, True)


@pytest.mark.parametrize("value", ["1000", "3600000", "000005000"])
def test_a_timeout_that_is_long_enough_changes_nothing(cluster: Cluster, value: str) -> None:
    answer = cluster.ask(PREDICT, '{"instances":[2.0]}', {"X-Request-Timeout-Ms": value})
    check(answer, {"predictions": [3.0]})


def test_a_deadline_that_passes_is_504(cluster: Cluster) -> None:
    """To read so long a body takes longer than the deadline allows."""
    body = json.dumps({"padding": "x" * (8 << 20), "instances": [1.0]})
    answer = cluster.ask(PREDICT, body, {"x-request-timeout-ms": "1"})
    assert (answer.status, "deadline" in answer.error) == (504, True)


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_health_and_readiness(cluster: Cluster, method: str, path: str) -> None:
    assert request(cluster.port, method, path).status == 200


@pytest.mark.parametrize("path", ["/metrics", "/monitoring/prometheus/metrics"])
def test_metrics_are_what_prometheus_reads(cluster: Cluster, path: str) -> None:
    assert cluster.ask(PREDICT, '{"instances":[2.0]}').status == 200
    assert cluster.ask(f"{MODEL}/versions/50:predict", "{}").status == 404
    answer = cluster.ask(path)
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
    }
    assert samples["serving_requests_total", "123", "OK", "half_plus_two"] >= 1
    assert samples["serving_errors_total", "NOT_FOUND"] >= 1
    assert samples["serving_router_accepted_total",] >= 1
    assert samples["serving_epoch",] == 1
    assert samples["shardserve_device_up", "device-0"] == 1
    in_time = sum(
        number
        for (name, *labels), number in samples.items()
        if name == "shardserve_device_requests_total"
        and {"device-0", "half_plus_two", "in_time"} < set(labels)
    )
    assert in_time >= 1


def test_top_shows_what_the_device_behind_a_router_did(cluster: Cluster) -> None:
    url = f"http://127.0.0.1:{cluster.port}"
    words = ["top", "--url", url, "--interval", "0.5", "--once", "--json"]
    deadline = time.monotonic() + 20.0
    while True:
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout.splitlines()[-1])
        [device] = found["devices"]
        # A device that has not answered within a quarter of a second is told of as down.
        if device["is_up"] and device["seconds"] >= 0.25:
            break
        assert time.monotonic() < deadline, found
    assert (device["name"], found["troubles"]) == ("device-0", [])
    assert {row["servable"] for row in device["servables"]} == {"half_plus_two"}


def test_a_request_of_text_does_not_reach_the_device(cluster: Cluster) -> None:
    """A signature that returns its inputs needs no unit."""
    answer = cluster.ask(PREDICT, '{"signature_name":"text","inputs":["a"]}')
    check(answer, {"outputs": [{"b64": "YQ=="}]})


def test_the_worst_body_holds_nobody_else_up(cluster: Cluster) -> None:
    """Read on the loop it would keep every client waiting for as long as it takes itself."""
    bomb = '{"unknown":' + "[" * 250_000 + "]" * 250_000 + ',"instances":[2.0]}'
    took_s: list[float] = []

    def ask_bomb() -> None:
        began = time.monotonic()
        assert cluster.ask(PREDICT, bomb, {"x-request-timeout-ms": "19000"}).status == 200
        took_s.append(time.monotonic() - began)

    ask_bomb()  # starts the process that reads it
    asking = threading.Thread(target=ask_bomb)
    longest_s = 0.0
    asking.start()
    while asking.is_alive():
        began = time.monotonic()
        assert cluster.ask(PREDICT, '{"instances":[1.0]}').status == 200
        longest_s = max(longest_s, time.monotonic() - began)
        asking.join(0.01)
    assert longest_s < took_s[1] / 2
