"""Stories in virtual time of clusters whose nodes are drained; `make stories` tells many.

In each, nodes are drained one after the other under trouble of some kind. Some drains are undone in
the midst of their moves; some nodes are lost. At the end everything that is served has as many
copies as are declared, nothing is on the node that is drained, and nothing is left over.
"""

from __future__ import annotations

import math

import pytest

from cluster.config import Transition
from tests.cluster.drained_simulation import CALM_S, Drained, Interrupted
from tests.cluster.simulated_parts import NONE
from tests.cluster.test_control_stories import KINDS, SEEDS

#: How the drains of a story go: how versions change places, how many are undone, and nodes lost.
WAYS: dict[str, tuple[Transition, float, float]] = {
    "drained": ("availability", 0.0, 0.0),
    "undone": ("availability", 0.7, 0.0),
    "lost": ("availability", 0.3, 0.6),
    "rolling": ("shard-rolling", 0.5, 0.3),
}
#: Without many seeds, these.
FEW = [("undone", "lossy", 0), ("lost", "storm", 5)]
MANY = [(way, kind, seed) for way in WAYS for kind in KINDS for seed in range(SEEDS)]


@pytest.mark.parametrize(("way", "kind", "seed"), MANY or FEW)
def test_drains_end_in_rest(way: str, kind: str, seed: int) -> None:
    transition, undo, lose = WAYS[way]
    story = Drained(seed, KINDS[kind], transition=transition, undo=undo, lose=lose)
    story.end()


def test_nodes_are_drained_one_after_the_other_while_every_request_is_answered() -> None:
    story = Drained(1, NONE, every_s=40.0, undo=0.5)
    story.versions_max = 2  # the third kills who loads it
    story.run(until=CALM_S)
    assert story._died_at < 0, "who holds something has died"
    assert story.undone
    story.end()


INTERRUPTIONS = (
    "the controller dies",
    "it is undone",
    "another node is drained instead",
    "the node is lost",
    "another node is lost",
)
#: Until everything is where it should be, and every router knows.
MOVED_S = 60.0


@pytest.mark.parametrize("what", INTERRUPTIONS)
def test_a_drain_that_is_interrupted_at_any_step_ends_in_rest(what: str) -> None:
    """Where nobody dies but the controller every request is answered all the while."""
    whole = Interrupted(what, math.inf)
    whole.run(until=whole.now + MOVED_S)
    whole.check_whole()
    assert 10 < whole.made < 200
    for steps in range(0 if SEEDS else 2, whole.made, 1 if SEEDS else 17):
        story = Interrupted(what, steps)
        story.run(until=story.now + MOVED_S)
        story.check_whole()
