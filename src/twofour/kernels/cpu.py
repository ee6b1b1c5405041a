"""The CPU kernels: 2:4 linear layers on the native module, torch tensors in and out.

The kernels read a layout of their own (`pack`, drawn in csrc/nm/layout.h), which holds the same bits as the canonical
format with the rows rounded up to whole tiles of 16. Masks that 2 or 4 rows share are stored once. Where such rows are
not neighbours but lie inside windows of WINDOW_ROWS rows, the layout moves them together and remembers the order: outputs
and speed are those of neighbours. The instruction set is chosen at run time; `TWOFOUR_ISA` (baseline;
avx2, avx512, avx512bf16; neon, neonbf16) overrides the choice.
"""

from __future__ import annotations

import math
import sys
import threading
from types import ModuleType
from typing import Literal, NoReturn

import torch
from torch import Tensor

from .. import native
from ..errors import PatternError, ShapeError, UnsupportedError
from ..masks.rows import WINDOW_ROWS
from ..native import empty as empty

TILE_ROWS = 16
"""Output rows of a tile of the CPU layout."""

Family = Literal["few", "many"]
"""Kernels for few tokens (output rows in the vector lanes) and for many (tokens in the lanes)."""

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_TYPES = {  # of the values and of x
    (torch.float32, torch.float32): 0,
    (torch.bfloat16, torch.bfloat16): 1,
    (torch.bfloat16, torch.float32): 2,
    (torch.float8_e4m3fn, torch.float32): 3,
    (torch.float8_e4m3fn, torch.bfloat16): 4,
}
_FAMILIES: dict[str | None, int] = {None: 0, "few": 1, "many": 2}
_ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
_SHARED = {TILE_ROWS // 2 // rows: rows for rows in (1, 2, 4)}  # by the bytes of metadata of a tile's group

_native = native.LOADED


def _why_unavailable() -> str | None:
    if _native is None:
        return native.MISSING
    try:
        _native.isa()
    except ValueError as error:
        return str(error)
    return None


_UNAVAILABLE = _why_unavailable()


def available() -> str | None:
    """None where the native kernels can run, otherwise the reason why they cannot. Found once, at import."""
    return _UNAVAILABLE


def isa() -> str:
    """The instruction set that runs by default: the best one of this machine, or the one TWOFOUR_ISA names.

    Raises:
        UnsupportedError: no native kernels in this build, or TWOFOUR_ISA names a set that this machine lacks.
    """
    try:
        name: str = _module().isa()
    except ValueError as error:
        raise UnsupportedError(str(error)) from None
    return name


def isas() -> list[str]:
    """The instruction sets that this build holds and this machine runs, plainest first."""
    names: list[str] = _module().isas()
    return names


def threads_source() -> str:
    """Where threads come from: "libgomp" (torch's own workers) or "pool"."""
    source: str = _module().threads_source()
    return source


def shared_rows(metadata: Tensor) -> int:
    """4, 2 or 1: how many neighbouring rows (0 ... 3, 4 ... 7, ...) have one mask everywhere in the canonical metadata.

    Two or four, and one load of an activation serves as many rows: "2:4x4" runs up to twice as fast as dense.
    """
    for rows in (4, 2):
        if metadata.shape[0] % rows == 0:
            blocks = metadata.view(-1, rows, metadata.shape[1])
            if torch.equal(blocks, blocks[:, :1].expand_as(blocks)):
                return rows
    return 1


def row_order(metadata: Tensor) -> tuple[int, Tensor | None]:
    """How many rows share a mask, 4, 2 or 1, and the order in which they are neighbours; None where they are already.

    Rows with equal masks may lie anywhere inside a window of WINDOW_ROWS rows (0 ... 63, 64 ... 127, ..): the kernels run
    them as fast as neighbours. Further apart, every row loads its own activations.

    Args:
        metadata: [out_features, bytes] uint8, canonical.
    Returns:
        (shared, order); order uint8, one for each row of the tiles: which row of its window lies there.
    Cost: reads the metadata once or twice.

    >>> masks = torch.tensor([[0x44], [0xEE]], dtype=torch.uint8)
    >>> shared, order = row_order(masks.repeat(4, 1))
    >>> shared, order.tolist()[:8]
    (4, [0, 2, 4, 6, 1, 3, 5, 7])
    >>> row_order(masks.repeat_interleave(4, 0))
    (4, None)
    """
    out_features, row_bytes = metadata.shape
    neighbours = shared_rows(metadata)
    metadata = metadata.contiguous()
    for rows in (4, 2):
        if neighbours % rows == 0:
            return rows, None
        if out_features % rows == 0 and metadata.numel():
            order = torch.empty(-(-out_features // TILE_ROWS) * TILE_ROWS, dtype=torch.uint8)
            if _module().order_rows(metadata.data_ptr(), out_features, 8 * row_bytes, rows, order.data_ptr()):
                return rows, order
    return 1, None


def packed_shapes(
    out_features: int, in_features: int, dtype: torch.dtype, shared: int = 1, ordered: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the values and of the metadata (uint8) in the CPU layout; `shared` neighbouring rows have one mask.

    With an order both lie in one row of bytes, the metadata first.

    >>> packed_shapes(100, 64, torch.float32)
    ((7, 16, 2, 16), (7, 16, 8))
    >>> packed_shapes(100, 64, torch.bfloat16)
    ((7, 16, 16, 2), (7, 16, 8))
    >>> packed_shapes(100, 64, torch.float32, shared=4)
    ((7, 16, 2, 16), (7, 16, 2))
    >>> packed_shapes(100, 64, torch.float32, shared=4, ordered=True)
    ((7, 16, 2, 16), (336,))
    """
    tiles, groups = -(-out_features // TILE_ROWS), in_features // 4
    tile = (2, TILE_ROWS) if dtype == torch.float32 else (TILE_ROWS, 2)
    of_masks = (tiles, groups, TILE_ROWS // 2 // shared)
    return (tiles, groups, *tile), (math.prod(of_masks) + tiles * TILE_ROWS,) if ordered else of_masks


def packed_sharing(metadata: Tensor, out_features: int, in_features: int) -> int:
    """How many rows share a mask in the packed metadata: 4, 2 or 1."""
    tiles, groups = -(-out_features // TILE_ROWS), in_features // 4
    order = tiles * TILE_ROWS if metadata.ndim == 1 else 0
    return _SHARED.get((metadata.numel() - order) // (tiles * groups or 1), 1)


def held_order(metadata: Tensor, out_features: int) -> tuple[Tensor, Tensor | None]:
    """The packed metadata without the order, and int64 [out_features], the row that lies at each place; None without."""
    if metadata.ndim != 1:
        return metadata, None
    places = -(-out_features // TILE_ROWS) * TILE_ROWS
    return metadata[:-places], _rows_at(metadata[-places:])[:out_features]


def pack(
    values: Tensor,
    metadata: Tensor,
    out_features: int,
    in_features: int,
    shared: int = 1,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The canonical values and metadata of a 2:4 matrix in the CPU layout.

    Args:
        values: [out_features, in_features / 2] float32, bfloat16 or float8_e4m3fn.
        metadata: [out_features, ceil(in_features / 8)] uint8, as in SparseMatrix.
        shared: 1, 2 or 4: the mask of so many neighbouring rows is stored once.
        order: with `shared` what `row_order(metadata)` gave. None: the rows as they are.
    Returns:
        values and metadata of `packed_shapes`; the bits of every kept value as they were.
    Raises:
        ShapeError: tensors of other shapes, in_features not a multiple of 4; masks that are not shared so, or no order.
        UnsupportedError: another dtype, a tensor that is not on the CPU.
    Cost: reads and writes the matrix once, on one thread.
    """
    native = _module()
    _require_weight(values, metadata, out_features, in_features)
    _require_shape("values", values, (out_features, in_features // 2))
    _require_shape("metadata", metadata, (out_features, -(-in_features // 8)))
    arranged = metadata
    if order is not None:
        _require_order(order, out_features)
        order = order.contiguous()
        arranged = metadata[_rows_at(order)[:out_features]]
    if shared not in (1, 2, 4) or (shared > 1 and shared_rows(arranged) % shared):
        raise ShapeError(
            f"shared={shared}: it must be 1, 2 or 4, and the masks of as many neighbouring rows equal; here"
            f" {shared_rows(arranged)} are. Pass shared, order = row_order(metadata)."
        )
    values, metadata = values.detach().contiguous(), metadata.contiguous()
    values_shape, metadata_shape = packed_shapes(out_features, in_features, values.dtype, shared, order is not None)
    packed = empty(values_shape, values.dtype), empty(metadata_shape, torch.uint8)
    native.pack_linear(
        values.data_ptr(),
        metadata.data_ptr(),
        packed[0].data_ptr(),
        packed[1].data_ptr(),
        out_features,
        in_features,
        values.itemsize,
        shared,
        0 if order is None else order.data_ptr(),
    )
    if order is not None:
        packed[1][-len(order) :] = order
    return packed


def copy(values: Tensor, metadata: Tensor) -> tuple[Tensor, Tensor]:
    """Both, in memory as `pack` takes it."""
    return empty(tuple(values.shape), values.dtype).copy_(values), empty(tuple(metadata.shape), metadata.dtype).copy_(
        metadata
    )


class PackedMemory:
    """Memory for weights that are packed again and again: what one step lets go of serves the next.

    Large blocks that go back to the system come again as pages to be zeroed, which takes as long as packing. Tensors that
    `take` gives are in use as long as anybody holds them (a graph that keeps them for its backward pass does); views of
    them do not count.
    """

    def __init__(self) -> None:
        self._pairs: dict[tuple[int, int, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
        self._lock = threading.Lock()

    def __deepcopy__(self, _: object) -> PackedMemory:
        return self

    def __reduce__(self) -> tuple[type[PackedMemory], tuple[()]]:
        return PackedMemory, ()

    def take(self, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Values and metadata of `packed_shapes`, of any content."""
        if not getattr(sys, "_is_gil_enabled", lambda: True)():
            return _empty_packed(out_features, in_features, dtype)  # counts of references mean nothing there
        with self._lock:
            pairs = self._pairs.setdefault((out_features, in_features, dtype), [])
            for pair in pairs:
                if _references(pair) == _UNUSED:
                    return pair[0], pair[1]
            pairs.append(_empty_packed(out_features, in_features, dtype))
            return pairs[-1][0], pairs[-1][1]


def _references(pair: tuple[Tensor, Tensor]) -> int:
    return sys.getrefcount(pair[0]) + sys.getrefcount(pair[1])


_UNUSED = _references((torch.empty(0), torch.empty(0)))


def pack_masked(
    weight: Tensor, mask: Tensor, *, both_ways: bool = False, memory: PackedMemory | None = None, isa: str | None = None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """A dense weight, where `mask` keeps it, in the CPU layout, and its transpose in the same pass: what training packs.

    The values of dropped places are not looked at. Each row of a tile has its own nibble, as with `pack(shared=1)`.

    Args:
        weight: [out_features, in_features] float32 or bfloat16; any strides, though only dense rows avoid a copy.
        mask: bool of the same shape, two True in each four neighbours of a row; with `both_ways` of a column too.
        both_ways: pack the transpose as well; out_features must be a multiple of 4 then.
        memory: where results go; None allocates.
        isa: one of `native.module().pack_masked_isas()`; None takes the best.
    Returns:
        values and metadata of `packed_shapes(out_features, in_features, dtype)`, and those of the transpose or None.
    Raises:
        ShapeError: shapes that do not fit each other, axes that are no multiples of 4.
        PatternError: a group of the mask does not keep two.
        UnsupportedError: another dtype, a tensor that is not on the CPU.
    Cost: reads weight and mask once: 4096x1024 in bfloat16, both ways, takes a core of Zen 5 about as long as two copies.
    """
    native = _module()
    if weight.ndim != 2 or weight.shape != mask.shape:
        raise ShapeError(
            f"weight is {list(weight.shape)} and mask {list(mask.shape)}: two matrices of one shape are needed."
        )
    if weight.dtype not in _DTYPES or not weight.is_cpu or mask.dtype != torch.bool or not mask.is_cpu:
        raise UnsupportedError(
            f"weight is {weight.dtype} on {weight.device}, mask {mask.dtype} on {mask.device}: float32 or bfloat16 and bool,"
            " both on the CPU, can be packed."
        )
    out_features, in_features = weight.shape
    if in_features % 4 or (both_ways and out_features % 4) or not weight.numel():
        axes = "both axes" if both_ways else "in_features"
        raise ShapeError(f"weight is {list(weight.shape)}: its groups of 4 along {axes} must be whole.")
    weight, mask = weight.detach(), mask.contiguous()
    if weight.stride(1) != 1 or weight.stride(0) < in_features:
        weight = weight.contiguous()
    allocate = _empty_packed if memory is None else memory.take
    found, turned = allocate(out_features, in_features, weight.dtype), None
    if both_ways:
        turned = allocate(in_features, out_features, weight.dtype)
    try:
        sound = native.pack_masked(
            weight.data_ptr(),
            mask.data_ptr(),
            found[0].data_ptr(),
            found[1].data_ptr(),
            0 if turned is None else turned[0].data_ptr(),
            0 if turned is None else turned[1].data_ptr(),
            out_features,
            in_features,
            weight.stride(0),
            weight.itemsize,
            torch.get_num_threads(),
            isa,
        )
    except ValueError as error:
        raise UnsupportedError(str(error)) from None
    if not sound:
        raise PatternError(
            f"the mask of a [{out_features}, {in_features}] weight does not keep two of each four"
            f"{' along both axes' if both_ways else ''}: take nm_mask(scores, '{'2:4t' if both_ways else '2:4'}')."
        )
    return found, turned


def _empty_packed(out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    values, metadata = packed_shapes(out_features, in_features, dtype)
    return empty(values, dtype), empty(metadata, torch.uint8)


def unpack(values: Tensor, metadata: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """The inverse of `pack`: canonical values [out_features, in_features / 2] and metadata, bit for bit."""
    native = _module()
    shared = _require_packed(values, metadata, out_features, in_features)
    values, metadata = values.detach().contiguous(), metadata.contiguous()
    canonical = (
        torch.empty((out_features, in_features // 2), dtype=values.dtype),
        torch.empty((out_features, -(-in_features // 8)), dtype=torch.uint8),
    )
    native.unpack_linear(
        values.data_ptr(),
        metadata.data_ptr(),
        canonical[0].data_ptr(),
        canonical[1].data_ptr(),
        out_features,
        in_features,
        values.itemsize,
        shared,
        _order_address(metadata, out_features),
    )
    return canonical


def linear(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    *,
    isa: str | None = None,
    kernel: Family | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """y = activation(x @ W.T * scales + bias) + residual for a 2:4 matrix W in the CPU layout, on torch.get_num_threads()
    threads.

    Sums and functions are float32 and y is rounded once. inf and NaN in x at dropped positions do not reach y. The bits
    of y do not depend on the number of threads.

    Args:
        x: [tokens, in_features], dtype of `values`, or float32 with bfloat16 values, or either with float8; any strides,
            though only a contiguous last axis avoids a copy.
        values, metadata: what `pack` returned.
        bias: [out_features] float32 or bfloat16, or None.
        isa: instruction set, one of `isas()`; None for `isa()`.
        kernel: "few" or "many"; None for the faster one at this number of tokens.
        activation: "none", "relu", "gelu" (by erf), "gelu_tanh" or "silu".
        residual: [tokens, out_features] of x's dtype, or None; only a contiguous last axis avoids a copy.
        scales: float32 [out_features], or None.
    Returns:
        [tokens, out_features], contiguous, dtype of x.
    Raises:
        ShapeError: shapes that do not fit each other.
        UnsupportedError: another dtype or device; an instruction set that this machine lacks; no native kernels.
    """
    # One condition, so that a call that is right costs 3 us less than with the checks one by one.
    tiles, groups = -(-out_features // TILE_ROWS), in_features // 4
    types = _TYPES.get((values.dtype, x.dtype))
    order = tiles * TILE_ROWS if metadata.ndim == 1 else 0  # bytes, behind those of the masks
    masks = metadata.numel() - order
    shared = _SHARED.get(masks // (tiles * groups or 1))
    if not (
        _native is not None
        and x.ndim == 2
        and x.shape[1] == in_features
        and types is not None
        and values.numel() == tiles * groups * 2 * TILE_ROWS
        and shared is not None
        and masks * shared == tiles * groups * TILE_ROWS // 2
        and metadata.dtype == torch.uint8
        and values.is_contiguous()
        and metadata.is_contiguous()
        and x.is_cpu
        and values.is_cpu
        and metadata.is_cpu
        and (bias is None or (bias.is_cpu and bias.numel() == out_features and bias.dtype in _DTYPES))
    ):
        _explain(x, values, metadata, bias, out_features, in_features)
    if activation != "none" or residual is not None:
        _require_epilogue(x, activation, residual, out_features)
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if scales is not None:
        _require_scales(scales, out_features)
        scales = scales.contiguous()
    tokens = x.shape[0]
    x_stride, inner = x.stride()
    if inner != 1 or (tokens > 1 and x_stride < in_features):
        x = x.contiguous()
        x_stride = in_features
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    y = empty((tokens, out_features), x.dtype)
    try:
        _native.linear(
            x.data_ptr(),
            values.data_ptr(),
            metadata.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            tokens,
            out_features,
            in_features,
            x_stride,
            out_features,
            types,
            torch.get_num_threads(),
            _FAMILIES[kernel],
            isa,
            0 if bias is None else _DTYPES[bias.dtype],
            shared,
            _ACTIVATIONS[activation],
            0 if residual is None else residual.data_ptr(),
            0 if residual is None else residual.stride(0),
            metadata.data_ptr() + masks if order else 0,
            0 if scales is None else scales.data_ptr(),
        )
    except ValueError as error:
        raise UnsupportedError(str(error)) from None
    return y


def _require_scales(scales: Tensor, out_features: int) -> None:
    if tuple(scales.shape) != (out_features,) or scales.dtype != torch.float32 or not scales.is_cpu:
        raise ShapeError(
            f"scales are {scales.dtype} {list(scales.shape)} on {scales.device}: they must be float32 [{out_features}] on"
            " the CPU, one for each output."
        )


def _require_epilogue(x: Tensor, activation: str, residual: Tensor | None, out_features: int) -> None:
    if activation not in _ACTIVATIONS:
        raise UnsupportedError(f"activation {activation!r} is unknown: the kernels have {', '.join(_ACTIVATIONS)}.")
    if residual is None:
        return
    if tuple(residual.shape) != (x.shape[0], out_features):
        raise ShapeError(f"residual is {list(residual.shape)}: it must be [{x.shape[0]}, {out_features}], as y.")
    if residual.dtype != x.dtype or not residual.is_cpu:
        raise UnsupportedError(
            f"residual is {residual.dtype} on {residual.device}: it must be {x.dtype} on the CPU, as x."
        )


def _explain(
    x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, out_features: int, in_features: int
) -> NoReturn:
    """Raises the error that says what is wrong with the arguments of `linear`."""
    _module()
    _require_packed(values, metadata, out_features, in_features)
    if x.ndim != 2 or x.shape[1] != in_features:
        raise ShapeError(f"x is {list(x.shape)}: it must be [tokens, {in_features}]. Flatten it with x.flatten(0, -2).")
    if (values.dtype, x.dtype) not in _TYPES or x.device.type != "cpu":
        raise UnsupportedError(
            f"x is {x.dtype} on {x.device} and the weight {values.dtype} on the CPU: convert one with .to(...)."
        )
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ShapeError(f"bias is {list(bias.shape)}: it must be [{out_features}], one for each output.")
    assert bias is not None
    raise UnsupportedError(f"bias is {bias.dtype} on {bias.device}: it must be float32 or bfloat16 on the CPU.")


def _module() -> ModuleType:
    return native.module()


def _rows_at(order: Tensor) -> Tensor:
    """int64: the row that lies at each place."""
    windows = torch.arange(len(order), device=order.device) // WINDOW_ROWS
    return windows * WINDOW_ROWS + order


def _order_address(metadata: Tensor, out_features: int) -> int:
    """Of the order in packed metadata; 0 without one."""
    if metadata.ndim != 1:
        return 0
    return metadata.data_ptr() + metadata.numel() + out_features // -TILE_ROWS * TILE_ROWS


def _require_order(order: Tensor, out_features: int) -> None:
    places = -(-out_features // TILE_ROWS) * TILE_ROWS
    if order.dtype != torch.uint8 or tuple(order.shape) != (places,) or not order.is_cpu:
        raise ShapeError(
            f"order is {order.dtype} {list(order.shape)} on {order.device}: it must be torch.uint8 [{places}] on the CPU."
            " Pass shared, order = row_order(metadata)."
        )
    rows, own = _rows_at(order), torch.arange(places)
    if not (
        int(order.max()) < WINDOW_ROWS
        and torch.equal(rows.sort().values, own)
        and torch.equal(rows[out_features:], own[out_features:])
    ):
        raise ShapeError(
            f"order does not name each row once, inside its window of {WINDOW_ROWS}, with rows that fill the last tile in"
            " their places. Pass shared, order = row_order(metadata)."
        )


def _require_packed(values: Tensor, metadata: Tensor, out_features: int, in_features: int) -> int:
    """How many rows share a mask."""
    _require_weight(values, metadata, out_features, in_features)
    shared = packed_sharing(metadata, out_features, in_features)
    values_shape, metadata_shape = packed_shapes(out_features, in_features, values.dtype, shared, metadata.ndim == 1)
    _require_shape("packed values", values, values_shape)
    _require_shape("packed metadata", metadata, metadata_shape)
    if not (values.is_contiguous() and metadata.is_contiguous()):
        raise ShapeError("packed values and metadata must be contiguous: pass what pack() returned.")
    return shared


def _require_weight(values: Tensor, metadata: Tensor, out_features: int, in_features: int) -> None:
    if out_features < 1 or in_features < 4 or in_features % 4:
        raise ShapeError(
            f"the weight is [{out_features}, {in_features}]: it needs an output, and in_features a multiple of 4."
        )
    if all(values.dtype != dtype for dtype, _ in _TYPES) or metadata.dtype != torch.uint8:
        raise UnsupportedError(
            f"values are {values.dtype}, metadata {metadata.dtype}: the CPU kernels take float32, bfloat16 or float8_e4m3fn,"
            " and uint8."
        )
    if values.device.type != "cpu" or metadata.device.type != "cpu":
        raise UnsupportedError(f"values are on {values.device}, metadata on {metadata.device}: move both to the CPU.")


def _require_shape(what: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ShapeError(f"{what} are {list(tensor.shape)}: this weight needs {list(shape)}.")
