"""One user, many items, over host, shards and device with real sockets between, through REST."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shards
from batching.errors import InvalidArgument
from cluster.doors.calls import call
from shards.specs import Spec
from tests.cluster.serving import Answer, Cluster

WIDTH, DIM, ROWS = 6, 4, 128
PATH = "/v1/models/ranker"
TABLE = (np.arange(ROWS * DIM).reshape(ROWS, DIM) % 13).astype(np.float32)
BIAS = np.arange(DIM, dtype=np.float32)

QUERY = Spec(("b",), "string", per="request")
HISTORY = Spec(("b", WIDTH), "int64", per="request")
USER = Spec(("b", DIM), per="request")
ITEM = Spec(("b",), "int64")
PRICE = Spec(("b",), "float32")


def tower(params: Any, words: Any) -> Any:
    return words.sum(1) + params["bias"]


def rank(params: Any, user: Any, history: Any, item: Any, price: Any) -> Any:
    """Whole numbers, so that the sums are exact in whatever order they are made."""
    return (user * item).sum(-1) + history.sum((1, 2)) - price + params["zero"]


def save(store: Path) -> None:
    with shards.Bundle.create(store, "ranker", 1) as bundle:
        reader = bundle.host(
            "reader", "tests.cluster.serving_units:load",
            inputs={"text": Spec(("b",), "string")}, outputs={"ids": Spec(("b", WIDTH), "int64")},
            options={"width": WIDTH},
        )  # fmt: skip
        table = bundle.table("table", TABLE, partitions=5, missing="zero")
        user = bundle.unit(
            "tower", tower, {"bias": BIAS}, inputs={"words": Spec(("b", WIDTH, DIM))},
            batch_buckets=(1, 4), platforms=("cpu",),
        )  # fmt: skip
        ranker = bundle.unit(
            "rank", rank, {"zero": np.float32(0)},
            inputs={
                "user": USER,
                "history": Spec(("b", WIDTH, DIM), per="request"),
                "item": Spec(("b", DIM)),
                "price": PRICE,
            },
            batch_buckets=(1, 16), request_buckets=(1, 3), platforms=("cpu",),
        )  # fmt: skip

        def ranked(query: Any, history: Any, item: Any, price: Any) -> Any:
            who = user(table.rows(reader(text=query)))
            return {"outputs": ranker(who, table.rows(history), table.rows(item), price)}

        # Nothing but look-ups and the request's own: their rows may all be joined at the device.
        @bundle.signature(
            "seen", inputs={"user": USER, "history": HISTORY, "item": ITEM, "price": PRICE}
        )
        def seen(user: Any, history: Any, item: Any, price: Any) -> Any:
            return {"outputs": ranker(user, table.rows(history), table.rows(item), price)}

        inputs = {"query": QUERY, "history": HISTORY, "item": ITEM, "price": PRICE}
        bundle.signature(inputs=inputs)(ranked)
        bundle.signature("regress", method="regress", inputs=inputs)(ranked)


def ids_of(query: str) -> list[int]:
    return list(query.encode()[:WIDTH])


def scores(user: Any, history: list[int], items: list[int], prices: list[float]) -> list[float]:
    seen = TABLE[history].sum()
    return [float(user @ TABLE[i] + seen - p) for i, p in zip(items, prices, strict=True)]


def expected(query: str, *others: Any) -> list[float]:
    return scores(TABLE[ids_of(query)].sum(0) + BIAS, *others)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    store = tmp_path_factory.mktemp("store")
    save(store)
    cluster = Cluster(store, tmp_path_factory.mktemp("s"), shards=3)
    try:
        cluster.load("ranker", 1)
        cluster.publish()
        yield cluster
        assert cluster.router.stats.unjoined == cluster.router.stats.mismatched == 0
    finally:
        cluster.close()


QUESTION = {"query": "abc", "history": [1, 2, 3, 4, 5, 6]}
ITEMS, PRICES = [7, 8, 9], [1.0, 2.0, 3.0]
SCORES = expected("abc", QUESTION["history"], ITEMS, PRICES)


def ask(cluster: Cluster, body: Any, verb: str = "predict") -> Answer:
    return cluster.ask(f"{PATH}:{verb}", json.dumps(body), {"x-request-timeout-ms": "15000"})


def instances(items: list[int] = ITEMS, prices: list[float] = PRICES) -> list[dict[str, float]]:
    return [{"item": item, "price": price} for item, price in zip(items, prices, strict=True)]


@pytest.mark.parametrize(
    ("body", "key"),
    [
        ({"inputs": {**QUESTION, "item": ITEMS, "price": PRICES}}, "outputs"),
        (
            {
                "inputs": {
                    "query": ["abc"],
                    "history": [QUESTION["history"]],
                    "item": ITEMS,
                    "price": PRICES,
                }
            },
            "outputs",
        ),
        ({"context": QUESTION, "instances": instances()}, "predictions"),
    ],
    ids=["columns", "columns with a leading one", "rows and a context"],
)
def test_what_is_per_request_is_written_once(cluster: Cluster, body: Any, key: str) -> None:
    answer = ask(cluster, body)
    assert answer.status == 200, answer.body
    assert answer.json == {key: SCORES}


@pytest.mark.parametrize("padding", [None, 30], ids=["on the loop", "in a process of its own"])
def test_a_large_body_is_read_like_a_small_one(cluster: Cluster, padding: int | None) -> None:
    """Of more rows than ten batches hold; blanks make it too large for the loop."""
    items = [n % ROWS for n in range(2000)]
    prices = [float(n % 7) for n in range(2000)]
    body = {"context": QUESTION, "instances": instances(items, prices)}
    text = json.dumps(body, indent=padding)
    assert (len(text) > 128 << 10) == (padding is not None)
    answer = cluster.ask(f"{PATH}:predict", text, {"x-request-timeout-ms": "15000"})
    assert answer.json == {"predictions": expected("abc", QUESTION["history"], items, prices)}


def test_the_context_of_examples_is_what_is_per_request(cluster: Cluster) -> None:
    body = {"signature_name": "regress", "context": QUESTION, "examples": instances()}
    answer = ask(cluster, body, "regress")
    assert answer.json == {"results": SCORES}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            {"inputs": {**QUESTION, "query": ["a", "b", "c"], "item": ITEMS, "price": PRICES}},
            "input 'query' is per request and must have one row, got [3]",
        ),
        ({"instances": instances()}, "Missing named input: query in 'context' object."),
        (
            {"context": {**QUESTION, "item": 3}, "instances": instances()},
            "'context' object has \"item\", no input per request",
        ),
        (
            {"context": QUESTION, "instances": [{**QUESTION, "item": 1, "price": 1.0}]},
            'input "history" is per request: give it once, in \'context\'',
        ),
        (
            {"context": QUESTION, "inputs": {**QUESTION, "item": ITEMS, "price": PRICES}},
            "'context' goes with 'instances'",
        ),
        (
            {"inputs": {**QUESTION, "item": [], "price": []}},
            "a request needs at least one row",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(cluster: Cluster, body: Any, said: str) -> None:
    answer = ask(cluster, body)
    assert answer.status == 400
    assert said in answer.error


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"examples": instances()}, "Feature: query (data type: string) is per request"),
        (
            {"context": QUESTION, "examples": [{"query": "x", "item": 1, "price": 1.0}]},
            "Feature: query is per request, and example 0 has one of its own",
        ),
    ],
)
def test_examples_that_lack_a_context_are_refused(cluster: Cluster, body: Any, said: str) -> None:
    answer = ask(cluster, {"signature_name": "regress", **body}, "regress")
    assert answer.status == 400
    assert said in answer.error


def test_metadata_says_what_is_per_request(cluster: Cluster) -> None:
    answer = cluster.ask(f"{PATH}/metadata")
    inputs = answer.json["metadata"]["signature_def"]["signature_def"]["serving_default"]["inputs"]
    assert inputs["history"]["tensor_shape"]["dim"] == [
        {"size": "1", "name": "request"}, {"size": "6", "name": ""},
    ]  # fmt: skip
    assert inputs["item"]["tensor_shape"]["dim"] == [{"size": "-1", "name": "b"}]


def test_calls_from_python_take_it_with_and_without_its_dimension(cluster: Cluster) -> None:
    async def ask(**inputs: Any) -> Any:
        return await call(cluster.router, "ranker", {"item": ITEMS, "price": PRICES, **inputs})

    for inputs in (QUESTION, {"query": ["abc"], "history": [QUESTION["history"]]}):
        version, outputs = cluster.io.run(ask(**inputs))
        assert (version, outputs["outputs"].tolist()) == (1, SCORES)
    with pytest.raises(InvalidArgument, match="per request and must have one row"):
        cluster.io.run(ask(query=["a", "b"], history=QUESTION["history"]))


@pytest.mark.parametrize(
    "least", [0, None], ids=["rows straight to the device", "rows through the router"]
)
def test_many_clients_get_each_their_own_exact_answer(cluster: Cluster, least: int | None) -> None:
    """Of one item or many more than a batch holds, in frames and batches that they share."""
    cluster.continuation_bytes_min = least
    cluster.publish()
    joined = cluster.router.stats.joined

    async def ask_all(seeds: range) -> None:
        await asyncio.gather(*map(ask_one, seeds))

    async def ask_one(seed: int) -> None:
        chosen = random.Random(seed)
        count = chosen.choice((1, 2, 3, 5, 16, 17, 60))
        query = "".join(chosen.choices("abcxyz 0189", k=chosen.randint(0, 9)))
        user = [float(chosen.randrange(9)) for _ in range(DIM)]
        history = [chosen.randrange(ROWS) for _ in range(WIDTH)]
        items = [chosen.randrange(ROWS) for _ in range(count)]
        prices = [float(chosen.randrange(9)) for _ in range(count)]
        inputs: dict[str, Any] = {"history": history, "item": items, "price": prices}
        if seed % 2:
            signature, wanted = "serving_default", expected(query, history, items, prices)
            inputs["query"] = query
        else:
            signature, wanted = "seen", scores(np.array(user), history, items, prices)
            inputs["user"] = user
        _, outputs = await call(
            cluster.router, "ranker", inputs, signature=signature, timeout_s=15.0
        )
        assert outputs["outputs"].tolist() == wanted

    for round_ in range(4):
        cluster.io.run(ask_all(range(40 * round_, 40 * round_ + 40)))
    assert (cluster.router.stats.joined > joined) == (least is not None)
    with ThreadPoolExecutor(8) as pool:
        bodies = [{"context": QUESTION, "instances": instances()}] * 16
        for answer in pool.map(lambda body: ask(cluster, body), bodies):
            assert answer.json == {"predictions": SCORES}
