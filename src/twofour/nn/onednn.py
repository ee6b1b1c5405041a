"""The strongest dense rival on a CPU: oneDNN with weights packed beforehand. What a sparse layer must be compared with.

`torch.nn.functional.linear` in float32 goes to MKL, which takes a slow path on some processors: winning against it
proves little. This is what torch.compile's freezing would run, without its compilation.
"""

from __future__ import annotations

from collections.abc import Callable

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


def prepacked_linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x -> x @ weight.T + bias with a copy of `weight` in oneDNN's blocked layout."""
    # The batch size that may be given here made no difference from 16 to 1024 tokens (torch 2.13).
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    bias = None if bias is None else bias.detach()

    def run(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return y

    return run


class OneDnnLinear(nn.Module):
    """A Linear of the same function and weights, its weight in oneDNN's blocked layout. Inference only.

    Args:
        linear: the dense layer; its bias is shared.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.run = prepacked_linear(linear.weight, linear.bias)
        self.train(False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self.run(x)


def prepack(model: nn.Module, names: list[str]) -> None:
    """Replaces the named Linears of `model`, in place, by their oneDNN twins."""
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, OneDnnLinear(linear))
