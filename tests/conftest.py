"""What holds for every test: no Ray by accident, a fixed environment, several CPU devices.

The environment is set when pytest imports this file, before a test module can import JAX or Ray,
since both read it once and for all. Dtypes promote as JAX's users are used to, not strictly: the
models that are tested are written the way theirs are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NoReturn

import hypothesis
import pytest
from xdist.scheduler import LoadFileScheduling

from tests.buckets import CREDENTIALS, Bucket, BucketServer

# Who runs the tests may have a cluster of their own: its settings must not reach ours.
for _name in [name for name in os.environ if name.startswith(("RAY_", "SHARDSERVE_"))]:
    del os.environ[_name]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "4"

# A busy machine makes a property slow, not false: the time limit of a test is pytest's. Examples
# are the same in every run, so what passes once passes again; `make fuzz` looks for others.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.register_profile("others", deadline=None, print_blob=True, max_examples=1000)
hypothesis.settings.load_profile("others" if os.environ.get("EXPLORE") else "same")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is quick comes first, and the cluster that many tests share comes up last.

    It stays up until the end of the run, and would take its share of every test in between.
    """

    def rank(item: pytest.Item) -> int:
        is_e2e = item.get_closest_marker("e2e") is not None
        return is_e2e + ("shared" in getattr(item, "fixturenames", ()))

    items.sort(key=rank)
    for item in items:
        if rank(item):
            # Ray starts processes by a way that forks, and JAX warns of it in whoever did. They
            # turn into other programs at once, so the locks that they may inherit do not matter.
            item.add_marker(pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning"))


class _ByWhatIsShared(LoadFileScheduling):  # type: ignore[misc]
    """A file's tests stay in one process, and so do all of the folder that shares a cluster."""

    def _split_scope(self, nodeid: str) -> str:
        folder, _, _ = nodeid.rpartition("/")
        return folder if folder.endswith("e2e/shared") else str(super()._split_scope(nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    """What `--dist loadfile` gets."""
    return _ByWhatIsShared(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture(autouse=True)
def _no_ray(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tests that say so start Ray; `ray.init` is what every implicit start calls, too."""
    if request.node.get_closest_marker("e2e") is None:
        import ray

        monkeypatch.setattr(ray, "init", _refuse)


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("this test is not marked e2e: it must not start or join a Ray")


@pytest.fixture(scope="session")
def bucket_server() -> Iterator[BucketServer]:
    """An object store on loopback that every test may make buckets in, and none may stop."""
    server = BucketServer()
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def bucket(bucket_server: BucketServer, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A bucket of the test's own, and the credentials for it in the environment."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    return bucket_server.bucket()
