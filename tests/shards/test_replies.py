"""How answers and refusals are cut into frames, and what a link that takes none of them costs."""

from __future__ import annotations

import numpy as np
import pytest

from shards import replies
from shards.errors import FrameRefused, SpecMismatch
from shards.replies import STALE, answers, refuse, refuse_all, refuse_answer, send_answers
from shards.wire import Item, ItemError, ReplyHeader
from tests.shards.serving import GENERATION, Array, FakeLink

ROWS = np.arange(12, dtype=np.float32).reshape(6, 2)


def send(link: FakeLink, items: list[tuple[int, int]], *outputs: Array) -> None:
    send_answers(link, "unit", GENERATION, answers(items, outputs))


def test_requests_share_a_frame() -> None:
    link = FakeLink()
    send(link, [(1, 2), (2, 4)], ROWS, np.arange(6))
    ((header, _),) = link.replies
    assert (header.unit, header.items, header.errors) == ("unit", [(1, 2), (2, 4)], [])
    np.testing.assert_array_equal(link.answers[1][0], ROWS[:2])
    np.testing.assert_array_equal(link.answers[2][1], [2, 3, 4, 5])


def test_what_is_too_large_to_share_goes_in_a_frame_for_each_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    link = FakeLink()
    monkeypatch.setattr(replies, "_SHARED_BYTES_MAX", ROWS.nbytes - 1)
    send(link, [(1, 1), (2, 0), (3, 5)], ROWS)
    assert [header.items for header, _ in link.replies] == [[(1, 1)], [(2, 0)], [(3, 5)]]
    np.testing.assert_array_equal(link.answers[3][0], ROWS[1:])
    assert link.answers[2][0].shape == (0, 2)


def test_a_request_that_is_too_large_alone_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    link = FakeLink()
    monkeypatch.setattr(replies, "_SHARED_BYTES_MAX", 1)
    send(link, [(1, 6)], ROWS)
    np.testing.assert_array_equal(link.answers[1][0], ROWS)


def test_an_answer_that_no_frame_takes_is_a_refusal_of_its_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    link = FakeLink(body_bytes_max=16)
    monkeypatch.setattr(replies, "_SHARED_BYTES_MAX", 16)
    send(link, [(1, 1), (2, 5)], ROWS)
    assert link.answers.keys() == {1}
    assert link.codes == {2: "INVALID_ARGUMENT"}
    assert link.errors[2].message.startswith("the answer cannot be sent: ")
    assert not link.closed


def test_an_answer_that_the_router_does_not_take_is_a_refusal_of_its_requests() -> None:
    link = FakeLink()
    header = ReplyHeader("unit", GENERATION, [(1, 2), (2, 4)], [])
    refuse_answer(link, header, FrameRefused("router: a body of 9 bytes is over the bound of 8"))
    assert link.codes == {1: "RESOURCE_EXHAUSTED", 2: "RESOURCE_EXHAUSTED"}
    assert link.errors[2].message == "router: a body of 9 bytes is over the bound of 8"


def test_an_output_that_cannot_travel_is_told_to_the_one_who_made_it() -> None:
    with pytest.raises(SpecMismatch):
        answers([(1, 1)], [np.array(["text, not bytes"], object)])


def test_refusals_carry_code_message_and_hint() -> None:
    link = FakeLink()
    refuse(link, "unit", [ItemError(1, "UNAVAILABLE", "later", 20)], GENERATION)
    assert link.errors[1] == ItemError(1, "UNAVAILABLE", "later", 20)


def test_every_item_of_a_call_is_refused() -> None:
    link = FakeLink()
    items = [Item(1, 1, 9), Item(2, 1, 9)]
    refuse_all(link, "unit", items, STALE, "gone", GENERATION, 5)
    assert link.codes == {1: "STALE_EPOCH", 2: "STALE_EPOCH"}
    assert {error.retry_after_ms for error in link.errors.values()} == {5}


def test_nothing_to_refuse_sends_nothing() -> None:
    link = FakeLink()
    refuse(link, "unit", [], GENERATION)
    assert not link.sent


def test_any_number_of_refusals_with_any_messages_fits_frames() -> None:
    link = FakeLink()  # refuses a header over the bound
    message = "€" * 5000
    refuse(link, "unit", [ItemError(n, "INTERNAL", message, n) for n in range(1000)], GENERATION)
    assert link.errors.keys() == set(range(1000))
    assert link.errors[999].retry_after_ms == 999
    assert link.errors[0].message == "€" * 1021 + "..."


def test_a_message_at_the_bound_is_not_cut() -> None:
    link = FakeLink()
    refuse(link, "unit", [ItemError(1, "INTERNAL", "x" * 1024)], GENERATION)
    assert link.errors[1].message == "x" * 1024


def test_a_peer_that_does_not_read_loses_its_link(caplog: pytest.LogCaptureFixture) -> None:
    link = FakeLink("router-3")
    link.full = True
    send(link, [(1, 6)], ROWS)
    assert link.closed == ["answers are not read"]
    assert "router-3 does not read its answers" in caplog.text


def test_a_peer_that_is_gone_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    link = FakeLink()
    link.close()
    send(link, [(1, 6)], ROWS)
    refuse(link, "unit", [ItemError(1, "INTERNAL", "x")], GENERATION)
    assert not link.sent
    assert not caplog.records
