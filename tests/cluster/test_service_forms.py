"""A service and bodies without JSON: the same answers in every form, and errors in JSON."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import orjson
import pytest
from msgspec import structs

from cluster.doors.service import Response
from cluster.forms import Columns, Form, Written, arrow, arrow_writing, packed, raw
from shards.specs import Spec
from tests.cluster.api_support import assert_same_arrays, f32
from tests.cluster.routing_fakes import doubled, epoch, host_unit, manifest, plain, turns
from tests.cluster.test_service import BODY, ONE, Door, error_of, play
from tests.cluster.test_service_reading import with_room

X = {"x": f32([1, 2])}
JSON = {b"content-type": b"application/json"}
MSGPACK = {b"content-type": b"application/x-msgpack"}


def joined(written: Written) -> bytes:
    return b"".join(written.buffers)


def in_form(form: Form, arrays: dict[str, Any], accept: Form | None = None) -> tuple[bytes, Any]:
    """A body and its headers."""
    headers = {b"accept": accept.value.encode()} if accept else {}
    if form is Form.RAW:
        written = raw.write_request(Columns(arrays))
        headers[b"inference-header-content-length"] = b"%d" % written.head_bytes
        return joined(written), headers
    if form is Form.MSGPACK:
        return joined(packed.write_request(Columns(arrays))), {**MSGPACK, **headers}
    if form is Form.ARROW:  # a request is written as an answer is
        headers[b"content-type"] = form.value.encode()
        return joined(arrow_writing.write_answer(arrays)), headers
    return orjson.dumps({"inputs": {n: a.tolist() for n, a in arrays.items()}}), {**JSON, **headers}


def outputs_of(response: Response) -> dict[str, Any]:
    """The outputs of an answer, whatever its form."""
    assert response.status == 200, response.body
    form = Form(response.content_type)
    if form is Form.MSGPACK:
        return packed.read_answer(response.body)
    if form is Form.ARROW:
        return arrow.read_request(response.body).arrays
    if form is Form.JSON:
        return {"y": f32(orjson.loads(response.body)["outputs"])}
    _, found, length = response.headers.partition(b"inference-header-content-length: ")
    assert found
    return raw.read_answer(response.body, int(length))


@pytest.mark.parametrize("accept", [None, *Form])
@pytest.mark.parametrize("form", list(Form))
def test_every_form_is_answered_in_every_form_alike(
    monkeypatch: pytest.MonkeyPatch, form: Form, accept: Form | None
) -> None:
    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(epoch(1, (plain(version=7), ONE)))
        for _ in range(3):  # the first looks the path up, the second learns the head
            door.ask(*_asked(form, accept))
            await turns()
            doubled(door.bench.actors["a"].take())
            response = door.responses.pop()
            assert response.content_type == (accept or form).value
            assert response.headers.startswith(b"x-servable-version: 7\r\n")
            assert_same_arrays(outputs_of(response), {"y": f32([2, 4])})

    def _asked(form: Form, accept: Form | None) -> Any:
        body, headers = in_form(form, X, accept)
        return body, b"/v1/models/model:predict", b"POST", headers

    play(scenario, monkeypatch)


def test_plain_json_after_another_form_is_json_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(epoch(1, (plain(), ONE)))
        body, headers = in_form(Form.MSGPACK, X)
        plain_headers = {b"host": b"a"}
        for asked in ((BODY, plain_headers), (body, headers), (BODY, plain_headers)):
            door.ask(asked[0], headers=asked[1])
            await turns()
            doubled(door.bench.actors["a"].take())
        kinds = [response.content_type for response in door.responses]
        assert kinds == ["application/json", "application/x-msgpack", "application/json"]

    play(scenario, monkeypatch)


@pytest.mark.parametrize("form", [Form.RAW, Form.MSGPACK])
def test_what_is_wrong_is_said_in_json(monkeypatch: pytest.MonkeyPatch, form: Form) -> None:
    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(epoch(1, (plain(), ONE)))
        for arrays in ({"x": f32([[1]])}, {"z": f32([1])}, {"x": np.array([1.0])}):
            body, headers = in_form(form, arrays)
            door.ask(body, headers=headers)
            response = door.responses.pop()
            assert (response.status, response.content_type) == (400, "application/json")
            assert next(iter(arrays)) in error_of(response)
        body, headers = in_form(form, X)
        door.ask(body[:-1], headers=headers)
        assert door.responses.pop().status == 400

    play(scenario, monkeypatch)


def test_classify_and_regress_take_tensors_and_give_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = plain()
    signature = found.signatures["serving_default"]
    classify = structs.replace(
        signature, method="classify", returns={"scores": "0:y"}, labels=("no", "yes")
    )
    regress = structs.replace(signature, method="regress", returns={"outputs": "0:y"})
    signatures = {"serving_default": regress, "classes": classify}
    found = structs.replace(found, signatures=signatures)

    async def scenario(door: Door) -> None:
        await door.bench.router.adopt(epoch(1, (found, ONE)))
        body = joined(packed.write_request(Columns(X, "classes")))
        door.ask(body, b"/v1/models/model:classify", headers=MSGPACK)
        await turns()
        door.bench.actors["a"].take().answer(f32([[1, 2], [3, 4]]))
        answer = packed.read_answer(door.responses.pop().body)
        assert answer["scores"].tolist() == [[1, 2], [3, 4]]
        assert answer["classes"].tolist() == [[b"no", b"yes"]] * 2
        body = joined(packed.write_request(Columns(X)))
        door.ask(body, b"/v1/models/model:regress", headers=MSGPACK)
        await turns()
        door.bench.actors["a"].take().answer(f32([[5], [6]]))
        answer = packed.read_answer(door.responses.pop().body)
        assert_same_arrays(answer, {"outputs": f32([5, 6])})
        examples = b'{"examples":[{"x":1.0}]}'
        accept = {b"accept": b"application/x-msgpack"}
        door.ask(examples, b"/v1/models/model:regress", headers=accept)
        await turns()
        door.bench.actors["a"].take().answer(f32([5]))
        assert packed.read_answer(door.responses.pop().body)["outputs"].tolist() == [5]

    play(scenario, monkeypatch)


def test_large_numbers_are_read_here_and_large_texts_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text, ids = {"text": Spec(("b",), "string")}, {"ids": Spec(("b",), "int64")}
    nodes = [("unit", {"text": "in:text"})]
    texts = manifest({"unit": host_unit()}, nodes, text, ids, {"ids": "0:ids"}, name="texts")

    async def scenario(door: Door) -> None:
        room = with_room(door)
        await door.bench.router.adopt(epoch(1, (plain(), ONE), (texts, ONE)))
        body, headers = in_form(Form.RAW, {"x": np.zeros(1 << 20, np.float32)})
        door.ask(body, headers=headers)
        await turns()
        assert len(door.bench.actors["a"].take().arrays[0]) == 1 << 20
        words = np.array([b"word"] * 5000, object)
        body, headers = in_form(Form.MSGPACK, {"text": words})
        door.ask(body, b"/v1/models/texts:predict", headers=headers)
        assert room.asked == [("predict", msgspec.msgpack.encode(texts.signatures), body)]

    play(scenario, monkeypatch)
