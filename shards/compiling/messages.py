"""What an actor and its compile process say to each other, and how a word is sealed.

The two share a socket pair that nobody else can reach, and a key that is drawn for each process.
What the child sends ends in an unpickler (an executable of JAX is a pickle), so no byte of a frame
is looked at before its length is within bounds and its seal fits. A seal covers the direction and
the number of the frame: a child that lost its mind cannot have a frame taken twice or out of order.

Pure: bytes in, bytes out. Does not know sockets, processes or JAX.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import Final, TypeAlias

import msgspec

from batching.errors import DataLoss
from shards.manifest import MapUnit

__all__ = [
    "FRAME_BYTES_MAX",
    "HEADER_BYTES",
    "KEY_BYTES",
    "Bucket",
    "Compiled",
    "Doing",
    "Done",
    "FileSpan",
    "FromChild",
    "Refused",
    "Sealer",
    "Settings",
    "Trial",
    "body_bytes",
]

#: (batch, sizes of the unit's other symbols in order of their names, and last, where inputs are per
#: request, the number of requests)
Bucket: TypeAlias = tuple[int, tuple[int, ...]]

KEY_BYTES: Final = 32
_SEAL_BYTES: Final = hashlib.sha256().digest_size
_LENGTH: Final = struct.Struct("<Q")
HEADER_BYTES: Final = _LENGTH.size + _SEAL_BYTES
#: The largest frame: the programs of a unit, or one executable.
FRAME_BYTES_MAX: Final = 1 << 30


class _Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the messages."""


class Settings(_Value, frozen=True):
    """What a compile process is told once.

    Attributes:
        platform: for which to compile: ``cpu``, or an accelerator's, which the process has not.
        device: index of the actor's device among those of its process.
        device_count: how many CPU devices the actor's process has: an executable knows it.
        enable_x64: JAX's setting of that name in the actor.
        memory_bytes_max: what the process may allocate besides what it needs to start.
        step_cpu_s_max: seconds of processor time that reading a program, compiling a bucket or
            running it may take.
        is_patient: run only when nothing else on the machine wants to; otherwise a little.
    """

    platform: str
    device: int
    device_count: int
    enable_x64: bool
    memory_bytes_max: int
    step_cpu_s_max: int
    is_patient: bool = True


class FileSpan(_Value, frozen=True):
    """Bytes of a file that both processes can open."""

    path: str
    offset: int


class Trial(_Value, frozen=True, tag="trial"):
    """Try a unit's programs and compile them.

    Attributes:
        programs: the bytes of `MapUnit.programs`, in their order.
        blobs: where the parameters' blobs lie, by digest.
        buckets: which to try, in this order.
        executables: for each of them what an equal program was compiled to, which is run and not
            compiled again, or ``b""``.
        is_checkable: the programs were written by this version of JAX, so that they must be, byte
            for byte, what it would write again, and the unit's identity can be found anew.
    """

    unit: MapUnit
    programs: tuple[bytes, ...]
    blobs: dict[str, FileSpan]
    buckets: tuple[Bucket, ...]
    executables: tuple[bytes, ...]
    is_checkable: bool


class Doing(_Value, frozen=True, tag="doing"):
    """What the child is about to do: if it dies, of this."""

    step: str


class Compiled(_Value, frozen=True, tag="compiled"):
    """A bucket that can be run: it was, if this is for a CPU.

    Attributes:
        data: what it was compiled to, for `shards.compiling.handover`; ``b""`` for one that came
            with the trial.
        run_s: seconds of a run; 0 if it was not run on such a device.
    """

    bucket: Bucket
    data: bytes
    run_s: float = 0.0


class Done(_Value, frozen=True, tag="done"):
    """The child is ready for a trial: it has started, or has sent every bucket of the last."""


class Refused(_Value, frozen=True, tag="refused"):
    """The trial failed, and the child lives on."""

    code: str
    message: str


FromChild: TypeAlias = Doing | Compiled | Done | Refused

# Laid out before there are threads that receive it; see `shards.checking`.
msgspec.msgpack.Decoder[FromChild](FromChild)


class Sealer:
    """Seals frames of one direction and opens them again, in order.

    Args:
        key: `KEY_BYTES` bytes that only the two processes know.
        direction: ``b"down"`` to the child, ``b"up"`` from it.
    """

    def __init__(self, key: bytes, direction: bytes) -> None:
        assert len(key) == KEY_BYTES
        self._key = key
        self._direction = direction
        self._number = 0

    def seal(self, body: bytes) -> bytes:
        """The header that goes before a body."""
        if len(body) > FRAME_BYTES_MAX:
            raise DataLoss(f"{len(body):,} bytes are too many for the compile process")
        return _LENGTH.pack(len(body)) + self._next_seal(body)

    def open(self, header: bytes, body: bytes) -> bytes:
        """The body, if it is the next frame of this direction.

        Raises:
            DataLoss: it is not; nothing more of this peer may be read.
        """
        if not hmac.compare_digest(header[_LENGTH.size :], self._next_seal(body)):
            raise DataLoss("a frame of the compile process does not bear its seal")
        return body

    def _next_seal(self, body: bytes) -> bytes:
        mac = hmac.new(self._key, self._direction, hashlib.sha256)
        mac.update(_LENGTH.pack(self._number))
        mac.update(body)
        self._number += 1
        return mac.digest()


def body_bytes(header: bytes) -> int:
    """How many bytes follow a header.

    Raises:
        DataLoss: more than a frame may have.
    """
    (size,) = _LENGTH.unpack_from(header)
    if size > FRAME_BYTES_MAX:
        raise DataLoss(f"a frame of the compile process claims {size:,} bytes")
    return int(size)
