"""One request from the command line: what is asked, and every way in which it fails."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import pytest

from batching.errors import InvalidArgument, ServingError, Unavailable
from cluster.doors.rest import RestDoor
from cluster.doors.service import Respond, Response, Service
from cluster.requesting import parse_target, send
from shards.loop import LoopThread
from tests.cluster.rest_clients import FakeService


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("mlp", "/v1/models/mlp"),
        ("mlp:3", "/v1/models/mlp/versions/3"),
        ("mlp@stable", "/v1/models/mlp/labels/stable"),
        ("a.b-c_d:12", "/v1/models/a.b-c_d/versions/12"),
        ("a/b?c", "/v1/models/a%2Fb%3Fc"),
        ("mlp@a/b", "/v1/models/mlp/labels/a%2Fb"),
    ],
)
def test_a_target_is_a_name_a_version_or_a_label(target: str, path: str) -> None:
    assert parse_target(target) == path


@pytest.mark.parametrize("target", ["", ":3", "mlp:", "mlp:x", "mlp@", "a:1@b", "a@b:1", "a:1:2"])
def test_anything_else_is_refused(target: str) -> None:
    with pytest.raises(InvalidArgument, match="is not NAME, NAME:VERSION or NAME@LABEL"):
        parse_target(target)


class Refusing(FakeService):
    """Answers everything with an error; its body is no JSON where the path says so."""

    def handle(
        self,
        method: bytes,
        path: bytes,
        headers: Mapping[bytes, bytes],
        body: bytes | bytearray,
        respond: Respond,
    ) -> None:
        text = b"<html>" if b"html" in path else b'{"error":"it is full"}'
        respond(Response(429, "application/json", b"", text))


@contextmanager
def door(service: FakeService) -> Iterator[str]:
    io = LoopThread("door")
    opened = io.call(RestDoor, cast(Service, service))
    try:
        yield f"http://127.0.0.1:{io.run(opened.open('127.0.0.1', 0))}"
    finally:
        io.run(opened.close(grace_s=0.1))
        io.close()


def test_the_body_is_posted_with_the_deadline_and_the_answer_comes_back() -> None:
    with door(FakeService()) as url:
        seen = json.loads(send(url, "mlp@stable", "regress", b'{"x":1}', 1234))
    assert (seen["method"], seen["path"]) == ("POST", "/v1/models/mlp/labels/stable:regress")
    assert seen["body"] == '{"x":1}'
    assert seen["headers"]["x-request-timeout-ms"] == "1234"
    assert seen["headers"]["content-type"] == "application/json"


@pytest.mark.parametrize(("target", "text"), [("mlp", "429: it is full"), ("html", "429: <html>")])
def test_the_servers_refusal_is_told_in_its_words(target: str, text: str) -> None:
    with door(Refusing()) as url, pytest.raises(ServingError) as caught:
        send(url, target, "predict", b"", 1000)
    assert str(caught.value) == text


def test_where_nothing_listens_the_cluster_may_not_be_up() -> None:
    with socket.socket() as bound:  # bound, but nobody listens
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(Unavailable, match="is the cluster up"):
            send(url, "mlp", "predict", b"", 1000)


@contextmanager
def answering(text: bytes) -> Iterator[str]:
    """Something that says this to whoever connects."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            client, _ = server.accept()
            with client:
                client.sendall(text)
                client.shutdown(socket.SHUT_WR)
                while client.recv(4096):
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        thread.join()


@pytest.mark.parametrize(
    "text", [b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"]
)
def test_what_does_not_speak_http_is_no_rest_door(text: bytes) -> None:
    with answering(text) as url, pytest.raises(Unavailable, match="no REST door"):
        send(url, "mlp", "predict", b"", 1000)


def test_a_server_that_says_nothing_is_given_up_for_lost() -> None:
    with answering(b"") as url, pytest.raises(Unavailable, match="nothing answers"):
        send(url, "mlp", "predict", b"", 1000)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8501", "https://", "http://", "http://x:port", "http://x:99999", "ftp://x"]
)
def test_what_is_no_http_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidArgument, match="is not an http:// or https:// URL"):
        send(url, "mlp", "predict", b"", 1000)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="'guess' is not one of predict, classify, regress"):
        send("http://127.0.0.1:1", "mlp", "guess", b"", 1000)
