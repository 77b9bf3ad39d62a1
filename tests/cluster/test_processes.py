"""Processes found by mark and ended, on processes of the test's own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import processes
from cluster.processes import Process, end_all, marked, process

MARK = "SHARDSERVE_TEST_MARK"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
#: Spawns the same program with an empty environment, as one that renames itself seems to have.
PARENT = (
    "import subprocess, sys; "
    "child = subprocess.Popen([sys.executable, '-S', '-c', sys.argv[1]], env={}, "
    "stdout=subprocess.PIPE); child.stdout.readline(); print(child.pid, flush=True); child.wait()"
)
SLEEP = "import time; print('ready', flush=True); time.sleep(60)"

Spawn = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def mark() -> str:
    return uuid.uuid4().hex


@pytest.fixture
def spawn(mark: str) -> Iterator[Spawn]:
    """Start a program that carries the mark; whatever is left of it is killed at the end."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*command: str, marked: bool = True) -> subprocess.Popen[bytes]:
        extra = {MARK: mark} if marked else {}
        one = subprocess.Popen(command, env={**os.environ, **extra}, stdout=subprocess.PIPE)
        started.append(one)
        return one

    yield start
    for one in started:
        one.kill()
        one.wait()
        assert one.stdout is not None
        one.stdout.close()


def first_line(one: subprocess.Popen[bytes]) -> str:
    """Wait until the program says that it is up."""
    assert one.stdout is not None
    return one.stdout.readline().decode().strip()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.005)


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", *arguments)


def pids(mark: str) -> set[int]:
    return {one.pid for one in marked(MARK, mark)}


def test_a_process_is_known_by_its_id_and_start(spawn: Spawn) -> None:
    one = spawn(*python(SLEEP))
    first_line(one)
    found = process(one.pid)
    assert found is not None
    assert found == process(one.pid)
    assert found.started > 0


def test_a_process_that_has_ended_and_was_not_reaped_is_none(spawn: Spawn) -> None:
    one = spawn(*python(SLEEP))
    first_line(one)
    one.kill()
    until(lambda: process(one.pid) is None)
    assert Path(f"/proc/{one.pid}").exists(), "it should still be a zombie"


def test_an_id_that_nobody_has_is_none() -> None:
    assert process(2**22 + 1) is None


@pytest.mark.parametrize("name", ["a b", "a) S 1 (b", "(", "))"])
def test_names_with_spaces_and_brackets_do_not_confuse(
    tmp_path: Path, spawn: Spawn, name: str
) -> None:
    sleep = shutil.which("sleep")
    assert sleep is not None
    program = tmp_path / name
    shutil.copy(sleep, program)
    one = spawn(str(program), "60")
    until(lambda: Path(f"/proc/{one.pid}/comm").read_text().strip() == name)
    found = process(one.pid)
    assert found is not None
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    assert uptime - found.started / os.sysconf("SC_CLK_TCK") < 60


def test_only_what_carries_the_very_mark_is_found(spawn: Spawn, mark: str) -> None:
    mine, other = spawn(*python(SLEEP)), spawn(*python(SLEEP), marked=False)
    first_line(mine)
    first_line(other)
    assert pids(mark) == {mine.pid}
    assert pids(mark[:-1]) == set()
    assert {one.pid for one in marked(MARK[:-1], mark)} == set()


def test_a_child_whose_environment_is_lost_is_found_through_its_parent(
    spawn: Spawn, mark: str
) -> None:
    parent = spawn(*python(PARENT, SLEEP))
    child = int(first_line(parent))
    assert Path(f"/proc/{child}/environ").read_bytes() == b""
    assert pids(mark) == {parent.pid, child}
    assert end_all(MARK, mark) == 2
    assert process(child) is None


def test_grandchildren_are_found_too(spawn: Spawn, mark: str) -> None:
    shell = spawn("sh", "-c", "env -i sh -c 'sleep 60 & wait' & wait")
    until(lambda: len(pids(mark)) == 3)
    assert shell.pid in pids(mark)
    assert end_all(MARK, mark) == 3


def test_the_caller_is_never_one_of_them(
    spawn: Spawn, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller that runs inside the marked tree must not end itself."""
    environ = Path(f"/proc/{os.getpid()}/environ").read_bytes().split(b"\0")[0].decode()
    name, _, value = environ.partition("=")
    assert os.getpid() not in {one.pid for one in marked(name, value)}


def test_ending_asks_first(spawn: Spawn, mark: str) -> None:
    one = spawn(*python(SLEEP))
    first_line(one)
    assert end_all(MARK, mark, grace_s=30.0) == 1
    assert one.wait() == -signal.SIGTERM


def test_who_does_not_listen_is_killed_after_the_grace(spawn: Spawn, mark: str) -> None:
    one = spawn(*python(DEAF + SLEEP))
    first_line(one)
    began = time.monotonic()
    assert end_all(MARK, mark, grace_s=0.2) == 1
    assert time.monotonic() - began > 0.2
    assert one.wait() == -signal.SIGKILL


def test_a_child_that_outlives_its_marked_parent_is_ended_all_the_same(
    spawn: Spawn, mark: str
) -> None:
    parent = spawn(*python(PARENT, DEAF + SLEEP))
    child = int(first_line(parent))
    known = process(child)
    assert end_all(MARK, mark, grace_s=0.5) == 2
    assert parent.wait() in (-signal.SIGTERM, -signal.SIGKILL), "the latter if it was held up"
    assert process(child) != known


def test_with_nobody_to_end_it_returns_at_once(mark: str) -> None:
    assert end_all(MARK, mark, grace_s=3600.0) == 0


def test_an_id_that_somebody_else_got_is_never_signalled(
    spawn: Spawn, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = spawn(*python(SLEEP), marked=False)
    first_line(stranger)
    now = process(stranger.pid)
    assert now is not None
    before = Process(stranger.pid, now.started - 1)
    answers = [[before], []]
    monkeypatch.setattr(processes, "marked", lambda *_: answers.pop(0))
    assert end_all(MARK, mark, grace_s=-1.0) == 1
    assert process(stranger.pid) == now
