"""Arrow streams: pyarrow reads what is written, is read in turn, and the rest is refused."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import flatbuffers
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from batching.errors import InvalidArgument
from cluster.api import ColumnsParser, Parsed
from cluster.forms import Form, Forms, arrow_writing
from cluster.forms.arrow import EXTENSION, EXTENSION_DATA, TENSOR, is_quick, read_request
from cluster.forms.arrow_writing import write_answer
from shards.specs import DTYPES, Spec
from tests.cluster.api_support import assert_same_array, assert_same_arrays, f32, signature, texts
from tests.cluster.routing_fakes import doubled, epoch, plain, turns
from tests.cluster.test_forms import EVERY_DTYPE
from tests.cluster.test_reading import Asked
from tests.cluster.test_reading import play as play_room
from tests.cluster.test_service import ONE, Door, error_of, play
from tests.cluster.test_service_reading import with_room

ARROW = Form.ARROW.value
HEADERS = {b"content-type": ARROW.encode()}
NUMBERS = [name for name in DTYPES if name not in ("string", "bfloat16")]


def stream(table: pa.Table, **options: Any) -> bytes:
    """A body as pyarrow writes it."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, **options) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def table_of(**columns: Any) -> pa.Table:
    return pa.table(dict(columns))


def read(body: bytes) -> pa.Table:
    """As pyarrow reads it, which believes nothing."""
    found = pa.ipc.open_stream(body).read_all()
    found.validate(full=True)
    return found


def answer(outputs: dict[str, Any]) -> bytes:
    [body] = write_answer(outputs).buffers
    return bytes(body)


def lists(values: Any, kind: Any) -> pa.Array:
    return pa.array(np.asarray(values).tolist(), kind)


# What is read


@pytest.mark.parametrize("dtype", NUMBERS)
def test_numbers_of_every_dtype_are_read(dtype: str) -> None:
    values = np.array([0, 1, 1, 0, 1]).astype(dtype)
    kind = pa.from_numpy_dtype(values.dtype)
    rows = pa.FixedSizeListArray.from_arrays(pa.array(np.tile(values, 2)), 5)
    found = read_request(stream(table_of(x=pa.array(values, kind)))).arrays
    assert_same_arrays(found, {"x": values})
    assert_same_arrays(read_request(stream(table_of(x=rows))).arrays, {"x": np.stack([values] * 2)})


@pytest.mark.parametrize("kind", [pa.utf8(), pa.binary(), pa.large_utf8(), pa.large_binary()])
def test_strings_of_every_kind_are_read(kind: Any) -> None:
    words = pa.array(["a", "", "é", "word"], pa.utf8()).cast(kind)
    nested = pa.FixedSizeListArray.from_arrays(words, 2)
    wanted = [b"a", b"", "é".encode(), b"word"]
    assert read_request(stream(table_of(t=words))).arrays["t"].tolist() == wanted
    assert read_request(stream(table_of(t=words[1:3]))).arrays["t"].tolist() == wanted[1:3]
    found = read_request(stream(table_of(t=nested))).arrays["t"]
    assert found.tolist() == [wanted[:2], wanted[2:]]


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.list_(pa.float32())),
        pa.large_list(pa.list_(pa.float32(), 3)),
        pa.list_(pa.large_list(pa.float32()), 2),
        pa.list_(pa.list_(pa.float32(), 3), 2),
        pa.fixed_shape_tensor(pa.float32(), [2, 3]),
    ],
    ids=str,
)
def test_rows_of_several_dimensions_are_read(kind: Any) -> None:
    wanted = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    if isinstance(kind, pa.FixedShapeTensorType):
        column = pa.FixedShapeTensorArray.from_numpy_ndarray(wanted)
    else:
        column = lists(wanted, kind)
    table = table_of(x=column)
    assert_same_arrays(read_request(stream(table)).arrays, {"x": wanted})
    assert_same_arrays(read_request(stream(table[1:3])).arrays, {"x": wanted[1:3]})
    parts = stream(pa.concat_tables([table, table]))
    assert_same_arrays(read_request(parts).arrays, {"x": np.concatenate([wanted, wanted])})


