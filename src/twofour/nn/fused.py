"""What stands where an activation stood that a SparseLinear applies itself."""

from __future__ import annotations

from torch import nn

from .linear import SparseLinear


class FusedActivation(nn.Identity):
    """Returns its input: the layer before it has applied the activation already. Remembers both, for `unfuse`.

    Args:
        original: the activation, without parameters or state.
        linear: the layer that applies it.
    """

    def __init__(self, original: nn.Module, linear: SparseLinear) -> None:
        super().__init__()
        self.fused = (original, linear)  # a tuple: submodules they must not be

    def extra_repr(self) -> str:
        return f"{self.fused[0]}, applied by the layer before"


def unfuse(model: nn.Module) -> int:
    """Puts every activation that `twofour.fuse` took out of `model` back, in place; returns how many."""
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, FusedActivation):
                original, linear = child.fused
                linear.activation = None
                parent._modules[name] = original.train(child.training)
                count += 1
    return count
