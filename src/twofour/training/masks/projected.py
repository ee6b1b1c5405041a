"""Layers whose forward pass sees a sparse weight, while all of the weight learns.

A layer keeps its object, its parameters, their names and its hooks; its class is changed for the time of training to a
subclass that makes the sparse weight in `forward`, as torch's `parametrize` and `fully_shard` do with theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...errors import UnsupportedError
from ...kernels.products import magnitude_mask
from ...masks import soft_threshold
from ...masks.of_weights import differences
from ...nn import observe
from ...pattern import Pattern
from .distributed import layout
from .products import LayerProducts, weight_gradient
from .schedule import Rule

_LIBRARY = torch.library.Library("twofour", "FRAGMENT")
_LIBRARY.define("soft_weight(Tensor weight, str pattern, float scale) -> Tensor")


@dataclass(eq=False)
class Sparsity:
    """How the weight of a layer is made sparse. Layers that share a weight share it.

    Args:
        pattern: what the sparse weight holds.
        rule: of the phase; "dense" and "fixed" take the weight as it is.
        scale: of the soft threshold, frozen when the phase begins; None until a forward pass has seen the weight.
        mask: bool, the weight's shape: True where it is kept; None until a forward pass has seen the weight.
        stale: the mask is to be made anew in the next forward pass.
        copied: in a copy of the model, which no one tells when its weights change: its mask is made in every forward pass.
        changes: in how many places new masks differ from the ones before them, summed since it was None; on a GPU a tensor,
            so that no one waits.
        products: how Linear layers multiply by it.
        used: the layer was called.
        origin: in a copy, that of the model it was made from; None where it was unpickled.
    """

    pattern: Pattern
    rule: Rule = "dense"
    mvue: bool = False
    scale: float | None = None
    mask: Tensor | None = None
    stale: bool = True
    copied: bool = False
    changes: Tensor | int | None = None
    products: LayerProducts = field(default_factory=LayerProducts)
    used: bool = False
    origin: Sparsity | None = None
    _outside_of_graphs: ClassVar[Callable[..., None] | None] = None

    def __post_init__(self) -> None:
        if Sparsity._outside_of_graphs is None:  # here, not at import: it loads the whole compiler
            Sparsity._outside_of_graphs = torch.compiler.disable(Sparsity.refresh)

    def __deepcopy__(self, memo: dict[int, Any]) -> Sparsity:
        found = Sparsity(self.pattern, self.rule, self.mvue, self.scale, copied=True, origin=self.origin or self)
        found.products = LayerProducts(self.products.wanted)
        memo[id(self)] = found
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        products = LayerProducts(self.products.wanted)
        return Sparsity, (self.pattern, self.rule, self.mvue, self.scale, None, True, True, None, products)

    @property
    def is_active(self) -> bool:
        """True where the forward pass does not see the weight itself."""
        return self.rule not in ("dense", "fixed")

    def sparse_weight(self, module: nn.Module, weight: Tensor) -> Tensor:
        """What the forward pass sees; its gradient reaches all of `weight`."""
        if not self.is_active:
            return weight
        if self.stale or self.copied:
            (Sparsity._outside_of_graphs or Sparsity.refresh)(self, module, weight)
        if self.rule == "s-ste":
            assert self.scale is not None
            matrix = torch.ops.twofour.soft_weight(observe.as_matrix(module, weight), str(self.pattern), self.scale)
            return observe.from_matrix(module, matrix, weight.shape)
        assert self.mask is not None
        found: Tensor = _StraightThrough.apply(weight, self.mask.to(weight.device))  # type: ignore[no-untyped-call]
        return found

    def sparse_linear(self, module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The output of a Linear by sparse kernels; None where dense ones are to be taken."""
        if self.rule == "dense" or self.products.wanted == "dense" or torch.compiler.is_compiling():
            return None
        if self.is_active and (self.stale or self.copied):
            self.refresh(module, weight)
        if self.mask is None or self.mask.device != weight.device:
            return None
        soft = self.rule == "s-ste"
        scale = 1.0 if self.scale is None or not soft else self.scale

        def kept() -> tuple[Tensor, Tensor]:
            if not soft:
                return weight, cast(Tensor, self.mask)
            found = weight.detach()
            return soft_threshold(found, self.pattern, scale=scale), magnitude_mask(found, self.pattern)

        estimate = self.mvue and self.is_active
        return self.products.linear(x, weight, bias, self.pattern, kept, scale=scale, estimate=estimate)

    def refresh(self, module: nn.Module, weight: Tensor) -> None:
        """Makes the mask anew from the whole weight and counts what changed; at the first time the scale too."""
        with torch.inference_mode(False), torch.no_grad():  # an evaluation may come first, and training goes on with it
            mask = self.mask_of(module, weight)
            if self.rule == "s-ste" and self.scale is None:
                self.scale = frozen_scale(observe.as_matrix(module, weight.detach()), self.pattern)
            if self.mask is not None:
                self.changes = differences(mask, self.mask) + (0 if self.changes is None else self.changes)
            self.mask, self.stale = mask, False

    def mask_of(self, module: nn.Module, weight: Tensor) -> Tensor:
        """The best mask of a whole weight: bool, its shape."""
        if layout(weight) is not None:
            raise UnsupportedError(
                f"a {type(module).__name__} computes with a weight that is spread over processes: masks move with"
                " fully_shard and DistributedDataParallel, not with tensor parallelism. Use keep_masks."
            )
        mask = magnitude_mask(observe.as_matrix(module, weight.detach()), self.pattern)
        return observe.from_matrix(module, mask, weight.shape).contiguous()


