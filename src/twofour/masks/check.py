"""Does a weight hold its pattern?"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import ShapeError, UnsupportedError
from ..pattern import Pattern
from .partition import shared_places


@dataclass(frozen=True, slots=True)
class PatternCheck:
    """What `check_pattern` found: how many groups there are, how many are broken, and where the first one is."""

    pattern: Pattern
    groups: int
    broken: int
    first_index: tuple[int, ...] | None
    first_values: tuple[float, ...] | None
    nonzero: int

    @property
    def holds(self) -> bool:
        """True when no group is broken."""
        return self.broken == 0

    def describe(self) -> str:
        """One line: the verdict, with the first broken group."""
        if self.holds:
            return f"holds {self.pattern} in {self.groups} groups"
        shown = ", ".join(f"{value:.6g}" for value in self.first_values or ())
        where = ", ".join(map(str, self.first_index or ()))
        return f"{self.broken} of {self.groups} groups are not {self.pattern}; the first at [{where}] holds [{shown}]"


def check_pattern(weight: Tensor, pattern: Pattern | str, *, dim: int = -1) -> PatternCheck:
    """Counts the groups of `weight` along `dim` that have more than `keep` non-zeros. -0.0 is zero, NaN is not.

    "2:4x4" asks the same of the union of each 4 rows that share a mask: neighbours, or rows anywhere that fit together
    (`masks.partition.shared_places`); where there are none such, what is counted is that of neighbours. "2:4t" asks it of
    both axes of a matrix.

    Args:
        weight: any shape and dtype; `weight.shape[dim]` a multiple of the group.
    Returns:
        PatternCheck; `first_index` is the coordinate of the first element of the first broken group.
    Raises:
        ShapeError: no whole groups, no such axis; "2:4x4" and "2:4t" of anything but a matrix along its last axis.
        UnsupportedError: a weight on the meta device.
    Cost: two passes; for "2:4x4" whose neighbours do not share that of `shared_places`.
    """
    pattern = Pattern.parse(pattern)
    weight = weight.detach()
    if weight.is_meta:
        raise UnsupportedError("weight is on the meta device: it has a shape and no numbers. Load it first.")
    rows_needed = pattern.group if pattern.transposable else pattern.rows
    if rows_needed > 1 and (weight.ndim != 2 or dim not in (-1, 1)):
        raise ShapeError(f"weight is {list(weight.shape)}, axis {dim}: {pattern} needs a matrix, along its last axis.")
    if not -weight.ndim <= dim < weight.ndim:
        raise ShapeError(f"weight is {list(weight.shape)}: it has no axis {dim}.")
    dim = dim % weight.ndim
    if weight.shape[dim] % pattern.group or (rows_needed > 1 and weight.shape[0] % rows_needed):
        raise ShapeError(
            f"weight is {list(weight.shape)}: it has no whole {pattern} groups along axis {dim}. Leave it dense."
        )
    numbers = weight if weight.dtype.itemsize > 2 else weight.float()
    nonzero = numbers != 0
    found = _count(numbers, nonzero, pattern, dim)
    if pattern.rows > 1 and not found.holds and shared_places(nonzero, pattern) is not None:
        return PatternCheck(pattern, found.groups, 0, None, None, found.nonzero)
    if pattern.transposable and found.holds:
        found = _count(numbers, nonzero, pattern, 1 - dim)
    return found


def _count(numbers: Tensor, nonzero: Tensor, pattern: Pattern, dim: int) -> PatternCheck:
    marked = nonzero
    if pattern.rows > 1:
        blocks = nonzero.unflatten(0, (-1, pattern.rows))
        marked = blocks.any(1, keepdim=True).expand_as(blocks).flatten(0, 1)
    crowded = marked.movedim(dim, -1).unflatten(-1, (-1, pattern.group)).sum(-1) > pattern.keep
    broken = int(crowded.sum())
    index: tuple[int, ...] | None = None
    values: tuple[float, ...] | None = None
    if broken:
        *place, group = (int(i) for i in crowded.nonzero()[0])
        groups = numbers.movedim(dim, -1).unflatten(-1, (-1, pattern.group))
        index_of_group = (*place, group)
        values = tuple(float(v) for v in groups[index_of_group])
        place.insert(dim, group * pattern.group)
        index = tuple(place)
    return PatternCheck(pattern, crowded.numel(), broken, index, values, int(nonzero.sum()))