def test_a_bfloat16_is_a_uint16_of_that_name_and_an_unknown_extension_is_refused() -> None:
    values = EVERY_DTYPE["bfloat16"]
    assert_same_arrays(read_request(answer({"x": values})).arrays, {"x": values})
    field = pa.field("x", pa.uint16(), metadata={"ARROW:extension:name": "else.where"})
    with pytest.raises(InvalidArgument, match=r"'x' is of the extension type 'else\.where'"):
        read_request(stream(pa.table([pa.array([1], pa.uint16())], pa.schema([field]))))


def test_numbers_of_one_batch_are_not_copied() -> None:
    body = stream(table_of(x=np.arange(1000, dtype=np.float32)))
    found = read_request(body).arrays["x"]
    assert np.shares_memory(found, np.frombuffer(body, np.uint8))
    assert is_quick(body)
    assert not is_quick(stream(pa.concat_tables([table_of(x=[1.0]), table_of(x=[2.0])])))


def test_the_schema_may_name_a_signature_and_the_end_may_be_missing() -> None:
    table = table_of(x=[1.0]).replace_schema_metadata({"signature_name": "é", "pandas": "{}"})
    for body in (stream(table), stream(table)[:-8]):
        found = read_request(body)
        assert found.signature_name == "é"
        assert found.arrays["x"].tolist() == [1.0]


COLUMN = st.tuples(
    st.sampled_from([*NUMBERS, "bfloat16"]),
    st.lists(st.integers(0, 3), max_size=3),
)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), rows=st.integers(0, 5), columns=st.lists(COLUMN, min_size=1, max_size=4))
def test_what_is_written_pyarrow_reads_and_we_read_again(
    data: st.DataObject, rows: int, columns: list[tuple[str, list[int]]]
) -> None:
    outputs: dict[str, Any] = {}
    for number, (dtype, inner) in enumerate(columns):
        shape = (rows, *inner)
        bits = data.draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 1)))
        outputs[f"column {number}"] = bits.astype(DTYPES[dtype])
    body = answer(outputs)
    table = read(body)
    assert (table.num_rows, table.column_names) == (rows, list(outputs))
    assert_same_arrays(read_request(body).arrays, outputs)


# What is written


def test_answers_have_the_types_that_tables_have() -> None:
    deep = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    outputs = {**EVERY_DTYPE, "deep": deep, "y": f32([1, 2]), "t": texts([b"a", b"\xff"])}
    table = read(answer(outputs))
    assert table["float32"].to_pylist() == [[0, 1], [1, 0]]
    assert table["bool"].to_pylist() == [[False, True], [True, False]]
    assert table["string"].to_pylist() == [[b"", b"\x00\xff"], [b"word", b"\xc3\xa9"]]
    assert table["t"].to_pylist() == [b"a", b"\xff"]
    assert table["y"].to_pylist() == [1.0, 2.0]
    assert_same_array(table["deep"].combine_chunks().to_numpy_ndarray(), deep)
    assert_same_arrays(read_request(answer(outputs)).arrays, outputs)


def test_an_output_of_one_row_is_repeated_and_others_must_fit() -> None:
    table = read(answer({"y": f32([1, 2, 3]), "once": f32([[5, 6]])}))
    assert table["once"].to_pylist() == [[5, 6]] * 3
    for outputs in ({"y": f32([1, 2]), "z": f32([1, 2, 3])}, {"y": f32(1.0)}):
        with pytest.raises(InvalidArgument, match="output"):
            write_answer(outputs)
    with pytest.raises(InvalidArgument, match="not bytes"):
        write_answer({"t": np.array(["text", None], object)})


# What is refused


