"""`shardserve top`: readings of routers, what is between them, and how it is shown."""

from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console

from batching.errors import InvalidArgument, Unavailable
from cluster import top
from cluster.device_metrics import DeviceReport, samples, texts
from cluster.top import ORDERS, Reading, View, parse, read, render, views
from tests.cluster.test_device_metrics import device, servable

change = msgspec.structs.replace
FIRST = device()
SECOND = change(
    FIRST,
    up_s=FIRST.up_s + 2.0,
    busy_s=FIRST.busy_s + 1.0,
    servables=(
        change(FIRST.servables[0], in_time=18, expired=2, refused_full=4, busy_s=2.25),
        servable("quiet", waiting_rows=0),
    ),
)


def reading(*statistics: object, troubles: tuple[str, ...] = ()) -> Reading:
    reports = [DeviceReport(f"device-{n}", each) for n, each in enumerate(statistics)]  # type: ignore[arg-type]
    return Reading(samples(reports), list(troubles))


def view(before: Reading, after: Reading) -> View:
    rest = iter([before, after])
    return next(views(lambda: next(rest), 1.0, lambda seconds: None))


def shown(found: View, order: str = "requests") -> list[str]:
    file = io.StringIO()
    Console(file=file, width=240).print(render(found, order))
    return [" ".join(line.split()) for line in file.getvalue().splitlines()]


def test_text_of_routers_is_read_back_as_it_was() -> None:
    reports = [DeviceReport("device-0", FIRST)]
    assert parse("".join(texts(reports))) == samples(reports)


def test_what_no_router_says_is_told_as_such() -> None:
    with pytest.raises(InvalidArgument, match="not what a router tells"):
        parse("<html>not found</html>")


def test_a_device_and_its_servables_are_lines_of_a_table() -> None:
    head, columns, first, second = shown(view(reading(FIRST), reading(SECOND)))
    assert head == "device-0: busy 50%, 1 batches in flight, 5 rows in line"
    assert columns.startswith("servable unit device req/s rows full p50 p99 busy share padding")
    assert first == (
        "m 0123456789ab device-0 9.0 - - - - 37.5% 75% 0% 5 90.00% refused full 2.0, expired 1.0"
    )
    assert second.startswith("quiet 0123456789ab device-0 0.0 - -")


@pytest.mark.parametrize(
    ("order", "names"),
    [
        ("requests", ["m", "quiet"]),
        ("device", ["quiet", "m"]),
        ("drops", ["m", "quiet"]),
        ("attainment", ["m", "quiet"]),
        ("name", ["m", "quiet"]),
        ("queue", ["quiet", "m"]),
    ],
)
def test_rows_come_in_the_order_that_is_asked_for(order: str, names: list[str]) -> None:
    found = view(reading(FIRST), reading(SECOND))
    assert [line.split()[0] for line in shown(found, order)[2:]] == names
    assert set(ORDERS) == {"requests", "device", "drops", "attainment", "name", "queue"}


def test_a_device_that_is_down_and_a_router_that_is_away_are_told() -> None:
    found = view(reading(FIRST), reading(None, troubles=("http://b: nothing answers",)))
    lines = shown(found)
    assert lines[0] == "device-0: down"
    assert lines[-1] == "http://b: nothing answers"


def test_compiles_while_serving_are_told_loudly() -> None:
    compiled = change(SECOND, compiles_after_available=2)
    assert "2 COMPILED WHILE SERVING" in shown(view(reading(FIRST), reading(compiled)))[0]


def test_without_devices_that_is_said() -> None:
    assert shown(view(Reading({}, []), Reading({}, [])))[0] == "no device serves anything"


def test_a_router_that_was_away_is_measured_from_what_it_said_last() -> None:
    away = Reading({}, ["away"])
    later = change(SECOND, up_s=FIRST.up_s + 4.0)
    rest = iter([reading(FIRST), away, reading(later)])
    slept: list[float] = []
    found = views(lambda: next(rest), 0.5, slept.append)
    assert next(found).devices == []
    [back] = next(found).devices
    assert (back.seconds, slept) == (4.0, [0.5, 0.5])


def test_where_no_router_answers_at_first_that_is_an_error() -> None:
    with pytest.raises(Unavailable, match="nobody there"):
        next(views(lambda: Reading({}, ["nobody there"]), 1.0, lambda seconds: None))


def test_routers_are_read_together_and_one_that_fails_is_named() -> None:
    def get(url: str, path: str, timeout_s: float) -> str:
        assert path == "/metrics"
        if url == "http://a":
            return "".join(texts([DeviceReport("device-0", FIRST)]))
        raise Unavailable("does not answer")

    found = read(["http://a", "http://b"], get)
    assert found.samples == samples([DeviceReport("device-0", FIRST)])
    assert found.troubles == ["http://b: does not answer"]


def test_an_order_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="attainment, device"):
        top.run(["http://127.0.0.1:1"], Console(), order="size")
