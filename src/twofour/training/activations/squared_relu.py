"""Squared ReLU, and its output made 2:4 on the fly.

With r = max(x, 0), m the mask that keeps the best of each group, and dy the gradient that arrives:

    y = m r²        dx = 2 m r dy = 2 √y dy

The mask is constant but for ties, so this is the exact gradient, and what the forward pass dropped gets none. A
straight-through gradient, 2 r dy at dropped places too, would train features by products that the next layer never saw,
and dx would not hold the pattern that y holds. It gains nothing: on the digits of scikit-learn (two blocks with norms,
eight seeds) dense, exact and straight-through end at a mean loss of 0.112, 0.112 and 0.110.

The right-hand form needs y alone, which the next layer keeps anyway. It has the same bits: the root of a rounded square
is the number itself (Boldo 2015, "Stupid is as stupid does: taking the square root of the square of a floating-point
number"), but where the square leaves the range of normal numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...errors import PatternError, ShapeError, UnsupportedError
from ...masks import keep_best, nm_mask
from ...pattern import Pattern

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_AT_ONCE = 1 << 18
"""Activations of a thread's piece that stays in its cache."""


def squared_relu(x: Tensor, pattern: Pattern | str | None = None) -> Tensor:
    """max(x, 0)², with a pattern only the largest of each group along the last axis, 0 elsewhere.

    Equal ones keep the lower index, and NaN ranks below every number, as in `nm_mask`: a NaN is dropped where its group has
    `keep` numbers. They are ranked before they are squared, so that overflow makes no ties.

    Differentiable any number of times, under torch.func and torch.compile; dropped places get no gradient, not even of NaN
    or infinity. For the backward pass it keeps its output alone, which a following Linear keeps too: one tensor less than
    `relu(x).square()`. The gradient has the same bits as that of torch, but where y is no normal number (float32 and
    bfloat16: x below 1.1e-19 or above 1.8e19). float16, where that would be x below 0.008, keeps another tensor instead.

    In language models squared ReLU becomes sparse once they have trained for a while, and not before (same source): begin
    with pattern=None, and let `observe_activations` tell what 2:4 would take before you switch.

    Args:
        x: [..., features] float32, bfloat16, float16 or float64, any strides.
        pattern: of each token for itself, as "2:4"; None keeps everything. features must be a multiple of the group.
    Returns:
        The shape and dtype of x, under autocast too; dropped places are +0.0.
    Raises:
        ShapeError: no whole groups along the last axis.
        PatternError: "2:4x4" and "2:4t", where tokens would share masks.
        UnsupportedError: another dtype.
    Cost: on a CPU [2048, 4096] with 2:4 in 8 ms on a core in float32, 7 in bfloat16: a relu, that of `keep_best`, a square.
    Source: Haziza et al. 2025, arXiv:2503.16672; squared ReLU: So et al. 2021, arXiv:2109.08668. Their weight gradients are
        approximate, with activations made 2:4 along the tokens too, for sparse tensor cores; these are exact.

    >>> squared_relu(torch.tensor([1., 3., -5., 2.]), "2:4").tolist()
    [0.0, 9.0, 0.0, 4.0]
    >>> squared_relu(torch.tensor([1., 3., -5., 2.])).tolist()
    [1.0, 9.0, 0.0, 4.0]
    """
    pattern = require_of_tokens(pattern)
    if x.dtype not in _DTYPES:
        raise UnsupportedError(
            f"x is {x.dtype}: squared_relu takes float32, bfloat16, float16 and float64. Convert it, as with x.float()."
        )
    if pattern is not None and (x.ndim == 0 or x.shape[-1] % pattern.group):
        raise ShapeError(
            f"x is {list(x.shape)}: its last axis is not a multiple of {pattern.group}, so it has no whole {pattern} groups."
            " Leave these activations dense with pattern=None, or make the layer before them wider."
        )
    if torch.compiler.is_compiling():  # which takes no Function with a rule for vmap, and chooses itself what to keep
        root = x.relu()
        return (root if pattern is None else torch.where(nm_mask(root.detach(), pattern), root, 0)).square()
    if x.dtype == torch.float16:
        return _KeptReLU.apply(x, pattern).square()
    return _KeptSquare.apply(x, pattern)


