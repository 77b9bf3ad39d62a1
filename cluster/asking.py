"""Which actors a request's next unit is asked of, and what each of them is told.

Rows go to the best holder of the unit; ids are fanned out over the partitions of their table. Where
a look-up's rows are for one unit alone and are many, they do not come back: the shards are told to
send them on, and the unit's device is told what to wait for (`shards.joining`). Whether that pays
is decided here, once the ids are known; a request that is tried again always takes the plain way,
in which this process puts the rows together.

Keeps the calls that are under way. Does not know what follows from an answer, nor how a request
ends.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from batching.allowance import BEST_EFFORT
from batching.busyness import Whose
from batching.errors import ResourceExhausted, Unavailable
from batching.reply_times import ReplyTimes
from cluster.partials import Partials
from cluster.peers import Peer
from cluster.pending import Call, Execution, RouterStats
from cluster.pooled import Pool
from cluster.roster import Roster
from cluster.routes import REQUEST, PlannedNode, SignaturePlan
from cluster.spares import CallAt, Spares, sharers
from cluster.tables import Gather, Thrift
from shards.specs import check
from shards.wire import LATER, Awaited, Continuation, Item, Join, ReplyHeader

__all__ = ["Asking", "Ready", "after_s"]

Array = npt.NDArray[np.generic]
#: Units whose outputs are there without anybody having been asked, with these outputs.
Ready: TypeAlias = list[tuple[PlannedNode, Mapping[str, Array]]]

_MICROSECOND: Final = 1e6
#: How parts become one: each row goes to the place that its slot names.
_COMBINE: Final = "place"
#: After rows could not be joined at a device, they come through this process for so long.
_DETOUR_S: Final = 5.0


class _Onward(NamedTuple):
    """Where the answer of a call goes, if not back: to a device, as a part of a join."""

    device: Peer
    request: int
    slot: int


class _LookUp(NamedTuple):
    """One look-up of a unit that may have its rows joined at its device."""

    tensor: int
    node: PlannedNode
    gather: Gather


class Asking:
    """Sends calls, and keeps those that are under way.

    Args:
        roster: the actors.
        stats: to count into.
        clock: the loop's.
        nonce: distinct for every router process; ids of joins begin with it, so that a part for a
            router that has died is never taken for one of its successor.
        call_at: the loop's.
    """

    def __init__(
        self,
        roster: Roster,
        stats: RouterStats,
        clock: Callable[[], float],
        nonce: int,
        call_at: CallAt,
    ) -> None:
        self._roster = roster
        self._stats = stats
        self._clock = clock
        self._calls: dict[int, Call] = {}
        self._next_call = 1
        self._next_join = (nonce & 0x7FFF_FFFF) << 32
        #: devices at which rows could not be joined, and until when that is not tried again
        self._detours: dict[str, float] = {}
        self.thrift = Thrift()
        self._times = ReplyTimes()
        self._spares = Spares(self, roster, stats, clock, call_at)
        #: see `Spares`
        self.goes_on = self._spares.goes_on
        self.close = self._spares.close

    @property
    def calls(self) -> Mapping[int, Call]:
        """Those under way, by number."""
        return self._calls

    def take(self, number: int) -> Call | None:
        """The call of this number, which is no longer under way; None for one that is not."""
        call = self._calls.pop(number, None)
        if call is not None:
            call.peer.in_flight -= 1
            if call.spare is not None:
                call.peer.pace.ended(call.rows)
            call.execution.calls.discard(number)
        return call

    def abandon(self, execution: Execution) -> None:
        """Tell everybody that this request's calls are not wanted any more."""
        for number in list(execution.calls):
            call = self.take(number)
            assert call is not None, "a request knows a call that is not under way"
            call.peer.cancel(number)

    def settle(self, call: Call) -> None:
        """A graph's call was answered: whoever sent rows to its actor has nothing more to say."""
        now = self._clock()
        self._times.observe(call.node.unit, now - call.sent_at)
        if call.spare is not None:
            self._spares.settle(call, now)
        for number in call.parts:
            self.take(number)

    def detour(self, call: Call) -> None:
        """Rows could not be joined for this call: let the next ones come here."""
        device = call.onward or call.peer
        self._stats.unjoined += 1
        self._detours[device.endpoint.actor] = self._clock() + _DETOUR_S

    def send_direct(self, execution: Execution, node: PlannedNode) -> None:
        """As `begin`, where the request feeds the only unit of the plan: the usual case.

        Raises:
            ServingError: the unit cannot take the inputs, or nobody can be asked.
        """
        inputs, names = execution.inputs, node.names
        # A comprehension is a call of its own.
        arrays = (inputs[names[0]],) if len(names) == 1 else tuple([inputs[name] for name in names])
        if node.limits:
            check(node.specs, dict(zip(node.specs, arrays, strict=True)), node.limits)
        peer = self._device(execution, node, execution.deadline)
        if peer is None:
            raise _away(node, node.holders[0])
        self.send(Call(execution, node, peer, execution.rows), "run", arrays)

    def check_in_time(self, execution: Execution) -> None:
        """Turn a request away where the devices of a unit could not be done with it in time.

        Raises:
            ResourceExhausted: says when another like it would be in time.
        """
        plan = execution.plan
        for node in plan.nodes:
            if node.kind == "map":
                due = execution.deadline - after_s(self._times, plan, node)
                self._device(execution, node, due, rows=0)

    def answered(self, peer: Peer, header: ReplyHeader) -> None:
        """A device has said with its answer how busy it is."""
        call = self._calls.get(header.items[0][0]) if header.items else None
        if call is not None:
            now = self._clock()
            peer.busyness.answered(_whose(call), header.wait_us, header.row_us, now)

    def refused(self, call: Call, retry_after_ms: int) -> None:
        """A device would not answer a call in time: nor others like it, for so long."""
        if call.node.kind == "map":
            due, now = call.due, self._clock()
            call.peer.busyness.refused(_whose(call), due, retry_after_ms, now)

    def ask_elsewhere(self, call: Call) -> bool:
        """Ask another device for what one has refused, where one may be in time.

        Once for each unit of a request, so that devices that are all too busy are asked for no more
        than twice what there is. Rows that shards sent to the device are not sent again.

        Args:
            call: which was refused, and is no longer under way.

        Returns:
            Whether another was asked.
        """
        node, execution = call.node, call.execution
        if call.is_second or call.parts or node.kind != "map" or call.due <= self._clock():
            return False
        others = [name for name in node.holders[0] if name != call.peer.endpoint.actor]
        try:
            peer = self._roster.soonest(others, _whose(call), call.rows, call.due, self._clock)
        except ResourceExhausted:
            return False
        if peer is None:
            return False
        if execution.plan.direct is node:
            arrays = tuple([execution.inputs[name] for name in node.names])
        else:
            arrays = execution.arguments(node)
        again = Call(execution, node, peer, call.rows)
        again.is_second = True
        self._stats.elsewhere += 1
        self.send(again, LATER if node.is_later else "run", arrays)
        return True

    def _device(
        self, execution: Execution, node: PlannedNode, due: float | None, rows: int | None = None
    ) -> Peer | None:
        """The holder of a map unit that would be done with it first, None if all are away.

        Args:
            execution: the request.
            node: the unit.
            due: by when it should be done; None to choose one even if all would be late.
            rows: that he will be sent; None for the request's.

        Raises:
            ResourceExhausted: nobody would be done by then.
        """
        criticality = execution.criticality
        if criticality <= BEST_EFFORT:
            # It waits for room, and nobody knows when there will be some.
            return self._roster.best(node.holders[0])
        whose = (node.unit, execution.plan.servable, criticality)
        rows = execution.rows if rows is None else rows
        anyway = due is None
        due = execution.deadline if due is None else due
        try:
            return self._roster.soonest(
                node.holders[0], whose, rows, due, self._clock, asks_anyway=anyway
            )
        except ResourceExhausted:
            self._stats.turned_away += 1
            raise

    def begin(self, execution: Execution, node: PlannedNode) -> Ready:
        """Ask for a unit's outputs, or say what is there at once.

        Called again for a unit whose look-ups come through this process, when they are here.

        Raises:
            ServingError: the unit cannot take its inputs, or nobody can be asked.
        """
        if node.look_ups and node.look_ups[0].node not in execution.values:
            return self._look_up(execution, node)
        if node.pool is not None:
            return self._pool(execution, node)
        if node.table is not None:
            return self._fan_out(execution, node, self._gather(execution, node))
        if node.kind == "columns":
            pieces = [_value(execution, source) for _, source in node.inputs]
            return [(node, {"rows": np.concatenate(pieces, axis=-1)})]
        if node.kind == "custom":
            self._send_to_all(execution, node)
        else:
            self._send_rows(execution, node)
        return []

    def _send_rows(self, execution: Execution, node: PlannedNode) -> None:
        arrays = execution.arguments(node)
        if node.kind == "map":
            peer = self._device(execution, node, None)
        else:
            peer = self._roster.best(node.holders[0])
        if peer is None:
            raise _away(node, node.holders[0])
        op = LATER if node.is_later else "run"
        self.send(Call(execution, node, peer, execution.rows_of(node)), op, arrays)

    def _send_to_all(self, execution: Execution, node: PlannedNode) -> None:
        """Ask every partition of a unit of a registered kind the same."""
        arrays = execution.arguments(node)
        partials = Partials(node)
        rows = execution.rows_of(node)
        holders = self._holders(execution, node)
        self._check_reached(node, holders, holders)
        for partition, holder in enumerate(holders):
            peer = self._roster[holder]
            call = Call(execution, node, peer, rows, None, None, partials, partition)
            self._send_part(call, "run", arrays, node.holders[partition])

    def _gather(self, execution: Execution, node: PlannedNode) -> Gather:
        [(_, source)] = node.inputs
        gather = Gather(node, _value(execution, source))
        self._stats.count_missing(execution.plan.servable, node.label, gather.missing)
        return gather

    def _fan_out(self, execution: Execution, node: PlannedNode, gather: Gather) -> Ready:
        gather.save(self.thrift)
        holders, parts = self._split(execution, node, gather)
        for holder, positions in parts.items():
            call = Call(execution, node, self._roster[holder], len(positions), gather, positions)
            names = sharers(node, holders, holder) if node.is_replicated else ()
            self._send_part(call, "rows", (gather.ids_at(positions),), names)
        # Nothing to ask: no ids, or none that exist.
        return [(node, {"rows": gather.rows()})] if gather.is_complete else []

    def _pool(self, execution: Execution, node: PlannedNode) -> Ready:
        bunch = execution.plan.bunches[node.index]
        pool = Pool(bunch, [execution.bags_of(member) for member in bunch.members])
        for label, count in pool.missing_by:
            self._stats.count_missing(execution.plan.servable, label, count)
        node = bunch.node
        holders = self._holders(execution, node)
        parts = pool.split(holders)
        self._check_reached(node, holders, {part.holder for part in parts})
        for number, part in enumerate(parts):
            peer = self._roster[part.holder]
            call = Call(execution, node, peer, len(part.bags), None, None, pool, number)
            names = sharers(node, holders, part.holder) if node.is_replicated else ()
            self._send_part(call, bunch.op, part.arrays, names)
        return [] if parts else pool.outputs(0)

    def _split(
        self, execution: Execution, node: PlannedNode, gather: Gather
    ) -> tuple[list[str], dict[str, npt.NDArray[np.intp]]]:
        holders = self._holders(execution, node)
        parts = gather.split(holders)
        self._check_reached(node, holders, parts)
        return holders, parts

    def _holders(self, execution: Execution, node: PlannedNode) -> list[str]:
        return self._roster.holders(node.holders, execution.rows, self._clock)

    def _check_reached(
        self, node: PlannedNode, holders: Sequence[str], asked: Container[str]
    ) -> None:
        # A partition that nobody can be asked for fails the requests that need it, no others.
        if "" in asked:
            lost = [names for names, who in zip(node.holders, holders, strict=True) if not who]
            raise _away(node, [name for names in lost for name in names])

    def _look_up(self, execution: Execution, node: PlannedNode) -> Ready:
        nodes = execution.plan.nodes
        look_ups = [
            _LookUp(each.tensor, nodes[each.node], self._gather(execution, nodes[each.node]))
            for each in node.look_ups
        ]
        device = self._device(execution, node, None)
        if device is not None and self._pays(execution, device, look_ups):
            self._join(execution, node, device, look_ups)
            return []
        execution.waiting[node.index] = len(look_ups)
        ready: Ready = []
        for each in look_ups:
            ready += self._fan_out(execution, each.node, each.gather)
        return ready

    def _pays(self, execution: Execution, device: Peer, look_ups: list[_LookUp]) -> bool:
        """Whether the rows should go straight to the device."""
        least = execution.routes.epoch.continuation_bytes_min
        if least is None or execution.retried:
            return False
        if sum(each.gather.nbytes for each in look_ups) < least:
            return False
        gathers = [each.gather for each in look_ups]
        if all(gather.is_complete for gather in gathers) or any(g.fills for g in gathers):
            return False  # nobody has a row to send, or a device would take zeros for one
        until = self._detours.get(device.endpoint.actor)
        if until is not None and self._clock() >= until:
            del self._detours[device.endpoint.actor]
            until = None
        return until is None

    def _join(
        self, execution: Execution, node: PlannedNode, device: Peer, look_ups: list[_LookUp]
    ) -> None:
        """Have shards send the rows to the device, and tell it what they are for."""
        by_tensor = {each.tensor: each for each in look_ups}
        sent: list[Array] = []
        full: list[Array] = []
        parts: list[Awaited] = []
        asked: list[tuple[Call, Array]] = []
        for tensor, (_, source) in enumerate(node.inputs):
            look_up = by_tensor.get(tensor)
            if look_up is None:
                sent.append(_value(execution, source))
                full.append(sent[-1])
                continue
            table, gather = look_up.node, look_up.gather
            full.append(gather.outline())
            if gather.is_complete:
                sent.append(gather.rows())
                continue
            _, split = self._split(execution, table, gather)
            sent.append(gather.slots(list(split.values()), len(parts)))
            for holder, positions in split.items():
                peer = self._roster[holder]
                generation = peer.endpoint.generation
                parts.append(Awaited(holder, generation, len(positions), table.plan, tensor))
                call = Call(execution, table, peer, len(positions))
                asked.append((call, gather.ids_at(positions)))
        check(node.specs, dict(zip(node.specs, full, strict=True)), node.limits)
        for each in look_ups:
            execution.values[each.node.index] = {}  # nobody here will read them
        request = self._next_join
        self._next_join = request + 1
        self._stats.joined += 1
        whole = Call(execution, node, device, execution.rows_of(node))
        self.send(whole, "join", tuple(sent), join=Join(request, parts))
        for slot, (call, ids) in enumerate(asked):
            number = self.send(call, "rows", (ids,), onward=_Onward(device, request, slot))
            whole.parts.append(number)

    # Calls

    def _send_part(
        self, call: Call, op: str, arrays: tuple[Array, ...], names: tuple[str, ...]
    ) -> None:
        """Ask for a part that any of these actors could be asked for."""
        if len(names) > 1:
            self._spares.send(call, op, arrays, names)
        else:
            self.send(call, op, arrays)

    def send(
        self,
        call: Call,
        op: str,
        arrays: tuple[Array, ...],
        join: Join | None = None,
        onward: _Onward | None = None,
    ) -> int:
        """Send a call; returns its number.

        Raises:
            Unavailable: the actor is away.
        """
        execution, node = call.execution, call.node
        number = self._next_call
        self._next_call = number + 1
        now = self._clock()
        call.due = execution.deadline
        if execution.plan.direct is None:
            call.sent_at = now
            later_s = after_s(self._times, execution.plan, node)
            call.due = self._times.due(execution.deadline, later_s, now)
        remaining_us = int((call.due - now) * _MICROSECOND)
        # Noted first: the frame may leave, or fail to, before `send` returns.
        call.peer.in_flight += 1
        self._calls[number] = call
        execution.calls.add(number)
        key = node.frame_key
        if key is None and node.merge:
            key = (call.address, *[array.shape[1:] for array in arrays])
        epoch, owner = execution.plan.epoch, execution.plan.servable
        if join is None and onward is None:
            item = Item(number, call.rows, remaining_us, execution.trace, None, None, call.sizes)
            call.peer.send(
                owner, call.address, op, epoch, item, arrays, key, node.plan, None,
                execution.criticality, node.tables,
            )  # fmt: skip
            return number
        reply_to = continuation = None
        if onward is not None:
            call.onward = onward.device
            reply_to = onward.device.endpoint
            continuation = Continuation(reply_to.actor, onward.request, onward.slot, _COMBINE)
            key = (key, reply_to.actor, reply_to.generation)
        elif join is not None:
            key = (node.unit, *[(array.shape[1:], array.dtype) for array in arrays])
        item = Item(number, call.rows, remaining_us, execution.trace, continuation, join)
        call.peer.send(
            owner, call.address, op, epoch, item, arrays, key, node.plan, reply_to,
            execution.criticality,
        )  # fmt: skip
        return number


def after_s(times: ReplyTimes, plan: SignaturePlan, node: PlannedNode) -> float:
    """What the units after this one need, along the longest way."""
    longest = 0.0
    for index in node.feeds:
        later = plan.nodes[index]
        longest = max(longest, times.least_s(later.unit) + after_s(times, plan, later))
    return longest


def _whose(call: Call) -> Whose:
    execution = call.execution
    return (call.node.unit, execution.plan.servable, execution.criticality)


def _value(execution: Execution, source: tuple[int, str]) -> Array:
    at, name = source
    return execution.inputs[name] if at == REQUEST else execution.values[at][name]


def _away(node: PlannedNode, names: Sequence[str]) -> Unavailable:
    who = ", ".join(names) or "none is up"
    return Unavailable(f"no actor that holds unit {node.unit[:12]} can be reached ({who})", 1000)
