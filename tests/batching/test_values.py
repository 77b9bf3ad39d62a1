from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import batching
from batching import LaneKey, Ticket, TicketState
from batching.testing import CheckedTicket, FakeClock, IllegalTransition
from batching.values import TRANSITIONS

FOLDER = Path(batching.__file__).parent


def test_every_state_can_be_reached_and_only_ends_have_no_way_on() -> None:
    reached, ways = {TicketState.NEW}, {before for before, _ in TRANSITIONS}
    for _ in TicketState:
        reached |= {after for (before, _), after in TRANSITIONS.items() if before in reached}
    assert reached == set(TicketState)
    assert set(TicketState) - ways == {
        TicketState.FINISHED,
        TicketState.FAILED,
        TicketState.EXPIRED,
        TicketState.SHED,
        TicketState.CANCELLED,
    }


def test_the_readme_prints_the_table() -> None:
    rows = [f"| {before} | {event} | {after} |" for (before, event), after in TRANSITIONS.items()]
    table = "\n".join(["| state | what happens | then |", "| --- | --- | --- |", *rows])
    assert table in (FOLDER / "README.md").read_text()


def test_the_readme_s_example_runs() -> None:
    _, _, rest = (FOLDER / "README.md").read_text().partition("```python\n")
    example, fence, _ = rest.partition("```")
    assert fence
    exec(compile(example, "README.md", "exec"), {})  # noqa: S102  (our own text)


def test_a_checked_ticket_follows_the_table_and_nothing_else() -> None:
    ticket = CheckedTicket(LaneKey("a"), 1, 1, 1.0)
    for state in (TicketState.WAITING, TicketState.RUNNING, TicketState.WAITING):
        ticket.state = state
    with pytest.raises(IllegalTransition, match="new -> waiting -> running -> waiting -> finished"):
        ticket.state = TicketState.FINISHED
    assert ticket.state is TicketState.WAITING


def test_tickets_are_compared_by_identity() -> None:
    one, other = (Ticket(LaneKey("a"), 1, 1, 1.0) for _ in range(2))
    assert one == one
    assert one != other
    assert len({one, other}) == 2


def test_lane_keys_are_values() -> None:
    assert LaneKey("trunk", (128,)) == LaneKey("trunk", (128,)) != LaneKey("trunk", (64,))


def test_the_fake_clock_goes_forward_only() -> None:
    clock = FakeClock(5.0)
    assert clock.advance(1.5) == clock() == 6.5
    assert clock.advance_to(6.0) == 6.5
    assert clock.advance_to(9.0) == clock() == 9.0
    with pytest.raises(AssertionError, match="does not go back"):
        clock.advance(-1.0)


def imported(path: Path) -> set[str]:
    """The top-level modules that a file imports at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_the_core_imports_nothing_that_acts(path: Path) -> None:
    acting = {"asyncio", "threading", "time", "socket", "os", "random", "logging", "datetime"}
    # Whoever draws something draws it from a seed that he is given; traces have dates in them.
    drawing = ("simulation.py", "virtual.py", "virtual_device.py", "virtual_router.py")
    guests = {
        "testing.py": {"hypothesis"},
        "workloads.py": {"random", "datetime"},
        **{name: {"random"} for name in drawing},
    }.get(path.name, set())
    names = imported(path) - guests - {"batching"}
    assert names <= sys.stdlib_module_names - acting


def test_what_the_package_names_is_there() -> None:
    assert len(set(batching.__all__)) == len(batching.__all__)
    for name in batching.__all__:
        assert hasattr(batching, name)
    assert "tests" not in Path(batching.__file__).parts
