"""One weight whose mask moves: what optimizers train of it, and what is done to its gradient before a step."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...errors import ModelError
from ...nn.survey import Layer
from .distributed import anywhere_each, full, is_sharded, layout, local, local_part, put_back
from .projected import Sparsity


@dataclass(eq=False)
class Moved:
    """A weight, the layers that have it, and how it is made sparse."""

    layers: list[Layer]
    sparsity: Sparsity

    def __post_init__(self) -> None:
        self.weight = cast(nn.Parameter, self.layer.weight)
        """What optimizers train: the shards, also while `fully_shard` has the whole weight in their place."""
        self._decayed: tuple[weakref.ref[Tensor], int] | None = None

    @property
    def layer(self) -> Layer:
        return self.layers[0]

    def refresh(self) -> None:
        """A new mask now. A collective where the weight is sharded."""
        self.sparsity.refresh(self.layer.module, full(self.weight))

    def write(self, whole: Tensor) -> None:
        """Puts what lies there of a whole weight into this process's part."""
        local(self.weight).copy_(local_part(whole, self.weight))

    def take_up(self) -> None:
        """From here on the weight is what the layers hold now, where they hold the same; its numbers may be others."""
        now = [_held(layer) for layer in self.layers]
        if now[0] is not None and all(each is now[0] for each in now) and not self._stands_in(now[0]):
            self.weight = now[0]

    def why_lost(self, model: nn.Module) -> str | None:
        """What has happened to the weight that its mask cannot follow; None where nothing has.

        What `fully_shard` puts in its place is the weight from then on.
        """
        for layer in self.layers:
            now = _held(layer)
            if now is self.weight or self._stands_in(now):
                continue
            if layer is self.layer and now is not None and is_sharded(model):
                in_backward = torch._C._current_graph_task_id() != -1  # which may need the whole weights of others
                if not in_backward:
                    put_back(model)
                sharded = _held(layer)
                if sharded is not None and layout(sharded) is not None and sharded.shape == self.weight.shape:
                    self.weight = sharded
                    continue
                if in_backward:
                    continue
            if now is None:
                return f"the weight of '{layer.name}' is no parameter of its own any more"
            if layer is not self.layer:
                return f"the weight of '{layer.name}' is no longer that of '{self.layer.name}'"
            return f"the weight of '{layer.name}' was replaced by another parameter"
        gone = next((layer for layer in self.layers if not _is_inside(model, layer)), None)
        if gone is not None:
            return f"the layer '{gone.name}' is not in the model any more"
        if self.sparsity.mask is not None and self.sparsity.mask.shape != self.weight.shape:
            shapes = f"{list(self.weight.shape)} now, its mask {list(self.sparsity.mask.shape)}"
            return f"the weight of '{self.layer.name}' is {shapes}"
        return None

    def decay(self, mask: Tensor, optimizer: Optimizer, rate: float) -> None:
        """g + rate * w where `mask` drops w, in place, before the optimizer makes anything of g.

        Once for each gradient: optimizers that have others inside tell of the same step twice.

        Args:
            mask: bool, of the whole weight.
        """
        grad = self.weight.grad
        if grad is None or (self._decayed is not None and self._is_decayed(grad, *self._decayed)):
            return
        weight, part = local(self.weight), local(grad)
        lost = torch.where(local_part(mask, self.weight).to(weight.device), 0.0, weight).to(part.dtype)
        scale = getattr(optimizer, "grad_scale", None)  # the optimizer divides by it
        if scale is not None:
            lost = lost * scale.to(lost.device)
        ascends = any(group.get("maximize") and self._is_in(group) for group in optimizer.param_groups)
        part.add_(lost, alpha=-rate if ascends else rate)
        self._decayed = (weakref.ref(grad), part._version)

    def forget_gradient(self) -> None:
        """The step is made. What refers to a gradient, however weakly, keeps `module.to(dtype)` from swapping it."""
        self._decayed = None

    def _is_in(self, group: dict[str, Any]) -> bool:
        return any(weight is self.weight for weight in group["params"])

    def _is_decayed(self, grad: Tensor, decayed: weakref.ref[Tensor], version: int) -> bool:
        return decayed() is grad and local(grad)._version == version

    def _stands_in(self, now: Tensor | None) -> bool:
        """True for the whole weight that `fully_shard` holds in the place of the shards for the time of a forward."""
        return now is not None and layout(now) is None and layout(self.weight) is not None


def require_numbers(own: Sequence[Moved]) -> None:
    """Raises where a gradient is not finite: on all processes that have parts of it, by one collective of them.

    Raises:
        ModelError: it names the first of them.
    """
    gradients = {i: local(each.weight.grad) for i, each in enumerate(own) if each.weight.grad is not None}
    sums: dict[torch.device, list[Tensor]] = {}
    for grad in gradients.values():
        sums.setdefault(grad.device, []).append(grad.sum().float())
    broken = [False] * len(own)
    if not all(bool(torch.stack(each).isfinite().all()) for each in sums.values()):
        for i, grad in gradients.items():  # one by one: a sum may be too large although no number is
            broken[i] = not bool(grad.isfinite().all())
    broken = anywhere_each(broken, [each.weight for each in own])
    if any(broken):
        name = own[broken.index(True)].layer.name
        raise ModelError(
            f"the gradient of '{name}' is not finite, and masks would follow it: lower the learning rate, clip, or"
            " skip the step. Nothing has changed."
        )


def _held(layer: Layer) -> nn.Parameter | None:
    return layer.module._parameters.get(layer.attribute)


def _is_inside(model: nn.Module, layer: Layer) -> bool:
    place: object = model
    for part in layer.names[0].split(".") if layer.names[0] else ():
        place = getattr(place, part, None)
    return place is layer.module or any(module is layer.module for module in model.modules())  # wrapped since
