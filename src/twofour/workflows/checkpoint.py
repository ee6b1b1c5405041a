"""Finished layers of a long run on disk, so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..errors import ModelError
from ..format.file import open_to_readers
from ..nn.inputs import Batch
from ..nn.survey import Layer
from ..pattern import Pattern
from ..report.record import write_text
from ..solvers import Recipe

_RUN = "run.json"


@dataclass(frozen=True)
class Finished:
    """One layer from a checkpoint: its new weight, and its row of the report."""

    weight: Tensor
    row: dict[str, Any]


class Checkpoint:
    """A folder with one safetensors file per finished layer.

    `run.json` says what the run is: pattern, recipe, and a digest of all weights and inputs as they were at its start. A
    folder of another run is refused, so that weights are never mixed.

    Args:
        folder: made if it is not there.
        layers, batches, pattern, recipe: of the run.
        write: False for processes that only read (all but the first of a torchrun).
    Raises:
        ModelError: the folder belongs to another run, or cannot be read or written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        layers: Sequence[Layer],
        batches: Sequence[Batch],
        pattern: Pattern,
        recipe: Recipe,
        write: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self._write = write
        self._files = {layer.name: self.folder / f"{i:05d}.safetensors" for i, layer in enumerate(layers)}
        run = {
            "pattern": str(pattern),
            "recipe": asdict(recipe),
            "weights": _digest((layer.name, layer.weight.detach()) for layer in layers),
            "inputs": _digest((str(i), leaf) for i, batch in enumerate(batches) for leaf in tree_leaves(batch)),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / _RUN
            if path.exists():
                old = json.loads(path.read_text(encoding="utf-8"))
                different = sorted(key for key in run if old.get(key) != run[key])
                if different:
                    raise ModelError(
                        f"checkpoint {self.folder} is of another run: other {', '.join(different)}. Name another folder,"
                        " or remove this one to begin anew."
                    )
            elif any(self.folder.iterdir()):
                raise ModelError(f"checkpoint {self.folder} holds other files: name an empty folder, or a new one.")
            elif write:
                write_text(path, json.dumps(run, indent=1) + "\n")
        except (OSError, ValueError) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"checkpoint {self.folder}: {error}") from error

    def load(self, layer: Layer) -> Finished | None:
        """The layer as it was finished; None if it was not. A file that was cut off counts as not finished."""
        path = self._files[layer.name]
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                row = json.loads(file.metadata()["row"])
                weight = file.get_tensor("weight")
        except (SafetensorError, KeyError, TypeError, ValueError):
            return None
        if weight.shape != layer.weight.shape or weight.dtype != layer.weight.dtype:
            return None
        return Finished(weight.to(layer.weight.device), row)

    def save(self, layer: Layer, weight: Tensor, row: dict[str, Any]) -> None:
        """Keeps the finished layer; the file appears whole or not at all."""
        if not self._write:
            return
        path = self._files[layer.name]
        temporary = path.with_suffix(".tmp")
        try:
            save_file({"weight": weight.cpu().contiguous()}, temporary, metadata={"row": json.dumps(row)})
            open_to_readers(temporary)
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise ModelError(f"checkpoint {self.folder} cannot be written: {error}") from error


def _digest(parts: Any) -> str:
    """Of names, shapes, dtypes and numbers."""
    digest = hashlib.blake2b(digest_size=16)
    for name, part in parts:
        digest.update(name.encode())
        if isinstance(part, Tensor):
            digest.update(f"{tuple(part.shape)}{part.dtype}".encode())
            flat = part.detach().cpu().contiguous().flatten()
            for piece in flat.view(torch.uint8).split(1 << 26) if flat.numel() else ():
                digest.update(piece.numpy().tobytes())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()
