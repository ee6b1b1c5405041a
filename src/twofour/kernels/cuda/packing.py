"""Dense CUDA tensors to and from the CUDA layout, by the kernels of csrc/cuda/pack.cu and pack_both.cu.

Everything runs on torch's current stream; the kernels allocate nothing and can be captured in a CUDA graph. Where they do
not apply, `layout.pack` does the same in plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from ...errors import PatternError, ShapeError, UnsupportedError
from . import layout, resources, table

_HALF_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
MASK_NAMES = {**_HALF_NAMES, torch.float32: "fp32"}
"""Dtypes of weights whose transposable masks kernels choose."""
_PRUNE_NAMES = {
    **_HALF_NAMES,
    torch.float8_e4m3fn: "e4m3",
    torch.float8_e5m2: "e5m2",
    torch.int8: "int8",
}
_ITEM_NAMES = {
    torch.bfloat16: "half",
    torch.float16: "half",
    torch.int8: "int8",
    torch.float8_e4m3fn: "fp8",
    torch.float8_e5m2: "fp8",
}
_WARPS_OF_BLOCK = 8
_SQUARE = 64
_MOST_BLOCKS_DOWN = 65535
_MOST_ITEMS = 2**31 - 1  # of a side: kernels count them in 32 bits
_MOST_SQUARES, _ROUNDS_OF_BLOCKS = 8, 8  # of a block, and blocks for each multiprocessor at least


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A 2:4 matrix in the CUDA layout.

    Args:
        values: [tiles, steps, 32, items].
        metadata: [tiles, chunks, 32] int32.
        shape: of the dense matrix.
    """

    values: Tensor
    metadata: Tensor
    shape: tuple[int, int]


