"""Counters of all routers of a node, told by any of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.doors.siblings import Siblings, labelled, together
from cluster.metrics import Metrics
from tests.cluster.routing_fakes import Bench, VirtualLoop, run_virtually

COUNTS = b"""# HELP requests_total Requests.
# TYPE requests_total counter
requests_total{code="OK",servable="a b{c} 1"} 3.0
# HELP epoch Current.
# TYPE epoch gauge
epoch 7.0
"""


def samples(text: bytes) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items()))):
            sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }  # fmt: skip


def test_every_sample_says_whose_it_is() -> None:
    assert samples(labelled(COUNTS, "1")) == {
        ("requests_total", "code=OK", "router=1", "servable=a b{c} 1"): 3.0,
        ("epoch", "router=1"): 7.0,
    }


def test_samples_of_a_metric_stand_together_below_one_head() -> None:
    text = together({"0": labelled(COUNTS, "0"), "1": labelled(COUNTS, "1")})
    assert text.count(b"# TYPE epoch") == text.count(b"# HELP epoch") == 1
    names = [line.split(b"{")[0] for line in text.splitlines() if not line.startswith(b"#")]
    assert names == [b"requests_total"] * 2 + [b"epoch"] * 2 + [b"serving_router_up"] * 2
    assert len(samples(text)) == 6


def test_a_metric_that_one_router_alone_has_is_told() -> None:
    more = b"# HELP hot Rows.\n# TYPE hot gauge\nhot 1.0\n"
    found = samples(together({"0": labelled(COUNTS, "0"), "1": labelled(more, "1")}))
    assert found["hot", "router=1"] == 1.0
    assert found["epoch", "router=0"] == 7.0


def test_all_that_a_router_tells_can_be_told_together() -> None:
    async def scenario(loop: VirtualLoop) -> None:
        bench = Bench(loop)
        await asyncio.sleep(0)
        texts: dict[str, bytes | None] = {}
        for number in ("0", "1"):
            metrics = Metrics(router=number)
            metrics.of('a "b" {c}', 3).answered(0.001)
            texts[number] = metrics.render(bench.router)
        found = samples(together(texts))
        name = "serving_requests_total"
        assert found[name, "code=OK", "router=1", 'servable=a "b" {c}', "version=3"] == 1.0
        assert {key[-1] for key in found if key[0] == "serving_epoch"} == {"router=0", "router=1"}

    run_virtually(scenario)


def teller(text: bytes) -> Callable[[Callable[[bytes], None]], None]:
    return lambda then: then(text)


@pytest.fixture
def sockets(tmp_path: Path) -> dict[str, Path]:
    return {number: tmp_path / f"router-{number}" for number in ("0", "1", "2")}


async def read(siblings: Siblings, own: bytes) -> dict[tuple[str, ...], float]:
    told: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    siblings.read(own, told.set_result)
    return samples(await told)


def test_a_router_tells_the_counters_of_its_siblings_and_which_are_down(
    sockets: dict[str, Path],
) -> None:
    async def scenario() -> None:
        routers = [Siblings(number, sockets) for number in ("0", "1")]
        for number, router in zip("01", routers, strict=True):
            await router.open(teller(labelled(COUNTS, number)))
        for number, router in zip("01", routers, strict=True):
            found = await read(router, labelled(COUNTS, number))
            up = [found["serving_router_up", f"router={each}"] for each in "012"]
            assert up == [1.0, 1.0, 0.0]
            assert {key[-1] for key in found if key[0] == "epoch"} == {"router=0", "router=1"}
        for router in routers:
            router.close()

    asyncio.run(scenario())


def test_a_sibling_that_says_nothing_is_down_in_a_moment(sockets: dict[str, Path]) -> None:
    async def scenario() -> None:
        mute, asked = Siblings("1", sockets), Siblings("0", sockets)
        await mute.open(lambda then: None)
        found = await asyncio.wait_for(read(asked, labelled(COUNTS, "0")), 10.0)
        assert found["serving_router_up", "router=1"] == 0.0
        mute.close()

    asyncio.run(scenario())


def test_a_router_that_was_started_again_takes_its_socket_over(sockets: dict[str, Path]) -> None:
    async def scenario() -> None:
        before, after, asked = (Siblings(number, sockets) for number in "110")
        await before.open(teller(labelled(COUNTS, "1")))
        await after.open(teller(b'# HELP epoch E.\n# TYPE epoch gauge\nepoch{router="1"} 9\n'))
        found = await read(asked, labelled(COUNTS, "0"))
        assert found["epoch", "router=1"] == 9.0
        for each in (before, after):
            each.close()

    asyncio.run(scenario())