@pytest.mark.parametrize(
    ("table", "why"),
    [
        (table_of(x=pa.array([1.0, None])), "'x' has nulls"),
        (table_of(x=pa.array([[1.0], None], pa.list_(pa.float64(), 1))), "'x' has nulls"),
        (table_of(x=pa.array(["a"]).dictionary_encode()), "'x' is a dictionary"),
        (table_of(x=pa.array([[1.0], [2.0, 3.0]])), "'x' has lists of several lengths"),
        (table_of(x=pa.array([{"a": 1}])), "'x' is of a type"),
        (table_of(x=pa.array([None])), "'x' is of a type"),
        (table_of(x=pa.array([1], pa.timestamp("s"))), "'x' is of a type"),
        (table_of(x=pa.array(["a"], pa.string_view())), "'x' is of a type"),
        (table_of(x=pa.array([1], pa.float64())[:0]), "no record batch"),
        (
            pa.concat_tables([table_of(x=pa.array([[1.0]])), table_of(x=pa.array([[1.0, 2.0]]))]),
            "'x' has rows of several shapes",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_tensor_is_is_refused_by_name(table: pa.Table, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        read_request(stream(table))


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_compressed_buffers_are_refused_with_what_to_do(codec: str) -> None:
    options = pa.ipc.IpcWriteOptions(compression=codec)
    body = stream(table_of(x=np.zeros(1000)), options=options)
    with pytest.raises(InvalidArgument, match="compress the whole body instead"):
        read_request(body)


def test_bodies_that_are_no_streams_are_refused() -> None:
    body = stream(table_of(x=[1.0]))
    permuted = pa.fixed_shape_tensor(pa.float32(), [2, 3], permutation=[1, 0])
    tensors = pa.ExtensionArray.from_storage(
        permuted, pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(6, np.float32)), 6)
    )
    for wrong, why in (
        (b"", "does not begin with a schema"),
        (b"{}", "ends within"),
        (b'{"instances": [1.0]}', "no message begins"),
        (body[8:], "no message begins"),
        (body + b"x", "goes on after"),
        (body + body, "goes on after"),
        (body[:-16], "ends within"),
        (stream(table_of(x=tensors)), "permuted"),
    ):
        with pytest.raises(InvalidArgument, match=why):
            read_request(wrong)
    with pytest.raises(InvalidArgument, match="no input is float64"):
        read_request(body, {"float32"})


def test_columns_batches_and_nesting_are_bounded() -> None:
    kind = pa.float32()
    for _ in range(40):
        kind = pa.list_(kind, 1)
    deep = pa.array([None], kind)
    with pytest.raises(InvalidArgument, match="too deep"):
        read_request(stream(table_of(x=deep)))
    many = pa.table([pa.array([1.0])] * 1025, [str(number) for number in range(1025)])
    with pytest.raises(InvalidArgument, match="1024 is the limit"):
        read_request(stream(many))
    wide = pa.table([lists([[[1]]], pa.list_(pa.list_(pa.int8(), 1), 1))] * 700, list(map(str, range(700))))  # fmt: skip  # noqa: E501
    with pytest.raises(InvalidArgument, match="2048 columns and lists"):
        read_request(stream(wide))
    batches = pa.concat_tables([table_of(x=[1.0])] * 1025)
    with pytest.raises(InvalidArgument, match="1024 record batches"):
        read_request(stream(batches))
    twice = pa.table([pa.array([1.0])] * 2, ["x", "x"])
    with pytest.raises(InvalidArgument, match="'x' is there twice"):
        read_request(stream(twice))


def repeated(columns: int, text: str, pairs: int) -> bytes:
    """A schema whose columns all have the same metadata: many pairs of the same long text."""
    builder = flatbuffers.Builder(1024)
    long = builder.CreateString(text)
    builder.StartObject(2)
    builder.PrependUOffsetTRelativeSlot(0, long, 0)
    builder.PrependUOffsetTRelativeSlot(1, long, 0)
    said = arrow_writing._references(builder, [builder.EndObject()] * pairs)
    kind, declared = arrow_writing._type(builder, "int32")
    fields = []
    for number in range(columns):
        name = builder.CreateString(str(number))
        builder.StartObject(7)
        builder.PrependUOffsetTRelativeSlot(0, name, 0)
        builder.PrependUint8Slot(2, kind, 0)
        builder.PrependUOffsetTRelativeSlot(3, declared, 0)
        builder.PrependUOffsetTRelativeSlot(6, said, 0)
        fields.append(builder.EndObject())
    all_fields = arrow_writing._references(builder, fields)
    builder.StartObject(4)
    builder.PrependUOffsetTRelativeSlot(1, all_fields, 0)
    return arrow_writing._message(builder, 1, builder.EndObject(), 0)


def test_a_few_bytes_cannot_be_read_again_and_again() -> None:
    with pytest.raises(InvalidArgument, match="more text than"):
        read_request(repeated(1000, "a" * 60_000, 64))  # 7 GB of text in 100 KB
    with pytest.raises(InvalidArgument, match="more tables than"):
        read_request(repeated(1000, "", 64))
    with pytest.raises(InvalidArgument, match="no record batch"):
        read_request(repeated(20, "a", 4))


def test_tensors_are_lists() -> None:
    said = {EXTENSION: TENSOR, EXTENSION_DATA: '{"shape":[2]}'}
    plain_column = pa.schema([pa.field("x", pa.int32(), metadata=said)])
    with pytest.raises(InvalidArgument, match="tensors that are no lists"):
        read_request(stream(pa.table([pa.array([1, 2], pa.int32())], schema=plain_column)))


def test_many_columns_are_not_quick() -> None:
    columns = table_of(**{str(number): [1.0] for number in range(600)})
    assert not is_quick(stream(columns))
    assert is_quick(stream(columns.select(range(30))))


def test_buffers_that_have_the_same_bytes_are_refused() -> None:
    size = 1 << 16
    columns = tuple((str(number), "int8", ()) for number in range(2))
    schema = arrow_writing._schema(columns)
    builder = flatbuffers.Builder(256)
    places = [(0, 0), (0, size), (0, 0), (0, size)]
    buffers = arrow_writing._pairs(builder, places)
    nodes = arrow_writing._pairs(builder, [(size, 0)] * 2)
    builder.StartObject(5)
    builder.PrependInt64Slot(0, size, 0)
    builder.PrependUOffsetTRelativeSlot(1, nodes, 0)
    builder.PrependUOffsetTRelativeSlot(2, buffers, 0)
    batch = arrow_writing._message(builder, 3, builder.EndObject(), size)
    with pytest.raises(InvalidArgument, match="the same bytes"):
        read_request(schema + batch + bytes(size))


def test_what_a_stream_claims_is_never_set_apart() -> None:
    body = bytearray(stream(table_of(x=np.zeros(64), t=["word"] * 64)))
    tracemalloc.start()
    try:
        for at in range(0, len(body) - 8, 8):
            for claimed in (1 << 62, 1 << 40, (1 << 31) - 1, -1):
                wrong = bytearray(body)
                wrong[at : at + 8] = struct.pack("<q", claimed)
                try:
                    read_request(bytes(wrong))
                except InvalidArgument:
                    continue
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


BODIES = (
    stream(
        table_of(
            x=pa.array(np.arange(6, dtype=np.float32)),
            t=["a", "", "word", "é", "x", "y"],
            b=[True, False] * 3,
            l=[[1, 2]] * 6,
            d=pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((6, 2, 2), np.int16)),
        )
    ),
    stream(pa.concat_tables([table_of(x=[[1.0, 2.0]]), table_of(x=[[3.0, 4.0]])])),
)


@settings(deadline=None, max_examples=600)
@given(data=st.data(), body=st.sampled_from(BODIES))
def test_whatever_comes_ends_in_arrays_or_a_refusal(data: st.DataObject, body: bytes) -> None:
    wrong = bytearray(body)
    edits = st.tuples(st.integers(0, len(body) - 1), st.integers(0, 255))
    for at, value in data.draw(st.lists(edits, max_size=6)):
        wrong[at] = value
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(wrong)))
        wrong[at : at + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=40))
    try:
        found = read_request(bytes(wrong))
    except InvalidArgument:
        return
    for array in found.arrays.values():
        assert array.nbytes <= 16 * len(wrong)
        array.tolist()
    is_quick(bytes(wrong))


