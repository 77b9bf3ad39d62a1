"""Files of request logs: when they are full, which ones go, and what goes wrong with them."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.doors.log_files import Entry, LogFile, LogWriter, Rotation, expired, redacted
from cluster.doors.settings import RequestLog
from cluster.doors.stats import LogStats
from shards.recorded import FILE_HEAD, Recorded, read_requests


def asked(number: float, size: int = 1) -> Recorded:
    values = np.full(size, number, np.float32)
    return Recorded(signature="score", inputs={"x": values}, version=3)


def rule(directory: Path, **fields: object) -> RequestLog:
    return RequestLog(directory=str(directory), rate=1.0, **fields)  # type: ignore[arg-type]


class Clock:
    """Seconds and names that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0
        self.names = 0

    def wall_ns(self) -> int:
        self.names += 1
        return self.names


@pytest.fixture
def clock() -> Clock:
    return Clock()


def opened(directory: Path, clock: Clock, **fields: object) -> LogFile:
    return LogFile(rule(directory, **fields), "ranker", lambda: clock.now, clock.wall_ns)


def kept(directory: Path) -> list[list[float]]:
    """What is in each file, the oldest first."""
    return [
        [float(each.inputs["x"][0]) for each in read_requests(path.read_bytes(), path.name)]
        for path in sorted((directory / "ranker").iterdir())
    ]


@given(
    st.integers(1, 5),
    st.integers(64, 1000),
    st.lists(st.integers(1, 900), max_size=20),
)
def test_no_file_has_more_than_it_may(requests_max: int, bytes_max: int, pieces: list[int]) -> None:
    rotation = Rotation(requests_max, bytes_max)
    for piece in pieces:
        if not rotation.has_room(piece):
            rotation = Rotation(requests_max, bytes_max)
        assert rotation.has_room(piece) == rotation.could_have(piece)
        if rotation.could_have(piece):
            rotation.add(piece)
        assert rotation.requests <= requests_max
        assert rotation.size <= bytes_max


def test_the_oldest_files_expire_and_those_of_others_do_not() -> None:
    names = ["3-1.requests", "1-9.requests", "notes.txt", "2-1.requests"]
    assert expired(names, 3) == []
    assert expired(names, 2) == ["1-9.requests"]
    assert expired(names, 1) == ["1-9.requests", "2-1.requests"]


def test_requests_go_from_file_to_file_and_the_oldest_file_goes(
    tmp_path: Path, clock: Clock
) -> None:
    file = opened(tmp_path, clock, requests_max=2, files_max=3)
    for number in range(9):
        assert file.write(asked(number))
        assert all(len(each) <= 2 for each in kept(tmp_path)), "a file is whole after each write"
    assert kept(tmp_path) == [[4.0, 5.0], [6.0, 7.0], [8.0]]


def test_files_are_no_larger_than_they_may_be(tmp_path: Path, clock: Clock) -> None:
    file = opened(tmp_path, clock, bytes_max=4096)
    assert not file.write(asked(0.0, 2000)), "no file may have it"
    for number in range(5):
        assert file.write(asked(number, 400))
    assert kept(tmp_path) == [[0.0, 1.0], [2.0, 3.0], [4.0]]
    for path in (tmp_path / "ranker").iterdir():
        assert path.stat().st_size <= 4096


def test_only_the_user_reads_a_log(tmp_path: Path, clock: Clock) -> None:
    assert opened(tmp_path / "logs", clock).write(asked(1.0))
    (path,) = (tmp_path / "logs" / "ranker").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_file_that_somebody_removed_is_not_written_to(tmp_path: Path, clock: Clock) -> None:
    file = opened(tmp_path, clock)
    assert file.write(asked(1.0))
    for path in (tmp_path / "ranker").iterdir():
        path.unlink()
    assert file.write(asked(2.0))
    assert kept(tmp_path) == [[2.0]]


