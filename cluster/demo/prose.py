"""Real prose to search in: paragraphs of the Python Language Reference, as Python carries them.

``pydoc_data.topics`` holds what ``help("with")`` shows. Here its headings, grammar, code, tables
and version notes are left out and its paragraphs made plain; a paragraph that stands in several
topics belongs to the shortest of them, the one that is most about it.

This file knows neither models nor servers. Its bounds are in characters and passages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

__all__ = ["CHARACTERS_MAX", "CHARACTERS_MIN", "TOPIC_PASSAGES_MAX", "Passage", "passages"]

#: A shorter paragraph says too little by itself.
CHARACTERS_MIN: Final = 100
#: A longer one is cut at the end of a sentence: about what the encoder's token limit lets pass.
CHARACTERS_MAX: Final = 500
#: So that the few long topics do not drown the others.
TOPIC_PASSAGES_MAX: Final = 8

_CODE: Final = re.compile(r">>>|::=")
_GAP: Final = re.compile(r"\S {3,}\S")
_NOT_PROSE: Final = re.compile(
    r"(Changed in|New in|Added in|Deprecated since|Note:|See also|Warning:|\[\d+\])"
)
_BULLET: Final = re.compile(r"^([*-]|\d+\.|\(?[a-z]\)) +")
_FOOTNOTE: Final = re.compile(r" \[\d+\]")
_HYPHEN: Final = re.compile(r"(?<=\w)-\n\s*(?=[a-z])")
_EMPHASIS: Final = re.compile(r"(?<![\w*])(\*{1,2})(?=\S)([^*\n]+?)(?<=\S)\1(?![\w*])")
_SENTENCE_END: Final = re.compile(r"[.!?][\")\u2019\u201d]?(?= )")
#: The share of letters and blanks below which text is not prose.
_LETTERS_MIN: Final = 0.85


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A paragraph and the topic it is from, a name that ``help`` knows."""

    topic: str
    text: str


def passages(topics: Mapping[str, str] | None = None) -> tuple[Passage, ...]:
    """The passages of all topics, by topic and place; none of them twice.

    Args:
        topics: name to text; by default Python's own.
    """
    if topics is None:
        from pydoc_data import topics as bundled

        topics = bundled.topics
    taken: set[str] = set()
    found: list[Passage] = []
    for topic in sorted(topics, key=lambda name: (len(topics[name]), name)):
        fresh = [text for text in _paragraphs(topics[topic]) if text not in taken]
        fresh = list(dict.fromkeys(fresh))[:TOPIC_PASSAGES_MAX]
        taken.update(fresh)
        found += [Passage(topic=topic, text=text) for text in fresh]
    return tuple(sorted(found, key=lambda passage: passage.topic))


def _paragraphs(text: str) -> Iterator[str]:
    for block in re.split(r"\n\s*\n", text):
        if not block.strip() or _is_heading(block) or _CODE.search(block):
            continue
        plain = _plain(block)
        if not _GAP.search(block.strip()) and _is_prose(plain):
            yield _cut(plain)


def _is_heading(block: str) -> bool:
    last = block.strip().splitlines()[-1].strip()
    return len(last) > 2 and len(set(last)) == 1 and not last[0].isalnum()


def _plain(block: str) -> str:
    line = " ".join(_HYPHEN.sub("-", block).split())
    return _FOOTNOTE.sub("", _EMPHASIS.sub(r"\2", _BULLET.sub("", line)))


def _is_prose(text: str) -> bool:
    letters = sum(c.isalpha() or c == " " for c in text)
    return (
        len(text) >= CHARACTERS_MIN
        and text[0].isupper()
        and text[-1] in ".!?)"
        and not _NOT_PROSE.match(text)
        and letters >= _LETTERS_MIN * len(text)
    )


def _cut(text: str) -> str:
    """The first sentences that fit, or what fits of the first."""
    if len(text) <= CHARACTERS_MAX:
        return text
    ends = [m.end() for m in _SENTENCE_END.finditer(text[: CHARACTERS_MAX + 1])]
    return text[: ends[-1]] if ends else text[:CHARACTERS_MAX].rsplit(" ", 1)[0]
