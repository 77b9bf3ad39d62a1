"""The controller core by example: what servables are allowed reaches the devices."""

from __future__ import annotations

import dataclasses

from batching.allowance import CRITICAL
from cluster.config import BatchingConfig, Config
from cluster.control import ActorUp, Declared, Load, Persist, ReadManifest, Tick
from cluster.declared import decode
from cluster.signals import Allow, Failure
from tests.cluster.control_fakes import (
    FOUR_SHARDS,
    Shell,
    begun,
    config,
    manifest,
    of,
    report,
    sharded,
)


def weighing(weight: float) -> Config:
    """One servable of this weight."""
    declared = config("m")
    batching = BatchingConfig(weight=weight, criticality="critical")
    servable = dataclasses.replace(declared.servables[0], batching=batching)
    return dataclasses.replace(declared, servables=(servable,))


def serving(weight: float = 1.0) -> Shell:
    shell = begun(weighing(weight))
    shell.serve("m", 1)
    return shell


def test_an_order_to_load_says_what_is_allowed_and_nothing_else_is_said() -> None:
    shell = serving(3.0)
    (load,) = of(Load, shell.effects)
    assert (load.order.allowance.weight, load.order.allowance.criticality) == (3.0, CRITICAL)
    shell.send(Tick())
    assert not of(Allow, shell.effects)


def test_a_new_weight_is_told_once_and_loads_nothing() -> None:
    shell = serving()
    shell.effects.clear()
    (allow,) = of(Allow, shell.send(Declared(config=weighing(2.0))))
    assert (allow.actor, allow.order.servable, allow.order.term) == ("device-0", "m", 1)
    assert allow.order.allowance.weight == 2.0
    shell.send(allow.done(), Tick())
    assert len(of(Allow, shell.effects)) == 1
    assert not of(Load, shell.effects)


def test_a_weight_that_is_declared_while_a_version_loads_is_told_when_it_has() -> None:
    shell = begun(weighing(1.0))
    (read,) = of(ReadManifest, shell.listed("m", 1))
    (load,) = of(Load, shell.send(read.done(manifest("m", 1))))
    assert not of(Allow, shell.send(Declared(config=weighing(2.0))))
    (allow,) = of(Allow, shell.send(load.done()))
    assert allow.order.allowance.weight == 2.0


def test_a_new_reign_tells_devices_that_hold_versions_from_before_it() -> None:
    old = serving(2.0)
    (*_, last) = of(Persist, old.effects)
    state = decode(last.data)
    new = Shell(dataclasses.replace(state, term=state.term + 1, seq=0))
    new.send(Tick(), ReadManifest(servable="m", version=1).done(manifest("m", 1)))
    new.send(ActorUp(report=report("device-0", loaded=[("m", 1)])))
    new.up("shard-0")
    (allow,) = of(Allow, new.effects)
    assert (allow.order.term, allow.order.allowance.weight) == (2, 2.0)
    assert not of(Load, new.effects)


def test_a_device_that_has_heard_another_reign_is_not_pressed() -> None:
    shell = serving()
    (allow,) = of(Allow, shell.send(Declared(config=weighing(2.0))))
    shell.send(allow.done(Failure(code="FAILED_PRECONDITION", message="term 9")))
    shell.sleep(60.0)
    assert len(of(Allow, shell.effects)) == 1


def test_what_was_put_back_is_told_to_the_process_it_was_meant_for_alone() -> None:
    shell = serving()
    (allow,) = of(Allow, shell.send(Declared(config=weighing(2.0))))
    shell.core.put_back([allow])
    assert of(Allow, shell.send(Tick())) == [allow]
    shell.core.put_back([allow])
    assert not of(Allow, shell.lost("device-0"))


def test_actors_that_queue_no_rows_are_told_nothing() -> None:
    shell = sharded()
    wide = dataclasses.replace(FOUR_SHARDS.servables[0], batching=BatchingConfig(weight=2.0))
    shell.send(Declared(config=dataclasses.replace(FOUR_SHARDS, servables=(wide,))))
    assert not of(Allow, shell.effects)
