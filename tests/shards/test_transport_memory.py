"""Shared memory between two processes: what is taken, lent, read and given back."""

from __future__ import annotations

import fcntl
import gc
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shards.errors import FrameCorrupt
from shards.transport import memory
from shards.transport._places import GRAIN_BYTES, Places
from shards.transport.memory import Borrower, Lender

PAGE = GRAIN_BYTES
SIZE = 16 * PAGE


class PlacesMachine(RuleBasedStateMachine):
    """Places against a list of bytes, each of which knows who has it."""

    def __init__(self) -> None:
        super().__init__()
        self.places = Places(SIZE)
        self.taken: dict[int, int] = {}

    @rule(nbytes=st.integers(1, SIZE + 1))
    def take(self, nbytes: int) -> None:
        start = self.places.take(nbytes)
        if start is None:
            assert nbytes > self._longest_free()
            return
        assert start >= 0
        assert start + nbytes <= SIZE
        assert all(start + nbytes <= a or a + size <= start for a, size in self.taken.items())
        # The lowest place that would do: what is warm is used again.
        assert all(not self._fits(lower, nbytes) for lower in range(0, start, PAGE))
        self.taken[start] = nbytes

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        start = data.draw(st.sampled_from(sorted(self.taken)))
        self.places.give_back(start)
        del self.taken[start]

    @rule(start=st.integers(0, SIZE))
    def give_back_what_was_not_taken(self, start: int) -> None:
        if start not in self.taken:
            with pytest.raises(KeyError):
                self.places.give_back(start)

    @invariant()
    def tiles(self) -> None:
        self.places.check_invariants()
        assert len(self.places) == len(self.taken)
        pages = sum(-(-size // PAGE) for size in self.taken.values())
        assert self.places.taken_bytes == pages * PAGE

    def teardown(self) -> None:
        for start in self.taken:
            self.places.give_back(start)
        assert self.places.take(SIZE) == 0, "something leaked"

    def _fits(self, start: int, nbytes: int) -> bool:
        end = start + -(-nbytes // PAGE) * PAGE
        return end <= SIZE and all(
            end <= a or a + -(-size // PAGE) * PAGE <= start for a, size in self.taken.items()
        )

    def _longest_free(self) -> int:
        longest = run = 0
        for page in range(0, SIZE, PAGE):
            run = run + PAGE if self._fits(page, 1) else 0
            longest = max(longest, run)
        return longest


TestPlaces = PlacesMachine.TestCase


class LendingMachine(RuleBasedStateMachine):
    """A lender and a borrower of one process, joined by lists of what they said."""

    def __init__(self) -> None:
        super().__init__()
        self.lender = Lender(SIZE)
        self.borrower = Borrower(os.getpid(), SIZE, lambda: None)
        self.told: list[tuple[bytes, int]] = []  # loans on their way, and what they hold
        self.views: list[tuple[memoryview, int]] = []
        self.returns: list[bytes] = []
        self.filling = 0

    @initialize()
    def open(self) -> None:
        self.lender.answered(self.borrower.take_up(self.lender.offer()))
        assert self.lender.is_taken_up

    @rule(nbytes=st.integers(1, SIZE))
    def lend(self, nbytes: int) -> None:
        loan = self.lender.lend(nbytes)
        if loan is None:
            return
        self.filling = (self.filling + 1) % 256
        cut = nbytes // 3
        for part in (cut, nbytes - cut):
            if part:
                loan.write(memoryview(bytes([self.filling]) * part))
        self.told.append((loan.reference, self.filling))

    @rule(nbytes=st.integers(1, SIZE))
    def lend_and_think_better_of_it(self, nbytes: int) -> None:
        before = self.lender.lent_bytes
        loan = self.lender.lend(nbytes)
        if loan is not None:
            self.lender.take_back(loan)
        assert self.lender.lent_bytes == before

    @precondition(lambda self: self.told)
    @rule(copies=st.integers(1, 3))
    def borrow(self, copies: int) -> None:
        reference, filling = self.told.pop(0)
        view = self.borrower.borrow(reference)
        assert view.readonly
        for _ in range(copies):
            self.views.append((view[1:] if copies > 1 else view, filling))

    @precondition(lambda self: self.views)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        del self.views[data.draw(st.integers(0, len(self.views) - 1))]

    @rule()
    def say_so(self) -> None:
        said = self.borrower.returned()
        if said:
            self.returns.append(said)

    @precondition(lambda self: self.returns)
    @rule()
    def hear(self) -> None:
        self.lender.returned(self.returns.pop(0))

    @rule(pages=st.integers(1, 16))
    def trim(self, pages: int) -> None:
        self.lender.trim(pages * PAGE)

    @invariant()
    def nothing_is_written_that_is_read(self) -> None:
        for view, filling in self.views:
            assert view == bytes([filling]) * len(view)

    def teardown(self) -> None:
        while self.told:
            self.borrow(1)
        self.views.clear()
        self.say_so()
        while self.returns:
            self.hear()
        assert self.borrower.borrowed == 0
        assert self.lender.lent_bytes == 0
        self.lender.close()


TestLending = LendingMachine.TestCase


@pytest.fixture
def lender() -> Iterator[Lender]:
    lender = Lender(SIZE)
    yield lender
    lender.close()


@pytest.fixture
def borrower() -> Borrower:
    return Borrower(os.getpid(), SIZE, lambda: None)


def join(lender: Lender, borrower: Borrower) -> None:
    lender.answered(borrower.take_up(lender.offer()))


def lend(lender: Lender, body: bytes) -> bytes:
    loan = lender.lend(len(body))
    assert loan is not None
    loan.write(memoryview(body))
    return loan.reference


def test_a_place_comes_back_when_the_last_view_dies_and_not_before(
    lender: Lender, borrower: Borrower
) -> None:
    join(lender, borrower)
    view = borrower.borrow(lend(lender, b"abcdefgh" * 100))
    rows = np.frombuffer(view, np.float32)[2:].reshape(-1, 2)[3]
    del view
    gc.collect()
    assert borrower.returned() == b""
    assert rows.tobytes() == b"abcdefgh"
    with pytest.raises(ValueError, match="read-only"):
        rows[0] = 0
    del rows
    lender.returned(borrower.returned())
    assert lender.lent_bytes == 0


def test_a_view_may_die_on_another_thread(lender: Lender) -> None:
    told: list[int] = []
    borrower = Borrower(os.getpid(), SIZE, lambda: told.append(threading.get_ident()))
    join(lender, borrower)
    views = [borrower.borrow(lend(lender, b"x"))]
    thread = threading.Thread(target=views.clear)
    thread.start()
    ident = thread.ident
    thread.join()
    assert told == [ident]
    lender.returned(borrower.returned())
    assert lender.lent_bytes == 0


def test_views_outlive_the_lender(borrower: Borrower) -> None:
    lender = Lender(SIZE)
    join(lender, borrower)
    view = borrower.borrow(lend(lender, b"still here"))
    lender.close()
    del lender
    gc.collect()
    assert bytes(view) == b"still here"


def test_another_process_reads_what_is_lent_and_its_death_harms_nobody(lender: Lender) -> None:
    code = (
        "import sys\n"
        "from shards.transport.memory import Borrower\n"
        f"borrower = Borrower({os.getpid()}, {SIZE}, lambda: None)\n"
        "read = lambda: bytes.fromhex(sys.stdin.readline())\n"
        "assert borrower.take_up(read())\n"
        "print('taken up', flush=True)\n"
        "view = borrower.borrow(read())\n"
        "print(bytes(view[-5:]).decode(), flush=True)\n"
        "sys.stdin.readline()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        print(lender.offer().hex(), file=other.stdin, flush=True)
        assert other.stdout.readline() == "taken up\n"
        lender.answered(True)
        body = b"x" * (3 * PAGE) + b"hello"
        print(lend(lender, body).hex(), file=other.stdin, flush=True)
        assert other.stdout.readline() == "hello\n"
        other.kill()
    assert lender.lend(PAGE) is not None


def test_a_full_segment_lends_no_more_and_does_not_grow(lender: Lender, borrower: Borrower) -> None:
    join(lender, borrower)
    assert lender.lend(SIZE + 1) is None
    reference = lend(lender, bytes(SIZE))
    assert lender.lend(1) is None
    del reference
    assert lender.lent_bytes == SIZE


def test_before_it_is_taken_up_and_after_it_is_refused_nothing_is_lent(lender: Lender) -> None:
    assert lender.lend(1) is None
    lender.offer()
    assert lender.lend(1) is None
    lender.answered(False)
    assert lender.lend(1) is None


def test_no_descriptor_of_a_segment_is_left_when_it_was_answered_and_closed() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for yes in (True, False):
        lender = Lender(SIZE)
        borrower = Borrower(os.getpid(), SIZE, lambda: None)
        taken_up = borrower.take_up(lender.offer())
        assert taken_up
        lender.answered(yes)
        lender.close()
        del lender, borrower
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_trimming_gives_the_pages_back_when_nothing_is_lent(
    lender: Lender, borrower: Borrower
) -> None:
    join(lender, borrower)
    view = borrower.borrow(lend(lender, b"x" * SIZE))
    assert not lender.trim(SIZE), "something is lent"
    assert bytes(view) == b"x" * SIZE
    del view
    lender.returned(borrower.returned())
    assert lender.trim(SIZE - PAGE)
    assert not lender.trim(SIZE)
    view = borrower.borrow(lend(lender, b"y"))
    assert bytes(view) == b"y"
    assert borrower._bytes is not None
    assert not borrower._bytes[1:].any()


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [
        (0, 0),
        (0, SIZE + 1),
        (SIZE, 1),
        (1, 1),
        (1 << 63, 1 << 63),
        (PAGE, SIZE),
        (SIZE - PAGE, 5000),
    ],
)
def test_a_loan_outside_of_the_segment_is_corrupt(
    lender: Lender, borrower: Borrower, offset: int, nbytes: int
) -> None:
    join(lender, borrower)
    with pytest.raises(FrameCorrupt):
        borrower.borrow(memory._LOAN.pack(offset, nbytes))
    assert borrower.borrowed == 0


def test_what_is_borrowed_cannot_be_lent_again(lender: Lender, borrower: Borrower) -> None:
    join(lender, borrower)
    reference = lend(lender, b"x")
    view = borrower.borrow(reference)
    with pytest.raises(FrameCorrupt, match="lent before"):
        borrower.borrow(reference)
    del view


@pytest.mark.parametrize("said", [b"x", b"12345678", bytes(16)])
def test_giving_back_what_was_not_lent_is_corrupt(
    lender: Lender, borrower: Borrower, said: bytes
) -> None:
    join(lender, borrower)
    lend(lender, b"x")
    with pytest.raises(FrameCorrupt, match="not lent"):
        lender.returned(said)


def test_a_loan_before_an_offer_and_a_second_offer_are_corrupt(
    lender: Lender, borrower: Borrower
) -> None:
    with pytest.raises(FrameCorrupt):
        borrower.borrow(bytes(memory.LOAN_BYTES))
    with pytest.raises(FrameCorrupt):
        borrower.take_up(b"no offer")
    offer = lender.offer()
    assert borrower.take_up(offer)
    with pytest.raises(FrameCorrupt, match="twice"):
        borrower.take_up(offer)


def _segment(size: int, seals: int, name: str = memory._NAME) -> int:
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


@pytest.mark.parametrize(
    ("seals", "size", "announced", "name"),
    [
        (fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL, SIZE, SIZE, memory._NAME),
        (memory._SEALS, PAGE, SIZE, memory._NAME),
        (memory._SEALS, 2 * SIZE, 2 * SIZE, memory._NAME),
        (memory._SEALS, SIZE, 0, memory._NAME),
        (memory._SEALS, SIZE, SIZE, "another"),
    ],
    ids=["may shrink", "shorter", "over the bound", "empty", "of another name"],
)
def test_memory_that_is_not_as_it_must_be_is_not_taken_up(
    borrower: Borrower, seals: int, size: int, announced: int, name: str
) -> None:
    descriptor = _segment(size, seals, name)
    try:
        assert not borrower.take_up(memory._OFFER.pack(descriptor, announced))
    finally:
        os.close(descriptor)


def test_other_files_and_processes_that_cannot_be_seen_are_not_taken_up(
    borrower: Borrower, tmp_path: Path
) -> None:
    file = tmp_path / f"memfd:{memory._NAME}"
    file.write_bytes(bytes(SIZE))
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    descriptors = [os.open(file, os.O_RDWR), os.open(fifo, os.O_RDWR), socket.socket().detach()]
    try:
        for descriptor in (*descriptors, 0xFFFF_FFFF):
            assert not borrower.take_up(memory._OFFER.pack(descriptor, SIZE))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    nobody = Borrower(0, SIZE, lambda: None)  # how the kernel names a process out of sight
    assert not nobody.take_up(memory._OFFER.pack(3, SIZE))


def test_the_mapping_of_a_borrower_cannot_be_written(lender: Lender, borrower: Borrower) -> None:
    join(lender, borrower)
    view = borrower.borrow(lend(lender, b"x"))
    array = np.frombuffer(view, np.uint8)
    assert view.readonly
    for read_only in (array, borrower._bytes):
        assert read_only is not None
        with pytest.raises(ValueError, match="WRITEABLE"):
            read_only.flags.writeable = True
