"""Passages: what is taken from the documentation, what is left out, and its bounds."""

from __future__ import annotations

from collections import Counter

import pytest

from cluster.demo import prose, search

PROSE = (
    "Assert statements are a convenient way to insert debugging assertions\n"
    "into a program, and they are left out when optimisation is asked for."
)
PLAIN = " ".join(PROSE.split())


def taken(text: str) -> list[str]:
    return [passage.text for passage in prose.passages({"topic": text})]


def test_pythons_own_topics_yield_a_few_hundred_bounded_passages() -> None:
    found = prose.passages()
    assert 200 <= len(found) <= 600
    for passage in found:
        assert len(passage.text) <= prose.CHARACTERS_MAX
        assert "\n" not in passage.text
        assert "::=" not in passage.text
    assert max(Counter(passage.topic for passage in found).values()) <= prose.TOPIC_PASSAGES_MAX
    assert len({passage.text for passage in found}) == len(found)


def test_every_known_answer_is_among_the_passages() -> None:
    topics = {passage.topic for passage in prose.passages()}
    for question in search.QUESTIONS:
        assert question.topics & topics, question.text


def test_a_paragraph_becomes_one_line() -> None:
    assert taken(PROSE) == [PLAIN]


@pytest.mark.parametrize(
    "block",
    [
        "The assert statement\n********************",
        (
            "Assert grammar is simple, and it is written down here for all who write parsers"
            '\n   assert_stmt ::= "assert" expression ["," expression]'
        ),
        ">>> print('An example that a reader may type is no paragraph, however long it may be.')",
        (
            "if __debug__:\n   if not expression: raise AssertionError(expression)\n   return it"
            "\n   and_so_on(for_as_many_lines, as_are_needed, to_be_long_enough)"
        ),
        (
            "Changed in version 3.8: the statement does something else than it did, which matters\n"
            "to those who come from an older version but does not explain anything to others."
        ),
        (
            "Type          Meaning of the type when it is used alone in a column\n"
            "'s'           String format, which is the default type for strings and may be omitted."
        ),
        "Too short to say anything.",
    ],
)
def test_what_is_not_prose_is_left_out(block: str) -> None:
    assert taken(f"{block}\n\n{PROSE}") == [PLAIN]


def test_marks_of_lists_emphasis_and_footnotes_are_removed() -> None:
    marked = "* " + PROSE.replace("convenient", "*convenient* [1]").replace(
        "program", "**program**"
    )
    assert taken(marked) == [PLAIN]


def test_words_broken_at_the_end_of_a_line_are_joined() -> None:
    assert taken(PROSE.replace("assertions\ninto", "asser-\ntions into"))[0].startswith(
        "Assert statements are a convenient way to insert debugging asser-tions into"
    )


def test_a_long_paragraph_is_cut_after_a_sentence() -> None:
    sentence = "This sentence is repeated until nobody can bear to read it any more. "
    (text,) = taken(sentence * 20)
    assert text == (sentence * 7).strip()
    assert len(text) <= prose.CHARACTERS_MAX < len(text) + len(sentence)


def test_a_long_sentence_is_cut_after_a_word() -> None:
    (text,) = taken("And " + "on " * 400 + "it goes.")
    assert len(text) <= prose.CHARACTERS_MAX
    assert text.endswith(" on")


def test_a_paragraph_of_two_topics_belongs_to_the_shorter() -> None:
    longer = f"{PROSE}\n\n{PROSE.replace('Assert', 'Other')}"
    found = prose.passages({"a-collection": longer, "the-topic": PROSE})
    assert [(p.topic, p.text.split()[0]) for p in found] == [
        ("a-collection", "Other"),
        ("the-topic", "Assert"),
    ]
