"""Reads flatbuffers that nobody has vouched for: every position is held against the bytes.

A table is what a vtable says of it, and several may be the same bytes, as may texts and lists: a
few bytes could lead to any number of them. So what is followed is counted, over all tables of a
buffer, and held against its size. Nothing is set apart for what they claim.
"""

from __future__ import annotations

import struct
from typing import Final

from batching.errors import InvalidArgument

__all__ = ["Table", "root_of"]

_U8: Final = struct.Struct("<B")
_U16: Final = struct.Struct("<H")
_I16: Final = struct.Struct("<h")
_I32: Final = struct.Struct("<i")
_U32: Final = struct.Struct("<I")
_I64: Final = struct.Struct("<q")
_TEXT_BYTES_MAX: Final = 64 << 10
#: A table that is nobody else's takes this at least: where it is, and where its vtable is.
_TABLE_BYTES: Final = 8
#: For those who write some of them once: tables beyond what their own bytes allow.
_TABLES_MORE: Final = 256


class _Left:
    """What may still be followed in a buffer.

    Attributes:
        tables: how many.
        text_bytes: of all texts together.
    """

    __slots__ = ("tables", "text_bytes")

    def __init__(self, nbytes: int) -> None:
        self.tables = _TABLES_MORE + nbytes // _TABLE_BYTES
        self.text_bytes = _TEXT_BYTES_MAX + nbytes


class Table:
    """One table. Fields are known by their numbers in the schema.

    Args:
        data: of the whole buffer.
        at: where the table begins.
        left: of the whole buffer.

    Raises:
        InvalidArgument: it is not within the buffer, or more has been followed than it can hold;
            so do all methods.
    """

    __slots__ = ("_at", "_data", "_fields", "_left", "_vtable")

    def __init__(self, data: memoryview, at: int, left: _Left) -> None:
        left.tables -= 1
        if left.tables < 0:
            raise InvalidArgument(f"more tables than {len(data)} bytes hold")
        self._left = left
        self._data = data
        self._at = at
        self._vtable = at - self._read(_I32, at)
        self._fields = (self._read(_U16, self._vtable) - 4) // 2

    def flag(self, field: int) -> int:
        """A byte; 0 where it is not there, like the other numbers."""
        return self._number(_U8, field)

    def short(self, field: int) -> int:
        """A number of two bytes."""
        return self._number(_I16, field)

    def integer(self, field: int) -> int:
        """A number of four bytes."""
        return self._number(_I32, field)

    def long(self, field: int) -> int:
        """A number of eight bytes."""
        return self._number(_I64, field)

    def table(self, field: int) -> Table | None:
        """Another table, or None."""
        at = self._place(field)
        return None if not at else Table(self._data, at + self._read(_U32, at), self._left)

    def text(self, field: int) -> str:
        """A text; empty where it is not there."""
        start, size = self.vector(field, 1)
        if size > _TEXT_BYTES_MAX:
            raise InvalidArgument(f"a text of {size} bytes")
        self._left.text_bytes -= size
        if self._left.text_bytes < 0:
            raise InvalidArgument(f"more text than {len(self._data)} bytes hold")
        try:
            return str(self._data[start : start + size], "utf-8")
        except UnicodeDecodeError:
            raise InvalidArgument("a text is not UTF-8") from None

    def tables(self, field: int, count_max: int) -> list[Table]:
        """A list of tables, of so many at most."""
        start, count = self.vector(field, 4)
        if count > count_max:
            raise InvalidArgument(f"a list of {count} things; {count_max} is the limit")
        places = range(start, start + 4 * count, 4)
        return [Table(self._data, at + self._read(_U32, at), self._left) for at in places]

    def vector(self, field: int, nbytes: int) -> tuple[int, int]:
        """Where the elements of a list begin, and how many there are; all are in the buffer.

        Args:
            field: its number.
            nbytes: of one element.
        """
        at = self._place(field)
        if not at:
            return 0, 0
        at += self._read(_U32, at)
        count = self._read(_U32, at)
        if at + 4 + count * nbytes > len(self._data):
            raise InvalidArgument("a list goes on after the end")
        return at + 4, count

    def _place(self, field: int) -> int:
        if field >= self._fields:
            return 0
        offset = self._read(_U16, self._vtable + 4 + 2 * field)
        return self._at + offset if offset else 0

    def _number(self, kind: struct.Struct, field: int) -> int:
        at = self._place(field)
        return self._read(kind, at) if at else 0

    def _read(self, kind: struct.Struct, at: int) -> int:
        # Before the first byte, Python would count from the end.
        if not 0 <= at <= len(self._data) - kind.size:
            raise InvalidArgument(f"byte {at} is not in a message of {len(self._data)}")
        found: int = kind.unpack_from(self._data, at)[0]
        return found


def root_of(data: memoryview) -> Table:
    """The table that a buffer begins with.

    Raises:
        InvalidArgument: it is not there.
    """
    if len(data) < _U32.size:
        raise InvalidArgument("a message without a table")
    return Table(data, _U32.unpack_from(data)[0], _Left(len(data)))
