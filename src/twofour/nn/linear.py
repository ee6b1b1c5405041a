"""SparseLinear: a Linear whose weight is stored compressed and run by a kernel of the table."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import TwofourError, UnsupportedError
from ..format import SparseMatrix
from ..kernels import KERNELS, Choice, Kernel, LinearSpec, choose, ops
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

    @property
    def ndim(self) -> int:
        """2."""
        return len(self.shape)

    def dim(self) -> int:
        """2."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> torch.Size | int:
        """The shape, or one axis of it."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """Weights of the dense matrix."""
        return self.shape.numel()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        name = getattr(function, "__name__", str(function))
        raise UnsupportedError(
            f"torch.{name} was given the weight of a SparseLinear, which is stored compressed.\n"
            "  Call the layer itself, take layer.matrix.to_dense(), or leave the layer dense with exclude=[...]."
        )


_moved: Any = WeakIdKeyDictionary()
"""Values that another device or dtype replaced -> the layer that holds them now; for weights that layers share."""


class SparseLinear(nn.Module):
    """y = x @ W.T + b with an N:M weight that is held once, in the layout of the kernel that runs it.

    Its state dict has `weight.values`, `weight.metadata` (the canonical format, whatever the kernel) and `bias`. The kept
    values are constants: gradients flow to the input and the bias. `requires_grad_values()` makes them a Parameter.

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
    activation: str | None = None
    """What the layer applies to its output in the same pass (`twofour.fuse` sets it): "relu", "gelu", "gelu_tanh", "silu"."""

    def __init__(self, matrix: SparseMatrix, bias: Tensor | None = None, *, backend: str | None = None) -> None:
        super().__init__()
        if not isinstance(matrix, SparseMatrix):
            raise UnsupportedError(
                f"SparseLinear takes a SparseMatrix, not a {type(matrix).__name__}: SparseLinear.from_linear(linear) makes"
                " one of a Linear that is pruned."
            )
        if matrix.dtype.itemsize == 1:
            raise UnsupportedError(f"SparseLinear runs float32, float16 and bfloat16 weights, not {matrix.dtype}.")
        choose(LinearSpec.of(matrix), backend)  # refuses a backend that cannot run the matrix
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
        self._tell(other)
        other.register_parameter("bias", bias)
        other._hold(self.values, self.metadata)
        return other.train(self.training)

    def _tell(self, other: SparseLinear) -> None:
        """Gives a twin what is no tensor."""
        for name in (
            "in_features",
            "out_features",
            "pattern",
            "_pattern_text",
            "backend",
            "_wanted_backend",
            "activation",
        ):
            setattr(other, name, getattr(self, name))

    def requires_grad_values(self, requires_grad: bool = True) -> SparseLinear:
        """Makes the kept values a Parameter, `values`, that optimizers train; with False constants again. Returns the layer.

        The Parameter and its gradient have the layout of the kernel (rows beyond out_features are and stay 0); dropped
        places have no gradient at all. The state dict stays as it was. `.to()` another dtype converts the same Parameter
        object and forgets its gradient, so make optimizers after it: their state has the layout too.

        Raises:
            UnsupportedError: the kernel that runs the layer has no gradient of its values (the dense one of oneDNN).

        >>> layer = SparseLinear(SparseMatrix.from_dense(torch.eye(4))).requires_grad_values()
        >>> [name for name, _ in layer.named_parameters()], sorted(layer.state_dict())
        (['values'], ['weight.metadata', 'weight.values'])
        """
        if requires_grad and self.backend not in ops.TRAINABLE:
            raise UnsupportedError(
                f"backend {self.backend!r} has no gradient of the values: SparseLinear(layer.matrix, layer.bias) runs on a"
                " kernel that has."
            )
        values = self.values
        if isinstance(values, nn.Parameter):
            if requires_grad:
                values.requires_grad_()
                return self
            values = values.detach()
        elif requires_grad:
            values = nn.Parameter(values)
        metadata = self.metadata
        del self.values, self.metadata
        self._hold(values, metadata)
        return self

    def to_linear(self) -> nn.Linear:
        """The dense twin: an nn.Linear with the zeros written out. Shares the bias.

        Raises:
            UnsupportedError: the layer applies an activation, which an nn.Linear cannot.
        """
        self._require_no_activation()
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=self.values.dtype)
        linear.weight = nn.Parameter(self.matrix.to_dense())
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def _require_no_activation(self) -> None:
        if self.activation is not None:
            raise UnsupportedError(
                f"the layer applies {self.activation!r} itself: take that out first, with twofour.unfuse(model)."
            )

    @property
    def matrix(self) -> SparseMatrix:
        """The weight in canonical form, made anew from the kernel's layout (bit for bit)."""
        return self._kernels[self.backend].unpack((self.values.detach(), self.metadata), self.spec)

    @property
    def _kernels(self) -> dict[str, Kernel]:
        return KERNELS

    @property
    def spec(self) -> LinearSpec:
        """What the table of kernels knows of this layer."""
        return LinearSpec(self.out_features, self.in_features, self.pattern, self.values.dtype, self.values.device)

    @property
    def choice(self) -> Choice:
        """The kernel that runs, and why no faster one does."""
        best = choose(self.spec, kernels=self._kernels)
        if best.kernel.backend == self.backend:
            slower = best.kernel.why_slower((self.values.detach(), self.metadata), self.spec)
            if slower is None:
                return best
            return Choice(best.kernel, (*best.rejected, (f"{self.backend} as {self.pattern}", slower)))
        return Choice(self._kernels[self.backend], ((best.kernel.backend, f"backend={self.backend!r} was asked for"),))

    @property
    def weight(self) -> SparseWeight:
        """Shape, dtype and device of the weight; for its numbers use `matrix.to_dense()`."""
        shape = torch.Size((self.out_features, self.in_features))
        return SparseWeight(shape, self.values.dtype, self.values.device, self.values.requires_grad)

    @property
    def nbytes(self) -> int:
        """Bytes the weight takes in memory (rows padded to the kernel's tile); without the bias."""
        return self.values.nbytes + self.metadata.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features] of x's dtype; under autocast of its dtype, computed in the weight's."""
        if not torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type):  # the type costs 0.2 us
            return self._run(x)
        if not x.dtype.is_floating_point or x.dtype == torch.float64:  # autocast leaves these alone
            return self._run(x)
        return self._run(x.to(self.values.dtype)).to(torch.get_autocast_dtype(x.device.type))

    def _run(self, x: Tensor) -> Tensor:
        # Not by attribute: Module.__getattr__ costs 0.5 us each time.
        values = self._buffers["values"] if "values" in self._buffers else self._own("values")
        return ops.linear(
            self.backend,
            x,
            (values, self._buffers["metadata"]),  # type: ignore[arg-type]
            self._own("bias"),
            self._pattern_text,
            self.out_features,
            self.in_features,
            self.activation or "none",
        )

    def _own(self, name: str) -> Any:
        """A parameter; replicas and parametrizations hold it as another kind of attribute."""
        parameters = self._parameters
        if name in parameters:
            return parameters[name]
        return getattr(self, name)

    def extra_repr(self) -> str:
        dtype = str(self.values.dtype).removeprefix("torch.")
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None},"
            f" pattern={self.pattern}, dtype={dtype}, kernel={self.backend}"
            + ("" if self.activation is None else f", activation={self.activation}")
        )

    def _set_matrix(self, matrix: SparseMatrix) -> None:
        spec = LinearSpec.of(matrix)
        wanted = self._wanted_backend
        kernel = choose(spec, None if wanted is None or KERNELS[wanted].why_not(spec) else wanted).kernel
        operands = kernel.pack(matrix)
        self.backend = kernel.backend
        self._hold(*operands)

    def _hold(self, values: Tensor, metadata: Tensor) -> None:
        """Registers both; where the values are a Parameter already, it stays the same object with new contents."""
        self.register_buffer("metadata", metadata, persistent=False)
        parameter = self._parameters.get("values")
        if isinstance(values, nn.Parameter):
            self.register_parameter("values", values)
        elif parameter is None:
            self.register_buffer("values", values, persistent=False)
        elif parameter.device == values.device:  # optimizers hold on to it
            if (parameter.shape, parameter.dtype) != (values.shape, values.dtype):
                parameter.grad = None
            parameter.data = values
        else:
            self.register_parameter("values", nn.Parameter(values, parameter.requires_grad))

    @contextlib.contextmanager
    def _without_values(self) -> Iterator[None]:
        """Hides the values from what nn.Module does with every parameter."""
        parameter = self._parameters.pop("values", None)
        try:
            yield
        finally:
            if parameter is not None:
                self.register_parameter("values", parameter)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        """Moves and converts by way of the canonical matrix: another device or dtype may need another kernel."""
        values, metadata = self.values, self.metadata
        trained = isinstance(values, nn.Parameter)
        probe = fn(values.detach().new_empty(0))
        before = _moved.get(values)  # a layer that shares this weight may have moved it already
        if (probe.dtype, probe.device) == (values.dtype, values.device):
            if trained and before is not None and before.values is values:
                metadata, self.backend = before.metadata, before.backend
            del (
                self.metadata,
                self.values,
            )  # a kernel's layout is not for others to change (memory formats, for instance)
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            self._hold(values, metadata)
            return self
        if probe.dtype.itemsize == 1 or not probe.dtype.is_floating_point:
            raise UnsupportedError(f"SparseLinear cannot become {probe.dtype}: it runs float32, float16 and bfloat16.")
        if before is None or (before.values.dtype, before.values.device) != (probe.dtype, probe.device):
            if values.is_meta:  # `to_empty`: any matrix will do, but it must be one
                zeros = torch.zeros(self.out_features, self.in_features, dtype=probe.dtype, device=probe.device)
                moved = SparseMatrix.from_dense(zeros, self.pattern)
            else:
                matrix = self.matrix
                converted = fn(matrix.values)
                moved = SparseMatrix(converted, matrix.metadata.to(converted.device), matrix.pattern, matrix.shape)
            self._set_matrix(moved)
            _moved[values] = before = self
        moved_values, moved_metadata, self.backend = before.values, before.metadata, before.backend
        del self.values, self.metadata
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._hold(moved_values, moved_metadata)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseLinear:
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        if id(self.values) not in memo and not isinstance(self.values, nn.Parameter):  # a layout not for others to copy
            memo[id(self.values)], memo[id(self.metadata)] = self._kernels[self.backend].copy(
                (self.values, self.metadata), self.spec
            )
        other.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return other

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the canonical matrix, not the layout of this machine's kernel."""
        state = dict(self.__dict__)
        state["_buffers"] = {name: None if name in ("values", "metadata") else x for name, x in self._buffers.items()}
        state["_parameters"] = {name: x for name, x in self._parameters.items() if name != "values"}
        state["_matrix"] = self.matrix
        state["_trained"] = self.values.requires_grad if isinstance(self.values, nn.Parameter) else None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        matrix, trained = state.pop("_matrix"), state.pop("_trained", None)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._set_matrix(matrix)
        if trained is not None:
            self.requires_grad_values().values.requires_grad_(trained)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        with self._without_values():
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
        parts = [prefix + "weight.values", prefix + "weight.metadata"]
        compressed = all(key in state_dict for key in parts)
        ours = parts if compressed else [prefix + "weight"]
        theirs = {key: value for key, value in state_dict.items() if key not in ours}
        with self._without_values():
            super()._load_from_state_dict(
                theirs, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        if not all(key in state_dict for key in ours):
            missing_keys.extend(key for key in parts if key not in state_dict)
            return
        tensors = [state_dict[key] for key in ours]
        if not local_metadata.get("assign_to_params_buffers", False):
            tensors[0] = tensors[0].to(self.values.dtype)
            tensors = [tensor.to(self.values.device) for tensor in tensors]
        try:
            if compressed:
                shape = (self.out_features, self.in_features)
                self._set_matrix(SparseMatrix(tensors[0].clone(), tensors[1].clone(), self.pattern, shape))
            else:  # a dense checkpoint whose weight holds the pattern
                self._set_matrix(SparseMatrix.from_dense(tensors[0], self.pattern, name=prefix + "weight"))
        except TwofourError as error:
            error_msgs.append(f"{prefix}weight: {error}")
