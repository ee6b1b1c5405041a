"""Dense layer <-> SparseLinear inside a model."""

from __future__ import annotations

from typing import cast

from torch import nn

from ..errors import UnsupportedError
from .fused import unfuse
from .linear import SparseLinear

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> int:
    """Puts `new` wherever `old` sits in `model`, with its hooks and training mode; returns how many places.

    A module used under several names is replaced under each, by the one new module.

    Raises:
        UnsupportedError: `old` applies an activation that stood after it, and would take it away.
    """
    if isinstance(old, SparseLinear) and old.activation is not None:
        raise UnsupportedError(
            f"a layer that applies {old.activation!r} itself cannot be replaced: call twofour.unfuse(model) first."
        )
    for hooks in _HOOKS:
        if getattr(old, hooks, None):
            setattr(new, hooks, getattr(old, hooks))
    new.train(old.training)
    places = 0
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new
                places += 1
    return places


def why_not_swappable(module: nn.Linear) -> str | None:
    """Why a Linear cannot be replaced by a SparseLinear without changing what it computes; None if it can."""
    if type(module).forward is not nn.Linear.forward:
        return f"{type(module).__name__} overrides Linear.forward"
    if "forward" in vars(module):
        return "its forward was replaced on the object"
    if hasattr(module, "parametrizations"):
        return "its weight is parametrized: call torch.nn.utils.parametrize.remove_parametrizations first"
    return None


def to_dense_modules(model: nn.Module) -> int:
    """Replaces every SparseLinear below `model` by its dense twin, in place; returns how many. Shared weights stay shared.

    Fused activations are taken out first.
    """
    unfuse(model)
    layers = [module for module in model.modules() if isinstance(module, SparseLinear) and module is not model]
    weights: dict[int, nn.Parameter] = {}
    for layer in layers:
        dense = layer.to_linear()
        key = layer.values.data_ptr() or id(layer)
        if key in weights:
            dense.weight = weights[key]
        else:
            weights[key] = cast(nn.Parameter, dense.weight)
        replace_module(model, layer, dense)
    return len(layers)
