"""A page of something that is still going on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..errors import TwofourError
from .record import Report, write_text

_SHARE = 0.05
"""Of the time that may go into pages."""

_SILENCE_SECONDS = 120.0
_SILENCE = 4.0
"""No page for as long as this, and for so many times the longest time between two: the run is no more."""


class LivePage:
    """Writes reports to one HTML page as they grow; the page loads itself anew until the last one.

    Where no last one comes, because the run was killed, the page says after some time that there are no more news.
    A page that cannot be written on the way is told in the notes of the next; only for the last it is an error.

    Args:
        path: of the page, always whole: it is written by way of a temporary file.
        every: seconds between two pages; more where they take long to make.
    Raises:
        TwofourError: the last page cannot be written.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "page.html"
    >>> page = LivePage(path)
    >>> page.show(lambda: Report("finetune", (), ()))
    >>> 'http-equiv="refresh"' in path.read_text(encoding="utf-8")
    True
    >>> page.show(lambda: Report("finetune", (), ()), running=False)
    >>> 'http-equiv="refresh"' in path.read_text(encoding="utf-8")
    False
    """

    def __init__(self, path: str | os.PathLike[str], every: float = 5.0) -> None:
        self.path, self.every = Path(path), every
        self._next = 0.0
        self._last: float | None = None
        self._longest = every
        self._fault = ""

    def show(self, report: Callable[[], Report], *, running: bool = True) -> None:
        """Writes the page, if it is time for one; at the end always."""
        began = time.monotonic()
        if running and began < self._next:
            return
        from .html import Growing, report_page

        if self._last is not None:
            self._longest = max(self._longest, began - self._last)
        silence = max(_SILENCE_SECONDS, _SILENCE * self._longest)
        growing = Growing(max(1, round(self.every)), silence) if running else None
        try:
            found = report()
            if self._fault:
                found = replace(found, notes=(*found.notes, self._fault))
            write_text(self.path, report_page(found, growing=growing))
        except TwofourError as error:
            if not running:
                raise
            self._fault = f"This page could not be written for some time: {error}"
        ended = self._last = time.monotonic()
        cost = 0.0 if self._next == 0 else ended - began  # the first page loads libraries
        self._next = ended + max(self.every, cost / _SHARE)
