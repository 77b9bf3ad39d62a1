"""Layouts of declared tables: all rows are somewhere, costs are explained, shortages typed."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batching.errors import InvalidArgument
from cluster.layout_costs import Host, Load, Pace, Part, Shape, TooBusy, Traffic, loads_of, shape_of
from cluster.layouts import STRATEGIES, Layout, Strategy, TooLarge, lay_out
from cluster.plans import EXAMPLES

GIB = 1 << 30


def hosts(count: int, memory: int = 64 * GIB) -> list[Host]:
    return [
        Host(
            name=f"n{i:03}", memory_bytes=memory, nic_bytes_s=12.5e9, memory_bytes_s=50e9, cores=16
        )
        for i in range(count)
    ]


def everywhere(shapes: Sequence[Shape], count: int, rows: int = 1) -> tuple[Load, ...]:
    """What nodes cost if every table is cut evenly over all of them."""
    nodes = hosts(count)
    held = {
        host.name: {s.name: (s.rows // count, s.nbytes // count) for s in shapes} for host in nodes
    }
    return loads_of(shapes, nodes, held, copies=1, traffic=Traffic(rows=rows), pace=Pace())


def rows_of(layout: Layout, table: str) -> int:
    return sum(node.tables.get(table, 0) for node in layout.nodes)


SIZES = st.lists(
    st.tuples(st.integers(1, 2000), st.integers(1, 64), st.sampled_from((0.0, 1.0, 2.5, 40.0))),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=40)
@given(sizes=SIZES, count=st.integers(1, 6), copies=st.integers(1, 2), rows=st.integers(1, 9))
def test_every_copy_of_every_row_is_on_a_node_of_its_own_and_no_node_is_overfull(
    strategy: Strategy,
    sizes: list[tuple[int, int, float]],
    count: int,
    copies: int,
    rows: int,
) -> None:
    copies = min(copies, count)
    shapes = [
        shape_of(f"t{i}", n, dim, "float32", ids=ids) for i, (n, dim, ids) in enumerate(sizes)
    ]
    nodes = hosts(count, 6 << 20)
    made = [
        lay_out(shapes, nodes, strategy=strategy, copies=copies, traffic=Traffic(rows=rows))
        for _ in range(2)
    ]
    layout = made[0]
    assert layout == made[1]
    for shape in shapes:
        assert rows_of(layout, shape.name) == shape.rows * copies
        assert sum(part.rows for part in layout.parts[shape.name]) == shape.rows
        homes = layout.homes[shape.name]
        assert len(homes) == len(layout.parts[shape.name])
        assert all(len(set(part)) == len(part) == copies for part in homes)
    assert all(node.nbytes <= 6 << 20 for node in layout.nodes)
    for figure in (layout.full, layout.busy, layout.spread):
        assert figure.value >= figure.bound * (1 - 1e-9)
    lookups = sum(node.lookups for node in layout.nodes)
    assert lookups == pytest.approx(rows * sum(shape.ids for shape in shapes))
    sent = sum(node.sent_bytes for node in layout.nodes)
    assert sent == pytest.approx(sum(node.received_bytes for node in layout.nodes))
    assert (sent > 0) == (count > 1 and lookups > 0)


@pytest.mark.parametrize(
    ("count", "answers"),
    [(2, 20_017), (4, 29_428), (8, 40_529), (16, 52_601), (32, 65_992), (64, 79_970)],
)
def test_sums_of_tables_that_are_cut_over_nodes_are_as_many_as_nodes_are_touched(
    count: int, answers: int
) -> None:
    """A sample of DLRM-v2: 512 bytes x sum over tables of S(1 - (1 - 1/S)^ids)."""
    shapes = EXAMPLES["dlrm-v2"]
    even = [shape_of(s.name, 64 * 3000, 128, "float32", ids=s.ids, pooled=True) for s in shapes]
    nodes = everywhere(even, count)
    ids, bags = 214 * 4, answers / 512 * 4
    # An answer and a question cross the network unless router and shard are on one node.
    crossing = (answers + ids + bags) * (count - 1) / count
    assert sum(node.sent_bytes for node in nodes) == pytest.approx(crossing, rel=1e-4)


def test_the_examples_are_the_published_tables() -> None:
    second, third = EXAMPLES["dlrm-v2"], EXAMPLES["dlrm-v3"]
    assert sum(shape.rows for shape in second) == 204_184_588
    assert sum(shape.ids for shape in second) == 214
    assert max(shape.nbytes for shape in third) == 1_024_000_000_000


def test_rows_of_a_terabyte_pass_networks_whole() -> None:
    """2 MiB of rows and 16 KiB of ids a request, over all networks of 12.5 GB/s."""
    for count in (32, 128):
        nodes = everywhere(EXAMPLES["dlrm-v3"][:1], count)
        each = 2048 * (1024 + 8) / count * (count - 1) / count
        assert nodes[0].needs["nic"] == pytest.approx(each / 12.5e9)


def test_memory_is_read_by_whole_lines_and_answers_pass_it() -> None:
    shape = shape_of("t", 1000, 33, "float32", ids=10)
    [node] = everywhere([shape], 1)
    assert node.read_bytes == 10 * 192 + 5 * 33 * 4
    assert node.sent_bytes == node.received_bytes == 0


def test_more_nodes_serve_more_of_what_asks_few_of_them_and_no_more_of_what_asks_all() -> None:
    asks_all = [everywhere(EXAMPLES["dlrm-v3"][:1], count) for count in (32, 128)]
    rates = [min(node.limit for node in nodes) for nodes in asks_all]
    assert [resource for _, resource in rates] == ["shard loop", "shard loop"]
    assert rates[1][0] < 2 * rates[0][0]
    few = shape_of("few", 10**6, 512, "float16", ids=1, pooled=False)
    limits = [min(node.limit[0] for node in everywhere([few], count)) for count in (32, 128)]
    assert limits[1] == pytest.approx(4 * limits[0], rel=0.05)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_has_no_room_on_all_nodes_is_told_with_the_bytes_that_are_short(
    strategy: Strategy,
) -> None:
    with pytest.raises(TooLarge) as caught:
        lay_out(EXAMPLES["dlrm-v3"][:1], hosts(2, 500 * 10**9), strategy=strategy)
    assert (caught.value.where, caught.value.short_bytes) == ("", 24 * 10**9)
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert (str(again), again.short_bytes) == (str(caught.value), 24 * 10**9)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_part_that_no_layout_may_cut_is_told_with_what_the_roomiest_node_lacks(
    strategy: Strategy,
) -> None:
    fixed = shape_of("t", 20, 16, "float32", parts=(Part(rows=20, nbytes=1280),))
    with pytest.raises(TooLarge) as caught:
        lay_out([fixed], hosts(3, 1000), strategy=strategy)
    assert (caught.value.where, caught.value.short_bytes) == ("n000", 280)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tables_that_fill_all_memory_are_cut(strategy: Strategy) -> None:
    shapes = [shape_of(f"t{i}", 5, 16, "float32") for i in range(4)]
    layout = lay_out(shapes, hosts(4, 5 * 64 + 63), strategy=strategy)
    assert [rows_of(layout, shape.name) for shape in shapes] == [5, 5, 5, 5]


def test_cold_tables_find_room_beside_busy_ones() -> None:
    """Busy small tables spread first would leave none of the nodes room for a large one."""
    cold = [
        shape_of(f"cold{i}", 10, 16, "float32", ids=0, parts=(Part(rows=10, nbytes=640),))
        for i in range(2)
    ]
    busy = [
        shape_of(f"busy{i}", 4, 16, "float32", ids=9, parts=(Part(rows=4, nbytes=256),))
        for i in range(2)
    ]
    layout = lay_out([*busy, *cold], hosts(3, 700), strategy="load")
    assert sum(node.nbytes for node in layout.nodes) == 2 * (640 + 256)


def test_an_even_load_is_evener_and_fewest_messages_are_fewer() -> None:
    shapes = [shape_of(f"t{i}", 1000 + 90 * i, 64, "float32", ids=4 + i % 5) for i in range(12)]
    found = {name: lay_out(shapes, hosts(4), strategy=name) for name in STRATEGIES}
    assert found["messages"].messages == 1
    assert found["load"].messages > 3.9
    assert found["load"].busy.value < found["capacity"].busy.value < found["messages"].busy.value
    assert found["capacity"].full.value < found["load"].full.value
    assert found["load"].busy.value <= 1.05 * found["load"].busy.bound


def test_fewest_messages_keeps_tables_of_a_net_on_one_node() -> None:
    shapes = [
        shape_of(f"{net}{i}", 100 + 7 * i, 16, "float32", net=net) for net in "ab" for i in range(3)
    ]
    one = max(sum(s.nbytes for s in shapes if s.net == net) for net in "ab")
    layout = lay_out(shapes, hosts(2, one), strategy="messages")
    assert {frozenset(name[0] for name in node.tables) for node in layout.nodes} == {
        frozenset("a"), frozenset("b"),
    }  # fmt: skip


def test_tables_no_larger_than_an_even_share_stay_whole() -> None:
    shapes = [shape_of(f"t{i}", 1000, 64, "float32", ids=4) for i in range(8)]
    for strategy in STRATEGIES:
        layout = lay_out(shapes, hosts(4), strategy=strategy)
        assert {len(parts) for parts in layout.parts.values()} == {1}


def test_nodes_of_different_sizes_get_shares_of_their_size() -> None:
    large, small = (
        Host(name=name, memory_bytes=size, nic_bytes_s=1e9, memory_bytes_s=1e10, cores=4)
        for name, size in (("large", 3 << 20), ("small", 1 << 20))
    )
    shape = shape_of("t", 20_000, 16, "float32")
    layout = lay_out([shape], [large, small], strategy="capacity")
    assert layout.nodes[0].nbytes / layout.nodes[1].nbytes == pytest.approx(3, rel=0.1)


def test_more_traffic_than_the_limit_is_refused_with_what_is_short_and_has_no_latency() -> None:
    shapes = [shape_of("t", 1000, 64, "float32", ids=4)]
    rate, resource, host = lay_out(shapes, hosts(2)).limit
    below = lay_out(shapes, hosts(2), traffic=Traffic(requests_s=rate * 0.9))
    below.check_rate()
    assert lay_out(shapes, hosts(2)).latency_s < below.latency_s < math.inf
    above = lay_out(shapes, hosts(2), traffic=Traffic(requests_s=rate * 1.5))
    assert math.isinf(above.latency_s)
    with pytest.raises(TooBusy) as caught:
        above.check_rate()
    assert (caught.value.resource, caught.value.host) == (resource, host)
    assert caught.value.requests_s - caught.value.requests_s_max == pytest.approx(rate / 2)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301


def test_int8_rows_are_held_with_their_scale_and_sent_as_floats() -> None:
    shape = shape_of("t", 10, 64, "int8", pooled=False)
    assert (shape.row_bytes, shape.answer_bytes, shape.id_bytes) == (68, 256, 8)
    pooled = shape_of("t", (1 << 31) + 1, 64, "float16")
    assert (pooled.row_bytes, pooled.answer_bytes, pooled.id_bytes) == (128, 256, 8)


def test_what_cannot_be_meant_is_refused() -> None:
    shape = shape_of("t", 1, 1, "float32")
    for shapes, nodes, copies in (
        ([shape, shape], hosts(1), 1), ([], hosts(1), 1), ([shape], [], 1), ([shape], hosts(1), 2),
        ([shape], hosts(1), 0),
    ):  # fmt: skip
        with pytest.raises(InvalidArgument):
            lay_out(shapes, nodes, copies=copies)
    with pytest.raises(InvalidArgument):
        shape_of("t", 1, 1, "string")
    with pytest.raises(InvalidArgument):
        shape_of("t", 3, 1, "float32", parts=(Part(rows=2, nbytes=8),))
    with pytest.raises(InvalidArgument):
        Host(name="n", memory_bytes=0, nic_bytes_s=1, memory_bytes_s=1, cores=1)
