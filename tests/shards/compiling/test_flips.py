"""Programs with one bit flipped, in hostile bundles whose digests are right.

``make fuzz`` tries 300 of them, ``make test`` a few: each is refused, with words, and the process
that would serve it, this one, is none the worse for it.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from batching.errors import Code, ServingError
from tests.shards.compiling.units import (
    WEIGHTS,
    Executables,
    answer,
    compiler,
    load,
    program_of,
    saved,
    with_program,
)

#: Bits that end the process that parses the program, on the JAX that they were found with.
CRASHING = (13546, 7892)
FOUND_ON = "0.10.2"
FLIPS = int(os.environ.get("FLIPS", "6"))
SEED = int(os.environ.get("SEED", "1"))


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def check(made: Executables) -> None:
    for (batch, _), executable in made.items():
        x = np.random.default_rng(batch).random((batch, 8), np.float32)
        np.testing.assert_allclose(executable.run(*WEIGHTS, x)[1], answer(x), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(60 + 2 * FLIPS)
def test_a_flipped_bit_is_refused_and_harms_nobody(tmp_path: Path) -> None:
    store, unit = saved(tmp_path)
    data = program_of(store, unit)
    bits = [*CRASHING, *random.Random(SEED).sample(range(len(data) * 8), FLIPS)]
    how: Counter[str] = Counter()
    started = time.monotonic()
    for bit in bits:
        hostile = with_program(store, unit, flipped(data, bit))
        with pytest.raises(ServingError, match=f"^unit {unit.id[:12]}: ") as refused:
            load(compiler(), store, hostile)
        error = refused.value
        assert error.code in (Code.DATA_LOSS, Code.FAILED_PRECONDITION, Code.INVALID_ARGUMENT)
        is_death = "the compile process" in error.message
        how["ended the compile process" if is_death else type(error).__name__] += 1
    print(f"{len(bits)} flips in {time.monotonic() - started:.0f} s: {dict(how)}")
    if jax.__version__ == FOUND_ON:
        assert how["ended the compile process"] >= len(CRASHING)
    check(load(compiler(), store, unit))
