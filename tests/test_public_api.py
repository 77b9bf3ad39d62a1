"""What a module offers is what its `__all__` says: nothing public forgotten, nothing hidden told.

Functions and classes that a module defines are held against its `__all__`; constants and aliases
are its author's to offer.
"""

from __future__ import annotations

import ast

import pytest

import batching
import cluster
import shards
from tests.test_tidy import PACKAGES, files, tree


def public(file: str) -> list[str]:
    """Functions and classes that a module defines and that are not named as private."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return [
        node.name
        for node in tree(file).body
        if isinstance(node, kinds)
        and not node.name.startswith("_")
        # A command is offered on the command line, to which its decorator gives it.
        and not any(ast.unparse(each).startswith("app.") for each in node.decorator_list)
    ]


def offered(file: str) -> list[str] | None:
    """The literal `__all__` of a module, if it has one."""
    for node in tree(file).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            found: list[str] = ast.literal_eval(node.value)
            return found
    return None


@pytest.mark.parametrize("package", PACKAGES)
def test_public_modules_say_what_they_offer(package: str) -> None:
    silent = [
        file
        for file in files(package)
        if public(file) and offered(file) is None and not file.rpartition("/")[2].startswith("_")
    ]
    assert silent == []


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_public_is_forgotten(package: str) -> None:
    forgotten = {
        file: missing
        for file in files(package)
        if (names := offered(file)) is not None
        and (missing := sorted(set(public(file)) - set(names)))
    }
    assert forgotten == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_private_is_offered(package: str) -> None:
    private = {
        file: hidden
        for file in files(package)
        if (
            hidden := [
                name
                for name in offered(file) or []
                if name.startswith("_") and not name.endswith("__")
            ]
        )
    }
    assert private == {}


def test_what_users_import_is_this_and_a_change_of_it_is_on_purpose() -> None:
    assert cluster.__all__ == ["__version__"]
    assert sorted(shards.__all__) == [
        "Bundle",
        "LocalStore",
        "Manifest",
        "STRING",
        "SparseRows",
        "Spec",
        "describe",
        "from_safetensors",
        "hashed_rows",
        "leaves_of_equinox",
        "leaves_of_nnx",
        "open_store",
        "read",
        "render",
        "save",
        "table_from_arrow",
        "table_to_arrow",
        "to_safetensors",
    ]
    assert {"Batcher", "Ladder", "Policy", "RoundRobin", "Ticket"} <= set(batching.__all__)


def test_lazy_names_of_shards_are_their_modules_own() -> None:
    from shards.bundle import Bundle
    from shards.saving import save

    assert (shards.Bundle, shards.save) == (Bundle, save)
    assert set(shards.__all__) <= set(dir(shards))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        shards.nothing  # noqa: B018
