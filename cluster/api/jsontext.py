"""Reading JSON that the fast path refused: tolerant, never crashing, exact about what is wrong.

Beyond the standard, ``NaN``, ``Infinity`` and ``-Infinity`` are numbers, and a number too large
for a double is an infinity. Of equal names in one object the last counts. Nesting has no limit but
memory: a document deeper than the C parser's stack is read without recursion, if it is not also
huge. Errors use the words of RapidJSON, which clients of TensorFlow Serving know.

This file does not know what a request looks like, only that its root is an object.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Final

from batching.errors import InvalidArgument

__all__ = ["clip", "load", "type_name"]

Buffer = bytes | bytearray | memoryview

#: Reading without recursion takes some 700 ns a character at worst, so only documents up to this
#: size are read that way: one request must not hold up the others for long.
DEEP_CHARS_MAX: Final = 5 << 18

_SPACE: Final = " \t\n\r"
_DECODER: Final = json.JSONDecoder()
_TOKEN: Final = re.compile(
    r"[ \t\n\r]*(?:([\[\]{},:\"])"
    r"|(-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)"
    r"|(true|false|null|NaN|Infinity|-Infinity))"
)
_BRACKET_OR_STRING: Final = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
_WORDS: Final[dict[str, object]] = {
    "true": True,
    "false": False,
    "null": None,
    "NaN": float("nan"),
    "Infinity": float("inf"),
    "-Infinity": float("-inf"),
}
#: 2**64 has 20 digits; a longer literal is a double anyway, and Python limits integer parsing.
_INT_CHARS_MAX: Final = 20

#: The beginnings of the standard library's messages, and RapidJSON's words for the same.
_RAPIDJSON: Final = (
    ("Expecting value", "Invalid value."),
    ("Extra data", "The document root must not be followed by other values."),
    ("Expecting property name", "Missing a name for object member."),
    ("Illegal trailing comma before end of object", "Missing a name for object member."),
    ("Illegal trailing comma before end of array", "Invalid value."),
    ("Expecting ':'", "Missing a colon after a name of object member."),
    ("Unterminated string", "Missing a closing quotation mark in string."),
    ("Invalid control character", "Invalid encoding in string."),
    ("Invalid \\u", "Incorrect hex digit after \\u escape in string."),
    ("Invalid \\", "Invalid escape character in string."),
)


def load(body: Buffer) -> dict[str, object]:
    """The document, whose root must be an object.

    Raises:
        InvalidArgument: it is not JSON, or the root is something else.
    """
    value = _load(body)
    if not isinstance(value, dict):
        raise InvalidArgument(f"JSON Value: {clip(value)} Is not object")
    return value


def type_name(value: object) -> str:
    """RapidJSON's word for the type of a value."""
    if value is None:
        return "Null"
    if isinstance(value, bool):
        return "True" if value else "False"
    if isinstance(value, int | float):
        return "Number"
    if isinstance(value, str):
        return "String"
    return "Object" if isinstance(value, dict) else "Array"


def clip(value: object, chars_max: int = 256) -> str:
    """The value as JSON text for a message, cut off after about `chars_max` characters.

    It neither walks nor prints more than that, whatever a client sent.
    """
    pieces: list[str] = []
    left = chars_max
    for piece in _pieces(value, chars_max):
        pieces.append(piece[:left])
        left -= len(piece)
        if left <= 0:
            return "".join(pieces) + "..."
    return "".join(pieces)


def _pieces(value: object, chars_max: int) -> Iterator[str]:
    # A stack of iterators, not recursion: the value may be nested half a million deep.
    stack: list[tuple[Iterator[tuple[str, object]], str]] = [(iter([("", value)]), "")]
    first = True
    while stack:
        rest, closing = stack[-1]
        entry = next(rest, None)
        if entry is None:
            yield closing
            stack.pop()
            first = False
            continue
        name, item = entry
        yield name if first else "," + name
        first = isinstance(item, dict | list)
        if isinstance(item, dict):
            yield "{"
            members = ((_quoted(key, chars_max) + ":", each) for key, each in item.items())
            stack.append((members, "}"))
        elif isinstance(item, list):
            yield "["
            stack.append(((("", each) for each in item), "]"))
        else:
            yield _quoted(item, chars_max) if isinstance(item, str) else json.dumps(item)


def _quoted(text: str, chars_max: int) -> str:
    clean = text[:chars_max].encode("utf-8", "replace").decode("utf-8")
    return json.dumps(clean, ensure_ascii=False)


