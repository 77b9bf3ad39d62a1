"""The environment of a Ray of our own."""

from __future__ import annotations

from pathlib import Path

from cluster.environment import MARK, SERVE_FLAGS, ray_environment

DIRECTORY = Path("/tmp/ssv-1000-0123abcd")


def test_every_value_is_text_and_carries_the_mark() -> None:
    environment = ray_environment(DIRECTORY, "0123abcd")
    assert all(isinstance(value, str) and value for value in environment.values())
    assert environment[MARK] == "0123abcd"


def test_it_holds_the_flags_without_which_serve_is_slow() -> None:
    environment = ray_environment(DIRECTORY, "mark")
    assert SERVE_FLAGS.items() <= environment.items()
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert environment["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"


def test_ray_wants_a_token_and_it_is_in_the_private_directory() -> None:
    environment = ray_environment(DIRECTORY, "mark")
    assert environment["RAY_AUTH_MODE"] == "token"
    assert Path(environment["RAY_AUTH_TOKEN_PATH"]).parent == DIRECTORY


def test_two_clusters_share_no_file_of_haproxy() -> None:
    one, other = (ray_environment(Path(f"/tmp/{name}"), name) for name in ("one", "other"))
    names = [name for name in one if name.startswith("RAY_SERVE_HAPROXY_")]
    assert len(names) == 5
    assert all(one[name] != other[name] for name in names)


def test_the_path_of_haproxys_socket_fits() -> None:
    path = ray_environment(DIRECTORY, "mark")["RAY_SERVE_HAPROXY_SOCKET_PATH"]
    # Ray puts a directory named by the node into it, HAProxy its process id behind it.
    assert len(path.encode()) + len(f"/{'0' * 56}") + len(".1234567.tmp") <= 107


def test_the_direct_doors_ports_are_left_alone() -> None:
    ports = {value for name, value in SERVE_FLAGS.items() if name.endswith("_PORT")}
    assert not ports & {"8000", "8500", "8501", "9000", "9500"}
