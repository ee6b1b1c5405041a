"""QuantizedSparseLinear: a SparseLinear whose kept values have eight bits, int8 or float8, and one scale per output row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FormatError, TwofourError, UnsupportedError
from ..format import SparseMatrix
from ..kernels import SCALED, Kernel, Kind, LinearSpec, choose
from ..pattern import Pattern
from .linear import SparseLinear, SparseWeight

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


_KINDS = {kind.name: kind for kind in SCALED.values()}
WEIGHTS = tuple(_KINDS)
"""Names of what weights can be rounded to."""


def quantize_rows(matrix: SparseMatrix, name: str = "weight", weights: str = "int8") -> tuple[SparseMatrix, Tensor]:
    """`matrix` in int8 or float8, at the same places, and the float32 scales [out_features] of its rows, symmetrically.

    int8: scale = largest / 127, value = round(weight * (127 / largest)), ties to even: the error of a weight is at most half
    its row's scale. float8 (e4m3): scale = largest / 448, value = weight * (448 / largest) with three bits behind the first:
    the error is at most a sixteenth of the weight, or 2**-10 scales. A row whose largest weight is below 2**-119 becomes
    zero, with scale 0.

    Args:
        name: of the weight, in errors.
        weights: "int8" or "float8".
    Raises:
        UnsupportedError: values that are not floating point, NaN or infinite; another name.
    """
    kind = _kind_of(weights)
    if not matrix.dtype.is_floating_point:
        raise UnsupportedError(f"{name} is {matrix.dtype}: only floating point weights can be quantized.")
    wide = matrix.values.to(torch.float32)
    bad = ~torch.isfinite(wide)
    if bool(bad.any()):
        row = int(bad.any(1).nonzero()[0])
        raise UnsupportedError(
            f"{name} has {int(bad.sum())} kept values that are NaN or infinite, the first in row {row}: no {weights} stands"
            " for them. Leave the layer out with exclude=[...]."
        )
    values, scales = kind.quantize(wide)
    return SparseMatrix(values, matrix.metadata.clone(), matrix.pattern, matrix.shape), scales


def _kind_of(weights: str) -> Kind:
    if weights not in _KINDS:
        raise UnsupportedError(f"weights={weights!r}: they can be rounded to {' or '.join(WEIGHTS)}.")
    return _KINDS[weights]


class QuantizedSparseLinear(SparseLinear):
    """y = x @ W.T, scaled, + b, with an N:M weight of int8 or float8 (e4m3) and one float32 scale per output.

    With int8 inputs are quantized inside, each token by itself (`kernels.reference.linear_int8` says exactly how); no
    calibration. A token with NaN or infinity in it is NaN in every output. Gradients of the input go straight through the
    rounding; there is no forward-mode derivative. With float8 inputs are taken as they are
    (`kernels.reference.linear_float8`). `activation` follows in the same pass, as in a SparseLinear.

    The state dict has `weight.values` (int8 or float8_e4m3fn), `weight.metadata`, `weight.scales` (float32) and `bias`; a
    dense `weight` that holds the pattern is quantized when it is loaded. Scales stay float32 whatever the layer is
    converted to.

    Args:
        matrix: the int8 or float8_e4m3fn weight, [out_features, in_features].
        scales: float32 [out_features].
        bias: [out_features], or None; a Parameter is used as it is.
        backend: a row of the table of its dtype (`kernels.SCALED`), or None for the first that applies.
        dtype: what `weight.dtype` says: the dtype that the model's other layers compute in. Inputs may be of any.
    Raises:
        UnsupportedError: a matrix of another dtype, a backend that cannot run it. FormatError: scales that do not fit.

    >>> linear = nn.Linear(8, 2)
    >>> _ = linear.weight.data.copy_(torch.tensor([[1., 0, 0, 2, 0, 3, 4, 0], [0, 0, 1, 1, 1, 1, 0, 0]]))
    >>> QuantizedSparseLinear.from_linear(linear).matrix.values.tolist()
    [[32, 64, 95, 127], [127, 127, 127, 127]]
    """

    scales: Tensor

    def __init__(
        self,
        matrix: SparseMatrix,
        scales: Tensor,
        bias: Tensor | None = None,
        *,
        backend: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        if not isinstance(matrix, SparseMatrix) or matrix.dtype not in SCALED:
            given = matrix.dtype if isinstance(matrix, SparseMatrix) else type(matrix).__name__
            raise UnsupportedError(
                f"QuantizedSparseLinear takes an int8 or float8_e4m3fn SparseMatrix, not {given}:"
                " QuantizedSparseLinear.from_linear(linear) makes one of a Linear that is pruned."
            )
        _require_scales(scales, matrix)
        self.in_features = matrix.in_features
        self.out_features = matrix.out_features
        self.pattern = matrix.pattern
        self._pattern_text = f"{matrix.pattern.keep}:{matrix.pattern.group}"
        self._wanted_backend = backend
        self.dtype = dtype or (torch.float32 if bias is None else bias.dtype)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        self.register_parameter("bias", bias)
        choose(
            LinearSpec.of(matrix), backend, SCALED[matrix.dtype].kernels
        )  # refuses a backend that cannot run the matrix
        self.register_buffer("scales", scales.detach(), persistent=False)
        self._set_matrix(matrix)

    @staticmethod
    def from_matrix(
        matrix: SparseMatrix,
        bias: Tensor | None = None,
        *,
        backend: str | None = None,
        name: str = "weight",
        weights: str = "int8",
    ) -> QuantizedSparseLinear:
        """A layer of a floating point matrix, quantized row by row (`quantize_rows`)."""
        return QuantizedSparseLinear(*quantize_rows(matrix, name, weights), bias, backend=backend, dtype=matrix.dtype)

    @staticmethod
    def from_linear(
        linear: nn.Linear, pattern: Pattern | str = "2:4", *, backend: str | None = None, weights: str = "int8"
    ) -> QuantizedSparseLinear:
        """The int8 or float8 twin of a Linear whose weight already is N:M (PatternError otherwise). Shares its bias."""
        matrix = SparseMatrix.from_dense(linear.weight, pattern)
        layer = QuantizedSparseLinear.from_matrix(matrix, linear.bias, backend=backend, weights=weights)
        return layer.train(linear.training)

    @property
    def kind(self) -> Kind:
        """int8 or float8: its kernels, and how it is quantized."""
        return SCALED[self.values.dtype]

    def twin(self, bias: nn.Parameter | None) -> QuantizedSparseLinear:
        """Another layer on the same weight tensors, with its own bias."""
        other = QuantizedSparseLinear.__new__(QuantizedSparseLinear)
        nn.Module.__init__(other)
        self._tell(other)
        other.dtype = self.dtype
        other.register_parameter("bias", bias)
        for name in ("values", "metadata", "scales"):
            other.register_buffer(name, getattr(self, name), persistent=False)
        return other.train(self.training)

    def requires_grad_values(self, requires_grad: bool = True) -> QuantizedSparseLinear:
        """Refused: values of eight bits have no gradient. Train the layer before it is quantized."""
        if requires_grad:
            raise UnsupportedError(
                f"{self.kind.name} values have no gradient: train a SparseLinear and quantize it afterwards."
            )
        return self

    def dequantized(self) -> Tensor:
        """[out_features, in_features] of `dtype`: values times scales, zeros written out."""
        return (self.matrix.to_dense().to(torch.float32) * self.scales[:, None]).to(self.dtype)

    def to_linear(self) -> nn.Linear:
        """The dense twin in `dtype`: an nn.Linear of values times scales, zeros written out. Shares the bias.

        Raises:
            UnsupportedError: the layer applies an activation, which an nn.Linear cannot.
        """
        self._require_no_activation()
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=self.dtype)
        linear.weight = nn.Parameter(self.dequantized())
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    @property
    def _kernels(self) -> dict[str, Kernel]:
        return self.kind.kernels

    @property
    def weight(self) -> SparseWeight:
        """Shape and device of the weight, and the dtype that the layer computes among (`dtype`, not its own)."""
        return SparseWeight(torch.Size((self.out_features, self.in_features)), self.dtype, self.values.device)

    @property
    def nbytes(self) -> int:
        """Bytes the weight takes in memory, scales included; without the bias."""
        return super().nbytes + self.scales.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features] of x's dtype; under autocast of its dtype."""
        y = self._run(x)
        if not torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type) or x.dtype == torch.float64:
            return y
        return y.to(torch.get_autocast_dtype(x.device.type))

    def _run(self, x: Tensor) -> Tensor:
        held = self._buffers  # as in SparseLinear
        return self.kind.linear(
            self.backend,
            x,
            (held["values"], held["metadata"]),  # type: ignore[arg-type]
            held["scales"],  # type: ignore[arg-type]
            self._own("bias"),
            self._pattern_text,
            self.out_features,
            self.in_features,
            self.activation or "none",
        )

    def extra_repr(self) -> str:
        dtype = str(self.values.dtype).removeprefix("torch.")
        return super().extra_repr().replace(f"dtype={dtype}", f"weights={dtype}")

    def _set_matrix(self, matrix: SparseMatrix) -> None:
        spec = LinearSpec.of(matrix)
        wanted = self._wanted_backend
        kernels = SCALED[matrix.dtype].kernels
        fits = wanted in kernels and kernels[wanted].why_not(spec) is None
        kernel = choose(spec, wanted if fits else None, kernels).kernel
        operands = kernel.pack(matrix)
        self.backend = kernel.backend
        self._hold(*operands)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedSparseLinear:
        """Devices move the weight; dtypes only the bias and what `dtype` says."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.values.device))
        if probe.dtype not in _FLOATS:
            raise UnsupportedError(f"QuantizedSparseLinear cannot become {probe.dtype}: its inputs are floating point.")
        held = {name: getattr(self, name) for name in ("values", "metadata", "scales")}
        for name in held:
            delattr(self, name)
        nn.Module._apply(self, fn, recurse)
        for name, tensor in held.items():
            self.register_buffer(name, tensor, persistent=False)
        self.dtype = probe.dtype
        if probe.device != self.values.device:
            if self.values.is_meta:  # `to_empty`: any matrix will do, but it must be one
                zeros = torch.zeros(self.out_features, self.in_features, device=probe.device)
                matrix, scales = quantize_rows(SparseMatrix.from_dense(zeros, self.pattern), weights=self.kind.name)
            else:
                matrix, scales = self.matrix.to(probe.device), self.scales.to(probe.device)
            self.register_buffer("scales", scales, persistent=False)
            self._set_matrix(matrix)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight.scales"] = self.scales

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        parts = [prefix + "weight.values", prefix + "weight.metadata", prefix + "weight.scales"]
        compressed = all(key in state_dict for key in parts)
        ours = parts if compressed else [prefix + "weight"]
        theirs = {key: value for key, value in state_dict.items() if key not in ours}
        nn.Module._load_from_state_dict(
            self, theirs, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not all(key in state_dict for key in ours):
            missing_keys.extend(key for key in parts if key not in state_dict)
            return
        tensors = [state_dict[key] for key in ours]
        if not local_metadata.get("assign_to_params_buffers", False):
            tensors = [tensor.to(self.values.device) for tensor in tensors]
        try:
            if compressed:
                shape = (self.out_features, self.in_features)
                matrix = SparseMatrix(tensors[0].clone(), tensors[1].clone(), self.pattern, shape)
                scales = tensors[2].detach().clone()
                if matrix.dtype not in SCALED:
                    raise FormatError(f"values are {matrix.dtype}: they must be int8 or float8_e4m3fn.")
                _require_scales(scales, matrix)
            else:  # a dense checkpoint whose weight holds the pattern
                matrix = SparseMatrix.from_dense(tensors[0], self.pattern, name=prefix + "weight")
                if matrix.shape != (self.out_features, self.in_features):
                    raise FormatError(f"the weight is {list(matrix.shape)}, the layer {list(self.weight.shape)}.")
                matrix, scales = quantize_rows(matrix, prefix + "weight", self.kind.name)
            self.register_buffer("scales", scales, persistent=False)
            self._set_matrix(matrix)
        except TwofourError as error:
            error_msgs.append(f"{prefix}weight: {error}")


def _require_scales(scales: Tensor, matrix: SparseMatrix) -> None:
    if scales.dtype != torch.float32 or tuple(scales.shape) != (matrix.out_features,):
        raise FormatError(
            f"scales are {scales.dtype} {list(scales.shape)}: they must be float32 [{matrix.out_features}], one for each"
            " output."
        )
    if scales.device != matrix.device:
        raise FormatError(f"scales are on {scales.device}, values on {matrix.device}: put both on one.")
