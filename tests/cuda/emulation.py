"""Kernels of csrc/cuda on the CPU: g++ builds them with the GPU of tests/cuda/emulated/gpu.h, once for each text."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent / "emulated"


@cache
def library() -> ctypes.CDLL:
    """All kernels. Built into build/emulated-gpu, under the hash of what it is made of."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"kernels are run on the CPU by way of {compiler}, which is not here")
    sources = sorted((ROOT / "csrc").rglob("*.h")) + sorted((ROOT / "csrc/cuda").glob("*.cu")) + sorted(HERE.iterdir())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    target = ROOT / "build" / "emulated-gpu" / f"{digest}.so"
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target.with_suffix(".lock")):
        if not target.exists():
            _build(compiler, target)
    found = ctypes.CDLL(str(target))
    found.emulated_allocate.restype = ctypes.c_void_p
    found.emulated_allocate.argtypes = [ctypes.c_uint64]
    found.emulated_free.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    return found


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Of the processes of a test run one builds; the others wait for it."""
    with open(lock, "w", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _build(compiler: str, target: Path) -> None:
    own = target.with_suffix(f".{os.getpid()}")
    command = [
        compiler,
        "-std=c++17",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
    ]
    command += [f"-I{ROOT / 'csrc'}", f"-I{HERE}", str(HERE / "emulated.cpp"), "-o", str(own)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]
    own.replace(target)


class Guarded:
    """A copy of a tensor that ends where its memory page ends: what reads or writes behind it ends the process."""

    def __init__(self, tensor: Tensor) -> None:
        self.like = tensor
        self.bytes = max(tensor.numel() * tensor.element_size(), 1)
        self.place = library().emulated_allocate(self.bytes)
        ctypes.memmove(self.place, tensor.contiguous().data_ptr(), tensor.numel() * tensor.element_size())

    def tensor(self) -> Tensor:
        """What is there now."""
        found = torch.empty(self.like.shape, dtype=self.like.dtype)
        ctypes.memmove(found.data_ptr(), self.place, found.numel() * found.element_size())
        return found

    def __del__(self) -> None:
        library().emulated_free(self.place, self.bytes)


def launch(
    name: str,
    grid: Sequence[int],
    threads: int,
    *arguments: Guarded | int | None,
    cluster: int = 1,
    early: bool = False,
) -> None:
    """Runs a kernel to its end. None is a null pointer.

    Args:
        cluster, early: as `table.launch`.
    """
    values = [each.place if isinstance(each, Guarded) else int(each or 0) for each in arguments]
    sizes = (ctypes.c_uint32 * 3)(*grid, *[1] * (3 - len(grid)))
    words = (ctypes.c_uint64 * len(values))(*(value & (2**64 - 1) for value in values))
    address = ctypes.cast(getattr(library(), name), ctypes.c_void_p)
    library().emulated_launch(address, sizes, threads, words, len(values), cluster, int(early))
