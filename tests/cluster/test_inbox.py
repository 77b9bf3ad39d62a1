"""Events of one turn are taken together, in order, and once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from batching.errors import FailedPrecondition
from cluster.control import ActorUp, Declared, Listed, Load, Publish, ReadManifest
from cluster.inbox import Inbox
from cluster.signals import Event, Look, Tick
from tests.cluster.control_fakes import Shell, config, manifest, of, report


class Turns:
    """A loop whose turns the test ends."""

    def __init__(self) -> None:
        self.due: list[Callable[[], None]] = []
        self.taken: list[list[Event]] = []
        self.inbox = Inbox(
            lambda then: self.due.append(then), lambda events: self.taken.append(list(events))
        )

    def end(self) -> None:
        due, self.due = self.due, []
        for each in due:
            each()


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
        Inbox(lambda then: None, refuse).put_now(Tick())


def test_events_taken_together_ask_for_what_they_ask_for_one_by_one() -> None:
    names = [f"m{at}" for at in range(20)]
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
