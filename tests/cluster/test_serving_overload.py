"""A device with more to do than it can: who is refused, what he is told, and who is not."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shards
from shards.specs import Spec
from tests.cluster.serving import Answer, Cluster

#: To save two models and to compile them takes a minute on a busy machine.
pytestmark = pytest.mark.timeout(240)

X = {"x": Spec(("b", 64))}
#: What a row of the slow model takes is some milliseconds, whatever the machine.
STEPS = 10_000


def save(store: Path, name: str, steps: int) -> None:
    import jax

    with shards.Bundle.create(store, name, 1) as bundle:
        unit = bundle.unit(
            "unit",
            lambda p, x: {"y": jax.lax.fori_loop(0, steps, lambda _, y: y @ p["w"], x).sum(-1)},
            {"w": np.eye(64, dtype=np.float32)},
            inputs=X,
            batch_buckets=(1,),
            platforms=("cpu",),
        )

        @bundle.signature(inputs=X)
        def serving_default(x: Any) -> Any:
            return unit(x)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    save(tmp_path / "store", "slow", STEPS)
    save(tmp_path / "store", "quick", 1)
    cluster = Cluster(tmp_path / "store", tmp_path, shards=1)
    try:
        cluster.load("slow", 1)
        cluster.load("quick", 1)
        cluster.publish()
        yield cluster
    finally:
        cluster.close()


def ask(cluster: Cluster, name: str, timeout_ms: int) -> Answer:
    body = json.dumps({"instances": [[1.0] * 64]})
    headers = {"x-request-timeout-ms": str(timeout_ms)}
    return cluster.ask(f"/v1/models/{name}:predict", body, headers)


def taken_ms(cluster: Cluster) -> float:
    """What a row of the slow model takes."""
    began = time.monotonic()
    assert ask(cluster, "slow", 10_000).status == 200
    return 1000 * (time.monotonic() - began)


def test_who_would_be_late_is_refused_with_a_time_and_others_on_the_device_are_not(
    cluster: Cluster,
) -> None:
    row_ms = min(taken_ms(cluster) for _ in range(3))
    with ThreadPoolExecutor(40) as pool:
        # Time for about eight rows, and 32 clients.
        slow = [pool.submit(ask, cluster, "slow", int(8 * row_ms)) for _ in range(32)]
        quick = [pool.submit(ask, cluster, "quick", 10_000) for _ in range(8)]
        assert {answer.result().status for answer in quick} == {200}
        answers = [answer.result() for answer in slow]
    refused = [answer for answer in answers if answer.status == 429]
    assert {answer.status for answer in answers} <= {200, 429, 504}
    assert any(answer.status == 200 for answer in answers)
    assert len(refused) >= 12
    waits = {int(answer.headers["retry-after-ms"]) for answer in refused}
    assert len(waits) > 1, waits
    assert all(0 < wait < 100 * row_ms for wait in waits)