# Against signatures, and through doors


def parser(**specs: Spec) -> ColumnsParser:
    return ColumnsParser({"serving_default": signature(specs)})


def parse(found: ColumnsParser, body: bytes) -> Parsed:
    return found.parse(body, Forms(Form.ARROW, Form.ARROW))


def test_what_is_per_request_is_the_same_in_every_row() -> None:
    found = parser(x=Spec(("b", 2)), user=Spec(("b", 3), per="request"))
    x = [[1.0, 2.0]] * 3
    kind = pa.list_(pa.float32())
    for user in ([[np.nan, 1, 2]] * 3, [[4, 5, 6]] * 3):
        body = stream(table_of(x=lists(x, kind), user=lists(user, kind)))
        parsed = parse(found, body)
        assert parsed.rows == 3
        assert_same_arrays(parsed.arrays, {"x": f32(x), "user": f32(user[:1])})
    differ = table_of(x=lists(x, kind), user=lists([[1, 2, 3], [1, 2, 3], [1, 2, 4]], kind))
    with pytest.raises(InvalidArgument, match="'user' is per request, and its rows differ"):
        parse(found, stream(differ))
    alone = table_of(x=lists(x[:1], kind), user=lists([[1, 2, 3]], kind))
    assert parse(found, stream(alone)).rows == 1


