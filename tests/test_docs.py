"""Documents that say what the code does are held to it."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
import textwrap
from pathlib import Path
from typing import Any, Final, cast

import pytest
import typer.main

from cluster import config, keyfile, lifecycle
from cluster.cli import app
from tests.test_tidy import PACKAGES, ROOT, files, tree

README: Final = (ROOT / "README.md").read_text()
ARCHITECTURE: Final = (ROOT / "ARCHITECTURE.md").read_text()
DOCUMENTS: Final = ("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "serve.yaml", "cluster.yaml")
#: Typer brings a Click of its own, which is typed nowhere.
COMMANDS: Final[dict[str, Any]] = cast(Any, typer.main.get_command(app)).commands
#: What a block begins with that is no declaration.
KEYS: Final = "# keys.yaml"
#: Options of `bench` are its own; it passes them on.
PASSED_ON: Final = frozenset({"bench"})


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of a language."""
    found = re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert all(isinstance(block, str) for block in found)
    return found


def called(text: str) -> list[list[str]]:
    """Each `shardserve ...` in code of a document, as the words that follow."""
    code = re.findall(r"`(shardserve [^`]+)`", text)
    fenced = "\n".join(blocks(text, "console") + blocks(text, "sh"))
    code += re.findall(r"^\$ (shardserve .*?)(?:#.*)?$", fenced, re.MULTILINE)
    code += re.findall(r"^#\s.*\b(shardserve [a-z]+ .*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True)[1:] for line in code if line.count("'") % 2 == 0]


def test_readme_shows_commands() -> None:
    """So that the tests below are about something."""
    names = {words[0] for words in called(README)}
    assert {"up", "apply", "status", "inspect", "predict"} <= names


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_and_options_exist(document: str) -> None:
    for words in called((ROOT / document).read_text()):
        # A list of commands in prose: `shardserve up, down, apply`.
        names = [word.rstrip(",") for word in words if word.endswith(",")] or words[:1]
        assert set(names) <= COMMANDS.keys(), words
        if names[0] in PASSED_ON:
            continue
        command = COMMANDS[names[0]]
        if hasattr(command, "commands") and len(words) > 1:  # `shardserve bundle push ...`
            assert words[1] in command.commands, words
            command = command.commands[words[1]]
        options = {option for each in command.params for option in each.opts}
        given = {word for word in words if word.startswith("--")}
        assert given <= options, words


def test_every_command_is_told_of() -> None:
    told = {word for words in called(README) for word in words[:1]}
    told |= set(re.findall(r"make (\w+)", README))
    assert COMMANDS.keys() <= told


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^\$ |`)make ([a-z0-9]+)", README, re.MULTILINE))
    assert {"demo", "test", "check"} <= named <= targets


def test_environment_variables_exist() -> None:
    named = {
        name
        for document in DOCUMENTS
        for name in re.findall(r"\bSHARDSERVE_[A-Z_]+\b", (ROOT / document).read_text())
    }
    known = {
        node.value
        for file in files(*PACKAGES)
        if "SHARDSERVE_" in (ROOT / file).read_text()
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert len(named) > 3
    assert named <= known


def test_declarations_of_the_readme_are_accepted() -> None:
    declarations = [text for text in blocks(README, "yaml") if not text.startswith("# ")]
    assert len(declarations) >= 2
    for text in declarations:
        assert config.parse(text).servables


def test_limits_of_the_readme_are_the_defaults() -> None:
    [text] = [text for text in blocks(README, "yaml") if text.startswith("# http.limits")]
    told = config.parse(
        "store: s\ncluster:\n http:\n  limits:\n" + textwrap.indent(text, "   ")
    ).cluster.http.limits
    assert told == config.HttpConfig().limits
    named = re.findall(r"^(\w+):", text, re.MULTILINE)
    assert named == [field.name for field in dataclasses.fields(told)]


def test_keys_file_of_the_readme_is_accepted(tmp_path: Path) -> None:
    [text] = [text for text in blocks(README, "yaml") if text.startswith(KEYS)]
    for name in ("prometheus", "operator.key"):
        (tmp_path / name).write_text(f"{name}: long enough for a secret")
    path = tmp_path / "keys.yaml"
    path.write_text(text.replace("/run/secrets/", ""))
    ring, _ = keyfile.read_keys(path)
    assert len(ring) == 3


def test_readme_declares_what_the_defaults_are() -> None:
    """The long example tells the defaults; where one changes, the example must."""
    [long] = [text for text in blocks(README, "yaml") if "cluster:" in text]
    told = config.parse(long)
    assert told.cluster.http == config.ClusterConfig().http
    assert told.cluster.serve == config.ClusterConfig().serve
    assert told.servables[0] == config.ServableConfig(name=told.servables[0].name)


def test_diagram_of_lives_is_the_table() -> None:
    found = re.findall(r"<!-- lifecycle -->\n(.*?)<!-- /lifecycle -->", ARCHITECTURE, re.DOTALL)
    assert len(found) == 1, "ARCHITECTURE.md has lost its <!-- lifecycle --> markers"
    [diagram] = blocks(found[0], "mermaid")
    assert textwrap.dedent(diagram) == lifecycle.diagram()


def test_files_that_documents_link_to_exist() -> None:
    for document in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", (ROOT / document).read_text()):
            assert (ROOT / target).exists(), f"{document}: {target}"


def test_files_that_the_architecture_names_exist() -> None:
    named = re.findall(r"`((?:batching|shards|cluster|bench|tests)/[\w/]+\.py)`", ARCHITECTURE)
    assert named
    assert [name for name in named if not (ROOT / Path(name)).is_file()] == []