def frozen_scale(weight: Tensor, pattern: Pattern) -> float:
    """beta = <W, S(W)> / <S(W), S(W)>: what brings the soft threshold nearest to the weight; 1 where it is all zeros.

    Source: Hu et al. 2024 (S-STE), arXiv:2409.09099, section 4.2.
    """
    soft = soft_threshold(weight, pattern).double()
    norm = float(soft.square().sum())
    return float((weight.double() * soft).sum()) / norm if norm else 1.0


def _soft_weight(weight: Tensor, pattern: str, scale: float) -> Tensor:
    return soft_threshold(weight, pattern, scale=scale)


def _soft_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.scale = inputs[2]


def _soft_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad * ctx.scale, None, None


_LIBRARY.impl("soft_weight", _soft_weight, "CompositeExplicitAutograd")
torch.library.register_fake("twofour::soft_weight", lambda weight, *_: torch.empty_like(weight), lib=_LIBRARY)
torch.library.register_autograd("twofour::soft_weight", _soft_backward, setup_context=_soft_setup, lib=_LIBRARY)


class _StraightThrough(torch.autograd.Function):
    """The kept weights; the gradient of what comes out is that of all of them (Bengio et al. 2013, arXiv:1308.3432)."""

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, weight, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _EstimatedLinear(torch.autograd.Function):
    """A linear layer whose weight gradient is made of a 2:4 estimate of the output gradient, along tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        of_x = grad @ weight if ctx.needs_input_grad[0] else None
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = weight_gradient(rows, x.reshape(-1, x.shape[-1]), estimate=True)
        of_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias


def _estimated(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        found: Tensor = _EstimatedLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return found


class Projected(nn.Module):
    """What the classes below have in common.

    Attributes:
        sparsity: how the weight is made sparse.
        plain: the class to go back to.
    """

    sparsity: Sparsity
    plain: type[nn.Module]

    def sparse_weight(self) -> Tensor:
        """The weight that `forward` multiplies by."""
        return self.sparsity.sparse_weight(self, cast(Tensor, self.weight))

    def __reduce_ex__(self, protocol: Any) -> Any:
        found = super().__reduce_ex__(protocol)
        if "plain" not in vars(type(self)) or not isinstance(found, tuple):
            return found
        return (_empty, (self.plain,), *found[2:])  # classes that are made on the way have no place to be found in


class ProjectedLinear(Projected, nn.Linear):
    """A Linear under a rule."""

    plain = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        found = self.sparsity.sparse_linear(self, input, self.weight, self.bias)
        if found is not None:
            return found
        weight = self.sparse_weight()
        if self.sparsity.mvue and self.sparsity.is_active:
            return _estimated(input, weight, self.bias)
        return F.linear(input, weight, self.bias)


class ProjectedConv1d(Projected, nn.Conv1d):
    """A Conv1d under a rule."""

    plain = nn.Conv1d

    def forward(self, input: Tensor) -> Tensor:
        found: Tensor = self._conv_forward(input, self.sparse_weight(), self.bias)
        return found


class ProjectedConv2d(Projected, nn.Conv2d):
    """A Conv2d under a rule."""

    plain = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        found: Tensor = self._conv_forward(input, self.sparse_weight(), self.bias)
        return found


class ProjectedConv3d(Projected, nn.Conv3d):
    """A Conv3d under a rule."""

    plain = nn.Conv3d

    def forward(self, input: Tensor) -> Tensor:
        found: Tensor = self._conv_forward(input, self.sparse_weight(), self.bias)
        return found


class _ProjectedConv1D(Projected):
    """transformers' Conv1D under a rule: y = x @ weight + bias, the weight [in_features, out_features]."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.sparse_weight(), cast("Tensor | None", getattr(self, "bias", None))
        if self.sparsity.mvue and self.sparsity.is_active:
            return _estimated(x, weight.T, bias)
        return F.linear(x, weight.T, bias)


