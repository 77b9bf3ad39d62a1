"""The `ray up` file is one that Ray accepts, and starts Ray as the rest of the system needs it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, Final

import pytest
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.environment import MARK, SERVE_FLAGS, haproxy_environment, ray_environment
from tests.hosts.cluster_file import FILE, SHIPPED, documents

HAPROXY: Final = "$HOME/.hap"
#: Of the variant whose head may go away: where it keeps its state.
HEADS: Final = ("RAY_gcs_storage", "RAY_gcs_storage_path")
#: Where a user's token is that no setting names.
USUAL: Final = "RAY_AUTH_TOKEN_PATH"


def starts(document: dict[str, Any]) -> list[str]:
    """The commands that start a Ray."""
    commands = document["head_start_ray_commands"] + document["worker_start_ray_commands"]
    return [command for command in commands if "ray start" in command]


def exported(command: str) -> dict[str, str]:
    """What a command puts into the environment before it starts Ray."""
    before = command.partition("ray start")[0]
    words = [word.rstrip(";") for word in shlex.split(before)]
    return dict(word.split("=", 1) for word in words if re.fullmatch(r"[A-Za-z_]+=\S+", word))


def test_variants_are_found() -> None:
    assert list(documents()) == [SHIPPED, "NVIDIA GPUs", "TPUs", "a head that may go away"]


@pytest.mark.parametrize("variant", documents())
def test_ray_accepts_the_file(variant: str) -> None:
    validate_config(prepare_config(documents()[variant]))


def test_ray_refuses_what_its_schema_does_not_know() -> None:
    """So that the test above can fail."""
    document = {**documents()[SHIPPED], "setup_comands": []}
    with pytest.raises(Exception, match="setup_comands"):
        validate_config(prepare_config(document))


@pytest.mark.parametrize("variant", documents())
def test_every_ray_start_has_the_environment_that_up_gives_it(variant: str) -> None:
    commands = starts(documents()[variant])
    assert [("--head" in command) for command in commands] == [True, False]
    ours = {**ray_environment(Path("/nowhere"), FILE.name), **haproxy_environment(HAPROXY)}
    wanted = {name: value for name, value in ours.items() if name != USUAL}
    assert wanted.keys() > {MARK, *SERVE_FLAGS}
    for command in commands:
        found = exported(command)
        # The settings that are the head's alone, and no business of `up`.
        assert found.pop("RAY_enable_autoscaler_v2", "0") == "0"
        for name in HEADS:
            found.pop(name, None)
        assert found == wanted


def test_the_path_of_haproxys_socket_fits_into_the_users_home() -> None:
    home = f"/home/{documents()[SHIPPED]['auth']['ssh_user']}"
    assert len(HAPROXY.replace("$HOME", home)) <= 27


@pytest.mark.parametrize("variant", documents())
def test_haproxys_files_lie_in_a_directory_that_is_made_private_before(variant: str) -> None:
    for command in starts(documents()[variant]):
        assert f"mkdir -p -m 700 {HAPROXY.replace('$HOME', '~')};" in command.partition("export")[0]


def test_every_node_gets_the_token_and_the_wheel() -> None:
    document = documents()[SHIPPED]
    assert document["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    [wheels] = [there for there, here in document["file_mounts"].items() if here == "./dist"]
    for variant in documents().values():
        assert any(f"{wheels}/shardserve-" in command for command in variant["setup_commands"])


@pytest.mark.parametrize(("variant", "extra"), [("NVIDIA GPUs", "cuda12"), ("TPUs", "tpu")])
def test_variants_install_an_extra_that_exists(variant: str, extra: str) -> None:
    project = (FILE.parent / "pyproject.toml").read_text()
    assert re.search(rf"^{extra} = \[", project, flags=re.MULTILINE)
    assert any(f"[{extra}]" in command for command in documents()[variant]["setup_commands"])
