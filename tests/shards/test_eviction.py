"""What a full cache gives up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.eviction import Cached, Room, make_room


def blob(digest: str, size: int, used: int, *, held: bool = False) -> Cached:
    return Cached(digest, size, used, held)


OLD, MID, NEW = blob("old", 4, 1), blob("mid", 4, 2), blob("new", 4, 3)


@pytest.mark.parametrize(
    ("cached", "coming", "need", "victims", "short", "why"),
    [
        ([], 0, 10, (), 0, "what fits exactly goes in"),
        ([], 0, 11, (), 1, "what is larger than the cache is short by the rest"),
        ([OLD], 0, 6, (), 0, "nothing goes while there is room"),
        ([NEW, OLD], 0, 3, ("old",), 0, "the one used longest ago goes"),
        ([NEW, OLD], 0, 7, ("old", "new"), 0, "as many go as must"),
        ([blob("old", 4, 1, held=True), NEW], 0, 3, ("new",), 0, "what is held stays"),
        ([blob("old", 4, 1, held=True), NEW], 0, 8, (), 2, "nothing goes in vain"),
        ([OLD], 5, 2, ("old",), 0, "what is on its way counts"),
        ([OLD], 9, 2, (), 1, "and cannot be given up"),
        ([blob("a", 1, 1), blob("b", 9, 2)], 0, 8, ("b",), 0, "none goes that could stay"),
        ([blob("hole", 0, 1), OLD, MID], 0, 3, ("old",), 0, "what takes nothing gives nothing"),
    ],
)
def test_room(
    cached: list[Cached], coming: int, need: int, victims: tuple[str, ...], short: int, why: str
) -> None:
    assert make_room(cached, coming, need, 10) == Room(victims, short), why


blobs = st.lists(
    st.builds(
        Cached,
        digest=st.text("abcdef", min_size=1, max_size=4),
        size=st.integers(0, 50),
        used=st.integers(0, 5),
        held=st.booleans(),
    ),
    unique_by=lambda each: each.digest,
    max_size=12,
)


@given(blobs, st.integers(0, 60), st.integers(0, 60), st.integers(0, 200))
def test_room_keeps_the_budget_and_what_is_held(
    cached: list[Cached], coming: int, need: int, budget: int
) -> None:
    room = make_room(cached, coming, need, budget)
    by_digest = {each.digest: each for each in cached}
    victims = [by_digest[digest] for digest in room.victims]
    assert not any(each.held for each in victims)
    assert len(set(room.victims)) == len(room.victims)
    left = sum(each.size for each in cached) - sum(each.size for each in victims) + coming + need
    if room.short:
        assert not victims
        free = sum(each.size for each in cached if not each.held)
        assert left - free - budget == room.short
    else:
        assert left <= budget
        # Each of them was needed.
        assert all(left + each.size > budget for each in victims)
        assert victims == sorted(victims, key=lambda each: (each.used, each.digest))
