"""Pattern: what a text may say, and what it means."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
from hypothesis import given, settings

from twofour.errors import PatternError, TwofourError
from twofour.pattern import MAX_GROUP, Pattern
from twofour.testing import strategies


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("2:4", Pattern(2, 4)),
        ("1:4", Pattern(1, 4)),
        ("3:4", Pattern(3, 4)),
        (" 4:8\n", Pattern(4, 8)),
        ("1:2", Pattern(1, 2)),
        ("31:32", Pattern(31, 32)),
        ("2:4x4", Pattern(2, 4, rows=4)),
        ("2:4x1", Pattern(2, 4)),
        ("2:4t", Pattern(2, 4, transposable=True)),
    ],
)
def test_texts_name_patterns(text: str, pattern: Pattern) -> None:
    assert Pattern.parse(text) == pattern
    assert Pattern.parse(pattern) is pattern


def test_keep_comes_first_so_1_4_and_3_4_differ() -> None:
    assert (Pattern.parse("1:4").keep, Pattern.parse("1:4").density) == (1, 0.25)
    assert (Pattern.parse("3:4").keep, Pattern.parse("3:4").density) == (3, 0.75)


@settings(deadline=None, max_examples=60)
@given(strategies.patterns())
def test_the_text_of_a_pattern_names_it(pattern: Pattern) -> None:
    assert Pattern.parse(str(pattern)) == pattern
    assert 0 < pattern.density < 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2",
        "2:",
        ":4",
        "2/4",
        "2:4:8",
        "-2:4",
        "2:4y",
        "2:4x",
        "2:4xt",
        "2:4tx4",
        "2 :4",
        "2.0:4",
        "٢:٤",
        "2:4T",
        "2:4444",
    ],
)
def test_other_texts_are_refused_with_the_way_out(text: str) -> None:
    with pytest.raises(PatternError, match=r"unknown pattern '.*': write KEEP:GROUP, as in '2:4'"):
        Pattern.parse(text)


@pytest.mark.parametrize("text", [None, 24, (2, 4), b"2:4"])
def test_other_types_are_refused(text: object) -> None:
    with pytest.raises(PatternError, match="unknown pattern"):
        Pattern.parse(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 4, "group": 4}, "keep=4 of group=4: a pattern keeps at least 1 and at most group-1"),
        ({"keep": 0, "group": 4}, "keep=0 of group=4"),
        ({"keep": 1, "group": 1}, "group=1 in a Pattern: a group has 2 to 32"),
        ({"keep": 1, "group": MAX_GROUP + 1}, "group=33 in a Pattern"),
        ({"rows": 0}, "rows=0 in a Pattern: 1 to 999 rows"),
        ({"keep": 2.0}, "keep=2.0 in a Pattern: it must be an int"),
        ({"keep": True, "group": 4}, "keep=True in a Pattern: it must be an int"),
        ({"rows": 4, "transposable": True}, "either transposable .* or shared by rows"),
    ],
)
def test_impossible_numbers_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(PatternError, match=message):
        Pattern(**arguments)  # type: ignore[arg-type]


def test_a_pattern_cannot_change_and_can_be_a_key_and_be_pickled() -> None:
    pattern = Pattern.parse("2:4")
    with pytest.raises(dataclasses.FrozenInstanceError):
        pattern.keep = 3  # type: ignore[misc]
    assert {pattern: 1}[Pattern(2, 4)] == 1
    assert pickle.loads(pickle.dumps(pattern)) == pattern
    assert issubclass(PatternError, TwofourError)
    assert issubclass(PatternError, ValueError)
