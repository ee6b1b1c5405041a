"""Real text that every Python has: the language reference of `pydoc_data.topics`, as paragraphs and sentences."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..errors import UnsupportedError

T = TypeVar("T")

SENTENCE_LETTERS = (70, 110)
"""Sentences of about one length, so that padding, which no model can skip, stays small."""
QUERY_LETTERS = (40, 160)
PARAGRAPH_LETTERS = (60, 420)

_END = re.compile(r"(?<=[a-z)\"*][.!?])\s+(?=[A-Z\"])")
_PROSE = re.compile(r"[A-Z\"*][^\n]*[.!?]")
_WORDS = re.compile(r"[A-Z][A-Za-z ,;'()-]*\.")


@dataclass(frozen=True, slots=True)
class SearchTask:
    """Queries and the paragraphs to find them in: query i was a sentence of paragraph `home[i]`, taken out of it."""

    corpus: tuple[str, ...]
    queries: tuple[str, ...]
    home: tuple[int, ...]


def paragraphs() -> list[str]:
    """All paragraphs of prose in the reference, in the order of the topics, each once; the same list on every call.

    Raises:
        UnsupportedError: a Python without `pydoc_data`.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise UnsupportedError(
            "the demo reads the language reference that comes with Python, and this Python has no 'pydoc_data'.\n"
            "  Some systems pack it apart: install Python's full standard library."
        ) from None
    found: dict[str, None] = {}
    for name in sorted(topics):
        for block in re.split(r"\n\s*\n", topics[name]):
            text = " ".join(block.split())
            if _PROSE.fullmatch(text) and ">>>" not in text and "::=" not in text:
                found[text] = None
    return list(found)


def sentences_of(paragraph: str) -> list[str]:
    """The sentences of a paragraph, in order."""
    return _END.split(paragraph)


def sentences(count: int) -> list[str]:
    """`count` sentences of 70 to 110 letters, words only, from the whole reference, shortest first.

    Every n-th of them has the same mix of lengths.
    """
    low, high = SENTENCE_LETTERS
    found = dict.fromkeys(
        sentence
        for paragraph in paragraphs()
        for sentence in sentences_of(paragraph)
        if low <= len(sentence) <= high and _WORDS.fullmatch(sentence)
    )
    return sorted(evenly(list(found), count), key=lambda sentence: (len(sentence), sentence))


def search_task(corpus_size: int, queries: int) -> SearchTask:
    """A corpus of paragraphs, and as many queries: sentences held out of evenly chosen paragraphs of it."""
    low, high = PARAGRAPH_LETTERS
    corpus = evenly([paragraph for paragraph in paragraphs() if low <= len(paragraph) <= high], corpus_size)
    candidates = [index for index, paragraph in enumerate(corpus) if _held_out(paragraph) is not None]
    home = evenly(candidates, queries)
    asked = []
    for index in home:
        held_out = _held_out(corpus[index])
        assert held_out is not None
        query, corpus[index] = held_out
        asked.append(query)
    return SearchTask(tuple(corpus), tuple(asked), tuple(home))


def calibration(corpus_size: int, count: int) -> list[str]:
    """`count` texts that `search_task(corpus_size, ...)` has nothing of: the paragraphs that are left, and their sentences."""
    low, high = PARAGRAPH_LETTERS
    every = paragraphs()
    corpus = set(evenly([paragraph for paragraph in every if low <= len(paragraph) <= high], corpus_size))
    left = [paragraph for paragraph in every if paragraph not in corpus]
    found = dict.fromkeys(
        part
        for paragraph in left
        for part in (paragraph, *sentences_of(paragraph))
        if QUERY_LETTERS[0] <= len(part) <= high
    )
    return evenly(list(found), count)


def evenly(items: Sequence[T], count: int) -> list[T]:
    """`count` of the items at equal distances, in order; all of them if there are fewer."""
    if count >= len(items):
        return list(items)
    return [items[index * len(items) // count] for index in range(count)]


def _held_out(paragraph: str) -> tuple[str, str] | None:
    """(a sentence of the paragraph, the rest), or None where too little would remain."""
    parts = sentences_of(paragraph)
    if len(parts) < 2:
        return None
    low, high = QUERY_LETTERS
    for place in range(len(parts) - 1, -1, -1):
        rest = " ".join(parts[:place] + parts[place + 1 :])
        if low <= len(parts[place]) <= high and len(rest) >= PARAGRAPH_LETTERS[0]:
            return parts[place], rest
    return None
