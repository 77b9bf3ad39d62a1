"""The demo's client against a real web server: shapes, refusals, deadlines, kept connections."""

from __future__ import annotations

import itertools
import pickle
import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from batching.errors import DeadlineExceeded, InvalidArgument, ServingError
from cluster.demo import classify, client, digits_data, errors, run, search
from cluster.demo.client import Client
from cluster.demo.errors import BadReply, RequestRefused, ServerUnreachable
from tests.cluster.demo_support import Respond, web_server


def always(status: int, value: object) -> Respond:
    return lambda verb, path, body: (status, value)


def test_predict_posts_columns_and_returns_the_outputs() -> None:
    seen: list[object] = []

    def respond(verb: str, path: str, body: object) -> tuple[int, object]:
        seen.append((verb, path, body))
        return 200, {"outputs": [[1.0]]}

    with web_server(respond) as url, Client(url) as asked:
        assert asked.predict("minilm", {"text": ["a"]}) == [[1.0]]
    assert seen == [("POST", "/v1/models/minilm:predict", {"inputs": {"text": ["a"]}})]


def test_classify_posts_examples_and_returns_the_results() -> None:
    seen: list[object] = []

    def respond(verb: str, path: str, body: object) -> tuple[int, object]:
        seen.append((verb, path, body))
        return 200, {"results": [[["7", 1.0]]]}

    with web_server(respond) as url, Client(f"{url}/prefix/") as asked:
        assert asked.classify("digits", [{"pixels": [0.0]}]) == [[["7", 1.0]]]
    assert seen == [
        ("POST", "/prefix/v1/models/digits:classify", {"examples": [{"pixels": [0.0]}]})
    ]


def test_an_error_of_the_server_is_told_with_its_status_and_words() -> None:
    with (
        web_server(always(404, {"error": "Servable not found: minilm"})) as url,
        Client(url) as asked,
        pytest.raises(RequestRefused, match=r"minilm:predict: HTTP 404: Servable not found"),
    ):
        asked.predict("minilm", {})


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (b"<html>", "not JSON: <html>"),
        ([1], "no 'outputs'"),
        ({"predictions": []}, "no 'outputs'"),
    ],
)
def test_a_reply_that_is_no_answer_is_refused(value: object, why: str) -> None:
    with (
        web_server(always(200, value)) as url,
        Client(url) as asked,
        pytest.raises(BadReply, match=why),
    ):
        asked.predict("minilm", {})


def test_a_reply_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "REPLY_BYTES_MAX", 1000)
    with (
        web_server(always(200, {"outputs": ["x" * 1000]})) as url,
        Client(url) as asked,
        pytest.raises(BadReply, match="over 1000 bytes"),
    ):
        asked.predict("minilm", {})


def test_one_connection_serves_many_calls() -> None:
    threads: set[int] = set()  # The server uses a thread for each connection.

    def respond(verb: str, path: str, body: object) -> tuple[int, object]:
        threads.add(threading.get_ident())
        return 200, {"outputs": [0]}

    with web_server(respond) as url, Client(url) as asked:
        for _ in range(5):
            asked.predict("minilm", {})
    assert len(threads) == 1


def test_a_kept_connection_that_was_closed_is_opened_anew() -> None:
    with (
        web_server(always(200, {"outputs": [0]}), keep_alive=False) as url,
        Client(url) as asked,
    ):
        for _ in range(3):
            assert asked.predict("minilm", {}) == [0]


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Accepts connections, by the kernel's hand, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_no_answer_is_a_deadline_exceeded(silent_server: str) -> None:
    with (
        Client(silent_server, timeout_s=0.05) as asked,
        pytest.raises(DeadlineExceeded, match=r"no answer in 0\.05 s"),
    ):
        asked.predict("minilm", {})


def test_the_deadline_holds_for_the_whole_call_and_not_for_each_piece() -> None:
    """Every look at the clock costs 4 seconds, so that 10 seconds are over in mid-answer."""
    ticks = itertools.count(0.0, 4.0)
    with (
        web_server(always(200, {"outputs": [0]})) as url,
        Client(url, timeout_s=10, clock=lambda: next(ticks)) as asked,
        pytest.raises(DeadlineExceeded, match="no answer in 10 s"),
    ):
        asked.predict("minilm", {})


def test_nobody_there_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with (
        Client(f"http://127.0.0.1:{port}") as asked,
        pytest.raises(ServerUnreachable, match="is the cluster up"),
    ):
        asked.predict("minilm", {})


