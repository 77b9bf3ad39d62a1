"""What a test of a cluster that fails tells."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.e2e.running import Cluster


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure is told together with what the cluster says of itself then."""
    report = yield
    cluster = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and isinstance(cluster, Cluster):
        told = cluster.run("status", "--config", str(cluster.config), "--json")
        report.sections.append(("shardserve status", told.stdout + told.stderr))
    return report
