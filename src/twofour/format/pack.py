"""Dense weight <-> values and metadata, in plain torch. This file is the specification; SPEC.md is its prose.

The path of one weight: `held_mask` (which places are stored) -> `pack` (values, metadata) -> `unpack` (dense).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import FormatError, PatternError, ShapeError, UnsupportedError
from ..masks import partition
from ..pattern import Pattern

VALUE_DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)

_CARRIER = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def uses_indices(pattern: Pattern) -> bool:
    """True where metadata holds 2-bit indices (1:4, 2:4), False where it holds a bitmask (every other pattern)."""
    return pattern.group == 4 and pattern.keep <= 2


def group_bits(pattern: Pattern) -> int:
    """Bits of metadata for one group: 4 for 2:4, 2 for 1:4, `group` for every other pattern."""
    return 2 * pattern.keep if uses_indices(pattern) else pattern.group


def packed_shapes(shape: tuple[int, int], pattern: Pattern) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of values and metadata (bytes) for a dense [out_features, in_features] weight."""
    out_features, in_features = shape
    groups = in_features // pattern.group
    return (out_features, groups * pattern.keep), (out_features, math.ceil(groups * group_bits(pattern) / 8))


def why_not_stored(dtype: torch.dtype) -> str | None:
    """The dtype, and why weights of it cannot be stored; None where they can."""
    if dtype in VALUE_DTYPES:
        return None
    names = ", ".join(_name(known) for known in VALUE_DTYPES)
    return f"{_name(dtype)} cannot be stored as N:M: the format knows {names}"


def require_dtype(dtype: torch.dtype) -> None:
    """Raises UnsupportedError unless `dtype` can be stored."""
    if (why := why_not_stored(dtype)) is not None:
        raise UnsupportedError(f"a weight of {why}. Convert it, as weight.float() does.")


def require_groups(shape: tuple[int, ...], pattern: Pattern, what: str = "weight") -> None:
    """Raises ShapeError unless `shape` is [out_features, in_features] with whole groups along in_features."""
    if len(shape) != 2:
        raise ShapeError(
            f"{what} is {list(shape)}: an N:M matrix is [out_features, in_features]."
            " For a convolution flatten it with weight.movedim(1, -1).flatten(0, -2)."
        )
    if shape[1] % pattern.group:
        raise ShapeError(
            f"{what} is {list(shape)}: in_features {shape[1]} is not a multiple of {pattern.group}, so it has no whole"
            f" {pattern} groups.\n  Leave it dense, or pad it with twofour.format.pad(weight, '{pattern}')."
        )


def require_numbers(tensor: Tensor, what: str = "weight") -> None:
    """Raises UnsupportedError for a tensor on the meta device: there is nothing to look at."""
    if tensor.is_meta:
        raise UnsupportedError(f"{what} is on the meta device: it has a shape and no numbers. Load it first.")


def numbers(weight: Tensor) -> Tensor:
    """The same numbers in a dtype that can be compared: float8, float16 and int8 become float32 (exact)."""
    return weight if weight.dtype in (torch.float32, torch.float64) else weight.to(torch.float32)


def pad(weight: Tensor, pattern: Pattern | str) -> Tensor:
    """`weight` with zero columns appended until in_features is a multiple of the group (itself if it already is).

    Inputs must be padded with as many zeros at run time. Args: weight [out_features, in_features], any dtype.
    """
    pattern = Pattern.parse(pattern)
    if weight.ndim != 2:
        raise ShapeError(f"weight is {list(weight.shape)}: pad takes [out_features, in_features].")
    missing = -weight.shape[1] % pattern.group
    if missing == 0:
        return weight
    return torch.cat([weight, torch.zeros_like(weight[:, :1]).expand(-1, missing)], dim=1)


def held_mask(wanted: Tensor, pattern: Pattern) -> Tensor:
    """The places that are stored: every True of `wanted`, and fillers, so that each group has exactly `keep`.

    A group with fewer than `keep` is filled with the lowest free places among its last `keep`. (For 2:4 this is the
    choice of NVIDIA's and PyTorch's packers, so metadata agree bit for bit.)

    Args:
        wanted: bool [out_features, in_features], at most `keep` True in each group.
    Returns:
        bool, same shape, exactly `keep` True in each group.
    """
    groups: Tensor = wanted.unflatten(-1, (-1, pattern.group))
    free = ~groups
    free[..., : pattern.group - pattern.keep] = False
    missing = pattern.keep - groups.sum(-1, keepdim=True, dtype=torch.int16)
    filler = free & (free.cumsum(-1, dtype=torch.int16) <= missing)
    return (groups | filler).flatten(-2)