@pytest.mark.parametrize(
    "answer",
    [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", b"220 mail server ready\r\n"],
)
def test_a_server_that_hangs_up_or_speaks_no_http_is_unreachable(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                received = b""
                while not received.endswith(b'{"examples": []}'):
                    piece = connection.recv(65536)
                    assert piece, "the client hung up first"
                    received += piece
                connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        with (
            Client(f"http://127.0.0.1:{listener.getsockname()[1]}") as asked,
            pytest.raises(ServerUnreachable),
        ):
            asked.classify("digits", [])
        thread.join()


@pytest.mark.parametrize("url", ["127.0.0.1:8501", "ftp://host", "http://", ""])
def test_what_is_no_url_of_a_web_server_is_refused(url: str) -> None:
    with pytest.raises(InvalidArgument, match="is not like http://host:port"):
        Client(url)


def statuses(*rounds: tuple[int, object]) -> Respond:
    left = list(rounds)
    return lambda verb, path, body: left.pop(0) if len(left) > 1 else left[0]


def version(state: str) -> tuple[int, object]:
    return 200, {"model_version_status": [{"version": "1", "state": state, "status": {}}]}


def test_waiting_ends_when_a_version_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_POLL_S", 0.0)
    rounds = statuses((404, {"error": "?"}), version("LOADING"), version("AVAILABLE"))
    with web_server(rounds) as url, Client(url) as asked:
        asked.wait_available(("minilm",), 10)
        assert asked.states("minilm") == {"1": "AVAILABLE"}


def test_waiting_in_vain_tells_the_last_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_POLL_S", 0.0)
    with (
        web_server(statuses(version("END"))) as url,
        Client(url) as asked,
        pytest.raises(DeadlineExceeded, match=r"minilm is not available in 0\.01 s: END"),
    ):
        asked.wait_available(("minilm",), 0.01)


def test_a_status_of_another_shape_is_refused() -> None:
    with (
        web_server(always(200, {"model_version_status": [{"version": 1}]})) as url,
        Client(url) as asked,
        pytest.raises(BadReply, match="is not the status of a version"),
    ):
        asked.states("minilm")


UNIT = [1.0, 0.0]


@pytest.mark.parametrize(
    ("outputs", "why"),
    [
        ([UNIT], "2 texts, embeddings of shape"),
        ([UNIT, [1.0]], "not a matrix"),
        ({"embedding": [UNIT, UNIT]}, "not a matrix"),
        ([UNIT, [3.0, 4.0]], "has length 5, not 1"),
        ([UNIT, [float("nan"), 0.0]], "has length nan, not 1"),
    ],
)
def test_what_cannot_be_embeddings_is_refused(outputs: object, why: str) -> None:
    with web_server(always(200, {"outputs": outputs})) as url, Client(url) as asked:
        embed = search.embed_over(asked)
        with pytest.raises(BadReply, match=why):
            embed(["a", "b"])


def digits(count: int) -> digits_data.Digits:
    """Images that show their number in the first pixel."""
    labels = np.arange(count, dtype=np.int32) % 10
    pixels = np.zeros((count, digits_data.PIXELS), np.float32)
    pixels[:, 0] = labels
    return digits_data.Digits(pixels=pixels, labels=labels)


def scored(number: int) -> list[list[object]]:
    return [[label, float(i == number)] for i, label in enumerate(digits_data.LABELS)]


def test_digits_are_sent_in_batches_and_counted() -> None:
    sizes: list[int] = []

    def respond(verb: str, path: str, body: object) -> tuple[int, object]:
        assert isinstance(body, dict)
        shown = [int(example["pixels"][0]) for example in body["examples"]]
        sizes.append(len(shown))
        # A server that takes every 9 for a 4.
        return 200, {"results": [scored(4 if number == 9 else number) for number in shown]}

    with web_server(respond) as url, Client(url) as asked:
        tally = classify.classify(asked, digits(100))

    assert sizes == [60, 40]
    assert (tally.sent, tally.right, tally.accuracy) == (100, 90, 0.9)


@pytest.mark.parametrize(
    "result",
    [
        [["0", 1.0]],
        [["zero", 1.0]] * 10,
        [[str(i), "high"] for i in range(10)],
        "0123456789",
        None,
    ],
)
def test_scores_that_are_not_of_our_labels_are_refused(result: object) -> None:
    with (
        web_server(always(200, {"results": [result]})) as url,
        Client(url) as asked,
        pytest.raises(BadReply, match="score"),
    ):
        classify.classify(asked, digits(1))


def test_too_few_results_are_refused() -> None:
    with (
        web_server(always(200, {"results": []})) as url,
        Client(url) as asked,
        pytest.raises(BadReply, match="not a list of 1"),
    ):
        classify.classify(asked, digits(1))


def test_check_asks_a_server_everything_and_reports_what_is_wrong() -> None:
    """The server embeds all text alike and calls every image a 3: it runs, and is wrong."""

    def respond(verb: str, path: str, body: object) -> tuple[int, object]:
        if body is None:
            return version("AVAILABLE")
        assert isinstance(body, dict)
        if path.endswith(":predict"):
            return 200, {"outputs": [UNIT for _ in body["inputs"]["text"]]}
        return 200, {"results": [scored(3) for _ in body["examples"]]}

    with web_server(respond) as url:
        report = run.check(url, "a question of my own", ready_s=5)

    assert not report.ok
    assert report.passages > 200
    assert report.digits.sent == digits_data.HOLDOUT
    assert 0 < report.digits.accuracy < 0.2
    assert len(report.answers) == len(search.QUESTIONS) + 1


@pytest.mark.parametrize("name", errors.__all__)
def test_errors_survive_pickling(name: str) -> None:
    error = getattr(errors, name)("why", 5)
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert isinstance(again, ServingError)
    assert (type(again), str(again), again.retry_after_ms) == (type(error), "why", 5)
