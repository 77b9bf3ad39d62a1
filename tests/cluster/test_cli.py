"""The command line without a cluster: help, and one line for every mistake."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import cli
from cluster._version import __version__
from shards.store import LocalStore
from tests.shards.bundles import full_manifest

COMMANDS = (
    "up", "down", "apply", "deploy", "status", "predict", "inspect", "demo", "bench",
    "load", "unload", "label", "split", "rollback", "versions",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No state or declaration of whoever runs the tests is seen, and none is left behind."""
    monkeypatch.setenv("SHARDSERVE_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)


class Outcome:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status = status
        self.out = out
        self.err = err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(monkeypatch, capsys)


class Runner:
    """Runs the entry point in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: str) -> Outcome:
        self._monkeypatch.setattr(sys, "argv", ["shardserve", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = self._capsys.readouterr()
        status = caught.value.code
        assert isinstance(status, int)
        return Outcome(status, out, err)

    def mistake(self, *arguments: str) -> str:
        """The one line that a mistake ends with."""
        outcome = self(*arguments)
        assert outcome.status == 1
        assert outcome.out == ""
        [line] = outcome.err.splitlines()
        assert line.startswith("shardserve: ")
        return line


# Help


def test_help_lists_every_command(run: Runner) -> None:
    outcome = run("--help")
    assert outcome.status == 0
    for command in COMMANDS:
        assert f"  {command} " in outcome.out


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "bench"])
def test_every_command_has_help(run: Runner, command: str) -> None:
    outcome = run(command, "--help")
    assert outcome.status == 0
    assert "Usage:" in outcome.out


def test_the_version_is_ours(run: Runner) -> None:
    assert run("--version").out.strip() == f"shardserve {__version__}"


@pytest.mark.parametrize(
    "arguments",
    [["fly"], ["up", "--wings"], ["predict"], ["predict", "m", "--timeout-ms", "0"]],
)
def test_a_wrong_call_ends_with_status_2(run: Runner, arguments: list[str]) -> None:
    outcome = run(*arguments)
    assert outcome.status == 2
    assert "Traceback" not in outcome.err


# Declarations


@pytest.mark.parametrize("command", ["up", "apply", "deploy", "status", "down"])
def test_a_declaration_that_is_not_there_is_named(run: Runner, command: str) -> None:
    line = run.mistake(command, "--config", "nowhere.yaml")
    assert "nowhere.yaml: cannot be read" in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("store: [", ["not YAML"]),
        ("- a list", ["a declaration is a mapping"]),
        ("servables: []", ["store: is missing"]),
        ("store: s\nservabels: []", ["servabels: unknown key", "did you mean servables"]),
        (
            "store: s\ncluster:\n  devices: -1\n  name: '?'\nservables:\n  - nam: x\n",
            ["cluster", "servables[0]"],
        ),
    ],
)
def test_what_is_wrong_in_a_declaration_is_said_in_one_line_with_the_file(
    run: Runner, tmp_path: Path, text: str, words: list[str]
) -> None:
    (tmp_path / "s.yaml").write_text(text)
    line = run.mistake("up", "--config", "s.yaml")
    assert "s.yaml: " in line
    for word in words:
        assert word in line


def test_a_store_that_is_not_there_is_named(run: Runner, tmp_path: Path) -> None:
    (tmp_path / "servables.yaml").write_text("store: ./[b]store")
    line = run.mistake("up")
    assert f"the store {tmp_path}/[b]store is not a directory" in line


@pytest.mark.parametrize("command", ["up", "apply", "deploy"])
def test_a_servable_that_the_store_has_not_is_named(
    run: Runner, tmp_path: Path, command: str
) -> None:
    store = LocalStore(tmp_path / "store")
    store.create()
    store.write_manifest(full_manifest(store, "ranker"))
    (tmp_path / "servables.yaml").write_text(
        "store: ./store\nservables: [{name: ranker}, {name: rancor}]"
    )
    line = run.mistake(command)
    assert "has no rancor; it has ranker" in line


@pytest.mark.parametrize("door", ["http", "serve"])
def test_a_port_that_is_taken_is_said_before_anything_starts(
    run: Runner, tmp_path: Path, door: str
) -> None:
    (tmp_path / "store").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        other = "serve" if door == "http" else "http"
        (tmp_path / "servables.yaml").write_text(
            f"store: ./store\ncluster: {{{door}: {{port: {port}}}, {other}: {{port: 0}}}}"
        )
        line = run.mistake("up", "--ray", "local")
    assert f"cannot listen on 127.0.0.1:{port}" in line
    assert f"set cluster.{door}.port to another port" in line
    assert not (tmp_path / "state" / "default" / "ray.json").exists()


# Clusters that are not up


def test_status_of_a_cluster_that_is_not_up(run: Runner) -> None:
    line = run.mistake("status", "--cluster", "mine")
    assert "cluster 'mine' is not up on this machine: run `shardserve up`" in line


def test_apply_to_a_cluster_that_is_not_up(run: Runner, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "servables.yaml").write_text("store: ./store\ncluster: {name: mine}")
    assert "cluster 'mine' is not up" in run.mistake("apply")


def test_down_with_nothing_to_end(run: Runner) -> None:
    assert "no cluster 'mine' was started here" in run.mistake("down", "--cluster", "mine")


def test_predict_where_nothing_listens(run: Runner) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        line = run.mistake("predict", "mlp", "--url", url, "--data", "{}")
    assert f"nothing answers at {url}" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mlp:x"], "'mlp:x' is not NAME, NAME:VERSION or NAME@LABEL"),
        (["mlp", "--method", "guess"], "'guess' is not one of"),
        (["mlp", "--url", "localhost:8501"], "is not an http:// or https:// URL"),
        (["mlp", "--data", "@nowhere.json"], "nowhere.json: No such file or directory"),
    ],
)
def test_a_wrong_predict_says_what_is_wrong(run: Runner, arguments: list[str], words: str) -> None:
    assert words in run.mistake("predict", "--data", "{}", *arguments)


# Stores


@pytest.fixture
def store(tmp_path: Path) -> Path:
    store = LocalStore(tmp_path / "store")
    store.create()
    store.write_manifest(full_manifest(store, "ranker", 4))
    return store.path


def test_inspect_lists_and_describes(run: Runner, store: Path) -> None:
    listed = run("inspect", str(store))
    assert (listed.status, "ranker" in listed.out) == (0, True)
    described = run("inspect", str(store), "ranker:4", "--verify")
    assert (described.status, "tokenize" in described.out) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere is not a directory"),
        (["store", "nope"], "has no servable 'nope'"),
        (["store", "ranker:5"], "ranker"),
        (["store", "ranker:new"], "is not NAME or NAME:VERSION"),
    ],
)
def test_inspecting_what_is_not_there(
    run: Runner, store: Path, arguments: list[str], words: str
) -> None:
    assert words in run.mistake("inspect", *arguments)


# As a program


def test_a_mistake_costs_neither_ray_nor_jax_nor_a_traceback(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.argv = ['shardserve', 'status', '--cluster', 'mine']\n"
        "from cluster.cli import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    print({'ray', 'jax'} & set(sys.modules))\n"
    )
    root = Path(cli.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=root
    )
    assert (done.returncode, done.stdout) == (1, "set()\n")
    assert len(done.stderr.splitlines()) == 1


# Versions


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["load", "m:x"], "'m:x' is not NAME or NAME:VERSION"),
        (["unload", ":3"], "':3' is not NAME or NAME:VERSION"),
        (["label", "m", "stable"], "give a version, or --remove"),
        (["label", "m", "stable", "3", "--remove"], "give a version, or --remove"),
        (["split", "m"], "give weights, as stable=95 canary=5, or --off"),
        (["split", "m", "stable=1", "--off"], "give weights"),
        (["split", "m", "stable"], "'stable' is not LABEL=WEIGHT"),
        (["split", "m", "stable=x"], "'stable=x' is not LABEL=WEIGHT"),
        (["split", "m", "a=1", "a=2"], "'a' is given twice"),
        (["versions", "--look"], "--look needs a servable"),
        (["rollback", "m"], "cluster 'default' is not up on this machine"),
        (["versions", "--cluster", "far"], "cluster 'far' is not up on this machine"),
    ],
)
def test_mistakes_about_versions(run: Runner, words: list[str], told: str) -> None:
    assert told in run.mistake(*words)
