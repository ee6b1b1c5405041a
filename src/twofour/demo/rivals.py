"""The dense rival: oneDNN with weights packed beforehand, the fastest dense Linear that torch has on a CPU.

`torch.nn.functional.linear` in float32 goes to MKL, which takes a slow path on some processors: winning against it
proves little. This is what torch.compile's freezing would run, without its compilation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def why_not(dtype: torch.dtype) -> str | None:
    """None where oneDNN can run prepacked Linears of this dtype; otherwise why it cannot."""
    if not torch._C._has_mkldnn:
        return "this build of torch has no oneDNN"
    try:
        linear = OneDnnLinear(nn.Linear(16, 16, dtype=dtype))
        with torch.inference_mode():
            linear(torch.ones(2, 16, dtype=dtype))
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return f"oneDNN refuses {str(dtype).removeprefix('torch.')}: {str(error).splitlines()[0]}"
    return None


class OneDnnLinear(nn.Module):
    """A Linear of the same function and weights, its weight in oneDNN's blocked layout. Inference only.

    Args:
        linear: the dense layer; its bias is shared.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = None if linear.bias is None else linear.bias.detach()
        # The batch size that may be given here made no difference from 16 to 1024 tokens (torch 2.13).
        self.packed: Any = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.train(False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y


def prepack(model: nn.Module, names: list[str]) -> None:
    """Replaces the named Linears of `model`, in place, by their oneDNN twins."""
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, OneDnnLinear(linear))
