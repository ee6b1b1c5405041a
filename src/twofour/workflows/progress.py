"""Progress of long verbs: a bar on a terminal, nothing in a pipe."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


def track(items: Collection[T], what: str, progress: bool | None = None) -> Iterator[T]:
    """Yields `items`; shows a bar with the time left if `progress`, or if None and the standard error is a terminal."""
    yield from tqdm(items, desc=what, disable=None if progress is None else not progress, leave=False)
