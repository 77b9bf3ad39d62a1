"""Rates of devices from two readings, by example."""

from __future__ import annotations

import msgspec
import pytest

from batching.telemetry import TIME_BOUNDS
from cluster.device_metrics import DeviceReport, samples
from cluster.rates import DeviceRates, ServableRates, rates, rates_between
from shards.figures import BucketStatistics, DeviceStatistics, Spread
from tests.cluster.test_device_metrics import UNIT, device, servable, unit

change = msgspec.structs.replace


def queue(*places: int) -> Spread:
    """One request in line for each of these places among the bounds."""
    counts = [places.count(place) for place in range(len(TIME_BOUNDS) + 1)]
    return Spread(counts=tuple(counts), total=1.0)


def between(before: DeviceStatistics | None, after: DeviceStatistics) -> DeviceRates:
    return rates_between("device-0", before, after)


def only(found: DeviceRates) -> ServableRates:
    [row] = found.servables
    return row


BEFORE = device()


def later(seconds: float = 10.0, busy_s: float = 0.0, **pair: object) -> DeviceStatistics:
    """`BEFORE`, after some time in which its one servable's counts became these."""
    mine = change(BEFORE.servables[0], **pair)
    return change(
        BEFORE, up_s=BEFORE.up_s + seconds, busy_s=BEFORE.busy_s + busy_s, servables=(mine,)
    )


def test_counts_become_rates_on_the_device_s_own_time_scale() -> None:
    found = between(BEFORE, later(10.0, busy_s=4.0, in_time=30, late=10, rows=90))
    assert (found.seconds, found.busy) == (10.0, 0.4)
    row = only(found)
    assert (row.servable, row.unit) == ("m", UNIT[:12])
    assert (row.requests_s, row.rows_s) == (4.0, 6.0)
    assert (row.waiting_rows, found.waiting_rows, found.in_flight) == (5, 5, 1)


def test_a_servable_s_share_is_of_the_device_s_work_and_its_padding_of_its_own() -> None:
    mine = change(BEFORE.servables[0], busy_s=4.5, padding_s=1.25)
    after = change(later(10.0, busy_s=4.0), servables=(mine,))
    row = only(between(BEFORE, after))
    assert (row.device, row.share, row.padding) == (0.3, 0.75, 0.25)


def test_attainment_is_of_what_was_accepted_and_still_wanted() -> None:
    after = later(in_time=90, late=4, expired=3, shed_hopeless=1, shed_dropped=1, failed=1,
                  cancelled=50, refused_full=70)  # fmt: skip
    row = only(between(BEFORE, after))
    assert row.attainment == 0.9
    assert row.drops_s == {
        "late": 0.4, "failed": 0.1, "expired": 0.3, "shed_hopeless": 0.1, "shed_dropped": 0.1,
        "refused_full": 7.0,
    }  # fmt: skip


def test_time_in_line_is_of_the_requests_that_left_it_since() -> None:
    before = change(BEFORE, servables=(change(BEFORE.servables[0], queue=queue(9, 9, 9)),))
    after = later(queue=queue(9, 9, 9, *[3] * 99, 5))
    row = only(between(before, after))
    assert row.queue_p50_s is not None
    assert TIME_BOUNDS[2] < row.queue_p50_s <= TIME_BOUNDS[3]
    assert row.queue_p99_s is not None
    assert row.queue_p99_s == pytest.approx(TIME_BOUNDS[3])


def test_batches_are_as_full_as_their_rows_say_over_all_sizes() -> None:
    buckets = (
        BucketStatistics(bucket="8", batches=6, rows=42, slots=48, estimate_s=0.5),
        BucketStatistics(bucket="32", batches=2, rows=36, slots=64, estimate_s=0.5),
    )
    after = change(later(), units=(unit(buckets=buckets),))
    row = only(between(BEFORE, after))
    assert row.batch_rows == (12 + 36) / 4
    assert row.occupancy == (12 + 36) / (16 + 64)


def test_where_nothing_went_on_nothing_is_claimed() -> None:
    row = only(between(BEFORE, later()))
    assert (row.requests_s, row.device, row.drops_s) == (0.0, 0.0, {})
    unknown = (row.share, row.padding, row.attainment, row.batch_rows, row.occupancy)
    assert unknown == (None,) * 5
    assert row.queue_p50_s is None


def test_the_same_reading_twice_divides_by_nothing() -> None:
    found = between(BEFORE, BEFORE)
    assert (found.seconds, found.busy, only(found).requests_s) == (0.0, 0.0, 0.0)


def test_of_a_device_that_began_anew_all_that_it_counted_is_new() -> None:
    anew = device(up_s=4.0, busy_s=1.0, servables=(servable(in_time=8),))
    found = between(BEFORE, anew)
    assert (found.seconds, found.busy, only(found).requests_s) == (4.0, 0.25, 2.0)
    assert found == between(None, anew)


def test_a_unit_that_was_loaded_again_counts_from_then() -> None:
    before = change(BEFORE, servables=(change(BEFORE.servables[0], in_time=1000),))
    assert only(between(before, later(in_time=20))).requests_s == 2.0


def test_devices_are_told_apart_and_one_that_is_down_is_told_as_such() -> None:
    before = samples([DeviceReport("b", BEFORE), DeviceReport("a", BEFORE)])
    after = samples([DeviceReport("b", later(busy_s=5.0)), DeviceReport("a", None)])
    found = rates(before, after)
    assert [(each.name, each.is_up, each.busy) for each in found] == [
        ("a", False, 0.0),
        ("b", True, 0.5),
    ]
    assert [row.device_name for row in found[1].servables] == ["b"]


def test_what_is_no_device_s_is_passed_over() -> None:
    assert rates({}, {("serving_epoch", frozenset()): 3.0}) == []
