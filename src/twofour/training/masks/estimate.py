"""Unbiased sparse estimates of gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ShapeError, UnsupportedError

_GROUP = 4


def mvue(x: Tensor, *, dim: int = -1, generator: torch.Generator | None = None) -> Tensor:
    """A random tensor with at most 2 non-zeros in every 4 neighbours along `dim`, whose mean over the draws is `x`.

    Place i of a group is kept with the chance p_i and becomes x_i / p_i. No choice of chances that add up to 2 has a lower
    variance than p_i = min(1, c * |x_i|): where the largest magnitude is at least the sum of the others it is always kept
    and one of the others is drawn, else p_i = 2 * |x_i| / sum. Places are taken where u and u + 1 fall among the running
    sums of p, with one random u for each group, which keeps exactly these chances. Groups of at most two non-zeros come
    back as they are.

    Args:
        x: floating point; `x.shape[dim]` a multiple of 4.
        generator: of the device of `x`; None takes torch's own, which `torch.get_rng_state` holds.
    Returns:
        shape and dtype of `x`; computed in float32 or float64. NaN and infinities fill their group with NaN. No gradients
        flow through.
    Raises:
        ShapeError: the axis is not a multiple of 4.
        UnsupportedError: x is not floating point.
    Cost: some twelve passes over `x` and one random number for each group.
    Source: minimum-variance unbiased estimates: Chmiel et al. 2023, arXiv:2203.10991, which draws two places one after the
        other, as Hu et al. 2024, arXiv:2404.01847; their chances differ a little from the best, and so does their variance.

    >>> mvue(torch.tensor([5.0, 0.0, -1.0, 0.0])).tolist()
    [5.0, 0.0, -1.0, 0.0]
    """
    if not x.dtype.is_floating_point:
        raise UnsupportedError(f"x is {x.dtype}: estimates are of floating point tensors.")
    if x.ndim == 0 or not -x.ndim <= dim < x.ndim or x.shape[dim] % _GROUP:
        raise ShapeError(f"x is {list(x.shape)}: axis {dim} is not a multiple of {_GROUP}. Pad it with zeros.")
    moved = x.detach().movedim(dim, -1)
    groups = moved.unflatten(-1, (-1, _GROUP))
    groups = groups.float() if x.dtype.itemsize < 4 else groups
    sizes = groups.abs()
    largest = sizes.amax(-1, keepdim=True)
    sizes = sizes / torch.where(largest == 0, 1.0, largest)  # so that nothing under- or overflows
    top = torch.zeros_like(sizes, dtype=torch.bool).scatter_(-1, sizes.argmax(-1, keepdim=True), True)
    rest = torch.where(top, 0.0, sizes).sum(-1, keepdim=True)
    sure = rest <= 1  # the largest is 1
    drawn = torch.where(sure, sizes / torch.where(rest == 0, 1.0, rest), 2 * sizes / (1 + rest))
    chance = torch.where(sure & top, 1.0, drawn)
    sums = chance.cumsum(-1)
    total = sums[..., -1:].round()  # 2, or 1 or 0 where fewer are not zero
    sums[..., -1:] = total  # rounding must not lose the last place,
    sums = torch.minimum(sums, total)  # nor let a third in
    u = torch.rand((*sums.shape[:-1], 1), dtype=sums.dtype, device=sums.device, generator=generator)
    marks = torch.ceil(sums - u)  # how many of u, u + 1 lie below
    taken = torch.diff(marks, dim=-1, prepend=torch.zeros_like(u)) > 0
    found = torch.where(taken & (chance > 0), groups / chance, 0.0)
    found = torch.where(largest.isfinite(), found, torch.nan)
    return found.flatten(-2).movedim(-1, dim).to(x.dtype)
