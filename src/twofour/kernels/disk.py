"""Where kernels keep what they learn and compile between runs, and how it comes there whole."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

_OFF = "off"


def folder() -> Path | None:
    """`$TWOFOUR_CACHE`, else `$XDG_CACHE_HOME/twofour`, else `~/.cache/twofour`; it need not exist.

    None where `TWOFOUR_CACHE=off` (or there is no home) keeps nothing.
    """
    named = os.environ.get("TWOFOUR_CACHE")
    if named is not None and named.strip().lower() in ("", _OFF):
        return None
    try:
        if named is not None:
            return Path(named).expanduser()
        base = os.environ.get("XDG_CACHE_HOME")
        return (Path(base) if base and os.path.isabs(base) else Path.home() / ".cache") / "twofour"
    except RuntimeError:  # no home directory
        return None


def write(file: Path, content: bytes) -> None:
    """All of it or nothing, whoever else writes the file at the time; the folder is made.

    Raises:
        OSError: it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