def first_crowded_group(wanted: Tensor, pattern: Pattern) -> tuple[int, int] | None:
    """(row, group) of the first group with more than `keep` True in bool [rows, columns], or None."""
    crowded = wanted.unflatten(-1, (-1, pattern.group)).sum(-1, dtype=torch.int16) > pattern.keep
    if not bool(crowded.any()):
        return None
    row, group = divmod(int(crowded.flatten().to(torch.uint8).argmax()), crowded.shape[1])
    return row, group


def require_pattern(weight: Tensor, pattern: Pattern, what: str = "weight") -> Tensor:
    """bool mask of the non-zero places of `weight`; -0.0 is zero, NaN is not.

    Raises:
        PatternError: a group has more than `keep` of them; the message names the first and shows its values.
    """
    nonzero = numbers(weight) != 0
    bad = first_crowded_group(nonzero, pattern)
    if bad is not None:
        row, group = bad
        start = group * pattern.group
        shown = ", ".join(f"{v:.6g}" for v in numbers(weight[row, start : start + pattern.group]).tolist())
        count = int(nonzero[row, start : start + pattern.group].sum())
        raise PatternError(
            f"{what} is not {pattern}: row {row}, columns {start}:{start + pattern.group} hold [{shown}],"
            f" {count} non-zeros where {pattern.keep} may be.\n"
            "  Pass mask= to say which to keep, or prune=True to keep the largest magnitudes."
        )
    return nonzero


def require_both_axes(wanted: Tensor, pattern: Pattern, what: str = "weight") -> None:
    """Raises unless bool `wanted`, which holds a transposable pattern along its rows, holds it along its columns too.

    Raises:
        ShapeError: out_features is not a multiple of the group.
        PatternError: names the first bad column.
    """
    if wanted.shape[0] % pattern.group:
        raise ShapeError(
            f"{what} is {list(wanted.shape)}: {pattern} needs out_features to be a multiple of {pattern.group} too."
            f" Store it as '{pattern.keep}:{pattern.group}'."
        )
    bad = first_crowded_group(wanted.T, pattern)
    if bad is not None:
        column, group = bad
        start = group * pattern.group
        raise PatternError(
            f"{what} is not {pattern}: column {column}, rows {start}:{start + pattern.group} have more than"
            f" {pattern.keep} non-zeros.\n  Store it as '{pattern.keep}:{pattern.group}', or choose again with"
            f" nm_mask(scores, '{pattern}')."
        )


