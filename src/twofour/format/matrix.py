"""SparseMatrix: an N:M matrix in the one format that is kept on disk and handed between rooms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import FormatError, PatternError, ShapeError, UnsupportedError
from ..masks import magnitude, nm_mask
from ..pattern import Pattern
from . import pack as packing


@dataclass(frozen=True, eq=False, repr=False)
class SparseMatrix:
    """An N:M matrix: the kept values and where they sit. Checked once, when it is made.

    Args:
        values: [out_features, in_features·keep/group], in the order of the columns; float32, float16, bfloat16, int8,
            float8_e4m3fn or float8_e5m2.
        metadata: uint8 [out_features, bytes]. For 2:4 one nibble `i0 | i1<<2` (i0 < i1) per group, two groups in a
            byte, low nibble first; for 1:4 two bits per group; for other patterns a bitmask, lowest bit first.
            For "2:4x4" each row of it occurs a multiple of 4 times; for "2:4t" the non-zero values hold both axes.
        pattern: the Pattern.
        shape: (out_features, in_features) of the dense matrix.
    Raises:
        FormatError: shapes, dtypes, devices or metadata that do not fit each other; says which.
    Source: the nibble is NVIDIA's (Mishra et al. 2021, arXiv:2104.08378, figure 2); see format/SPEC.md.
    """

    values: Tensor
    metadata: Tensor
    pattern: Pattern
    shape: tuple[int, int]
    prepared: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False)
    """Layouts that kernels have made of this matrix, by backend; never saved."""

    def __post_init__(self) -> None:
        packing.require_dtype(self.values.dtype)
        try:
            packing.require_groups(self.shape, self.pattern, "shape")
        except ShapeError as error:
            raise FormatError(str(error)) from None
        values_shape, metadata_shape = packing.packed_shapes(self.shape, self.pattern)
        for name, tensor, expected in (
            ("values", self.values, values_shape),
            ("metadata", self.metadata, metadata_shape),
        ):
            if tuple(tensor.shape) != expected:
                raise FormatError(
                    f"{name} of a {self.pattern} matrix {list(self.shape)} must be {list(expected)}, not {list(tensor.shape)}."
                )
        if self.metadata.dtype != torch.uint8:
            raise FormatError(f"metadata must be uint8, not {self.metadata.dtype}.")
        if self.values.device != self.metadata.device:
            raise FormatError(
                f"values are on {self.values.device}, metadata on {self.metadata.device}: put both on one."
            )
        if not self.metadata.is_meta:
            packing.require_metadata(self.metadata, self.shape, self.pattern)
            if self.pattern.rows > 1:
                packing.require_shared_metadata(self.metadata, self.pattern)
            if self.pattern.transposable:
                packing.require_transposable(self.values, self.metadata, self.shape, self.pattern)

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles, without what kernels have made of it. torch pickles float8 but does not read it again."""
        held = self.values.view(torch.uint8) if self.values.dtype.itemsize == 1 else self.values
        return _from_pickle, (held, self.values.dtype, self.metadata, self.pattern, self.shape)

    @staticmethod
    def from_dense(
        weight: Tensor,
        pattern: Pattern | str = "2:4",
        *,
        mask: Tensor | None = None,
        prune: bool = False,
        name: str = "weight",
    ) -> SparseMatrix:
        """`weight` as a SparseMatrix. Nothing is dropped unless `mask` or `prune` asks for it.

        Args:
            weight: [out_features, in_features]; in_features a multiple of the group; any strides.
            pattern: a Pattern or its text.
            mask: bool, shape of `weight`, True = keep; at most `keep` True in each group. For "2:4x4" each row must
                occur a multiple of 4 times, anywhere; without `mask` who shares is found from the zeros, neighbours
                first.
            prune: keep the largest magnitudes (`nm_mask`: ties keep the lower index, NaN ranks lowest).
            name: what to call the weight in errors.
        Returns:
            A matrix whose `to_dense()` is `torch.where(mask, weight, 0)` bit for bit; without `mask`, where `weight`
            is non-zero. -0.0 counts as zero. Tensors are detached copies on the weight's device.
        Raises:
            PatternError: the weight is not N:M (first bad row, columns and values are named), or the mask is not.
            ShapeError: no whole groups, a weight that is not a matrix, a mask of another shape.
            UnsupportedError: a dtype the format does not know, a weight on the meta device.
        Cost: about ten passes over the weight.

        >>> matrix = SparseMatrix.from_dense(torch.tensor([[0., 3., 0., -1.], [5., 0., 0., 0.]]))
        >>> matrix.values.tolist(), matrix.metadata.tolist()
        ([[3.0, -1.0], [5.0, 0.0]], [[13], [8]])
        >>> matrix.to_dense().tolist()
        [[0.0, 3.0, 0.0, -1.0], [5.0, 0.0, 0.0, 0.0]]
        """
        pattern = Pattern.parse(pattern)
        if not isinstance(weight, Tensor):
            raise UnsupportedError(
                f"{name} is a {type(weight).__name__}: pass a torch.Tensor (torch.from_numpy makes one)."
            )
        weight = weight.detach()
        packing.require_dtype(weight.dtype)
        packing.require_groups(tuple(weight.shape), pattern, repr(name) if name != "weight" else name)
        packing.require_numbers(weight, name)
        if mask is not None and prune:
            raise PatternError("mask= and prune=True both choose what to keep: pass one of them.")
        if mask is not None:
            wanted = _require_mask(mask, weight, pattern)
        elif prune:
            wanted = nm_mask(magnitude(weight), pattern)
        else:
            wanted = packing.require_pattern(weight, pattern, name)
        if pattern.transposable:
            packing.require_both_axes(wanted, pattern, "mask" if mask is not None else name)
        places: Tensor | None = None
        if pattern.rows > 1 and mask is not None:
            packing.require_equal_rows(wanted, pattern)
        elif pattern.rows > 1:
            places = packing.shared_places(wanted, pattern, name)
        values, metadata = packing.pack(weight, wanted, pattern, places=places)
        return SparseMatrix(values, metadata, pattern, (weight.shape[0], weight.shape[1]))

    def to_dense(self) -> Tensor:
        """[out_features, in_features], dropped places +0.0, everything else bit for bit."""
        packing.require_numbers(self.values, "the matrix")
        return packing.unpack(self.values, self.metadata, self.shape, self.pattern)

    def mask(self) -> Tensor:
        """bool [out_features, in_features]: exactly `keep` True in each group, fillers included."""
        packing.require_numbers(self.metadata, "the matrix")
        return packing.unpack_mask(self.metadata, self.shape, self.pattern)

    def transposed(self) -> SparseMatrix:
        """The matrix of `to_dense().T`, [in_features, out_features], of the same pattern; only where it holds both axes.

        Kept places stay kept where the columns leave room for all of them; a stored zero without room is dropped.
        Raises:
            PatternError: a pattern that is not transposable.
        Cost: the dense weight, and as `from_dense`.

        >>> matrix = SparseMatrix.from_dense(torch.eye(4).roll(1, 0) + 2 * torch.eye(4), "2:4t")
        >>> torch.equal(matrix.transposed().to_dense(), matrix.to_dense().T)
        True
        """
        if not self.pattern.transposable:
            raise PatternError(
                f"pattern {self.pattern} holds along the rows only: choose the mask with nm_mask(scores, '2:4t'), and"
                " store the weight as '2:4t'."
            )
        dense, wanted = self.to_dense().T, self.mask().T
        if packing.first_crowded_group(wanted, self.pattern) is not None:
            wanted = packing.numbers(dense) != 0
        return SparseMatrix.from_dense(dense, self.pattern, mask=wanted)

    def to(self, *args: object, **kwargs: object) -> SparseMatrix:
        """The matrix with `values.to(...)`; metadata follow to the device. Values are rounded as torch rounds them."""
        values = self.values.to(*args, **kwargs)  # type: ignore[call-overload]
        return SparseMatrix(values, self.metadata.to(values.device), self.pattern, self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Where the matrix lives."""
        return self.values.device

    @property
    def out_features(self) -> int:
        """Rows."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the dense matrix."""
        return self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of values and metadata: 36/64 of dense for 2:4 at 16 bits, 20/32 at 8, 68/128 at 32."""
        return self.values.nbytes + self.metadata.nbytes

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"SparseMatrix({self.pattern}, [{self.out_features}, {self.in_features}], {dtype}, {self.nbytes} bytes)"


def _require_mask(mask: Tensor, weight: Tensor, pattern: Pattern) -> Tensor:
    if mask.dtype != torch.bool or mask.shape != weight.shape or mask.device != weight.device:
        raise ShapeError(
            f"mask is {mask.dtype} {list(mask.shape)} on {mask.device}: it must be torch.bool {list(weight.shape)}"
            f" on {weight.device}, as the weight."
        )
    bad = packing.first_crowded_group(mask, pattern)
    if bad is not None:
        row, group = bad
        raise PatternError(
            f"mask is not {pattern}: row {row}, columns {group * pattern.group}:{(group + 1) * pattern.group} keep more"
            f" than {pattern.keep}. Make one with twofour.masks.nm_mask(scores, '{pattern}')."
        )
    return mask


def _from_pickle(
    held: Tensor, dtype: torch.dtype, metadata: Tensor, pattern: Pattern, shape: tuple[int, int]
) -> SparseMatrix:
    return SparseMatrix(held.view(dtype), metadata, pattern, shape)
