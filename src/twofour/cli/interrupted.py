"""Ctrl-C on the command line: what is kept, and how to go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_CODE = 130
"""128 and the number of the signal, as shells have it."""


class Interrupted(Exception):
    """Ctrl-C, with what a user should know then."""


@contextmanager
def telling(what_is_kept: Callable[[], str]) -> Iterator[None]:
    """Lets Ctrl-C within say what is kept by then."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(what_is_kept()) from None
