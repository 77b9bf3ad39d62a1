"""What tests of several files share, because it takes long to start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.half_plus_two import half_plus_two
from tests.cluster.serving import Cluster


@pytest.fixture(scope="package")
def half_plus_two_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Serves `half_plus_two`; no test may change what it serves."""
    with half_plus_two(tmp_path_factory.mktemp("c")) as cluster:
        yield cluster
