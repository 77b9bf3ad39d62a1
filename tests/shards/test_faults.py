"""Which faults end a process; each in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from shards.faults import EXIT_STATUS

_BEGIN = """
import threading
from shards.faults import end_process_on_fault
from shards.loop import LoopThread

io = LoopThread("io")
end_process_on_fault(io.loop, {"worker"})

def fail(error):
    raise error

def on_a_thread(name, error):
    thread = threading.Thread(target=fail, args=(error,), name=name)
    thread.start()
    thread.join()

def on_the_loop(error):
    io.loop.call_soon_threadsafe(fail, error)
    io.call(int)

async def task(error):
    raise error

def in_a_forgotten_task(error):
    import gc
    async def start():
        import asyncio
        asyncio.ensure_future(task(error))
    io.run(start())
    io.call(int)
    gc.collect()
    io.call(int)
"""


def run(code: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{_BEGIN}\n{code}\nprint('goes on')"],
        capture_output=True,
        text=True,
        timeout=50,
    )
    return done.returncode, done.stdout.strip(), done.stderr


@pytest.mark.parametrize(
    ("code", "story"),
    [
        ("from shards.faults import end_process; end_process('the device is lost')", "is lost"),
        ("on_a_thread('worker', ValueError('what it died of'))", "what it died of"),
        ("on_a_thread('worker of a table', ValueError('what it died of'))", "what it died of"),
        ("on_the_loop(AssertionError('what was wrong'))", "what was wrong"),
        ("in_a_forgotten_task(AssertionError('what was wrong'))", "what was wrong"),
    ],
)
def test_a_process_that_cannot_vouch_for_itself_ends_and_says_why(code: str, story: str) -> None:
    status, said, log = run(code)
    assert (status, said) == (EXIT_STATUS, "")
    assert story in log


@pytest.mark.parametrize(
    "code",
    [
        "on_a_thread('of somebody else', ValueError('a fault'))",
        "on_the_loop(ValueError('a fault'))",
        "in_a_forgotten_task(ValueError('a fault'))",
    ],
)
def test_other_faults_are_logged_and_it_goes_on(code: str) -> None:
    status, said, log = run(code)
    assert (status, said) == (0, "goes on")
    assert "a fault" in log