def test_a_directory_that_cannot_be_written_is_left_alone_for_a_while(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "ranker").write_text("in the way")
    file = opened(tmp_path, clock)
    assert not file.write(asked(1.0))
    assert not file.write(asked(2.0))
    assert caplog.text.count("is not written") == 1
    (tmp_path / "ranker").unlink()
    assert not file.write(asked(3.0))
    clock.now = 6.0
    assert file.write(asked(4.0))
    assert kept(tmp_path) == [[4.0]]


def test_what_a_full_disk_took_half_of_is_taken_back(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = opened(tmp_path, clock)
    assert file.write(asked(1.0))
    writev: Callable[..., int] = os.writev
    monkeypatch.setattr(os, "writev", lambda fd, buffers: writev(fd, buffers[:2]))
    assert not file.write(asked(2.0))
    monkeypatch.undo()
    assert kept(tmp_path) == [[1.0]]


def test_a_retired_file_gets_no_more(tmp_path: Path, clock: Clock) -> None:
    file = opened(tmp_path, clock)
    assert file.write(asked(1.0))
    file.retire()
    assert not file.write(asked(2.0))
    assert kept(tmp_path) == [[1.0]]


def test_redacted_inputs_keep_their_shapes_and_lengths_alone() -> None:
    texts = np.array([[b"secret"], [b""]], object)
    inputs = {"x": np.ones((2, 3), np.float32), "text": texts, "open": np.array([7])}
    found = redacted(inputs, ("x", "text"))
    assert found["x"].tolist() == [[0.0] * 3] * 2
    assert found["x"].dtype == np.float32
    assert found["text"].tolist() == [[b"xxxxxx"], [b""]]
    assert found["open"] is inputs["open"]
    assert texts.tolist() == [[b"secret"], [b""]]


def test_redacted_values_are_in_no_file(tmp_path: Path, clock: Clock) -> None:
    file = opened(tmp_path, clock, redact=("text",))
    text = np.array([b"my secret"], object)
    assert file.write(Recorded(signature="s", inputs={"text": text}))
    (path,) = (tmp_path / "ranker").iterdir()
    assert b"secret" not in path.read_bytes()
    (request,) = read_requests(path.read_bytes(), "log")
    assert request.inputs["text"].tolist() == [b"x" * 9]


class Held(LogFile):
    """A file whose disk hangs until the test lets go of it."""

    def __init__(self, directory: Path) -> None:
        super().__init__(rule(directory), "ranker")
        self.goes_on = threading.Event()
        self.began = threading.Event()

    def write(self, request: Recorded) -> bool:
        self.began.set()
        assert self.goes_on.wait(20.0)
        return super().write(request)


def test_a_disk_that_hangs_makes_requests_be_dropped_and_holds_up_nobody(tmp_path: Path) -> None:
    file, stats, writer = Held(tmp_path), LogStats(), LogWriter()
    taken = sum(writer.offer(Entry(file, stats, asked(number), 4)) for number in range(1000))
    assert taken == 256
    assert file.began.wait(20.0)
    assert not writer.offer(Entry(file, stats, asked(0.0), 4))
    file.goes_on.set()
    writer.close()
    assert stats.written == taken
    assert kept(tmp_path) == [[float(number) for number in range(256)]]
    assert writer.offer(Entry(file, stats, asked(1.0), 4)), "what was written takes no room"
    writer.close()


def test_what_waits_is_bounded_in_bytes(tmp_path: Path) -> None:
    file, stats, writer = Held(tmp_path), LogStats(), LogWriter()
    assert writer.offer(Entry(file, stats, asked(1.0), 16 << 20))
    assert not writer.offer(Entry(file, stats, asked(2.0), 1))
    assert writer.offer(Entry(file, stats, None)), "that a file is over is always taken"
    file.goes_on.set()
    writer.close()
    assert stats.written == 1


def test_a_file_begins_with_what_every_file_begins_with(tmp_path: Path, clock: Clock) -> None:
    assert opened(tmp_path, clock).write(asked(1.0))
    (path,) = (tmp_path / "ranker").iterdir()
    assert path.read_bytes().startswith(FILE_HEAD)