class SquaredReLU(nn.Module):
    """`squared_relu` as a module. Its pattern may change at any time, so that a model trains dense first.

    It has no state: a checkpoint does not say whether activations were 2:4, so set the pattern again after loading.

    Args:
        pattern: "2:4" or another KEEP:GROUP, or None for dense; `module.pattern = "2:4"` changes it.
    Raises:
        PatternError: "2:4x4" and "2:4t", where tokens would share masks.

    >>> act = SquaredReLU()
    >>> act(torch.tensor([1., 3., -5., 2.])).tolist()
    [1.0, 9.0, 0.0, 4.0]
    >>> act.pattern = "2:4"
    >>> act(torch.tensor([1., 3., -5., 2.])).tolist()
    [0.0, 9.0, 0.0, 4.0]
    """

    def __init__(self, pattern: Pattern | str | None = None) -> None:
        super().__init__()
        self._pattern = require_of_tokens(pattern)

    @property
    def pattern(self) -> Pattern | None:
        """What is kept of each group; None: everything."""
        return self._pattern

    @pattern.setter
    def pattern(self, pattern: Pattern | str | None) -> None:
        self._pattern = require_of_tokens(pattern)

    def forward(self, x: Tensor) -> Tensor:
        """`squared_relu(x, self.pattern)`."""
        return squared_relu(x, self._pattern)

    def extra_repr(self) -> str:
        """The pattern."""
        return f"pattern={None if self._pattern is None else str(self._pattern)!r}"


class _KeptSquare(torch.autograd.Function):
    """m max(x, 0)²; its output is all that is kept."""

    apply: Callable[..., Tensor]

    @staticmethod
    def forward(x: Tensor, pattern: Pattern | None) -> Tensor:
        return _kept(x, pattern).square_()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return times_slope(grads[0], *ctx.saved_tensors), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return times_slope(tangents[0], *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, pattern: Pattern | None) -> tuple[Tensor, int]:
        return _KeptSquare.apply(_batch_first(x, in_dims[0]), pattern), 0


class _KeptReLU(torch.autograd.Function):
    """m max(x, 0); its output is all that is kept."""

    apply: Callable[..., Tensor]

    @staticmethod
    def forward(x: Tensor, pattern: Pattern | None) -> Tensor:
        return _kept(x, pattern)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return where_positive(grads[0], *ctx.saved_tensors), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return where_positive(tangents[0], *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, pattern: Pattern | None) -> tuple[Tensor, int]:
        return _KeptReLU.apply(_batch_first(x, in_dims[0]), pattern), 0


def _kept(x: Tensor, pattern: Pattern | None) -> Tensor:
    """m max(x, 0), in memory of its own."""
    root = x.relu()
    if pattern is None or not root.numel():
        return root
    root = root.contiguous()
    rows = root.view(-1, x.shape[-1])
    if rows.dtype.itemsize > 2:
        keep_best(rows, pattern, out=rows)
        return root
    # In pieces that stay in the cache: [2048, 4096] bfloat16 in 7 ms on a core, in one piece in 32.
    for part in rows.split(rows_at_once(rows) if rows.is_cpu else len(rows)):
        wide = part.float()
        part.copy_(keep_best(wide, pattern, out=wide))
    return root


def rows_at_once(rows: Tensor) -> int:
    """How many rows of a matrix on the CPU to work on at a time, so that they stay in the cache."""
    return max(1, _AT_ONCE * torch.get_num_threads() // rows.shape[1])


def times_slope(grad: Tensor, y: Tensor) -> Tensor:
    """2 √y grad, 0 where y is: what arrives before the square, of what arrives at y."""
    if torch.is_grad_enabled():
        # The root's derivative at 0 would be NaN. It goes nowhere, but anomaly mode finds it.
        root = torch.where(y == 0, 1, y).sqrt()
    else:
        root = y.sqrt()
    return where_positive(2 * root * grad, y)


def where_positive(grad: Tensor, y: Tensor) -> Tensor:
    """`grad` where y > 0 or NaN, 0 elsewhere."""
    return cast(Tensor, torch.ops.aten.threshold_backward.default(grad, y, 0))


def _batch_first(x: Tensor, dim: int | None) -> Tensor:
    assert dim is not None
    return x.movedim(dim, 0)


def require_of_tokens(pattern: Pattern | str | None) -> Pattern | None:
    """The parsed pattern.

    Raises:
        PatternError: it is not of each token for itself.
    """
    if pattern is None:
        return None
    pattern = Pattern.parse(pattern)
    if pattern.rows > 1 or pattern.transposable:
        raise PatternError(
            f"pattern {pattern} of activations: tokens would share masks, so that an output depended on other tokens, in a"
            f" causal model on later ones. Use '{pattern.keep}:{pattern.group}'."
        )
    return pattern
