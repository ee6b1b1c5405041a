"""NVRTC: the CUDA C++ of csrc/cuda for one architecture, compiled where it runs and kept on disk.

Compiling needs no GPU and no driver, only the wheels of `pip install twofour[cuda13]` (or cuda12). A compiled file is found
again by the hash of all that went into it: sources, options, the version of NVRTC. It carries a hash of itself, so that a
damaged file is compiled anew, and comes into place by a rename, so that two processes may compile at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import UnsupportedError
from .. import disk

ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a")
"""Those that CI compiles every kernel for."""
OLDEST = (8, 0)
"""Compute capability of the first sparse tensor cores."""
OLDEST_NVRTC = (12, 5)
"""The first with PTX 8.5, whose mma.sp::ordered_metadata takes the nibbles as they are."""
OPTIONS = ("-std=c++17", "-default-device")
_HASH_BYTES = 32
_MOST_LINES = 40
_INSTALL = "pip install 'twofour[cuda13]', or cuda12: torch.version.cuda says which"


def why_not() -> str | None:
    """Why nothing can be compiled here; None where it can."""
    return _nvrtc()[1]


def why_not_for(capability: tuple[int, int]) -> str | None:
    """Why nothing can be compiled for a device; None where it can."""
    nvrtc, reason = _nvrtc()
    if reason is not None:
        return reason
    if capability < OLDEST:
        return f"compute capability {capability[0]}.{capability[1]} has no sparse tensor cores"
    if _knows(nvrtc, architecture_of(capability)):
        return None
    return f"NVRTC {version()} does not know {architecture_of(capability)}, a newer one does; {_INSTALL}"


def version() -> str | None:
    """Of NVRTC, as "13.0"."""
    nvrtc, reason = _nvrtc()
    if reason is not None:
        return None
    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"


def architecture_of(capability: tuple[int, int]) -> str:
    """The name that NVRTC knows a device by, with its own instructions from Hopper on.

    Raises:
        UnsupportedError: a device without sparse tensor cores.
    """
    major, minor = capability
    if capability < OLDEST:
        raise UnsupportedError(
            f"compute capability {major}.{minor} has no sparse tensor cores: they begin at {OLDEST[0]}.{OLDEST[1]} (Ampere)."
            " kernels.linear and SparseLinear take another kernel there."
        )
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


@cache
def sources() -> Path:
    """The folder that holds `cuda/` and `nm/`: in the package, or in the repository of an editable installation.

    Raises:
        UnsupportedError: neither has it.
    """
    package = Path(__file__).parents[2]
    for folder in (package / "csrc", package.parents[1] / "csrc"):
        if (folder / "cuda" / "pack.cu").is_file():
            return folder
    raise UnsupportedError(f"the CUDA sources are missing beside {package}: reinstall twofour.")


def digest(file: str, architecture: str, options: tuple[str, ...] = OPTIONS) -> str:
    """Of all that a compiled file is made of: what benchmarks and caches know it by."""
    parts = [file, architecture, *options, f"nvrtc {version()}"]
    texts = [path for folder in ("cuda", "nm") for path in sorted((sources() / folder).glob("*.h"))]
    texts.append(sources() / "cuda" / file)
    found = hashlib.sha256("\n".join(parts).encode())
    for path in texts:
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def source_digest(file: str, defines: tuple[str, ...] = ()) -> str:
    """Of the code of a file and of what it includes, whatever compiles it: what measurements are judged by.

    Comments and blanks do not count.

    Args:
        defines: "NAME=VALUE" of what to make of the file.
    """
    texts: dict[str, str] = {}
    missing = [f"cuda/{file}"]
    while missing:
        name = missing.pop()
        text = re.sub(r"//.*", "", (sources() / name).read_text(encoding="utf-8"))
        texts[name] = " ".join(text.split())
        missing += [each for each in re.findall(r'#include "([^"]+)"', text) if _is_new(each, texts)]
    found = hashlib.sha256("\n".join([*OPTIONS, *defines]).encode())
    for name, text in sorted(texts.items()):
        found.update(f"\n{name}\n{text}".encode())
    return found.hexdigest()


def _is_new(name: str, texts: dict[str, str]) -> bool:
    """False for what was read already, and for what only emulated GPUs have."""
    return name not in texts and (sources() / name).is_file()


@cache
def text_digest() -> str:
    """Of the code of all kernels, likewise."""
    names = sorted(path.name for path in (sources() / "cuda").glob("*.cu"))
    return hashlib.sha256("".join(map(source_digest, names)).encode()).hexdigest()


def compiled(file: str, architecture: str, defines: tuple[str, ...] = ()) -> bytes:
    """The cubin of a file of csrc/cuda, from disk where it lies there.

    Args:
        defines: "NAME=VALUE" of what to make of the file.

    Raises:
        UnsupportedError: NVRTC is not installed, does not know the architecture, or refuses the file; with its messages.
    """
    reason = why_not()
    if reason is not None:
        raise UnsupportedError(f"GPU kernels cannot be compiled: {reason}.")
    where = disk.folder()
    options = (*OPTIONS, *(f"-D{each}" for each in defines))
    kept = None if where is None else where / "cubins" / f"{digest(file, architecture, options)}.cubin"
    if kept is not None:
        with contextlib.suppress(OSError):
            found = kept.read_bytes()
            if hashlib.sha256(found[_HASH_BYTES:]).digest() == found[:_HASH_BYTES]:
                return found[_HASH_BYTES:]
    cubin, _ = compile_text((sources() / "cuda" / file).read_text(encoding="utf-8"), file, architecture, options)
    if kept is not None:
        with contextlib.suppress(OSError):  # a folder that cannot be written to costs time, nothing else
            disk.write(kept, hashlib.sha256(cubin).digest() + cubin)
    return cubin


def compile_text(text: str, name: str, architecture: str, options: tuple[str, ...] = OPTIONS) -> tuple[bytes, str]:
    """The cubin of a text that may include csrc's headers, and what the compiler says.

    Raises:
        UnsupportedError: as `compiled`.
    """
    nvrtc, reason = _nvrtc()
    if reason is not None:
        raise UnsupportedError(f"GPU kernels cannot be compiled: {reason}.")
    _, program = nvrtc.nvrtcCreateProgram(text.encode(), name.encode(), 0, [], [])
    try:
        every = [f"--gpu-architecture={architecture}", f"-I{sources()}", *options]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(every), [each.encode() for each in every])
        log = _log(nvrtc, program)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            said = "\n".join(log.splitlines()[:_MOST_LINES]) or status.name
            way = "" if _knows(nvrtc, architecture) else f"\nA newer NVRTC may know {architecture}: {_INSTALL}."
            raise UnsupportedError(
                f"NVRTC {version()} cannot compile csrc/cuda/{name} for {architecture}:\n{said}{way}"
            )
        _, size = nvrtc.nvrtcGetCUBINSize(program)
        cubin = bytearray(size)
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return bytes(cubin), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _knows(nvrtc: Any, architecture: str) -> bool:
    _, known = nvrtc.nvrtcGetSupportedArchs()
    return architecture.removeprefix("sm_").rstrip("a") in map(str, known)


def _log(nvrtc: Any, program: Any) -> str:
    """What the compiler says, with the source lines it says it of."""
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytearray(size)
    nvrtc.nvrtcGetProgramLog(program, log)
    return log.rstrip(b"\0").decode(errors="replace").strip()


@cache
def _nvrtc() -> tuple[Any, str | None]:
    """The bindings, or why they cannot be used."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        return None, f"{error}; {_INSTALL}"
    try:
        _, *found = nvrtc.nvrtcVersion()
    except Exception as error:  # the library behind the bindings is found at the first call
        return None, f"NVRTC is not found ({(str(error) or type(error).__name__).splitlines()[0]}); {_INSTALL}"
    if tuple(found) < OLDEST_NVRTC:
        needed = ".".join(map(str, OLDEST_NVRTC))
        return (
            None,
            f"NVRTC {'.'.join(map(str, found))} is too old, {needed} is the first that knows mma.sp::ordered_metadata;"
            f" {_INSTALL}",
        )
    return nvrtc, None
