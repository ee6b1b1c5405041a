"""AdaptedLinear: a linear layer, dense or compressed, with a low-rank companion beside it."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import ModelError, ShapeError, UnsupportedError
from ...kernels import ops
from ...masks import check_pattern
from ...nn import QuantizedSparseLinear, SparseLinear, SparseWeight, observe
from ...pattern import MAX_GROUP, Pattern


class AdaptedLinear(nn.Module):
    """y = base(x) + scale * (x Aᵀ) Bᵀ, with B zero at the start, so that nothing changes until it is trained.

    Its state dict has `lora_a` [rank, in_features], `lora_b` [out_features, rank], and the base layer's tensors under
    `base.`. Whatever takes the base's place there, as `twofour.compress` and `twofour.load` do, has the companion beside it.

    Args:
        base: nn.Linear, SparseLinear (of 8 bits too) or transformers' Conv1D; called as it is.
        rank: 1 or more.
        alpha: scale = alpha / rank; None: scale 1.
        masked: the update is zero where the base's weight is, in every forward: y = x (mask ⊙ (W + scale B A))ᵀ + bias. A
            merge then loses nothing. Costs the dense product, B A and a weight's worth of memory for each call; the base is
            not called, its weight is read. A compressed base is written out at each call.
        dropout: share of the inputs of A that is dropped in training mode; not with `masked`.
        dtype: of A and B; None: float32, float64 beside float64 weights. Products run in it, or in autocast's.
    Raises:
        ModelError: numbers out of range. UnsupportedError: another kind of base, or `masked` on one of 8 bits.
    Source: Hu et al. 2021, arXiv:2106.09685 (LoRA); Mozaffari et al. 2024, arXiv:2405.16325 (SLoPe: beside sparse weights).

    >>> layer = AdaptedLinear(nn.Linear(8, 4), rank=2)
    >>> x = torch.randn(3, 8)
    >>> torch.equal(layer(x), layer.base(x)), sorted(layer.state_dict())
    (True, ['base.bias', 'base.weight', 'lora_a', 'lora_b'])
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter

    def __init__(
        self,
        base: nn.Module,
        rank: int = 16,
        *,
        alpha: float | None = None,
        masked: bool = False,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_numbers(rank, alpha, dropout, masked)
        reason = why_not_adaptable(base)
        if reason is not None:
            raise UnsupportedError(f"a {type(base).__name__} cannot be adapted: {reason}.")
        if masked and isinstance(base, QuantizedSparseLinear):
            raise UnsupportedError(
                f"masked=True adds to the weight itself, and this one is {base.kind.name}: leave the companion beside it"
                " (masked=False)."
            )
        self.base = base
        self.scale = 1.0 if alpha is None else alpha / rank
        self.masked = masked
        self.dropout = dropout
        weight = cast(Tensor, base.weight)
        dtype = torch.promote_types(weight.dtype, torch.float32) if dtype is None else dtype
        out_features, in_features = shape_of(base)
        self.lora_a = nn.Parameter(torch.empty(rank, in_features, dtype=dtype, device=weight.device))
        self.lora_b = nn.Parameter(torch.zeros(out_features, rank, dtype=dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.train(base.training)

    @property
    def rank(self) -> int:
        """Rows of `lora_a`."""
        return self.lora_a.shape[0]

    @property
    def in_features(self) -> int:
        """Of the base."""
        return shape_of(self.base)[1]

    @property
    def out_features(self) -> int:
        """Of the base."""
        return shape_of(self.base)[0]

    @property
    def weight(self) -> Tensor | SparseWeight:
        """What the layer multiplies by, companion and all, made anew at each access: for code that reads the weight itself.

        Beside a compressed weight: its shape, dtype and device alone.
        """
        if isinstance(self.base, SparseLinear):
            return self.base.weight
        weight = cast(Tensor, self.base.weight)
        return observe.from_matrix(self.base, self.effective(), weight.shape)

    @property
    def bias(self) -> Tensor | None:
        """Of the base."""
        return cast("Tensor | None", self.base.bias)

    def update(self) -> Tensor:
        """scale * B A, [out_features, in_features], dtype of the adapters; of a masked layer too before it is masked."""
        with torch.autocast(self.lora_a.device.type, enabled=False):
            return self.scale * (self.lora_b @ self.lora_a)

    def effective(self, kept: Tensor | None = None) -> Tensor:
        """W + scale * B A, [out_features, in_features], rounded once to the dtype of W; masked where the layer is.

        Args:
            kept: bool, same shape: True where the sum counts; elsewhere it is zero.
        """
        matrix = matrix_of(self.base)
        if kept is None and self.masked:
            kept = matrix != 0
        wide = torch.promote_types(matrix.dtype, self.lora_a.dtype)
        turned = observe.is_transposed(
            self.base
        )  # in the memory order of the weight, so that products give the same bits
        one, other = (self.lora_a.T, self.lora_b.T) if turned else (self.lora_b, self.lora_a)
        with torch.autocast(matrix.device.type, enabled=False):
            total = torch.addmm(
                (matrix.T if turned else matrix).to(wide), one.to(wide), other.to(wide), alpha=self.scale
            )
            total = total.T if turned else total
        total = total.to(matrix.dtype)
        return total if kept is None else total * kept  # torch.where takes 20 times as long

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], dtype of what the base gives."""
        autocast = torch.is_autocast_enabled(input.device.type)
        if self.masked:
            return self._multiply(input, autocast)
        y = cast(Tensor, self.base(input))
        x = functional.dropout(input, self.dropout, self.training) if self.dropout else input
        x = x if autocast else x.to(self.lora_a.dtype)
        update = functional.linear(self.scale * functional.linear(x, self.lora_a), self.lora_b)
        return y + update.to(y.dtype)

    def _multiply(self, x: Tensor, autocast: bool) -> Tensor:
        weight, bias = self.effective(), self.bias
        if isinstance(self.base, SparseLinear):
            if self.base.values.requires_grad:
                raise UnsupportedError(
                    "a masked companion reads the compressed values as constants, and these are trained: call"
                    " base.requires_grad_values(False), or add adapters with masked=False."
                )
            if not autocast and weight.dtype != x.dtype:  # bfloat16 values among float32
                weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        return functional.linear(x, weight, bias)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, masked={self.masked}" + (
            f", dropout={self.dropout:g}" if self.dropout else ""
        )


def require_numbers(rank: int, alpha: float | None, dropout: float, masked: bool) -> None:
    """Raises ModelError where the numbers of an adapter are out of range."""
    if type(rank) is not int or rank < 1:
        raise ModelError(f"rank={rank!r}: a whole number of 1 or more, as in rank=16.")
    if alpha is not None and not 0 < alpha < math.inf:
        raise ModelError(
            f"alpha={alpha!r}: a positive number (the update is scaled by alpha / rank), or None for scale 1."
        )
    if not 0 <= dropout < 1:
        raise ModelError(f"dropout={dropout!r}: a share of the inputs, 0 up to 1.")
    if masked and dropout:
        raise ModelError(
            "masked=True adds the update to the weight, where inputs cannot be dropped for it alone: dropout=0, or"
            " masked=False."
        )


def why_not_adaptable(base: nn.Module) -> str | None:
    """Why `base` cannot have a companion; None if it can."""
    if isinstance(base, SparseLinear):
        return f"it applies {base.activation} itself: call twofour.unfuse(model) first" if base.activation else None
    if isinstance(base, nn.Linear) or observe.is_transposed(base):
        return None
    return "it is no nn.Linear, SparseLinear or Conv1D"


def shape_of(base: nn.Module) -> tuple[int, int]:
    """(out_features, in_features)."""
    rows, columns = cast(Tensor, base.weight).shape
    return (columns, rows) if observe.is_transposed(base) else (rows, columns)


def matrix_of(base: nn.Module) -> Tensor:
    """[out_features, in_features]: the weight of `base`; that of a compressed one is written out, as a constant."""
    if isinstance(base, QuantizedSparseLinear):
        raise UnsupportedError(
            f"the weight is {base.kind.name}, and a sum with the update would be rounded anew: merge before"
            f" compress(weights='{base.kind.name}'), or leave the companion beside it (masked=False, no merge)."
        )
    if isinstance(base, SparseLinear):
        operands = (base.values, base.metadata)
        return ops.to_dense(base.backend, operands, ops.pattern_text(base.pattern), base.out_features, base.in_features)
    return observe.as_matrix(base, cast(Tensor, base.weight))


def kept_of(base: nn.Module, pattern: Pattern | None = None) -> Tensor | None:
    """bool [out_features, in_features], True where the weight of `base` is not zero; None where its zeros need not stay.

    A compressed weight's zeros stay. A dense one's do where it holds `pattern`; without one, where there are as many of them
    as the loosest pattern leaves, one in MAX_GROUP. A weight of nothing but zeros is a beginning, and not pruned.
    """
    matrix = matrix_of(base).detach()
    kept = matrix != 0
    if isinstance(base, SparseLinear):
        return kept
    count = int(kept.sum())
    if pattern is None:
        sparse = (kept.numel() - count) * MAX_GROUP >= kept.numel()
    else:
        try:
            sparse = check_pattern(matrix, pattern).holds
        except ShapeError:
            sparse = False
    return kept if sparse and count else None