def _load(body: Buffer) -> object:
    if not len(body):
        raise InvalidArgument("JSON Parse error: The document is empty")
    try:
        text = str(body, "utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise _refusal("Invalid encoding in string.", error.start) from None
    try:
        value: object = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise _translated(error, text) from None
    except (RecursionError, ValueError):
        # Too deep for the C parser's stack, or an integer of thousands of digits.
        if len(text) > DEEP_CHARS_MAX:
            raise InvalidArgument(
                f"JSON Parse error: a document of more than {DEEP_CHARS_MAX} characters must not "
                "be nested deeply or hold integers of thousands of digits"
            ) from None
        return _load_without_recursion(text)
    return value


def _load_without_recursion(text: str) -> object:
    """What the C parser would return, with an explicit stack of open containers."""
    containers: list[list[object] | dict[str, object]] = []
    names: list[str] = []
    position = 0
    while True:
        mark, value, position = _token(text, position)
        if mark == "[":
            containers.append([])
            continue
        if mark == "{":
            mark, _, after = _token(text, position, strict=False)
            if mark != "}":
                name, position = _name(text, position)
                containers.append({})
                names.append(name)
                continue
            value, position = {}, after
        elif mark == "]" and containers and containers[-1] == []:
            # Only a list that was just opened is empty here: none ends after a comma.
            value = containers.pop()
        elif mark:
            raise _refusal("Invalid value.", _offset(text, position - 1))
        # A whole value stands before `position`: hand it to its container, and close every
        # container that ends with it.
        while containers:
            top = containers[-1]
            if isinstance(top, dict):
                top[names.pop()] = value
            else:
                top.append(value)
            mark, _, after = _token(text, position, strict=False)
            if mark == ",":
                position = after
                if isinstance(top, dict):
                    name, position = _name(text, position)
                    names.append(name)
                break
            if mark != ("}" if isinstance(top, dict) else "]"):
                raise _refusal(_missing_comma(isinstance(top, dict)), _offset(text, position))
            value, position = containers.pop(), after
        else:
            if text[position:].strip(_SPACE):
                words = "The document root must not be followed by other values."
                raise _refusal(words, _offset(text, position))
            return value


def _token(text: str, position: int, strict: bool = True) -> tuple[str, object, int]:
    """The next token: a structural mark, or an empty mark and a scalar; and where it ends.

    With `strict` off, what is not a mark is left for the caller to complain about.
    """
    match = _TOKEN.match(text, position)
    if match is None:
        if strict:
            raise _refusal("Invalid value.", _offset(text, position))
        return "", None, position
    mark, number, word = match.groups()
    if mark == '"' and strict:
        try:
            value, end = _DECODER.raw_decode(text, match.end() - 1)
        except json.JSONDecodeError as error:
            raise _translated(error, text) from None
        return "", value, end
    if mark:
        return mark, None, match.end()
    return "", _WORDS[word] if word else _number(number), match.end()


def _number(literal: str) -> int | float:
    digits = literal.lstrip("-")
    if digits.isdigit() and len(digits) <= _INT_CHARS_MAX:
        return int(literal)
    return float(literal)


def _name(text: str, position: int) -> tuple[str, int]:
    """A member's name and where its value begins."""
    match = _TOKEN.match(text, position)
    if match is None or match[1] != '"':
        raise _refusal("Missing a name for object member.", _offset(text, position))
    _, name, position = _token(text, position)
    mark, _, after = _token(text, position, strict=False)
    if mark != ":":
        raise _refusal("Missing a colon after a name of object member.", _offset(text, position))
    return str(name), after


def _translated(error: json.JSONDecodeError, text: str) -> InvalidArgument:
    """The standard library's complaint in RapidJSON's words."""
    offset = _offset(text, error.pos)
    if not text.strip(_SPACE):
        return _refusal("The document is empty.", len(text))
    if error.msg.startswith("Expecting ','"):
        return _refusal(_missing_comma(_inside_object(text, error.pos)), offset)
    for theirs, words in _RAPIDJSON:
        if error.msg.startswith(theirs):
            return _refusal(words, offset)
    return _refusal("Unspecific syntax error.", offset)


def _inside_object(text: str, position: int) -> bool:
    """Whether the innermost container open at `position` is an object."""
    opened: list[str] = []
    for match in _BRACKET_OR_STRING.finditer(text, 0, position):
        mark = match[0]
        if mark in ("[", "{"):
            opened.append(mark)
        elif mark in ("]", "}"):
            opened.pop()
    return opened[-1] == "{"


def _missing_comma(in_object: bool) -> str:
    if in_object:
        return "Missing a comma or } after an object member."
    return "Missing a comma or ] after an array element."


def _offset(text: str, position: int) -> int:
    """RapidJSON counts bytes, Python characters."""
    return len(text[:position].encode("utf-8"))


def _refusal(words: str, offset: int) -> InvalidArgument:
    return InvalidArgument(f"JSON Parse error: {words} at offset: {offset}")
