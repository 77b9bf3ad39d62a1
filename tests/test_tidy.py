"""Rules of the code that no linter here checks: sizes, names, docstrings, who imports what."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

import batching
import cluster
import shards

ROOT: Final = Path(__file__).resolve().parents[1]
PACKAGES: Final = ("batching", "shards", "cluster")
ROOMS: Final = (*PACKAGES, "bench", "tests")
FUNCTION_LINES_MAX: Final = 70
FILE_LINES_MAX: Final = 500

#: Ray's calls live in shells; everything else can be tested, simulated and reused without it.
RAY_SHELLS: Final = frozenset(
    {
        "cluster/app.py",
        "cluster/bringup.py",
        "cluster/controller.py",
        "cluster/crew.py",
        "cluster/deployment.py",
        "cluster/nodes.py",
        "cluster/router_actor.py",
        "cluster/routers.py",
        "shards/actors.py",
    }
)


def files(*rooms: str) -> list[str]:
    """Every Python file of these rooms."""
    found = (path for room in rooms for path in (ROOT / room).rglob("*.py"))
    return sorted(str(path.relative_to(ROOT)) for path in found)


def modules(*packages: str) -> list[str]:
    """Every module of these packages, by its dotted name."""
    names = (name.removesuffix(".py").replace("/", ".") for name in files(*packages))
    return sorted(name.removesuffix(".__init__") for name in names)


def tree(file: str) -> ast.Module:
    """A file, parsed."""
    return ast.parse((ROOT / file).read_text(), file)


def imported(node: ast.AST) -> Iterator[str]:
    """Top-level names of everything imported anywhere below a node."""
    for each in ast.walk(node):
        if isinstance(each, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in each.names)
        elif isinstance(each, ast.ImportFrom) and not each.level and each.module:
            yield each.module.partition(".")[0]


def test_there_is_something_to_check() -> None:
    assert len(files(*ROOMS)) > 100
    assert "cluster/app.py" in files("cluster")
    assert "shards.transport.sockets" in modules("shards")


@pytest.mark.parametrize("room", ROOMS)
def test_functions_fit_on_a_screen(room: str) -> None:
    long = [
        f"{file}:{node.lineno} {node.name}: {lines} lines"
        for file in files(room)
        for node in ast.walk(tree(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > FUNCTION_LINES_MAX
    ]
    assert long == []


@pytest.mark.parametrize("room", ROOMS)
def test_files_are_about_one_thing(room: str) -> None:
    long = [
        f"{file}: {lines} lines"
        for file in files(room)
        if (lines := len((ROOT / file).read_text().splitlines())) > FILE_LINES_MAX
    ]
    assert long == []


@pytest.mark.parametrize("room", [*PACKAGES, "bench"])
def test_modules_say_what_they_are(room: str) -> None:
    assert [file for file in files(room) if not ast.get_docstring(tree(file))] == []


def test_no_module_hides_one_of_the_standard_library() -> None:
    hiding = [
        name for name in modules(*ROOMS) if name.rpartition(".")[2] in sys.stdlib_module_names
    ]
    assert hiding == []


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


def test_packages_are_imported_and_not_their_tests() -> None:
    for module in (batching, shards, cluster):
        assert module.__file__ is not None
        assert Path(module.__file__).parent.parent == ROOT


@pytest.mark.parametrize("name", modules(*PACKAGES))
def test_all_names_exist(name: str) -> None:
    if name.rpartition(".")[2].startswith("_"):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Ray Serve's own modules say when imported
        module = importlib.import_module(name)
    names: list[str] = getattr(module, "__all__", [])
    assert isinstance(names, list), f"{name} has no __all__"
    assert len(set(names)) == len(names)
    assert [each for each in names if not hasattr(module, each)] == []


def test_ray_is_imported_by_its_shells_only() -> None:
    importers = {file for file in files(*PACKAGES) if "ray" in imported(tree(file))}
    assert importers == RAY_SHELLS


def test_batching_imports_the_standard_library_and_numpy_only() -> None:
    # `testing` is for tests, and is not imported by the package.
    kept = [file for file in files("batching") if not file.endswith("/testing.py")]
    found = {name for file in kept for name in imported(tree(file))}
    assert found - sys.stdlib_module_names <= {"batching", "numpy"}


@pytest.mark.parametrize(
    "module",
    [
        "cluster.cli",
        "cluster.bringup",
        "cluster.controller",
        "cluster.router_actor",
        "cluster.app",
        "shards",
        "shards.actors",
    ],
)
def test_jax_is_no_business_of_doors_routers_and_commands(module: str) -> None:
    """It takes seconds and hundreds of megabytes, in processes that never touch a device."""
    script = f"import sys, {module}; print('jax' in sys.modules)"
    told = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == ["False"]


def test_commands_that_need_no_ray_do_not_import_it() -> None:
    script = "import sys, cluster.cli, cluster.bringup; print('ray' in sys.modules)"
    told = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == ["False"]
