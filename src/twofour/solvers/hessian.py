"""What calibration leaves behind: the second moments of a layer's inputs, damped, scaled and factorised with care."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CalibrationError, ShapeError

DAMPING = 0.01
"""Share of the mean diagonal that is added to the diagonal before a solver sees it."""

DRIFT_DAMPING = 0.1
"""The same, where a solver makes up for what its inputs have lost."""

_MOST_DAMPING = 1.0
_TOKENS_AT_ONCE = 1 << 14
_BLOCK = 256


class Hessian:
    """Sums of x xᵀ and of x over tokens: half the second derivative of a layer's squared output error.

    The sums are float64, so that batches may come in any order, or from several processes, with the same masks after
    it; products within a batch are float32, or float64 for float64 inputs.

    Args:
        features: in_features of the matrix.
        device: where the sums are kept and made.
        paired: each token comes with the one that was wanted in its place: `drift` sums their difference times x.
        through: [out_features, features], on the same device, the one weight that makes up for the drift: what is summed
            is the drift of its outputs, which costs less where it has fewer outputs than half its inputs.
    """

    def __init__(
        self,
        features: int,
        device: torch.device | str = "cpu",
        *,
        paired: bool = False,
        through: Tensor | None = None,
    ) -> None:
        self.second = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.first = torch.zeros(features, dtype=torch.float64, device=device)
        self.tokens = 0
        if through is not None and through.shape[1:] != (features,):
            raise ShapeError(f"through is {list(through.shape)}: it must be [out_features, {features}].")
        self.through = through.detach().clone() if through is not None and paired else None
        rows = features if self.through is None else len(self.through)
        self.drift: Tensor | None = self.second.new_zeros(rows, features) if paired else None

    @property
    def features(self) -> int:
        """in_features."""
        return self.first.numel()

    def add(self, x: Tensor, wanted: Tensor | None = None) -> None:
        """Takes the tokens x [..., features] in; `wanted`: of the same shape, where the Hessian is paired.

        Raises:
            ShapeError: another number of features, or `wanted` where it is not expected, or none where it is.
            CalibrationError: NaN or infinities in x. Nothing of it is taken in then.
        Cost: little more than tokens * features² / 2 products; paired, three times that, or through a weight another
            2 * tokens * out_features * features.
        """
        if x.shape[-1] != self.features:
            raise ShapeError(f"x is {list(x.shape)}: its last axis must be the layer's {self.features} in_features.")
        if (wanted is None) != (self.drift is None) or (wanted is not None and wanted.shape != x.shape):
            raise ShapeError(
                f"x is {list(x.shape)}, wanted {None if wanted is None else list(wanted.shape)}: the same shape where the"
                f" Hessian is paired, else None; this one is {'not ' if self.drift is None else ''}paired."
            )
        rows, sums = self._rows(x)
        if wanted is not None and self.drift is not None:
            difference = self._rows(wanted)[0] - rows
            if self.through is not None:
                difference = difference @ self.through.to(difference.dtype).T
            for part, moved in zip(rows.split(_TOKENS_AT_ONCE), difference.split(_TOKENS_AT_ONCE), strict=True):
                self.drift += moved.T @ part
        step = max(_BLOCK, -(-self.features // 8))
        for part in rows.split(_TOKENS_AT_ONCE):
            for first in range(
                0, self.features, step
            ):  # the blocks on and above the diagonal; those below are the same
                last = min(first + step, self.features)
                product = part[:, first:last].T @ part[:, first:]
                self.second[first:last, first:] += product
                self.second[last:, first:last] += product[:, last - first :].T
        self.first += sums
        self.tokens += rows.shape[0]

    def _rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.detach().reshape(-1, self.features).to(self.second.device)
        rows = rows if rows.dtype == torch.float64 else rows.float()
        sums = rows.sum(0, dtype=torch.float64)
        if not bool(torch.isfinite(sums).all()):  # float64 sums of finite numbers stay finite
            bad = int((~torch.isfinite(rows)).any(1).sum())
            raise CalibrationError(f"{bad} of {rows.shape[0]} tokens hold NaN or infinities.")
        return rows, sums

    def forget_drift(self) -> None:
        """From now on it is not paired."""
        self.drift = self.through = None

    def merge(self, other: Hessian) -> None:
        """Takes in what another one has seen, through the same weight. Stays paired if both are."""
        ways = [each for each in (self.through, other.through) if each is not None]
        if self.drift is None or other.drift is None:
            self.forget_drift()
        elif not ways or (len(ways) == 2 and torch.equal(*ways)):
            self.drift += other.drift
        else:
            raise CalibrationError(
                "drifts of different weights' outputs have no sum: `through` must be the same weight."
            )
        self.second += other.second
        self.first += other.first
        self.tokens += other.tokens

    def mean_square(self) -> Tensor:
        """float64 [features]: the mean of x² of each input; zeros before the first token."""
        return self.second.diagonal() / max(1, self.tokens)


@dataclass(frozen=True)
class Statistics:
    """What a solver works with, from `statistics`.

    Args:
        matrix: float64 [features, features], mean of x xᵀ (or its covariance), damped; symmetric positive definite.
        factor: float64, upper triangular R with R Rᵀ = matrix.
        damping: what was added to the diagonal, as a share of its mean; above what was asked where factors failed.
        dead: bool [features], inputs that were zero at every token: their weights cannot be told apart by outputs.
    """

    matrix: Tensor
    factor: Tensor
    damping: float
    dead: Tensor

    @property
    def scale(self) -> Tensor:
        """float64 [features]: square roots of the diagonal, all positive."""
        return self.matrix.diagonal().sqrt()


def statistics(
    hessian: Hessian, *, centered: bool = False, shrinkage: float = 0.0, damping: float = DAMPING
) -> Statistics:
    """The damped matrix of a Hessian, ready for every solver: checked to have a Cholesky factor.

    Args:
        centered: the covariance in place of the second moments: right where the bias takes up what the mean of the
            outputs loses.
        shrinkage: 0 ... 1, how far entries off the diagonal shrink towards zero: against over-fitting to few or
            foreign inputs.
        damping: share of the mean diagonal added to the diagonal. Times ten until the Cholesky factor exists, and
            the answer says what was needed: a layer that saw fewer tokens than it has inputs is no failure.
    Raises:
        CalibrationError: no tokens, all inputs zero, or no factor up to a damping of 1.
    Cost: features³ / 3 products.
    """
    if hessian.tokens == 0:
        raise CalibrationError("no tokens reached the layer.")
    matrix = hessian.second / hessian.tokens
    dead = matrix.diagonal() == 0
    if centered:
        mean = hessian.first / hessian.tokens
        matrix = matrix - torch.outer(mean, mean)
    live = matrix.diagonal()[~dead]
    mean_diagonal = float(live.mean()) if live.numel() else 0.0
    if not mean_diagonal > 0:
        raise CalibrationError("every input of the layer was zero at every token.")
    if shrinkage:
        diagonal = matrix.diagonal().clone()
        matrix = matrix * (1 - shrinkage)
        matrix.diagonal().copy_(diagonal)
    while True:
        damped = matrix.clone()
        damped.diagonal().add_(damping * mean_diagonal)
        damped.diagonal()[dead] = mean_diagonal
        factor, info = torch.linalg.cholesky_ex(damped.flip(0, 1))  # from the last column on: upper triangular
        if int(info) == 0:
            return Statistics(damped, factor.flip(0, 1), damping, dead)
        if damping >= _MOST_DAMPING:
            raise CalibrationError("the second moments of the inputs have no Cholesky factor at a damping of 1.")
        damping = max(10 * damping, 1e-4)


def corrected(weight: Tensor, hessian: Hessian, found: Statistics) -> Tensor:
    """The weight whose outputs on the inputs there are come nearest to those of `weight` on the inputs wanted.

    W + W D (H + λ)⁻¹ with D the mean of (x' - x) xᵀ, x' the token wanted in the place of x; λ is DRIFT_DAMPING of the mean
    diagonal: less follows the noise of few tokens.

    Args:
        weight: [out_features, in_features].
        hessian: paired, or the weight comes back as it is.
        found: its statistics.
    Raises:
        CalibrationError: the drift was summed through another weight.
    Cost: features³ / 3 products, and 2 * out_features * features².
    Source: Li et al. 2025, arXiv:2504.02692 (GPTAQ); Arai & Ichikawa 2025, arXiv:2504.09629 (QEP).
    """
    if hessian.drift is None:
        return weight
    drift = hessian.drift / hessian.tokens
    if hessian.through is None:
        moved = weight.to(drift.dtype) @ drift
    elif torch.equal(hessian.through.to(weight.dtype), weight):
        moved = drift
    else:
        raise CalibrationError(
            "the Hessian knows the drift of another weight's outputs: `through` must be this weight."
        )
    damped = hessian.second / hessian.tokens
    live = damped.diagonal()[~found.dead]
    damped.diagonal().add_(DRIFT_DAMPING * live.mean())
    factor = torch.linalg.cholesky(damped)
    change: Tensor = torch.cholesky_solve(moved.T, factor).T
    return weight + change.to(weight.dtype)


def inverse_factor(found: Statistics, dtype: torch.dtype = torch.float64) -> Tensor:
    """Upper triangular U of `dtype` with Uᵀ U the inverse of the scaled matrix (ones on its diagonal): one triangular inverse.

    R Rᵀ = matrix, so U = (R / scale)⁻¹. The condition of R / scale is the square root of the matrix's, so that float32
    serves once the factor itself has been found in float64.
    """
    factor = (found.factor / found.scale[:, None]).to(dtype)
    eye = torch.eye(*factor.shape, dtype=dtype, device=factor.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, eye, upper=True)
    return inverse


def output_error(change: Tensor, matrix: Tensor) -> float:
    """Mean over tokens of the squared change of a layer's outputs, summed over outputs: tr(change · matrix · changeᵀ).

    Args:
        change: [out_features, in_features] the new weight minus the old one.
        matrix: [in_features, in_features] mean of x xᵀ, undamped; symmetric.
    Cost: little more than half of the product change · matrix: the blocks below the diagonal are those above it.
    """
    change = change.to(matrix.dtype)
    features = len(matrix)
    step = max(_BLOCK, -(-features // 8))
    total = 0.0
    for first in range(0, features, step):
        last = min(first + step, features)
        image = change[:, first:last] @ matrix[first:last, first:]
        image[:, : last - first] *= 0.5
        total += 2.0 * float((image * change[:, first:]).sum())
    return total
