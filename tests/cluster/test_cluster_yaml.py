"""The `ray up` file is one that Ray accepts, and starts Ray as the rest of the system needs it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.environment import MARK, SERVE_FLAGS, ray_environment

FILE: Final = Path(__file__).resolve().parents[2] / "cluster.yaml"
TEXT: Final = FILE.read_text()
#: Belong to a directory or to a run of `shardserve up`; nodes of their own take Ray's defaults.
LOCAL: Final = re.compile(rf"{MARK}|RAY_AUTH_TOKEN_PATH|RAY_SERVE_HAPROXY_.*")


def documents() -> dict[str, dict[str, Any]]:
    """The file as it is, and with each variant in its place."""
    base: dict[str, Any] = yaml.safe_load(TEXT)
    found = {"as it is": base}
    pieces = re.split(r"^# --- Variant: (.+?) -+$", TEXT, flags=re.MULTILINE)[1:]
    for name, piece in zip(pieces[::2], pieces[1::2], strict=True):
        lines = [line[3:] for line in piece.splitlines() if line.startswith("#| ")]
        found[name] = {**base, **yaml.safe_load("\n".join(lines))}
    return found


def starts(document: dict[str, Any]) -> list[str]:
    """The commands that start a Ray."""
    commands = document["head_start_ray_commands"] + document["worker_start_ray_commands"]
    return [command for command in commands if "ray start" in command]


def exported(command: str) -> dict[str, str]:
    """What a command puts into the environment before it starts Ray."""
    before = command.partition("ray start")[0]
    words = [word.rstrip(";") for word in shlex.split(before)]
    return dict(word.split("=", 1) for word in words if re.fullmatch(r"RAY_\w+=\S+", word))


def test_variants_are_found() -> None:
    assert list(documents()) == ["as it is", "NVIDIA GPUs", "TPUs"]


@pytest.mark.parametrize("variant", documents())
def test_ray_accepts_the_file(variant: str) -> None:
    validate_config(prepare_config(documents()[variant]))


def test_ray_refuses_what_its_schema_does_not_know() -> None:
    """So that the test above can fail."""
    document = {**documents()["as it is"], "setup_comands": []}
    with pytest.raises(Exception, match="setup_comands"):
        validate_config(prepare_config(document))


def test_every_ray_start_has_the_environment_that_up_gives_it() -> None:
    commands = starts(documents()["as it is"])
    assert [("--head" in command) for command in commands] == [True, False]
    ours = ray_environment(Path("/nowhere"), "mark")
    wanted = {name: value for name, value in ours.items() if not LOCAL.fullmatch(name)}
    assert wanted.keys() > SERVE_FLAGS.keys()
    for command in commands:
        found = exported(command)
        # The one setting that is the head's alone, and about `ray up` alone.
        assert found.pop("RAY_enable_autoscaler_v2", "0") == "0"
        assert found == wanted


def test_every_node_gets_the_token_and_the_wheel() -> None:
    document = documents()["as it is"]
    assert document["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    [wheels] = [there for there, here in document["file_mounts"].items() if here == "./dist"]
    for variant in documents().values():
        assert any(f"{wheels}/shardserve-" in command for command in variant["setup_commands"])


@pytest.mark.parametrize(("variant", "extra"), [("NVIDIA GPUs", "cuda12"), ("TPUs", "tpu")])
def test_variants_install_an_extra_that_exists(variant: str, extra: str) -> None:
    project = (FILE.parent / "pyproject.toml").read_text()
    assert re.search(rf"^{extra} = \[", project, flags=re.MULTILINE)
    assert any(f"[{extra}]" in command for command in documents()[variant]["setup_commands"])
