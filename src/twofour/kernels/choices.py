"""What measurements said, kept between runs: microseconds of the rivals for one shape, per machine and build.

One small JSON file per fingerprint (processor, instruction set, torch, native module): another build of the kernels starts
anew. It lies in `$TWOFOUR_CACHE`, else `$XDG_CACHE_HOME/twofour`, else `~/.cache/twofour`; `TWOFOUR_CACHE=off` keeps
nothing. Losing it costs a new measurement, so no fault of the file ever raises: it becomes a note.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import math
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..report.environment import cpu_name
from . import cpu, disk
from .cuda import compiler
from .registry import LinearSpec

_VERSION = 1
_EXACT_BELOW = 32
_AT = ", tokens "


@dataclass(frozen=True, slots=True)
class Measured:
    """Microseconds per call of each rival, and when they were taken (UTC, ISO 8601)."""

    us: Mapping[str, float]
    date: str

    @staticmethod
    def now(us: Mapping[str, float]) -> Measured:
        """Taken just now."""
        return Measured(dict(us), datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"))


def bucket(tokens: int) -> int:
    """The token count that stands for `tokens`: itself below 32, then 8 steps per doubling (at most 6 % away).

    >>> [bucket(tokens) for tokens in (1, 31, 33, 100, 128, 1000)]
    [1, 31, 32, 104, 128, 1024]
    """
    if tokens < _EXACT_BELOW:
        return tokens
    step: int = 1 << (tokens.bit_length() - 4)
    return (tokens + step // 2) // step * step


def key(spec: LinearSpec, backend: str, has_bias: bool, tokens: int, threads: int) -> str:
    """What a measurement is filed under; `backend` is the kernel that ran as "sparse"."""
    dtype = str(spec.dtype).removeprefix("torch.")
    bias = "bias" if has_bias else "no bias"
    shape = f"{spec.out_features}x{spec.in_features}"
    return f"{shape} {spec.pattern} {dtype} {_place(spec.device)} {backend} {bias} {threads} threads{_AT}{tokens}"


@cache
def _place(device: torch.device) -> str:
    """The device as what its times depend on: the kind of GPU, and the text of its kernels."""
    if device.type != "cuda":
        return str(device)
    return f"{torch.cuda.get_device_name(device)} {compiler.text_digest()[:12]}"


@cache
def machine() -> dict[str, str]:
    """What the times depend on besides the key: a change of any starts a new file."""
    native = getattr(cpu._native, "__file__", None)
    return {
        "twofour": version("twofour"),
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "system": f"{platform.system()} {platform.machine()}",
        "instruction set": cpu.isa() if cpu.available() is None else "none",
        "native module": hashlib.sha256(Path(native).read_bytes()).hexdigest()[:16] if native else "none",
    }


def path() -> Path | None:
    """The file of this machine and build; it need not exist."""
    where = disk.folder()
    if where is None:
        return None
    text = json.dumps(machine(), sort_keys=True)
    return where / f"choices-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def clear() -> int:
    """Removes every file of choices, of other machines and builds too; returns how many.

    Raises:
        OSError: a file cannot be removed.
    """
    where = disk.folder()
    files = sorted(where.glob("choices-*.json*")) if where is not None and where.is_dir() else []
    for file in files:
        file.unlink(missing_ok=True)
    return sum(file.suffix == ".json" for file in files)


@dataclass
class Store:
    """The measurements of this machine: read once, new ones added by `save`."""

    file: Path | None
    entries: dict[str, Measured]
    notes: list[str] = field(default_factory=list)
    _new: dict[str, Measured] = field(default_factory=dict)

    @staticmethod
    def open() -> Store:
        """What is on disk; empty, with a note, where it cannot be read."""
        file = path()
        if file is None:
            return Store(None, {})
        entries, fault = _read(file)
        notes = [f"{file} {fault}: its choices are measured again"] if fault else []
        return Store(file, entries, notes)

    def get(self, name: str) -> Measured | None:
        """The measurement filed under `key(...)`, or None."""
        return self.entries.get(name)

    def known(self, spec: LinearSpec, backend: str, has_bias: bool, threads: int) -> dict[int, Measured]:
        """All measurements of one shape, by token count."""
        prefix = key(spec, backend, has_bias, 0, threads).removesuffix("0")
        counts = [(name, name.removeprefix(prefix)) for name in self.entries if name.startswith(prefix)]
        return {int(count): self.entries[name] for name, count in sorted(counts) if count.isdecimal()}

    def add(self, name: str, measured: Measured) -> None:
        """Files a measurement; `save` writes it."""
        self.entries[name] = self._new[name] = measured

    def save(self) -> None:
        """Adds what is new to the file, whole or not at all; what other processes wrote meanwhile stays."""
        if self.file is None or not self._new:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.file):
                entries, _ = _read(self.file)
                _write(self.file, {**entries, **self._new})
        except OSError as error:
            self.notes.append(f"choices cannot be kept in {self.file}: {error.strerror or error}")
        self._new = {}


def _read(file: Path) -> tuple[dict[str, Measured], str | None]:
    """The entries that are sound, and what is wrong with the file, if anything is."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        return {}, f"cannot be read ({reason})"
    if not isinstance(record, dict) or record.get("version") != _VERSION or not isinstance(record.get("entries"), dict):
        return {}, "is damaged, or of another version"
    found = {name: _entry(value) for name, value in record["entries"].items()}
    sound = {name: entry for name, entry in found.items() if entry is not None}
    return sound, "is damaged in parts" if len(sound) < len(found) else None


def _entry(value: Any) -> Measured | None:
    if not isinstance(value, dict) or not isinstance(value.get("date"), str) or not isinstance(value.get("us"), dict):
        return None
    us = value["us"]
    if not {"dense", "sparse"} <= set(us):
        return None
    if not all(type(x) in (int, float) and math.isfinite(x) and x > 0 for x in us.values()):
        return None
    return Measured({name: float(x) for name, x in us.items()}, value["date"])


def _write(file: Path, entries: Mapping[str, Measured]) -> None:
    record = {
        "version": _VERSION,
        "machine": machine(),
        "entries": {name: {"us": dict(entry.us), "date": entry.date} for name, entry in sorted(entries.items())},
    }
    disk.write(file, json.dumps(record, indent=1).encode())


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Keeps other processes from writing meanwhile, where the system can; without it the last writer wins."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with open(file.with_name(file.name + ".lock"), "w", encoding="utf-8") as stream:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
