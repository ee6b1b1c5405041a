"""The strongest dense rival on a CPU as a module: what a sparse layer must be compared with.

The kernel itself is `kernels/onednn.py`; a SparseLinear with backend="onednn" runs it with gradients, compile and export.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..kernels.onednn import prepacked_linear as prepacked_linear
from ..kernels.onednn import why_not as why_not


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
