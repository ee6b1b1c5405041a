"""Bytes: what stands in a file, and what the layers take in memory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from ..nn import SparseLinear
from .model import encoder_linears, is_encoder_weight


def file_bytes(path: Path) -> dict[str, int]:
    """{"file": all bytes, "encoder": those of the encoder's Linear weights} of a safetensors file, by its header."""
    with path.open("rb") as file:
        header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    encoder = sum(
        entry["data_offsets"][1] - entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__" and is_encoder_weight(name)
    )
    return {"file": os.path.getsize(path), "encoder": encoder}


def memory_bytes(encoder: nn.Module) -> dict[str, int]:
    """{"model": all parameters and buffers, "encoder": the encoder's Linear weights} in memory."""
    tensors = {
        (tensor.data_ptr(), tensor.nbytes): tensor.nbytes for tensor in (*encoder.parameters(), *encoder.buffers())
    }
    linears = encoder_linears(encoder).values()
    return {"model": sum(tensors.values()), "encoder": sum(map(_weight_bytes, linears))}


def _weight_bytes(linear: nn.Module) -> int:
    if isinstance(linear, SparseLinear):
        return linear.nbytes
    assert isinstance(linear, nn.Linear)
    return linear.weight.nbytes
