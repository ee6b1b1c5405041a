"""Where low-rank companions begin: the best that their rank can do for what pruning took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ...errors import CalibrationError, ModelError
from ...nn import QuantizedSparseLinear, observe
from ...solvers import Hessian
from ...solvers.hessian import Statistics, output_error, statistics
from .lora import matrix_of, shape_of


@dataclass(frozen=True)
class Recovered:
    """A [rank, in_features] and B [out_features, rank], float64, and what is left of the error with them."""

    a: Tensor
    b: Tensor
    errors: dict[str, float]


def dense_weights(dense: nn.Module | Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Layer name -> its weight in the dense model, as a matrix [out_features, in_features].

    Raises:
        ModelError: a layer is not there, of another shape, or not finite.
    """
    state = dense.state_dict() if isinstance(dense, nn.Module) else dense
    found: dict[str, Tensor] = {}
    for name, module in modules.items():
        key = f"{name}.weight" if name else "weight"
        weight = state.get(key)
        if not isinstance(weight, Tensor):
            raise ModelError(
                f"dense= has no '{key}': pass the model before it was pruned, or its state dict; or leave the layer out with"
                " exclude=."
            )
        matrix = observe.as_matrix(module, weight.detach())
        if tuple(matrix.shape) != shape_of(module):
            raise ModelError(
                f"'{key}' of dense= is {list(matrix.shape)}, the layer {list(shape_of(module))}: is it the same model?"
            )
        if not bool(torch.isfinite(matrix).all()):
            raise ModelError(f"'{key}' of dense= has weights that are NaN or infinite.")
        found[name] = matrix
    return found


def recover(
    name: str,
    module: nn.Module,
    dense: Tensor,
    rank: int,
    scale: float,
    hessian: Hessian | None,
    moments: Literal["full", "diagonal"],
) -> Recovered:
    """A and B with scale * B A nearest to E = dense - weight: of all of this rank, in the Frobenius norm of E Rᵀ.

    With a Hessian of the layer's inputs, R Rᵀ is their damped second moments, and the norm is that of the outputs: with
    U S Vᵀ the singular value decomposition of E R, B = U √S and A = √S Vᵀ R⁻¹, cut to the rank. "diagonal": R is a diagonal of
    root mean squares, nearly as in SLiM, which has mean magnitudes. Without a Hessian, R = 1.

    Args:
        name: the layer's, for errors.
        dense: [out_features, in_features].
    Raises:
        CalibrationError: the Hessian cannot be used.
    Source: Mozaffari et al. 2024, arXiv:2410.09615 (SLiM); Eckart & Young 1936; Liu et al. 2024, arXiv:2410.21271 (EoRA).
    """
    weight = _weight(module).detach()
    work = torch.promote_types(torch.promote_types(weight.dtype, dense.dtype), torch.float32)
    dense = dense.to(weight.device, work)
    lost = dense - weight.to(work)
    found: Statistics | None = None
    if hessian is not None:
        try:
            found = statistics(hessian)
        except CalibrationError as error:
            raise CalibrationError(f"the inputs of '{name}': {error}") from None
    seen = lost
    if found is not None:
        seen = (lost.double() @ found.factor if moments == "full" else lost.double() * found.scale).to(work)
    u, s, vt = torch.linalg.svd(seen, full_matrices=False)
    some = min(rank, len(s))
    half = (s[:some].double() / scale).sqrt()
    rows = half[:, None] * vt[:some].double()
    if found is not None and moments == "full":
        rows = torch.linalg.solve_triangular(found.factor, rows, upper=True, left=False)
    elif found is not None:
        rows = rows / found.scale
    a = rows.new_zeros(rank, lost.shape[1])
    b = rows.new_zeros(lost.shape[0], rank)
    a[:some] = rows
    b[:, :some] = u[:, :some].double() * half
    left = lost - (scale * (b @ a)).to(work)
    if hessian is None:
        return Recovered(a, b, {"error": float(left.square().sum() / (lost.square().sum() or 1.0))})
    plain = (hessian.second / hessian.tokens).to(work)
    whole = output_error(dense, plain) or 1.0
    errors = {"error_pruned": output_error(lost, plain) / whole, "error": output_error(left, plain) / whole}
    return Recovered(a, b, errors)


def _weight(module: nn.Module) -> Tensor:
    """[out_features, in_features]; of an int8 or float8 layer what its numbers stand for."""
    return module.dequantized() if isinstance(module, QuantizedSparseLinear) else matrix_of(module)
