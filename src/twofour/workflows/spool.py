"""Activations between two passes: in memory up to a limit, beyond it in a temporary file."""

from __future__ import annotations

import tempfile
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


class Spool:
    """Nested outputs of modules by key. Tensors are kept on the CPU and come back as copies on the device they were on.

    Args:
        limit: bytes of tensors in memory; None: no limit. What is over it lies in files of a temporary folder.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._kept: dict[Hashable, tuple[list[Any], Any]] = {}
        self._bytes = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files = 0

    @property
    def bytes_in_memory(self) -> int:
        """Bytes of tensors that are in memory now."""
        return self._bytes

    def put(self, key: Hashable, output: Any) -> None:
        """Keeps a copy of `output` under `key`, in place of what was there."""
        self.drop(key)
        leaves, spec = tree_flatten(output)
        self._kept[key] = ([self._store(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)

    def offer(self, key: Hashable, output: Any, most: int) -> bool:
        """Keeps a copy of `output` if all tensors together, this one's too, take at most `most` bytes. True if so."""
        self.drop(key)
        size = sum(leaf.numel() * leaf.itemsize for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor))
        if self._bytes + size > most:
            return False
        self.put(key, output)
        return True

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def get(self, key: Hashable) -> Any:
        """A copy of what is kept under `key`."""
        leaves, spec = self._kept[key]
        return tree_unflatten([leaf.load() if isinstance(leaf, _Stored) else leaf for leaf in leaves], spec)

    def drop(self, key: Hashable) -> None:
        """Forgets `key`, if it is there."""
        leaves, _ = self._kept.pop(key, ([], None))
        for leaf in leaves:
            if isinstance(leaf, _Stored):
                self._bytes -= leaf.bytes_in_memory
                leaf.forget()

    def close(self) -> None:
        """Forgets everything and removes the files."""
        for key in list(self._kept):
            self.drop(key)
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _store(self, tensor: Tensor) -> _Stored:
        tensor = tensor.detach()
        size = tensor.numel() * tensor.itemsize
        if self._limit is None or not size or self._bytes + size <= self._limit:
            self._bytes += size
            return _Stored(tensor.to("cpu", copy=True), tensor.device, None)
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="twofour-")
        self._files += 1
        path = Path(self._folder.name) / str(self._files)
        mapped = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
        return _Stored(mapped.view(tensor.shape).copy_(tensor), tensor.device, path)


class _Stored:
    def __init__(self, tensor: Tensor, device: torch.device, path: Path | None) -> None:
        self.tensor: Tensor | None = tensor
        self.device = device
        self.path = path

    @property
    def bytes_in_memory(self) -> int:
        return 0 if self.path is not None or self.tensor is None else self.tensor.numel() * self.tensor.itemsize

    def load(self) -> Tensor:
        assert self.tensor is not None
        return self.tensor.to(self.device, copy=True)

    def forget(self) -> None:
        self.tensor = None
        if self.path is not None:
            self.path.unlink(missing_ok=True)