def words_of(rows: int, columns: int) -> int:
    """Of metadata."""
    return -(-rows // layout.TILE) * -(-columns // layout.COLUMNS) * layout.LANES


def is_readable(values: Tensor, metadata: Tensor, words: int) -> bool:
    """Can kernels read them as a packed matrix of so many words of metadata? Of their devices nothing is asked."""
    return (
        metadata.numel() == words
        and values.numel() == 16 * words
        and metadata.dtype == torch.int32
        and values.is_contiguous()
        and metadata.is_contiguous()
        and (values.data_ptr() | metadata.data_ptr()) % layout.ALIGNED == 0
    )


def require_layout(packed: PackedMatrix) -> None:
    """Raises ShapeError unless kernels can read it: memory formats and views may have moved what they expect."""
    values, metadata, (rows, columns) = packed.values, packed.metadata, packed.shape
    if is_readable(values, metadata, words_of(rows, columns)) and values.get_device() == metadata.get_device():
        return
    shape, meta_shape = layout.packed_shapes(rows, columns, values.dtype)
    raise ShapeError(
        f"values are {_lies(values)}, metadata {_lies(metadata)}: a matrix of {list(packed.shape)} is packed as"
        f" {list(shape)} and {list(meta_shape)} int32, contiguous, at multiples of {layout.ALIGNED} bytes, on one device. Copy"
        " them with .contiguous().clone(), or pack it again."
    )


def _lies(tensor: Tensor) -> str:
    """Shape, dtype, strides and place of a tensor, in words."""
    off = tensor.data_ptr() % layout.ALIGNED
    return f"{list(tensor.shape)} {tensor.dtype} with strides {tensor.stride()} on {tensor.device}" + (
        f", {off} bytes behind a multiple of {layout.ALIGNED}" if off else ""
    )


def prune_both(weight: Tensor, mask: Tensor | None = None) -> tuple[PackedMatrix, PackedMatrix]:
    """The best transposable 2:4 mask of |weight|, and weight and transpose packed under it, in one reading.

    The mask is that of `nm_mask(weight.abs(), "2:4t")`, bit for bit: exact, ties to the places that come first, NaN below
    every number.

    Args:
        weight: [rows, columns] bfloat16 or float16 on a GPU, both multiples of 4; rows may be any distance apart.
        mask: bool of the same shape, contiguous, that takes the mask; None leaves it out.
    Returns:
        the packed weight and the packed transpose.
    Raises:
        ShapeError, UnsupportedError: as the arguments say; no driver or compiler.
    """
    weight = _matrix(weight, _HALF_NAMES)
    _require_transposable(weight, mask)
    own, turned = _empty_both(weight)
    if weight.numel() == 0:
        return own, turned
    table.launch(
        f"prune_both_{_HALF_NAMES[weight.dtype]}",
        _blocks_of_squares(weight),
        weight.device,
        weight.data_ptr(),
        weight.stride(0),
        *weight.shape,
        own.values.data_ptr(),
        own.metadata.data_ptr(),
        turned.values.data_ptr(),
        turned.metadata.data_ptr(),
        0 if mask is None else mask.data_ptr(),
    )
    return own, turned


def mask_both(weight: Tensor) -> Tensor:
    """The best transposable 2:4 mask of |weight|: `nm_mask(weight.abs(), "2:4t")`, bit for bit.

    Args:
        weight: [rows, columns] float32, bfloat16 or float16 on a GPU, both multiples of 4.
    Returns:
        bool, shape and device of `weight`.
    Raises:
        ShapeError, UnsupportedError: as the argument says; no driver or compiler.
    """
    weight = _matrix(weight, MASK_NAMES)
    mask = resources.empty(weight.shape, resources.strides_of(weight.shape), torch.bool, weight.device)
    _require_transposable(weight, mask)
    if weight.numel():
        table.launch(
            f"mask_both_{MASK_NAMES[weight.dtype]}",
            _squares(weight),
            weight.device,
            weight.data_ptr(),
            weight.stride(0),
            *weight.shape,
            mask.data_ptr(),
        )
    return mask


def keep_both(
    weight: Tensor, mask: Tensor, *, in_place: bool = False, check: bool = True
) -> tuple[PackedMatrix, PackedMatrix]:
    """Weight and transpose packed under a given transposable mask, in one reading: what a step of training needs.

    Args:
        weight: as for `prune_both`.
        mask: bool of the same shape, two True in each four neighbours of a row and of a column.
        in_place: write zeros to the dropped places of `weight` as well: in the same pass, or with `check` in a second one,
            once the mask is known to be good.
        check: wait for the GPU and raise where the mask does not keep two; False packs something.
    Returns:
        the packed weight and the packed transpose.
    Raises:
        PatternError: the mask is not transposable; the weight is as it was.
        ShapeError, UnsupportedError: as the arguments say; no driver or compiler.
    """
    given, weight = weight, _matrix(weight, _HALF_NAMES)
    _require_transposable(weight, mask)
    if in_place and weight.data_ptr() != given.data_ptr():
        raise ShapeError(
            f"weight has strides {given.stride()}: only one whose rows have no gaps between items is masked in place."
        )
    own, turned = _empty_both(weight)
    if weight.numel() == 0:
        return own, turned
    status = _status(weight, check)
    launch = partial(
        table.launch,
        "keep_both_half",
        _blocks_of_squares(weight),
        weight.device,
        weight.data_ptr(),
        weight.stride(0),
        *weight.shape,
        own.values.data_ptr(),
        own.metadata.data_ptr(),
        turned.values.data_ptr(),
        turned.metadata.data_ptr(),
        mask.data_ptr(),
    )
    launch(weight.data_ptr() if in_place and not check else 0, 0 if status is None else status.data_ptr())
    if status is not None and int(status.item()) != 0:
        raise PatternError(
            "the mask does not keep two of each four along both axes: nm_mask(scores, '2:4t') makes one."
        )
    if in_place and check:
        launch(weight.data_ptr(), 0)
    return own, turned


def prune(weight: Tensor) -> PackedMatrix:
    """The larger two of each four |weights| of a row, packed: `nm_mask(weight.abs(), "2:4")`.

    Args:
        weight: [rows, columns] of one of `layout.DTYPES` on a GPU, columns a multiple of 4.
    Raises:
        ShapeError, UnsupportedError: as the argument says; no driver or compiler.
    """
    weight = _matrix(weight, _PRUNE_NAMES)
    return _one_way(f"prune_{_PRUNE_NAMES[weight.dtype]}", weight, check=False)


def quantize(weight: Tensor) -> tuple[PackedMatrix, Tensor]:
    """The larger two of each four |weights| of a row as float8_e4m3fn with a scale for each row, packed.

    The numbers are those of `reference.quantize_rows_e4m3`; where one is NaN its sign may differ.

    Args:
        weight: [rows, columns] bfloat16 or float16 on a GPU, columns a multiple of 4.
    Returns:
        the packed float8_e4m3fn matrix, and float32 scales [rows].
    Raises:
        ShapeError, UnsupportedError: as the argument says; no driver or compiler.
    Cost: the weight is read twice, the second time from the last cache.
    """
    weight = _matrix(weight, _HALF_NAMES)
    rows, columns = weight.shape
    found = _empty(rows, columns, weight, torch.float8_e4m3fn)
    if weight.numel() == 0:
        return found, torch.zeros(rows, dtype=torch.float32, device=weight.device)
    scales = resources.empty((rows,), (1,), torch.float32, weight.device)
    table.launch(
        f"quantize_{_HALF_NAMES[weight.dtype]}",
        (found.metadata.shape[0],),
        weight.device,
        weight.data_ptr(),
        weight.stride(0),
        rows,
        columns,
        found.values.data_ptr(),
        found.metadata.data_ptr(),
        scales.data_ptr(),
    )
    return found, scales


def compress(matrix: Tensor, *, check: bool = True) -> PackedMatrix:
    """A matrix that keeps two of each four already, packed. Zeros fill groups that keep fewer; -0.0 is one.

    Args:
        matrix: [rows, columns] of one of `layout.DTYPES` on a GPU, columns a multiple of 4.
        check: wait for the GPU and raise where a group keeps more than two; False packs the larger two.
    Raises:
        PatternError: a group keeps more than two.
        ShapeError, UnsupportedError: as the arguments say; no driver or compiler.
    """
    matrix = _matrix(matrix, _ITEM_NAMES)
    return _one_way(f"compress_{_ITEM_NAMES[matrix.dtype]}", matrix, check=check)


def take(matrix: Tensor, packed: PackedMatrix) -> Tensor:
    """Values of `matrix` where `packed` keeps them, in its layout: a gradient, or a weight after a step.

    Args:
        matrix: [rows, columns] on the GPU of `packed`, of its dtype.
    Returns:
        values for `PackedMatrix(values, packed.metadata, packed.shape)`.
    """
    matrix = _matrix(matrix, _ITEM_NAMES)
    require_layout(packed)
    if matrix.shape != packed.shape or matrix.device != packed.metadata.device or matrix.dtype != packed.values.dtype:
        raise ShapeError(
            f"matrix is {list(matrix.shape)} {matrix.dtype} on {matrix.device}, what is packed {list(packed.shape)}"
            f" {packed.values.dtype} on {packed.metadata.device}: they must agree."
        )
    values = resources.empty(packed.values.shape, packed.values.stride(), packed.values.dtype, matrix.device)
    if values.numel():
        table.launch(
            f"take_{'half' if matrix.itemsize == 2 else 'byte'}",
            _blocks(packed.metadata),
            matrix.device,
            matrix.data_ptr(),
            matrix.stride(0),
            *matrix.shape,
            packed.metadata.data_ptr(),
            values.data_ptr(),
        )
    return values


def expand(packed: PackedMatrix) -> Tensor:
    """The dense matrix.

    Raises:
        ShapeError, UnsupportedError: what is packed does not fit, or is on no GPU; no driver or compiler.
    """
    _require_gpu(packed.values)
    require_layout(packed)
    rows, columns = packed.shape
    matrix = resources.empty((rows, columns), (max(columns, 1), 1), packed.values.dtype, packed.values.device)
    if matrix.numel():
        table.launch(
            f"expand_{'half' if matrix.itemsize == 2 else 'byte'}",
            _blocks(packed.metadata),
            matrix.device,
            packed.values.data_ptr(),
            packed.metadata.data_ptr(),
            rows,
            columns,
            matrix.data_ptr(),
            columns,
        )
    return matrix


def _one_way(name: str, matrix: Tensor, *, check: bool) -> PackedMatrix:
    rows, columns = matrix.shape
    found = _empty(rows, columns, matrix)
    if matrix.numel() == 0:
        return found
    status = _status(matrix, check)
    table.launch(
        name,
        _blocks(found.metadata),
        matrix.device,
        matrix.data_ptr(),
        matrix.stride(0),
        rows,
        columns,
        found.values.data_ptr(),
        found.metadata.data_ptr(),
        0 if status is None else status.data_ptr(),
    )
    if status is not None and int(status.item()) != 0:
        raise PatternError(
            f"a matrix of [{rows}, {columns}] does not keep two of each four: prune it first, twofour.prune or packing.prune."
        )
    return found


def _status(like: Tensor, check: bool) -> Tensor | None:
    """What kernels set where something is wrong; to make it takes a launch, which is spared where nobody looks."""
    return torch.zeros(1, dtype=torch.int32, device=like.device) if check else None


def _blocks(metadata: Tensor) -> tuple[int, int]:
    """Eight chunks of a tile each; where there are more tiles than blocks go down, some take several."""
    tiles, chunks = metadata.shape[:2]
    return -(-chunks // _WARPS_OF_BLOCK), min(tiles, _MOST_BLOCKS_DOWN)


def _squares(weight: Tensor) -> tuple[int, int]:
    return -(-weight.shape[1] // _SQUARE), -(-weight.shape[0] // _SQUARE)


def _blocks_of_squares(weight: Tensor) -> tuple[int, int]:
    """Blocks that take several squares of a row each where there are many: each begins with a table of masks."""
    across, down = _squares(weight)
    each = across * down // (_ROUNDS_OF_BLOCKS * resources.processors(weight.device))
    return -(-across // min(max(each, 1), _MOST_SQUARES)), down


def _require_transposable(weight: Tensor, mask: Tensor | None) -> None:
    rows, columns = weight.shape
    if rows % 4:
        raise ShapeError(
            f"weight is [{rows}, {columns}]: both axes come in groups of 4 where the mask is transposable."
        )
    if rows > _MOST_BLOCKS_DOWN * _SQUARE:
        raise ShapeError(
            f"weight is [{rows}, {columns}]: at most {_MOST_BLOCKS_DOWN * _SQUARE} rows are packed at once. Pack it part by"
            " part."
        )
    if mask is None:
        return
    if mask.shape != weight.shape or mask.dtype != torch.bool or not mask.is_contiguous():
        raise ShapeError(f"mask is {list(mask.shape)} {mask.dtype}: a contiguous bool of [{rows}, {columns}] fits.")
    if mask.device != weight.device:
        raise UnsupportedError(f"weight is on {weight.device}, mask on {mask.device}: put them on one.")


def _empty_both(weight: Tensor) -> tuple[PackedMatrix, PackedMatrix]:
    rows, columns = weight.shape
    return _empty(rows, columns, weight), _empty(columns, rows, weight)


def _empty(rows: int, columns: int, like: Tensor, dtype: torch.dtype | None = None) -> PackedMatrix:
    dtype, device = like.dtype if dtype is None else dtype, like.device
    shape, strides, meta_shape, meta_strides = _sizes(rows, columns, dtype)
    values = resources.empty(shape, strides, dtype, device)
    return PackedMatrix(values, resources.empty(meta_shape, meta_strides, torch.int32, device), (rows, columns))


@lru_cache(maxsize=1024)
def _sizes(rows: int, columns: int, dtype: torch.dtype) -> tuple[tuple[int, ...], ...]:
    """Shape and strides of values, and of metadata."""
    shape, meta_shape = layout.packed_shapes(rows, columns, dtype)
    return shape, resources.strides_of(shape), meta_shape, resources.strides_of(meta_shape)


def _matrix(matrix: Tensor, names: dict[torch.dtype, str]) -> Tensor:
    """With rows without gaps between their items."""
    if matrix.ndim != 2 or matrix.shape[1] % 4:
        raise ShapeError(f"a tensor of {list(matrix.shape)} is no matrix whose rows come in groups of 4.")
    if matrix.dtype not in names:
        known = ", ".join(str(each).removeprefix("torch.") for each in names)
        raise UnsupportedError(
            f"{str(matrix.dtype).removeprefix('torch.')} is not packed by a GPU kernel: {known} are."
        )
    _require_gpu(matrix)
    if max(matrix.shape) > _MOST_ITEMS:
        raise ShapeError(
            f"the matrix is {list(matrix.shape)}: a side has less than {_MOST_ITEMS + 1} items. Pack it part by part."
        )
    matrix = matrix.detach() if matrix.requires_grad else matrix
    return matrix if matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1] else matrix.contiguous()


def _require_gpu(matrix: Tensor) -> None:
    if not _on_gpu(matrix):
        raise UnsupportedError(
            f"the matrix is on {matrix.device}: GPU kernels need it on a GPU; layout.pack works anywhere."
        )


def _on_gpu(matrix: Tensor) -> bool:
    return matrix.is_cuda
