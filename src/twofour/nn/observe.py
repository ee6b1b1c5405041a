"""What a layer multiplies: its weight as one matrix [out_features, features], its inputs as tokens [tokens, features].

The features of a convolution are the places of its kernel, input channels innermost: a group of four neighbours is four
input channels at one place, as pruning wants it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NUMBERS_AT_ONCE = 1 << 24


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """`weight` of `module` as [out_features, features]; a view where the memory allows it.

    Linear: as it is. Convolutions: [out, places * input channels]. transformers' Conv1D, which holds [in, out]: the
    transpose.
    """
    if isinstance(module, _CONVOLUTIONS):
        return weight.movedim(1, -1).flatten(1)
    return weight.T if is_transposed(module) else weight


def from_matrix(module: nn.Module, matrix: Tensor, shape: torch.Size) -> Tensor:
    """The way back from `as_matrix`, for a weight of `shape`."""
    if isinstance(module, _CONVOLUTIONS):
        weight: Tensor = matrix.unflatten(1, (*shape[2:], shape[1])).movedim(-1, 1)
        return weight
    return matrix.T if is_transposed(module) else matrix


def is_transposed(module: nn.Module) -> bool:
    """True for transformers' Conv1D (GPT-2), a Linear whose weight is [in_features, out_features], and what derives from it,
    as the classes do that `fully_shard` makes."""
    return hasattr(module, "nf") and any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)


def tokens(module: nn.Module, x: Tensor, real: Tensor | None = None) -> Iterator[Tensor]:
    """The rows that `module` multiplies for the input `x`, in pieces of bounded size: [tokens, features] each.

    Args:
        module: a Linear, convolution (any kernel, stride, padding and dilation; groups=1) or Conv1D.
        x: what the module is called with.
        real: bool [batch, tokens]: False marks padding, whose rows are left out where `x` is [batch, tokens, features].
    """
    if not isinstance(module, _CONVOLUTIONS):
        if real is not None and x.ndim == 3 and x.shape[:2] == real.shape:
            x = x[real.to(x.device)]
        yield x.reshape(-1, x.shape[-1])
        return
    dims = len(module.kernel_size)
    if x.ndim == dims + 1:
        x = x.unsqueeze(0)
    per_image = x[0].numel() * max(1, module.weight[0, 0].numel())
    for part in x.split(max(1, _NUMBERS_AT_ONCE // max(1, per_image))):
        yield _patches(module, part)


def _patches(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """[images * places of the output, places of the kernel * input channels]."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    dims = len(module.kernel_size)
    for axis, (size, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True)
    ):
        x = x.unfold(2 + axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    # [images, channels, *places of the output, *places of the kernel]
    places, kernel = range(2, 2 + dims), range(2 + dims, 2 + 2 * dims)
    return x.permute(0, *places, *kernel, 1).flatten(1 + dims).flatten(0, dims)
