"""Keys and rights: who may do what, by which header."""

from __future__ import annotations

import pytest

from batching.errors import PermissionDenied, ServingError, Unauthenticated
from cluster.access import Key, Keyring, Right, digest_of, secret_in

SEARCH = "a-secret-of-the-search-team"
OPS = "a-secret-of-the-operators"
RING = Keyring(
    [
        Key(
            name="search",
            digest=digest_of(SEARCH),
            predict=("search-*", "mlp"),
            metadata=("search-*",),
        ),
        Key(name="ops", digest=digest_of(OPS), metadata=("*",), metrics=True, admin=True),
    ]
)


def bearer(secret: str) -> dict[bytes, bytes]:
    return {b"authorization": b"Bearer " + secret.encode()}


@pytest.mark.parametrize(
    ("secret", "right", "servable", "allowed"),
    [
        (SEARCH, Right.PREDICT, "search-en", True),
        (SEARCH, Right.PREDICT, "search-", True),
        (SEARCH, Right.PREDICT, "mlp", True),
        (SEARCH, Right.PREDICT, "mlp2", False),
        (SEARCH, Right.PREDICT, "research-en", False),
        (SEARCH, Right.PREDICT, "search-en\nother", True),
        (SEARCH, Right.PREDICT, "", False),
        (SEARCH, Right.METADATA, "search-en", True),
        (SEARCH, Right.METADATA, "mlp", False),
        (SEARCH, Right.METRICS, "", False),
        (SEARCH, Right.ADMIN, "", False),
        (OPS, Right.PREDICT, "search-en", False),
        (OPS, Right.METADATA, "anything", True),
        (OPS, Right.METRICS, "", True),
        (OPS, Right.ADMIN, "", True),
    ],
)
def test_a_key_may_do_what_it_was_given_and_no_right_implies_another(
    secret: str, right: Right, servable: str, allowed: bool
) -> None:
    if allowed:
        assert RING.check(bearer(secret), right, servable) in ("search", "ops")
        return
    with pytest.raises(PermissionDenied) as caught:
        RING.check(bearer(secret), right, servable)
    name = "search" if secret is SEARCH else "ops"
    assert repr(name) in caught.value.message
    assert not servable or repr(servable) in caught.value.message
    assert secret not in caught.value.message


@pytest.mark.parametrize(
    "headers",
    [
        {b"authorization": b"Bearer " + SEARCH.encode()},
        {b"authorization": b"bEaReR   " + SEARCH.encode()},
        {b"x-api-key": SEARCH.encode()},
    ],
)
def test_a_key_comes_as_bearer_token_or_api_key(headers: dict[bytes, bytes]) -> None:
    assert RING.check(headers, Right.PREDICT, "mlp") == "search"


@pytest.mark.parametrize(
    ("headers", "why"),
    [
        ({}, "a key is needed"),
        ({b"x-api-key": b""}, "a key is needed"),
        ({b"authorization": b""}, "only bearer tokens"),
        ({b"authorization": b"Bearer"}, "only bearer tokens"),
        ({b"authorization": SEARCH.encode()}, "only bearer tokens"),
        ({b"authorization": b"Basic " + SEARCH.encode()}, "only bearer tokens"),
        ({b"authorization": b"Bearer a b"}, "only bearer tokens"),
        ({b"authorization": b"Bearer " + SEARCH.encode() + b", Bearer x"}, "only bearer tokens"),
        ({**bearer(SEARCH), b"x-api-key": SEARCH.encode()}, "given twice"),
        (bearer(SEARCH + "x"), "unknown key"),
        (bearer(SEARCH[:-1]), "unknown key"),
        ({b"x-api-key": b"x" * 10_000}, "unknown key"),
        ({b"x-api-key": b"\xff\x00"}, "unknown key"),
    ],
)
def test_who_brings_no_good_key_is_not_known(headers: dict[bytes, bytes], why: str) -> None:
    with pytest.raises(Unauthenticated, match=why) as caught:
        RING.check(headers, Right.PREDICT, "mlp")
    assert SEARCH not in caught.value.message
    with pytest.raises(Unauthenticated):
        RING.visible(headers, ["mlp"])


def test_counters_may_be_open_to_all_and_nothing_else_is() -> None:
    ring = Keyring([], open_metrics=True)
    assert ring.check({}, Right.METRICS) == ""
    for right in set(Right) - {Right.METRICS}:
        with pytest.raises(Unauthenticated):
            ring.check({}, right, "mlp")


def test_an_empty_ring_lets_nobody_in() -> None:
    for right in Right:
        with pytest.raises(ServingError):
            Keyring([]).check(bearer(SEARCH), right, "mlp")


def test_only_servables_that_a_key_may_see_are_visible() -> None:
    names = ["search-en", "search-de", "mlp"]
    assert RING.visible(bearer(SEARCH), names) == {"search-en", "search-de"}
    assert RING.visible(bearer(OPS), names) == set(names)


def test_patterns_know_stars_and_nothing_surprising() -> None:
    ring = Keyring([Key(name="k", digest=digest_of(SEARCH), predict=("a.b", "*-x"))])
    assert ring.check(bearer(SEARCH), Right.PREDICT, "a.b") == "k"
    assert ring.check(bearer(SEARCH), Right.PREDICT, "one-x") == "k"
    for other in ("aXb", "one-x2", "A.B"):
        with pytest.raises(PermissionDenied):
            ring.check(bearer(SEARCH), Right.PREDICT, other)


def test_a_ring_keeps_digests_and_no_secret() -> None:
    assert digest_of(SEARCH).hex() not in SEARCH
    assert len(RING) == 2
    assert secret_in({b"x-api-key": b"k"}) == b"k"
