"""Products for the tests of their kernels: arguments in guarded memory, and what is right, in double."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from tests.cuda import emulation
from tests.cuda.emulation import Guarded
from tests.cuda.test_layout import matrix_of
from torch import Tensor

from twofour.kernels import epilogue
from twofour.kernels.cuda import arguments, layout, packing, table
from twofour.kernels.cuda.packing import PackedMatrix
from twofour.kernels.cuda.products import linear

decoded = partial(linear, kernels="decode")
tiled = partial(linear, kernels="gemm")
DTYPES = list(arguments.NAMES)
E4M3 = torch.float8_e4m3fn
KINDS = [(dtype, dtype) for dtype in DTYPES] + [(dtype, E4M3) for dtype in arguments.NAMES_OF_E4M3]
"""Of x and of the weight, of all kernels for few tokens."""


def name_of(x: torch.dtype, weight: torch.dtype) -> str:
    """As kernels are called."""
    return arguments.NAMES_OF_E4M3[x] if weight == E4M3 else arguments.NAMES[x]


def packed_of(shape: tuple[int, int], dtype: torch.dtype) -> tuple[PackedMatrix, Tensor]:
    """A weight of whole numbers, and the dense one."""
    matrix = matrix_of(shape, dtype)
    return PackedMatrix(*layout.pack(matrix.values, matrix.metadata, *shape), shape), matrix.to_dense()


def numbers(shape: Sequence[int], dtype: torch.dtype, most: int, seed: int = 0) -> Tensor:
    return torch.randint(-most, most + 1, tuple(shape), generator=torch.Generator().manual_seed(seed)).to(dtype)


def powers(size: int, seed: int) -> Tensor:
    return 2.0 ** numbers((size,), torch.float32, 3, seed)


def activated(y: Tensor, activation: str) -> Tensor:
    """In forms that keep all digits where GELU decays to 0, as those of torch do not."""
    if activation == "gelu":
        return y * 0.5 * torch.special.erfc(-y * 0.5**0.5)
    if activation == "gelu_tanh":
        return y / (1 + torch.exp(-2 * (2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
    return epilogue.ACTIVATIONS[activation](y)


class Case:
    """A product of whole numbers. Rows of x and of the residual lie apart, with NaN, or what counts, between them."""

    def __init__(
        self,
        dtype: torch.dtype,
        tokens: int,
        shape: tuple[int, int],
        *,
        out: torch.dtype | None = None,
        bias: bool = False,
        scales: bool = False,
        activation: str = "none",
        residual: bool = False,
        weight: torch.dtype | None = None,
    ) -> None:
        rows, columns = shape
        self.weight = weight or dtype
        self.dtype, self.tokens, self.shape, self.activation = dtype, tokens, shape, activation
        self.out = out or (torch.bfloat16 if dtype.itemsize == 1 else dtype)
        self.packed, self.dense = packed_of(shape, self.weight)
        self.x = numbers((tokens, columns), dtype, 4, tokens)
        self.bias = numbers((rows,), self.out, 9, 1) if bias else None
        self.row_scale, self.token_scale = (powers(rows, 2), powers(tokens, 3)) if scales else (None, None)
        self.residual = numbers((tokens, rows), self.out, 9, 4) if residual else None
        self.y = Guarded(torch.full((tokens, rows), float("nan"), dtype=self.out))

    def wanted(self) -> Tensor:
        """In double."""
        y = self.x.double() @ self.dense.double().T
        if self.row_scale is not None and self.token_scale is not None:
            y = y * self.row_scale.double() * self.token_scale.double()[:, None]
        if self.bias is not None:
            y = y + self.bias.double()
        y = activated(y, self.activation)
        return y if self.residual is None else y + self.residual.double()

    def of_product(self) -> tuple[Guarded | int, ...]:
        items = 16 // self.dtype.itemsize  # rows begin at multiples of 16 bytes
        width = -(-self.shape[1] // items) * items
        stride = width + items
        x = _apart(self.x, stride, width)
        packed = self.packed
        return (
            Guarded(packed.values),
            Guarded(packed.metadata),
            Guarded(x),
            stride * x.itemsize,
            self.tokens,
            *self.shape,
        )

    def of_epilogue(self) -> tuple[Guarded | int | None, ...]:
        stride = self.shape[0] + 3
        residual = None if self.residual is None else Guarded(_apart(self.residual, stride, self.shape[0]))
        vectors = (None if each is None else Guarded(each) for each in (self.bias, self.row_scale, self.token_scale))
        activation = list(epilogue.ACTIVATIONS).index(self.activation)
        return (
            *vectors,
            residual,
            stride,
            activation,
            self.y,
            self.shape[0],
            arguments.ITEMS.index(self.out),
        )


def _apart(matrix: Tensor, stride: int, width: int) -> Tensor:
    """Rows `stride` items apart; memory ends `width` items after the beginning of the last one."""
    filler = 101 if matrix.dtype == torch.int8 else float("nan")
    whole = torch.full((len(matrix), stride), filler, dtype=matrix.dtype)
    whole[:, : matrix.shape[1]] = matrix
    return whole.flatten()[: (len(matrix) - 1) * stride + width]


def close(found: Tensor, wanted: Tensor, added: Tensor | float = 0.0) -> bool:
    """Within one unit in the last place, half of which is the rounding, and what computing in float32 costs: 16 units, and
    4 for each e that the result is away from 1, for so much does the rounding of an exponent do.

    Args:
        wanted: in double; NaN and infinities must be where it has them.
        added: the residual, as differences lose digits of what they are made of.
    """
    rounded = wanted.to(found.dtype).double()  # may be infinite
    info, found = torch.finfo(found.dtype), found.double()
    least = max(info.eps * info.tiny, 2.0**-115)  # functions below it may become 0
    same = (found == rounded) | (found.isnan() & wanted.isnan())
    added = torch.as_tensor(added).double()
    units = 16 + 4 * (wanted - added).abs().clamp_min(1e-300).log().abs()
    magnitude = wanted.abs() + added.abs()
    allowed = info.eps * wanted.abs() + units * 2.0**-24 * magnitude + least
    return bool((same | ((found - wanted).abs() <= allowed)).all())


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that ran, on the memory that they were given."""
    names: list[str] = []

    def launch(
        name: str, grid: Sequence[int], device: torch.device, *given: int, cluster: int = 1, early: bool = False
    ) -> None:
        names.append(name)
        emulation.launch(name, grid, table.KERNEL_TEXTS[name].threads, *given, cluster=cluster, early=early)

    monkeypatch.setattr(table, "launch", launch)
    for module in (packing, arguments):
        monkeypatch.setattr(module, "_on_gpu", lambda _: True)
    return names
