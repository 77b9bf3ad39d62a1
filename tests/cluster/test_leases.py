"""The fence between "no longer routed to" and "unload", one instant before and on it."""

from __future__ import annotations

from cluster.leases import Leases


def test_without_routers_nothing_is_waited_for() -> None:
    assert Leases(10.0).passes_at(5, 3.0, now=100.0) is None


def test_a_router_that_has_moved_on_is_not_waited_for() -> None:
    leases = Leases(10.0)
    leases.renew("a", 5, 100.0)
    assert leases.passes_at(5, 3.0, now=100.0) is None
    assert leases.passes_at(6, 3.0, now=100.0) == 113.0


def test_the_slowest_router_decides() -> None:
    leases = Leases(10.0)
    leases.renew("a", 4, 100.0)
    leases.renew("b", 4, 101.0)
    leases.renew("c", 5, 102.0)
    assert leases.passes_at(5, 3.0, now=102.0) == 114.0


def test_a_silent_router_is_waited_for_until_its_lease_and_the_longest_request_are_over() -> None:
    leases = Leases(10.0)
    leases.renew("a", 4, 100.0)
    assert leases.passes_at(5, 3.0, now=112.999) == 113.0
    assert leases.passes_at(5, 3.0, now=113.0) is None


def test_a_late_report_takes_a_router_neither_back_nor_shortens_its_lease() -> None:
    leases = Leases(10.0)
    leases.renew("a", 7, 100.0)
    leases.lease_s = 1.0
    leases.renew("a", 3, 101.0)
    assert leases.oldest() == {"a": 7}
    assert leases.passes_at(8, 0.0, now=101.0) == 110.0


def test_a_router_is_behind_until_it_has_told_the_epoch_or_its_lease_has_ended() -> None:
    leases = Leases(10.0)
    leases.renew("a", 4, 100.0, epoch=7)
    leases.renew("a", 5, 101.0)  # a correction, which says only what it is pinned to
    leases.renew("b", 8, 105.0)
    leases.heed(105.0)
    assert leases.behind(7) == ()
    assert leases.behind(8) == ("a",)
    assert leases.behind(9) == ("a", "b")
    for now in (107.4, 109.8, 112.0):
        leases.heed(now)
    assert leases.behind(9) == ("b",)


def test_a_router_that_is_gone_is_not_waited_for() -> None:
    leases = Leases(10.0)
    leases.renew("a", 4, 100.0)
    leases.forget("a")
    leases.forget("never heard of")
    assert leases.passes_at(5, 3.0, now=100.0) is None


def test_a_new_reign_waits_for_routers_it_has_not_heard() -> None:
    leases = Leases(10.0)
    leases.begin_blind(100.0)
    leases.renew("a", 9, 101.0)
    assert leases.passes_at(5, 3.0, now=112.999) == 113.0
    assert leases.passes_at(5, 3.0, now=113.0) is None


def test_silent_routers_are_forgotten_so_that_the_book_stays_small() -> None:
    leases = Leases(10.0)
    leases.renew("a", 4, 100.0)
    leases.expire(112.999, 3.0)
    assert leases.oldest() == {"a": 4}
    leases.expire(113.0, 3.0)
    assert leases.oldest() == {}


def test_time_in_which_the_controller_stood_still_runs_no_lease_out() -> None:
    leases = Leases(10.0)
    leases.heed(100.0)
    leases.renew("a", 4, 100.0)
    leases.heed(102.5)  # as it wanted to
    assert leases.passes_at(5, 3.0, now=102.5) == 113.0
    leases.heed(165.0)  # and now a minute later than that
    assert leases.passes_at(5, 3.0, now=165.0) == 113.0 + 60.0
    leases.expire(165.0, 3.0)
    assert leases.oldest() == {"a": 4}


def test_a_new_reign_that_stands_still_at_once_has_not_heard_anybody() -> None:
    leases = Leases(10.0)
    leases.heed(100.0)
    leases.begin_blind(100.0)
    leases.heed(202.5)
    assert leases.passes_at(5, 3.0, now=202.5) == 213.0


def test_a_silence_that_was_listened_to_is_no_shorter_for_what_comes_after() -> None:
    leases = Leases(10.0)
    leases.heed(100.0)
    leases.renew("a", 4, 100.0)
    for at in (102.5, 105.0, 107.5, 110.0):
        assert leases.looks_at == at
        leases.heed(at)
    leases.heed(170.0)  # the lease had run out before; what is left is for its last request
    assert leases.passes_at(5, 3.0, now=112.9) == 113.0
