"""Children: started, awaited, ended, and what is said when that fails."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from bench.errors import ContenderFailed
from bench.processes import apart, child, first_in_line
from tests.bench.fakes import eventually

AUTOGROUP = Path("/proc/self/autogroup")


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def _gone(pid: int) -> bool:
    """Whether the process has ended; one that nobody has reaped yet has, too."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def test_child_yields_the_rest_of_its_ready_line_and_is_ended(tmp_path: Path) -> None:
    code = "import os, time; print('noise'); print('up', os.getpid()); time.sleep(600)"
    with child(_python(code), log=tmp_path / "log", ready="up", timeout_s=20) as said:
        os.kill(int(said), 0)
    assert _gone(int(said))


def test_children_of_the_child_are_ended_with_it(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys; "
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        "print('up', p.pid); p.wait()"
    )
    with child(_python(code), log=tmp_path / "log", ready="up", timeout_s=20) as said:
        assert not _gone(int(said))
    assert eventually(lambda: _gone(int(said)))


def test_child_gets_the_environment_that_was_added(tmp_path: Path) -> None:
    code = "import os, time; print('up', os.environ['ADDED']); time.sleep(600)"
    with child(
        _python(code),
        log=tmp_path / "log",
        ready="up",
        timeout_s=20,
        environment={"ADDED": "yes"},
    ) as said:
        assert said == "yes"


def test_child_that_ends_at_once_is_reported_with_its_last_words(tmp_path: Path) -> None:
    with (
        pytest.raises(ContenderFailed, match=r"(?s)ended with 3.*because"),
        child(
            _python("import sys; print('because'); sys.exit(3)"),
            log=tmp_path / "log",
            ready="up",
            timeout_s=20,
        ),
    ):
        pytest.fail("it was not ready")


def test_child_that_stays_silent_is_given_up(tmp_path: Path) -> None:
    with (
        pytest.raises(ContenderFailed, match=r"not ready in 0\.3 s"),
        child(
            _python("import time; time.sleep(600)"),
            log=tmp_path / "log",
            ready="up",
            timeout_s=0.3,
        ),
    ):
        pytest.fail("it was not ready")


def test_child_that_ends_during_the_measurement_is_reported(tmp_path: Path) -> None:
    # Its standard input is empty, so it ends by itself; the context must notice at its end.
    code = "import os, sys; print('up', os.getpid(), flush=True); sys.stdin.read(); sys.exit(4)"
    with (
        pytest.raises(ContenderFailed, match="ended with 4"),
        child(_python(code), log=tmp_path / "log", ready="up", timeout_s=20) as said,
    ):
        assert eventually(lambda: _gone(int(said)))


@pytest.mark.skipif(not AUTOGROUP.exists(), reason="no scheduler groups by session here")
def test_a_session_goes_first_only_as_long_as_it_measures() -> None:
    before = AUTOGROUP.read_text()
    with first_in_line() as is_first:
        # The root group has no niceness: its file is empty, and cannot be written.
        assert AUTOGROUP.read_text().split()[-1:] == (["-10"] if is_first else before.split()[-1:])
    assert AUTOGROUP.read_text() == before


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor cannot be halved")
def test_processes_have_halves_of_the_processors_for_as_long_as_they_are_apart(
    tmp_path: Path,
) -> None:
    given = os.sched_getaffinity(0)
    code = "import os, time; print('up', os.getpid()); time.sleep(600)"
    with child(_python(code), log=tmp_path / "log", ready="up", timeout_s=20) as said:
        pid = int(said)
        with apart(pid, [os.getpid()]) as is_so:
            mine, its = os.sched_getaffinity(0), os.sched_getaffinity(pid)
            assert is_so
            assert mine
            assert its
            assert not mine & its
            assert mine | its == given
        assert os.sched_getaffinity(0) == os.sched_getaffinity(pid) == given