def shared_places(wanted: Tensor, pattern: Pattern, what: str = "weight") -> Tensor:
    """bool, shape of `wanted`: the places of all rows that share a mask together, the same for each of them.

    Each `pattern.rows` neighbours share where they can, otherwise rows anywhere (`masks.partition.shared_places`).

    Raises:
        ShapeError: out_features is not a multiple of `rows`.
        PatternError: no rows fit together; names the first neighbours that have more than `keep` in a group.
    """
    _require_whole_blocks(tuple(wanted.shape), pattern, what)
    places = partition.shared_places(wanted, pattern)
    if places is not None:
        return places
    together = wanted.unflatten(0, (wanted.shape[0] // pattern.rows, pattern.rows)).any(1)
    bad = first_crowded_group(together, pattern)
    assert bad is not None
    block, group = bad
    row, start = block * pattern.rows, group * pattern.group
    raise PatternError(
        f"{what} is not {pattern}: rows {row}:{row + pattern.rows} together have more than {pattern.keep} non-zeros"
        f" in columns {start}:{start + pattern.group}, and no other rows share a mask.\n  Store it as"
        f" '{pattern.keep}:{pattern.group}', choose again with nm_mask(scores, '{pattern}'), or pass mask= to say which"
        " rows do."
    )


def require_equal_rows(mask: Tensor, pattern: Pattern) -> None:
    """Raises unless each row of bool `mask` occurs a multiple of `pattern.rows` times, neighbours or not.

    Raises:
        ShapeError: out_features is not a multiple of `rows`.
        PatternError: names the first row that too few others equal.
    """
    _require_whole_blocks(tuple(mask.shape), pattern, "mask")
    row = _first_lonely_row(_join(mask.to(torch.uint8), 1), pattern.rows)
    if row is not None:
        raise PatternError(
            f"mask is not {pattern}: row {row} and its equals are not a multiple of {pattern.rows} rows. Make one with"
            f" twofour.masks.nm_mask(scores, '{pattern}')."
        )


def require_shared_metadata(metadata: Tensor, pattern: Pattern) -> None:
    """Raises FormatError unless each row of `metadata` occurs a multiple of `pattern.rows` times, neighbours or not.

    Cost: one pass where neighbours share, a sort of the rows where they do not.
    """
    row = _first_lonely_row(metadata, pattern.rows)
    if row is not None:
        raise FormatError(
            f"metadata is not {pattern}: row {row} and its equals are not a multiple of {pattern.rows} rows."
        )


def require_transposable(values: Tensor, metadata: Tensor, shape: tuple[int, int], pattern: Pattern) -> None:
    """Raises FormatError unless the non-zero values hold `pattern` along the columns too; fillers may stand anywhere.

    Cost: making the mask; values are read only where the stored places alone do not hold it.
    """
    held = unpack_mask(metadata, shape, pattern)
    if not held.numel():
        return
    if shape[0] % pattern.group == 0 and first_crowded_group(held.T, pattern) is None:
        return
    nonzero = torch.zeros_like(held)
    nonzero[held] = (numbers(values) != 0).flatten()
    try:
        require_both_axes(nonzero, pattern, "matrix")
    except (PatternError, ShapeError) as error:
        raise FormatError(str(error).partition("\n")[0]) from None


def _require_whole_blocks(shape: tuple[int, ...], pattern: Pattern, what: str) -> None:
    if shape[0] % pattern.rows:
        raise ShapeError(
            f"{what} is {list(shape)}: {pattern} needs out_features to be a multiple of {pattern.rows}."
            f" Store it as '{pattern.keep}:{pattern.group}'."
        )


def _first_lonely_row(rows: Tensor, times: int) -> int | None:
    """The first row of uint8 [n, bytes] that does not occur a multiple of `times` times."""
    if rows.shape[0] % times == 0:
        blocks = rows.unflatten(0, (rows.shape[0] // times, times))
        if bool((blocks == blocks[:, :1]).all()):
            return None
    if rows.shape[1] == 0:
        return 0
    _, which, counts = torch.unique(rows, dim=0, return_inverse=True, return_counts=True)
    lonely = (counts % times != 0)[which]
    return int(lonely.to(torch.uint8).argmax()) if bool(lonely.any()) else None


def pack(weight: Tensor, wanted: Tensor, pattern: Pattern, *, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Values and metadata of `torch.where(wanted, weight, 0)`.

    Args:
        weight: [out_features, in_features] of a VALUE_DTYPES dtype.
        wanted: bool, same shape, at most `keep` True in each group. A wanted -0.0 is kept as it is.
        places: bool, same shape, every True of `wanted` and more: places to store, as zeros where they are not wanted.
    Returns:
        values [out_features, in_features·keep/group] of the weight's dtype, in the order of the columns, and
        metadata uint8 [out_features, bytes].
    Cost: about ten passes over the weight.
    """
    out_features, in_features = weight.shape
    groups = in_features // pattern.group
    held = held_mask(wanted if places is None else places, pattern)
    bits = _carrier(weight.contiguous())
    kept = torch.where(wanted, bits, torch.zeros_like(bits))
    values = kept[held].view(out_features, groups * pattern.keep).view(weight.dtype)
    if uses_indices(pattern):
        places = held.nonzero()[:, 1].to(torch.uint8) % 4
        codes = places.view(out_features, groups, pattern.keep)
        nibbles = codes[..., 0] if pattern.keep == 1 else codes[..., 0] | (codes[..., 1] << 2)
        metadata = _join(nibbles, group_bits(pattern))
    else:
        metadata = _join(held.to(torch.uint8), 1)
    return values, metadata


def unpack_mask(metadata: Tensor, shape: tuple[int, int], pattern: Pattern) -> Tensor:
    """bool [out_features, in_features]: the stored places.

    Raises:
        FormatError: indices that repeat or descend, a bitmask without exactly `keep` bits; names the first bad group.
    """
    if uses_indices(pattern):
        places = _places(metadata, shape, pattern)
        held = torch.zeros(*places.shape[:2], 4, dtype=torch.bool, device=metadata.device)
        return held.scatter_(-1, places, True).view(shape)
    held = _split(metadata, 1, shape[1]).bool()
    counts = held.unflatten(-1, (-1, pattern.group)).sum(-1, dtype=torch.int16)
    _require_none(counts != pattern.keep, f"a bitmask without exactly {pattern.keep} bits", counts)
    return held


def _places(metadata: Tensor, shape: tuple[int, int], pattern: Pattern) -> Tensor:
    """int64 [out_features, groups, keep]: the index of each stored value in its group, for patterns that store indices.

    Raises:
        FormatError: indices that repeat or descend.
    """
    codes = _split(metadata, group_bits(pattern), shape[1] // pattern.group)
    if pattern.keep == 1:
        return codes.long()[..., None]
    first, second = codes & 3, codes >> 2
    _require_none(first >= second, "indices that repeat or descend", codes)
    return torch.stack([first, second], dim=-1).long()


def require_metadata(metadata: Tensor, shape: tuple[int, int], pattern: Pattern) -> None:
    """Raises FormatError unless `metadata` is what `pack` could have made: whole groups, clear tail.

    Cost: for 2:4 a few passes over the metadata bytes, a tenth of making the mask; 1:4 codes are all valid.
    """
    require_clear_tail(metadata, shape, pattern)
    if not uses_indices(pattern):
        unpack_mask(metadata, shape, pattern)
    elif pattern.keep == 2:
        bad_low = (metadata & 3) >= (metadata >> 2 & 3)
        bad_high = (metadata >> 4 & 3) >= (metadata >> 6)
        if shape[1] // pattern.group % 2:
            bad_high[:, -1:] = False  # the unused nibble
        if bool((bad_low | bad_high).any()):
            unpack_mask(metadata, shape, pattern)  # names the group


def require_clear_tail(metadata: Tensor, shape: tuple[int, int], pattern: Pattern) -> None:
    """Raises FormatError unless the unused bits of each row's last byte are 0, so that one matrix has one byte form."""
    used = (shape[1] // pattern.group) * group_bits(pattern) % 8
    if used and metadata.numel() and bool((metadata[:, -1] >> used).any()):
        raise FormatError("metadata has bits set after the last group of a row: they must be 0.")


def unpack(values: Tensor, metadata: Tensor, shape: tuple[int, int], pattern: Pattern) -> Tensor:
    """The dense weight [out_features, in_features]; dropped places are +0.0. The inverse of `pack`, bit for bit."""
    bits = _carrier(values)
    if uses_indices(pattern):  # 24 times as fast as through the mask (1024x1024)
        places = _places(metadata, shape, pattern)
        groups = torch.zeros(*places.shape[:2], 4, dtype=bits.dtype, device=values.device)
        return groups.scatter_(-1, places, bits.unflatten(-1, (-1, pattern.keep))).view(shape).view(values.dtype)
    held = unpack_mask(metadata, shape, pattern)
    dense = torch.zeros(shape, dtype=bits.dtype, device=values.device)
    dense[held] = bits.flatten()
    return dense.view(values.dtype)


def _carrier(tensor: Tensor) -> Tensor:
    """The same bits as integers: float8 has few operations, and integers keep NaN payloads."""
    return tensor.view(_CARRIER[tensor.dtype.itemsize])


def _join(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, n] codes of `bits` bits -> uint8 [rows, ceil(n·bits/8)], lowest bits first."""
    per_byte = 8 // bits
    missing = -codes.shape[1] % per_byte
    if missing:
        codes = torch.cat([codes, codes.new_zeros(codes.shape[0], missing)], dim=1)
    lanes: Tensor = codes.unflatten(-1, (-1, per_byte))
    joined = lanes[..., 0].clone()
    for lane in range(1, per_byte):
        joined |= lanes[..., lane] << (lane * bits)
    return joined


def _split(metadata: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `_join`, cut to `count` codes."""
    lanes = [(metadata >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return torch.stack(lanes, dim=-1).flatten(-2)[:, :count]


def _require_none(bad: Tensor, fault: str, shown: Tensor) -> None:
    if bool(bad.any()):
        row, group = divmod(int(bad.flatten().to(torch.uint8).argmax()), bad.shape[1])
        raise FormatError(f"metadata has {fault}: row {row}, group {group} (code {int(shown[row, group]):#x}).")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
