"""The product is started by its command line; here by a script in its place."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench import product
from bench.errors import ContenderFailed, ToolMissing
from bench.product import declaration, start_product
from bench.report import ROOT
from cluster import config


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A command that writes down how it was called; `up` does what the test puts beside it."""
    command = tmp_path / "shardserve"
    command.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, sys\n"
        "folder = pathlib.Path(__file__).parent\n"
        "with (folder / 'calls').open('a') as calls:\n"
        "    print(*sys.argv[1:], file=calls)\n"
        "if sys.argv[1] == 'up':\n"
        "    exec((folder / 'up.py').read_text())\n"
    )
    command.chmod(0o755)
    monkeypatch.setattr(product, "_command", lambda: str(command))
    return tmp_path


def _calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def test_up_is_given_the_declaration_and_down_follows(script: Path) -> None:
    doors = '{"rest": "http://127.0.0.1:8501/", "serve": ""}'
    (script / "up.py").write_text(f"print('starting')\nprint('{doors}')")
    with start_product(script / "s.yaml", folder=script) as url:
        assert url == "http://127.0.0.1:8501"
        assert _calls(script) == [f"up --config {script / 's.yaml'} --no-serve --json"]
    assert _calls(script)[1:] == [f"down --config {script / 's.yaml'}"]


@pytest.mark.parametrize(
    ("up", "why"),
    [
        ("print('no store'); sys.exit(2)", r"(?s)shardserve up ended with 2:.*no store"),
        ("print('ready')", "did not end in a line"),
        ("print('[]')", "did not end in a line"),
        ("pass", "did not end in a line"),
    ],
)
def test_start_that_fails_is_told_and_cleaned_up(script: Path, up: str, why: str) -> None:
    (script / "up.py").write_text(up)
    with (
        pytest.raises(ContenderFailed, match=why),
        start_product(script / "s.yaml", folder=script),
    ):
        pytest.fail("it started")
    assert _calls(script)[-1] == f"down --config {script / 's.yaml'}"


_BENCH = """
import sys, time
from pathlib import Path
from bench import cli, product
from bench.registry import Bench

folder = Path(sys.argv[1])
product._command = lambda: str(folder / "shardserve")

def run(options):
    with product.start_product(folder / "s.yaml", folder=folder):
        print("up", flush=True)
        time.sleep(600)

cli.find = lambda name: Bench(name=name, summary="", run=run)
cli.main(["swap"])
"""


def test_a_bench_that_is_told_to_end_takes_its_cluster_down(script: Path) -> None:
    (script / "up.py").write_text("""print('{"rest": "http://127.0.0.1:8501/"}')""")
    command = [sys.executable, "-c", _BENCH, str(script)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as bench:
        assert bench.stdout is not None
        assert bench.stdout.readline() == "up\n"
        bench.terminate()
        assert bench.wait(20.0) == 128 + signal.SIGTERM
    assert [call.split()[0] for call in _calls(script)] == ["up", "down"]


def test_missing_command_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with (
        pytest.raises(ToolMissing, match="pip install"),
        start_product(tmp_path / "s.yaml", folder=tmp_path),
    ):
        pytest.fail("it started")


def test_declaration_is_one_that_the_product_accepts(tmp_path: Path) -> None:
    text = declaration(tmp_path, [{"name": "mlp", "replicas": 1}], cluster={"shards": 2})
    declared = config.parse(text)
    assert declared.store == str(tmp_path)
    assert [servable.name for servable in declared.servables] == ["mlp"]
    assert declared.cluster.shards == 2
    assert 0 < declared.cluster.http.port != declared.cluster.serve.port > 0
