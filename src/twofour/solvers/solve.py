"""One layer: its weight and what calibration saw -> the weight that takes its place."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ShapeError, UnsupportedError
from ..masks.scores import magnitude, ria, wanda
from ..pattern import Pattern
from .admm import admm
from .choose import Chooser
from .hessian import DAMPING, Hessian, Statistics, corrected, inverse_factor, output_error, statistics
from .refit import refit
from .sparsegpt import sparsegpt
from .supports import descend, descends

TARGETS = ("dense", "pruned")
METHODS = ("magnitude", "wanda", "ria", "sparsegpt", "admm")


@dataclass(frozen=True)
class Recipe:
    """How a layer is pruned.

    Args:
        method: one of METHODS.
        refit: least squares on the mask afterwards; None: as the method has it (admm has it, the others do not).
        sweeps: passes of coordinate descent over supports before the refit; None: 1 for admm, 0 for the others.
        damping, shrinkage: of the Hessian, see `statistics`.
        cluster: let rows that share a mask ("2:4x4") be those that lose least by it, anywhere inside windows of 64 rows,
            where the CPU kernels run them as fast as neighbours; False: side by side only.
        targets: the outputs that new weights come near to: those of the "dense" model, so that each layer makes up for
            what the ones before it have lost, or those that the old weights give on the "pruned" model's inputs. None:
            "dense" for admm, "pruned" for the others. "dense" needs the inputs of both, a paired Hessian.
    """

    method: str = "admm"
    refit: bool | None = None
    sweeps: int | None = None
    damping: float = DAMPING
    shrinkage: float = 0.0
    cluster: bool = True
    targets: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UnsupportedError(f"unknown method {self.method!r}: it is one of {', '.join(map(repr, METHODS))}.")
        if not (self.damping >= 0 and 0 <= self.shrinkage < 1 and (self.sweeps is None or self.sweeps >= 0)):
            raise UnsupportedError(
                f"damping={self.damping}, shrinkage={self.shrinkage}, sweeps={self.sweeps}: damping is 0 or more, shrinkage 0"
                " up to 1, sweeps 0 or more."
            )

        if self.targets is not None and self.targets not in TARGETS:
            raise UnsupportedError(f"unknown targets {self.targets!r}: 'dense' or 'pruned'.")
        if self.targets == "dense" and not self.changes_weights:
            raise UnsupportedError(
                f"method {self.method!r} keeps weights as they are and cannot make up for what layers before it have lost:"
                " targets='dense' needs one that changes them (refit=True does)."
            )

    @property
    def changes_weights(self) -> bool:
        """True where kept weights get new values."""
        return self.method in ("sparsegpt", "admm") or bool(self.refit) or bool(self.sweeps)

    def resolved(self) -> Recipe:
        """With the method's own answers in place of None."""
        own = self.method == "admm"
        return replace(
            self,
            refit=own if self.refit is None else self.refit,
            sweeps=(1 if own else 0) if self.sweeps is None else self.sweeps,
            targets=("dense" if own else "pruned") if self.targets is None else self.targets,
        )


@dataclass(frozen=True)
class Solution:
    """What `solve` found.

    Args:
        weight: [out_features, in_features] float32 or float64, zero off the mask.
        mask: bool, same shape, holds the pattern (rows that share it not always side by side).
        error_masked: squared output error of the old weights on the mask, as a share of the squared outputs. With a
            paired Hessian the outputs are those nearest to the dense model's that a dense weight gives on these inputs.
        error: the same of the new weights.
        damping: what the Hessian needed.
        seconds: time taken.
    """

    weight: Tensor
    mask: Tensor
    error_masked: float
    error: float
    damping: float
    seconds: float


def solve(weight: Tensor, hessian: Hessian, pattern: Pattern | str, recipe: Recipe | None = None) -> Solution:
    """Prunes one matrix so that its outputs change little.

    Args:
        weight: [out_features, in_features], any floating dtype, finite; computed with in float32 (float64 stays).
        hessian: of the layer's inputs, on the device to compute on; paired for targets="dense", else those are "pruned".
        pattern: any.
        recipe: default Recipe(): ADMM mask, coordinate descent, refit.
    Raises:
        CalibrationError: the Hessian cannot be used (`statistics`).
        ShapeError: it is another layer's.
    Cost: for admm about 40 products of out_features x in_features x in_features.
    """
    began = time.perf_counter()
    pattern = Pattern.parse(pattern)
    recipe = (recipe or Recipe()).resolved()
    if weight.ndim != 2 or weight.shape[1] != hessian.features:
        raise ShapeError(f"weight is {list(weight.shape)}: its Hessian has {hessian.features} in_features.")
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    old = weight.detach().to(hessian.second.device, dtype)
    found = statistics(hessian, shrinkage=recipe.shrinkage, damping=recipe.damping)
    scale = found.scale.to(dtype)
    matrix = (found.matrix / torch.outer(found.scale, found.scale)).to(dtype)
    target = corrected(old, hessian, found) if recipe.targets == "dense" else old
    new, mask = _prune(old, hessian, pattern, recipe, found, target * scale, matrix)
    new = (new / scale).masked_fill_(~mask, 0.0) if recipe.changes_weights else old.masked_fill(~mask, 0.0)
    plain = (hessian.second / hessian.tokens).to(dtype)
    whole = output_error(target, plain) or 1.0
    return Solution(
        weight=new,
        mask=mask,
        error_masked=output_error(old.masked_fill(~mask, 0.0) - target, plain) / whole,
        error=output_error(new - target, plain) / whole,
        damping=found.damping,
        seconds=time.perf_counter() - began,
    )


def _prune(
    old: Tensor,
    hessian: Hessian,
    pattern: Pattern,
    recipe: Recipe,
    found: Statistics,
    target: Tensor,
    matrix: Tensor,
) -> tuple[Tensor, Tensor]:
    """(weights, mask), scaled where the recipe changes weights."""
    choose = Chooser(pattern, target.square(), recipe.cluster)
    if recipe.method == "admm":
        mask, weights = admm(target, matrix, choose)
    elif recipe.method == "sparsegpt":
        weights, mask = sparsegpt(target, inverse_factor(found, old.dtype), pattern.group, choose)
    else:
        if recipe.method == "magnitude":
            scores = magnitude(old)
        else:
            scores = (wanda if recipe.method == "wanda" else ria)(old, hessian.mean_square())
        mask = choose(scores)
        weights = target
    if recipe.sweeps and descends(pattern):
        start = choose.neighbours(weights.masked_fill(~mask, 0.0))
        weights, mask = descend(choose.neighbours(target), start, matrix, pattern, recipe.sweeps)
        weights, mask = choose.original(weights), choose.original(mask)
    if recipe.refit:
        weights = refit(target, mask, matrix, weights)
    return weights, mask
