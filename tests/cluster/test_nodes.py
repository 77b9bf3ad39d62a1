"""What is asked of Ray so that something starts on the node where it should."""

from __future__ import annotations

import pytest
import ray

from cluster.nodes import of_the_head

HEAD = "node:__internal_head__"


def node(*, alive: bool = True, head: bool = False) -> dict[str, object]:
    return {
        "NodeID": "n",
        "Alive": alive,
        "Resources": {"CPU": 2.0} | ({HEAD: 1.0} if head else {}),
    }


def test_the_head_is_wanted_by_what_only_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [node(), node(head=True)])
    wanted = of_the_head()
    assert wanted is not None
    assert wanted.keys() == {HEAD}
    assert 0 < wanted[HEAD] <= 0.01, "room for other clusters"


def test_nothing_is_wanted_that_no_node_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [node(), node(head=True, alive=False)])
    assert of_the_head() is None