_CLASSES: dict[type[nn.Module], type[Projected]] = {
    nn.Linear: ProjectedLinear,
    nn.Conv1d: ProjectedConv1d,
    nn.Conv2d: ProjectedConv2d,
    nn.Conv3d: ProjectedConv3d,
}


@cache
def projected_class(kind: type[nn.Module]) -> type[Projected]:
    """The subclass of `kind` that makes its weight sparse in `forward`."""
    if kind in _CLASSES:
        return _CLASSES[kind]
    base = next((own for plain, own in _CLASSES.items() if issubclass(kind, plain)), _ProjectedConv1D)
    return cast(
        type[Projected], type(f"Projected{kind.__name__}", (base, kind), {"__module__": __name__, "plain": kind})
    )


def project(module: nn.Module, sparsity: Sparsity) -> None:
    """From here on the layer computes with a sparse weight.

    The hook that it gets says that it was called, and makes torch call it: an nn.TransformerEncoderLayer without hooks
    inside reads the weights of its linear layers itself when it evaluates.
    """
    module.__class__ = projected_class(cast(Any, type(module)))
    module.sparsity = sparsity  # type: ignore[assignment]
    module.register_forward_pre_hook(_note_use)


def restore(module: Projected) -> None:
    """Gives the layer its class back; of a class that something else made since (`fully_shard`), what it would have made."""
    module.__class__ = cast(Any, _without(cast(Any, type(module))))
    del module.sparsity
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is _note_use:
            del module._forward_pre_hooks[key]


def why_not_projected(module: nn.Module) -> str | None:
    """Why a layer cannot be put under a rule; None where it can."""
    if "forward" in vars(module):
        return "its forward was replaced on the object"
    kind = type(module)
    if observe.is_transposed(module):
        plain: type[nn.Module] | None = next(each for each in kind.__mro__ if each.__name__ == "Conv1D")
    else:
        plain = next((each for each in _CLASSES if isinstance(module, each)), None)
    if plain is None or any(getattr(kind, name, None) is not getattr(plain, name, None) for name in _COMPUTING):
        return f"{kind.__name__} does not compute what a Linear or convolution does"
    return None


_COMPUTING = ("forward", "_conv_forward")


def _note_use(module: nn.Module, _: Any) -> None:
    cast(Projected, module).sparsity.used = True


def _empty(plain: type[nn.Module]) -> nn.Module:
    kind = projected_class(cast(Any, plain))
    return kind.__new__(kind)


@cache
def _without(kind: type[Projected]) -> type[nn.Module]:
    if "plain" in vars(kind):
        return kind.plain
    bases = tuple(_without(cast(Any, base)) if issubclass(base, Projected) else base for base in kind.__bases__)
    own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return cast(type[nn.Module], type(kind.__name__.replace("Projected", "", 1), bases, own))
