"""SparseLinear: a Linear whose weight is stored compressed and run by a kernel of the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..errors import TwofourError, UnsupportedError
from ..format import SparseMatrix
from ..kernels import KERNELS, Choice, LinearSpec, choose, ops
from ..pattern import Pattern


@dataclass(frozen=True, slots=True)
class SparseWeight:
    """What `SparseLinear.weight` returns: shape, dtype and device, as model code likes to ask; no numbers.

    Using it in a torch function raises UnsupportedError, because a dense weight would have to be made silently.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool = False

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        name = getattr(function, "__name__", str(function))
        raise UnsupportedError(
            f"torch.{name} was given the weight of a SparseLinear, which is stored compressed.\n"
            "  Call the layer itself, take layer.matrix.to_dense(), or leave the layer dense with exclude=[...]."
        )


class SparseLinear(nn.Module):
    """y = x @ W.T + b with an N:M weight that is held once, in the layout of the kernel that runs it.

    Its state dict has `weight.values`, `weight.metadata` (the canonical format, whatever the kernel) and `bias`. The kept
    values are constants: gradients flow to the input and the bias.

    Args:
        matrix: the weight, [out_features, in_features]; float32, float16 or bfloat16.
        bias: [out_features] of the matrix's dtype, or None; a Parameter is used as it is, so that it stays shared.
        backend: a kernel of the table, or None for the best that applies here.
    Raises:
        UnsupportedError: values of 8 bits (they need scales), or a backend that cannot run the matrix.
    """

    values: Tensor
    metadata: Tensor
    bias: nn.Parameter | None

    def __init__(self, matrix: SparseMatrix, bias: Tensor | None = None, *, backend: str | None = None) -> None:
        super().__init__()
        if matrix.dtype.itemsize == 1:
            raise UnsupportedError(f"SparseLinear runs float32, float16 and bfloat16 weights, not {matrix.dtype}.")
        self.in_features = matrix.in_features
        self.out_features = matrix.out_features
        self.pattern = matrix.pattern
        self._pattern_text = ops.pattern_text(matrix.pattern)
        self._wanted_backend = backend
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        self.register_parameter("bias", bias)
        self._set_matrix(matrix)

    @staticmethod
    def from_linear(linear: nn.Linear, pattern: Pattern | str = "2:4", *, backend: str | None = None) -> SparseLinear:
        """The compressed twin of a Linear whose weight already is N:M (PatternError otherwise). Shares its bias."""
        matrix = SparseMatrix.from_dense(linear.weight, pattern)
        return SparseLinear(matrix, linear.bias, backend=backend).train(linear.training)

    def twin(self, bias: nn.Parameter | None) -> SparseLinear:
        """Another layer on the same weight tensors, with its own bias: for weights that are shared between layers."""
        other = SparseLinear.__new__(SparseLinear)
        nn.Module.__init__(other)
        for name in ("in_features", "out_features", "pattern", "_pattern_text", "backend", "_wanted_backend"):
            setattr(other, name, getattr(self, name))
        other.register_parameter("bias", bias)
        other.register_buffer("values", self.values, persistent=False)
        other.register_buffer("metadata", self.metadata, persistent=False)
        return other.train(self.training)

    def to_linear(self) -> nn.Linear:
        """The dense twin: an nn.Linear with the zeros written out. Shares the bias."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=self.values.dtype)
        linear.weight = nn.Parameter(self.matrix.to_dense())
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    @property
    def matrix(self) -> SparseMatrix:
        """The weight in canonical form, made anew from the kernel's layout (bit for bit)."""
        return KERNELS[self.backend].unpack((self.values, self.metadata), self.spec)

    @property
    def spec(self) -> LinearSpec:
        """What the table of kernels knows of this layer."""
        return LinearSpec(self.out_features, self.in_features, self.pattern, self.values.dtype, self.values.device)

    @property
    def choice(self) -> Choice:
        """The kernel that runs, and why no faster one does."""
        return choose(self.spec, self._wanted_backend)

    @property
    def weight(self) -> SparseWeight:
        """Shape, dtype and device of the weight; for its numbers use `matrix.to_dense()`."""
        return SparseWeight(torch.Size((self.out_features, self.in_features)), self.values.dtype, self.values.device)

    @property
    def nbytes(self) -> int:
        """Bytes the weight takes in memory (rows padded to the kernel's tile); without the bias."""
        return self.values.nbytes + self.metadata.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]; under autocast computed in the weight's dtype."""
        result_dtype = x.dtype
        if x.dtype != self.values.dtype and torch.is_autocast_enabled(x.device.type):
            x = x.to(self.values.dtype)
            result_dtype = torch.get_autocast_dtype(x.device.type)
        y = ops.linear(
            self.backend,
            x,
            (self.values, self.metadata),
            self.bias,
            self._pattern_text,
            self.out_features,
            self.in_features,
        )
        return y if y.dtype == result_dtype else y.to(result_dtype)

    def extra_repr(self) -> str:
        dtype = str(self.values.dtype).removeprefix("torch.")
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None},"
            f" pattern={self.pattern}, dtype={dtype}, kernel={self.backend}"
        )

    def _set_matrix(self, matrix: SparseMatrix) -> None:
        kernel = choose(LinearSpec.of(matrix), self._wanted_backend).kernel
        values, metadata = kernel.pack(matrix)
        self.backend = kernel.backend
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("metadata", metadata, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        """Moves and converts by way of the canonical matrix: another device or dtype may need another kernel."""
        matrix = self.matrix
        probe = fn(matrix.values.new_empty(0))
        if (probe.dtype, probe.device) == (matrix.dtype, matrix.device):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        if probe.dtype.itemsize == 1 or not probe.dtype.is_floating_point:
            raise UnsupportedError(f"SparseLinear cannot become {probe.dtype}: it runs float32, float16 and bfloat16.")
        values = fn(matrix.values)
        moved = SparseMatrix(values, matrix.metadata.to(values.device), matrix.pattern, matrix.shape)
        del self.values, self.metadata
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._wanted_backend is not None and KERNELS[self._wanted_backend].why_not(LinearSpec.of(moved)) is not None:
            self._wanted_backend = None
        self._set_matrix(moved)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        matrix = self.matrix
        destination[prefix + "weight.values"] = matrix.values
        destination[prefix + "weight.metadata"] = matrix.metadata

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
        keys = {part: f"{prefix}weight.{part}" for part in ("values", "metadata")}
        ours = [key for key in (*keys.values(), prefix + "weight") if key in state_dict]
        theirs = {key: value for key, value in state_dict.items() if key not in ours}
        super()._load_from_state_dict(theirs, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        shape = (self.out_features, self.in_features)
        device, dtype = self.values.device, self.values.dtype
        try:
            if all(key in state_dict for key in keys.values()):
                values, metadata = (state_dict[keys[part]].to(device) for part in ("values", "metadata"))
                self._set_matrix(SparseMatrix(values.to(dtype).clone(), metadata.clone(), self.pattern, shape))
            elif prefix + "weight" in state_dict:  # a dense checkpoint whose weight holds the pattern
                weight = state_dict[prefix + "weight"].to(device=device, dtype=dtype)
                self._set_matrix(SparseMatrix.from_dense(weight, self.pattern, name=prefix + "weight"))
            else:
                missing_keys.extend(key for key in keys.values() if key not in state_dict)
        except TwofourError as error:
            error_msgs.append(f"{prefix}weight: {error}")
