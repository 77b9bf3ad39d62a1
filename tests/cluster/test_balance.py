"""Which parts go where: by example, and whatever is held."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from cluster import balance
from cluster.balance import Balance, Held
from cluster.pieces import PieceKey
from cluster.sites import Site


def balanced(tables: list[Held], there: list[Site]) -> Balance:
    """All that makes load even."""
    return balance.balanced(tables, there, legs_max=1000)


def held(name: str, homes: dict[int, str], size: int = 10, **more: object) -> Held:
    """One table of equal partitions, each on the actors of its letters."""
    parts = {("t", index): {(name, index): size} for index in homes}
    found = Held(
        key=(name, 1),
        parts=parts,
        weights=dict.fromkeys(parts, float(size)),
        homes={("t", index): tuple(actors) for index, actors in homes.items()},
    )
    return replace(found, **more)  # type: ignore[arg-type]


def sites(names: str, tables: list[Held], capacity: int = 0, nodes: str = "") -> list[Site]:
    """Shard actors of one letter each, each on a node of its own unless said otherwise."""
    book: dict[str, dict[PieceKey, int]] = {name: {} for name in names}
    for each in tables:
        for part, actors in each.homes.items():
            for actor in actors:
                book[actor].update(each.parts[part])
    return [
        Site(name=name, kind="shard", node=node, capacity_bytes=capacity, pieces=book[name])
        for name, node in zip(names, nodes or names, strict=True)
    ]


def result(tables: list[Held], found: Balance) -> list[Held]:
    """What is held once it is done."""
    homes = {each.key: dict(each.homes) for each in tables}
    for leg in found.legs:
        for part in leg.parts:
            actors = homes[leg.key][part]
            assert leg.old in actors
            assert leg.new not in actors
            homes[leg.key][part] = tuple(leg.new if a == leg.old else a for a in actors)
    return [replace(each, homes=homes[each.key]) for each in tables]


def test_parts_of_one_table_go_to_actors_that_have_come() -> None:
    tables = [held("m", {0: "a", 1: "a", 2: "a", 3: "b", 4: "b", 5: "b"})]
    found = balanced(tables, sites("abc", tables))
    assert sum(len(leg.parts) for leg in found.legs) == 2
    assert {leg.new for leg in found.legs} == {"c"}
    assert {bytes_held for bytes_held, _ in found.after.values()} == {20}
    assert found.uneven == (1.5, 1.0)


def test_parts_that_go_the_same_way_go_together() -> None:
    tables = [held("m", dict.fromkeys(range(8), "a"))]
    (leg,) = balanced(tables, sites("ab", tables)).legs
    assert (leg.old, leg.new, len(leg.parts), leg.nbytes) == ("a", "b", 4, 40)


def test_what_is_even_stays() -> None:
    tables = [held("m", {0: "a", 1: "b", 2: "a"})]
    assert balanced(tables, sites("ab", tables)).legs == ()


def test_tables_of_several_servables_are_spread() -> None:
    tables = [held(name, {0: "a", 1: "b"}) for name in "mno"]
    found = balanced(tables, sites("abc", tables))
    assert {bytes_held for bytes_held, _ in found.after.values()} == {20}


def test_a_version_that_stays_counts_as_load() -> None:
    fixed = held("m", {0: "a", 1: "a"}, 20, stays="it gives way")
    tables = [fixed, held("n", {0: "a", 1: "b"})]
    (leg,) = balanced(tables, sites("ab", tables)).legs
    assert leg.key == ("n", 1)


def test_where_there_is_no_room_nothing_goes() -> None:
    tables = [held("m", {0: "a", 1: "a"})]
    found = balanced(tables, sites("ab", tables, capacity=9))
    assert (found.legs, dict(found.full)) == ((), {"b": 1})


def test_copies_stay_on_nodes_of_their_own() -> None:
    tables = [held("m", {0: "ac", 1: "ac"})]
    assert balanced(tables, sites("abc", tables, nodes="xyy")).legs[0].new == "b"
    assert not [
        leg
        for leg in balanced(tables, sites("abc", tables, nodes="xyy")).legs
        if (leg.old, leg.new) == ("a", "b")
    ]


def test_a_base_that_another_version_has_there_is_not_held_twice() -> None:
    old = held("m", {0: "a", 1: "a"})
    new = replace(old, key=("m", 2))
    tables = [old, new]
    assert balanced(tables, sites("ab", tables)).legs == ()


def test_a_version_is_on_no_more_actors_than_it_may_be() -> None:
    tables = [held("m", {0: "a", 1: "a"}, actors_max=1)]
    assert balanced(tables, sites("ab", tables)).legs == ()


def test_parts_that_nobody_looks_up_stay() -> None:
    tables = [held("m", {0: "a", 1: "a"}, weights={("t", 0): 0.0, ("t", 1): 20.0})]
    assert balanced(tables, sites("ab", tables)).legs == ()


ACTORS = "abcd"
COPIES = st.lists(st.sampled_from(ACTORS), min_size=1, max_size=2, unique=True).map("".join)


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[Held], int]:
    tables = []
    for name in "mn"[: draw(st.integers(1, 2))]:
        homes = draw(st.dictionaries(st.integers(0, 7), COPIES, min_size=1))
        parts = {("t", i): {(name, i): draw(st.integers(1, 50))} for i in homes}
        weights = {part: float(draw(st.integers(0, 50))) for part in parts}
        tables.append(held(name, homes, parts=parts, weights=weights))
    used = {site.name: sum(site.pieces.values()) for site in sites(ACTORS, tables)}
    return tables, max(used.values()) + draw(st.integers(0, 60))


def unevenness(tables: list[Held]) -> float:
    squares = 0.0
    for group in [tables, *([each] for each in tables)]:
        for actor in ACTORS:
            load = sum(
                each.weights[part]
                for each in group
                for part, actors in each.homes.items()
                if actor in actors
            )
            squares += load * load
    return squares


@given(clusters())
def test_it_gets_more_even_fits_and_is_at_rest_then(case: tuple[list[Held], int]) -> None:
    tables, capacity = case
    found = balanced(tables, sites(ACTORS, tables, capacity))
    after = result(tables, found)
    there = sites(ACTORS, after, capacity)
    for site in there:
        assert sum(site.pieces.values()) == found.after[site.name][0] <= capacity
    assert bool(found.legs) == (unevenness(after) < unevenness(tables))
    assert balanced(after, there).legs == ()
