"""Stories in virtual time of clusters that are made even; `make stories` tells many.

In each, shard actors come and go under trouble of some kind, and somebody asks for even load all
the time. Whoever is named holds the very parts that it is named for, and lets go of none that a
request may ask it for. At the end every part is held once and load is even.
"""

from __future__ import annotations

import math

import pytest

from tests.cluster.rebalanced_simulation import CALM_S, Interrupted, Rebalanced
from tests.cluster.simulated_parts import NONE
from tests.cluster.test_control_stories import KINDS, SEEDS

#: Without many seeds, these.
FEW = [("lossy", 0), ("storm", 5)]
MANY = [(kind, seed) for kind in KINDS for seed in range(SEEDS)]


@pytest.mark.parametrize(("kind", "seed"), MANY or FEW)
def test_a_cluster_that_is_made_even_ends_in_rest(kind: str, seed: int) -> None:
    Rebalanced(seed, KINDS[kind]).end()


def test_while_load_is_made_even_every_request_is_answered() -> None:
    story = Rebalanced(1, NONE, every_s=20.0)
    story.versions_max = 2  # the third kills who loads it
    story.run(until=CALM_S)
    assert story._died_at < 0, "who holds something has died"
    assert story.changed
    story.end()


INTERRUPTIONS = (
    "the controller dies",
    "who gets parts dies",
    "who gives parts dies",
    "a node is lost",
    "a version is saved",
    "fewer actors are declared",
)
#: Until everything is where it should be, and every router knows.
EVEN_S = 90.0


@pytest.mark.parametrize("what", INTERRUPTIONS)
def test_what_comes_at_any_step_of_it_it_ends_in_rest(what: str) -> None:
    """Where nobody dies but the controller every request is answered all the while."""
    whole = Interrupted("", math.inf)
    whole.run(until=whole.now + EVEN_S)
    whole.check_whole()
    assert whole.changed
    assert 10 < whole.made < 200
    for steps in range(0 if SEEDS else 2, whole.made, 1 if SEEDS else 11):
        story = Interrupted(what, steps)
        story.run(until=story.now + EVEN_S)
        story.check_whole()
