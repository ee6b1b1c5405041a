"""One weight and its mask: of a weight that is sharded over processes, this process's part of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...nn.survey import Layer
from .distributed import anywhere, full, layout, local, local_part, whole_of

_BITS = 8


@dataclass
class Kept:
    """A weight and which of it is dropped.

    Args:
        dropped: bool, of the whole weight when it is given, of `local(weight)` from then on.
    """

    layer: Layer
    weight: nn.Parameter
    dropped: Tensor
    handle: RemovableHandle | None = None

    def __post_init__(self) -> None:
        self.shape = self.weight.shape
        self.layout = layout(self.weight)
        self.take(self.dropped)

    def take(self, dropped: Tensor) -> None:
        """From now on `dropped` is: bool, of the whole weight."""
        self.dropped = local_part(dropped, self.weight)

    def whole(self) -> Tensor:
        """bool, shape of the weight: what is dropped. A collective where the weight is sharded."""
        return whole_of(self.dropped, self.weight)

    def dropped_there(self) -> Tensor:
        """On the weight's device, wherever that is now."""
        device = local(self.weight).device
        if self.dropped.device != device:
            self.dropped = self.dropped.to(device)
        return self.dropped

    def zero(self) -> None:
        """Zeroes what is dropped of the weight."""
        local(self.weight).masked_fill_(self.dropped_there(), 0.0)

    def is_broken(self) -> bool:
        """True where a dropped weight is not zero in this process's part."""
        return bool(((local(self.weight) != 0) & self.dropped_there()).any())

    def mask_gradient(self, weight: Tensor) -> None:
        """Zeroes what is dropped of the gradient of `weight`, this one."""
        if weight.grad is not None:
            self._mask(weight.grad)

    def clear(self, state: Mapping[str, Any]) -> None:
        """Zeroes what is dropped of everything in an optimizer's state that has the weight's shape."""
        for value in state.values():
            if (
                isinstance(value, Tensor)
                and value.is_floating_point()
                and (value.shape == self.shape or self._is_part(value))
            ):
                self._mask(value)

    def not_zero(self, weight: Tensor, dropped: Tensor | None = None) -> str | None:
        """Where `weight` is not zero although the mask drops it, in words that are the same on every process; None if nowhere.

        A collective where this weight is sharded.

        Args:
            weight: to stand in the place of this one; whole or sharded, and not as this one is.
            dropped: another mask for it: bool, of the whole.
        """
        place = self.weight
        dropped = (
            self.dropped_there() if dropped is None else local_part(dropped, place).to(self.dropped_there().device)
        )
        part = local(weight) if layout(weight) == self.layout else local_part(full(weight), place)
        broken = (part.detach().to(dropped.device) != 0) & dropped
        if not anywhere(bool(broken.any()), place):
            return None
        broken = whole_of(broken, place)
        where = ", ".join(str(int(i)) for i in broken.nonzero()[0])
        return f"'{self.layer.name}' is not zero at {int(broken.sum())} places that its mask drops, the first at [{where}]."

    def is_same_memory(self, weight: Tensor) -> bool:
        """True, on every process, where `weight` is not to be copied into this one: it is there."""
        part = local(weight)
        return anywhere(part.numel() > 0 and part.data_ptr() == local(self.weight).data_ptr(), self.weight)

    def _mask(self, tensor: Tensor) -> None:
        """Zeroes what is dropped of a gradient or of what an optimizer remembers."""
        part, dropped = local(tensor), self.dropped_there()
        if layout(tensor) != self.layout and not self._is_part(tensor):
            dropped = local_part(self.whole(), tensor)
        part.masked_fill_(dropped.to(part.device), 0.0)

    def _is_part(self, tensor: Tensor) -> bool:
        """True for a plain tensor of the shape of this process's part: some optimizers see no more than that."""
        return layout(tensor) is None and tensor.shape == self.dropped.shape


def packed(mask: Tensor) -> Tensor:
    """uint8, eight booleans a byte, the first in the lowest bit."""
    flat = mask.detach().cpu().flatten().to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % _BITS)).view(-1, _BITS)
    return (flat << torch.arange(_BITS, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    """The way back from `packed`, for a mask of `shape`."""
    spread = bits.cpu()[:, None] >> torch.arange(_BITS, dtype=torch.uint8) & 1
    return spread.flatten()[: shape.numel()].bool().view(shape)
