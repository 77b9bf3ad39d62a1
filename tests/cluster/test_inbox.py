"""Events of one turn are taken together, in order, and once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from batching.errors import FailedPrecondition
from cluster.control import ActorLost, ActorUp, Declared, Listed, Load, Publish, ReadManifest
from cluster.inbox import Inbox
from cluster.signals import Event, Look, Tick
from tests.cluster.control_fakes import Shell, config, manifest, of, report


class Turns:
    """A loop whose turns the test ends, and a clock that it sets.

    Args:
        cost_s: what taking events takes.
    """

    def __init__(self, cost_s: float = 0.0) -> None:
        self.now = 100.0
        self.cost_s = cost_s
        self.due: list[tuple[float, Callable[[], None]]] = []
        self.taken: list[list[Event]] = []
        self.inbox = Inbox(
            lambda delay_s, then: self.due.append((self.now + delay_s, then)),
            self.take,
            lambda: self.now,
        )

    def take(self, events: Sequence[Event]) -> None:
        self.taken.append(list(events))
        self.now += self.cost_s

    def end(self) -> None:
        due = [then for at, then in self.due if at <= self.now]
        self.due = [each for each in self.due if each[0] > self.now]
        for each in due:
            each()

    def one_by_one(self, count: int, every_s: float) -> None:
        """Events that come after one another, each in a turn of its own."""
        for _ in range(count):
            self.inbox.put(Tick())
            self.end()
            self.now += every_s


def test_what_comes_in_one_turn_is_taken_together_and_in_order() -> None:
    turns = Turns()
    first, second, third = Look(servable="a"), Tick(), Look(servable="b")
    turns.inbox.put(first)
    turns.inbox.put(second)
    assert turns.taken == []
    turns.end()
    turns.inbox.put(third)
    turns.end()
    turns.end()
    assert turns.taken == [[first, second], [third]]


def test_what_cannot_wait_is_taken_at_once_after_what_came_before() -> None:
    turns = Turns()
    first, second = Look(servable="a"), Look(servable="b")
    turns.inbox.put(first)
    turns.inbox.put_now(second)
    assert turns.taken == [[first], [second]]
    turns.end()
    assert turns.taken == [[first], [second]]


def test_who_asks_at_once_hears_of_a_refusal() -> None:
    def refuse(events: object) -> None:
        raise FailedPrecondition("no")

    with pytest.raises(FailedPrecondition):
        Inbox(lambda delay_s, then: None, refuse, lambda: 0.0).put_now(Tick())


def test_a_change_by_itself_is_taken_at_once_in_every_step() -> None:
    turns = Turns(cost_s=0.02)
    turns.one_by_one(8, every_s=0.01)
    assert len(turns.taken) == 8


def test_of_very_many_those_of_a_moment_are_taken_together_and_none_is_lost() -> None:
    turns = Turns(cost_s=0.02)
    turns.one_by_one(1000, every_s=0.01)
    turns.now += 1.0
    turns.end()
    assert sum(len(each) for each in turns.taken) == 1000
    # A quarter of the time, and a quarter of a second ahead of it, in takes of 20 ms.
    spent_s = len(turns.taken) * 0.02
    assert spent_s < (turns.now - 100.0) * 0.25 + 0.25 + 0.02


def test_after_a_quiet_while_a_change_is_taken_at_once_again() -> None:
    turns = Turns(cost_s=0.02)
    turns.one_by_one(1000, every_s=0.01)
    turns.now += 10.0
    turns.end()
    before = len(turns.taken)
    turns.one_by_one(8, every_s=0.01)
    assert len(turns.taken) == before + 8


def test_the_loss_of_an_actor_waits_for_nothing_and_takes_what_came_before_along() -> None:
    turns = Turns(cost_s=1.0)
    turns.one_by_one(2, every_s=0.01)
    assert len(turns.taken) == 1
    lost = ActorLost(name="device-0", generation=1, reason="gone")
    turns.inbox.put(lost)
    turns.end()
    assert turns.taken[-1] == [Tick(), lost]


def test_events_taken_together_ask_for_what_they_ask_for_one_by_one() -> None:
    names = [f"m{at}" for at in range(12)]
    shell = Shell()
    shell.send(Declared(config=config(*names, shards=0)), ActorUp(report=report("device-0")))

    def together(*events: Event) -> list[object]:
        found = shell.core.handle_all(events, shell.now)
        shell.core.check_invariants()
        shell.effects += found
        return list(found)

    together(*(Listed(servable=name, versions=(1,)) for name in names))
    read = of(ReadManifest, shell.effects)
    assert [each.servable for each in read] == sorted(names)
    together(*(each.done(manifest(each.servable, 1)) for each in read))
    loads = of(Load, shell.effects)
    assert sorted(each.order.servable for each in loads) == sorted(names)
    before = len(of(Publish, shell.effects))
    together(*(each.done(None) for each in loads))
    [published] = of(Publish, shell.effects)[before:]
    assert published.epoch.servables.keys() == set(names)
