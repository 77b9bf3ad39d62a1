"""A lane whose sizes change while it serves, as servables come to the unit and go."""

from __future__ import annotations

import pytest

from batching import Ladder, LaneKey, LaneUnknown
from tests.batching.scene import Scene

A = LaneKey("a")


def test_what_waits_leaves_in_the_new_sizes() -> None:
    scene = Scene(sizes=(1, 2))
    for label in "xyzuvw":
        scene.offer(label)
    assert scene.poll() == ["run a/2: x[0:1] y[0:1]"]
    scene.batcher.resize_lane(A, Ladder((1, 2, 4)))
    scene.complete()
    assert scene.poll() == ["run a/4: z[0:1] u[0:1] v[0:1] w[0:1]"]
    assert scene.complete() == [f"finished {label}" for label in "zuvw"]


def test_a_batch_of_a_size_that_is_gone_comes_back_like_any_other() -> None:
    scene = Scene(sizes=(1, 8))
    scene.offer("x", rows=8)
    assert scene.poll() == ["run a/8: x[0:8]"]
    scene.batcher.resize_lane(A, Ladder((1, 2)))
    assert scene.complete() == ["finished x"]
    scene.offer("y", rows=3)
    assert scene.run_dry() == ["run a/2: y[0:2]", "run a/1: y[2:3]", "finished y"]


def test_rows_that_are_tried_again_fit_into_the_sizes_that_are_left() -> None:
    scene = Scene(sizes=(1, 8))
    tickets = [scene.offer(label, rows=2) for label in "xyzw"]
    scene.poll()
    scene.fail()
    scene.batcher.resize_lane(A, Ladder((1, 3)))
    told = scene.run_dry()
    runs = [line for line in told if line.startswith("run")]
    assert runs[:2] == ["run a/3: x[0:2] y[0:1]", "run a/1: y[1:2]"]
    assert sorted(line for line in told if line.startswith("finished")) == [
        f"finished {label}" for label in "wxyz"
    ]
    assert all(ticket.done == 2 for ticket in tickets)


def test_a_batch_that_fails_after_its_lane_shrank_is_cut_to_what_fits() -> None:
    scene = Scene(sizes=(1, 8))
    for label in "xyzw":
        scene.offer(label, rows=2)
    scene.poll()
    scene.batcher.resize_lane(A, Ladder((1, 3)))
    scene.fail()
    told = scene.run_dry(poison="y")
    assert "failed y" in told
    assert sorted(line for line in told if line.startswith("finished")) == [
        f"finished {label}" for label in "wxz"
    ]


def test_a_lane_that_is_not_there_has_no_sizes() -> None:
    with pytest.raises(LaneUnknown):
        Scene().batcher.resize_lane(LaneKey("gone"), Ladder((1,)))