def test_a_table_that_does_not_fit_is_refused_as_json_would_be() -> None:
    found = parser(x=Spec(("b", 2)))
    for table, why in (
        (table_of(y=lists([[1.0, 2.0]], pa.list_(pa.float32()))), "x"),
        (table_of(x=lists([[1.0]], pa.list_(pa.float32()))), "x"),
        (table_of(x=lists([[1.0, 2.0]], pa.list_(pa.float64()))), "float64"),
        (table_of(x=[1.0]).replace_schema_metadata({"signature_name": "other"}), "float64"),
    ):
        with pytest.raises(InvalidArgument, match=why):
            parse(found, stream(table))


def test_a_door_answers_a_table_with_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    body = stream(table_of(x=f32([1, 2])))

    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(epoch(1, (plain(version=7), ONE)))
        for _ in range(3):
            door.ask(body, headers=HEADERS)
            await turns()
            doubled(door.bench.actors["a"].take())
            response = door.responses.pop()
            assert (response.status, response.content_type) == (200, ARROW)
            assert response.headers == b"x-servable-version: 7\r\n"
            assert read(response.body)["y"].to_pylist() == [2.0, 4.0]
        door.ask(body[:-20], headers=HEADERS)
        response = door.responses.pop()
        assert (response.status, response.content_type) == (400, "application/json")
        assert "not a request in Arrow" in error_of(response)

    play(scenario, monkeypatch)


def test_large_streams_of_one_batch_are_read_here_and_of_many_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = table_of(x=np.zeros(5000, np.float32))

    async def scenario(door: Door) -> None:
        room = with_room(door)
        await door.bench.router.adopt(epoch(1, (plain(), ONE)))
        door.ask(stream(table), headers=HEADERS)
        await turns()
        assert len(door.bench.actors["a"].take().arrays[0]) == 5000
        many = stream(pa.concat_tables([table, table]))
        door.ask(many, headers=HEADERS)
        assert [asked[2] for asked in room.asked] == [many]

    play(scenario, monkeypatch)


def test_the_process_that_reads_bodies_takes_tables() -> None:
    words = [b"a", b"\xff", b""] * 5000
    table = table_of(s=pa.array(words, pa.binary()))
    table = table.replace_schema_metadata({"signature_name": "texts"})

    async def scenario(asked: Asked) -> None:
        forms = Forms(Form.ARROW, Form.ARROW)
        found = await asked.read(stream(table), forms=forms)
        assert isinstance(found, Parsed)
        assert (found.signature_name, found.rows) == ("texts", 15_000)
        assert found.arrays["s"].tolist() == words
        assert isinstance(await asked.read(b"x" * 9000, forms=forms), InvalidArgument)

    play_room(scenario)
