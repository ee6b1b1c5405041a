"""Hypothesis strategies: patterns, weights, scores, masks and matrices rich in ties, NaN, infinities and -0.0.

Needs hypothesis (`pip install hypothesis`), which twofour itself does not.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..format import SparseMatrix
from ..format.pack import VALUE_DTYPES
from ..pattern import MAX_GROUP, Pattern
from .cases import _pick, hostile_values

COMMON_PATTERNS = ("2:4", "1:4", "3:4", "1:2", "4:8", "2:8", "3:7", "8:16", "16:32", "1:32")


def patterns(*texts: str) -> st.SearchStrategy[Pattern]:
    """One of `texts`; without any, mostly the common patterns and sometimes any keep and group."""
    if texts:
        return st.sampled_from([Pattern.parse(text) for text in texts])
    anything = st.integers(2, MAX_GROUP).flatmap(
        lambda group: st.builds(Pattern, keep=st.integers(1, group - 1), group=st.just(group))
    )
    return st.sampled_from([Pattern.parse(text) for text in COMMON_PATTERNS]) | anything


def dtypes() -> st.SearchStrategy[torch.dtype]:
    """A dtype that the format stores."""
    return st.sampled_from(VALUE_DTYPES)


@st.composite
def tensors(
    draw: st.DrawFn, dtype: torch.dtype, shape: tuple[int, ...], *, finite: bool = False, strided: bool = True
) -> Tensor:
    """`shape` of `dtype` from `hostile_values`; with `strided`, sometimes transposed or with gaps in memory."""
    values = hostile_values(dtype, finite=finite)
    count = torch.Size(shape).numel()
    picks = torch.tensor(list(draw(st.binary(min_size=count, max_size=count))), dtype=torch.int64) % len(values)
    tensor = _pick(values, picks.view(shape))
    layout = draw(st.sampled_from(("plain", "transposed", "gaps"))) if strided and len(shape) == 2 else "plain"
    if layout == "transposed":
        return tensor.T.contiguous().T
    if layout == "gaps":
        wide = torch.zeros(shape[0], 2 * shape[1] + 1, dtype=torch.uint8).to(dtype)
        view = wide[:, 1::2]
        view.copy_(tensor)
        return tensor if _differ(view, tensor) else view
    return tensor


@st.composite
def weights(
    draw: st.DrawFn,
    pattern: Pattern,
    dtype: torch.dtype = torch.float32,
    *,
    finite: bool = False,
    rows: st.SearchStrategy[int] | None = None,
    max_groups: int = 5,
) -> Tensor:
    """A dense weight [out_features, in_features] with whole groups; it does not hold the pattern. May be empty."""
    out_features = draw(rows if rows is not None else st.integers(0, 6))
    in_features = draw(st.integers(0, max_groups)) * pattern.group
    return draw(tensors(dtype, (out_features, in_features), finite=finite))


def scores(
    pattern: Pattern, dtype: torch.dtype = torch.float32, *, rows: st.SearchStrategy[int] | None = None
) -> st.SearchStrategy[Tensor]:
    """Scores for `nm_mask`: ties, NaN and infinities of both signs. May be empty."""
    return weights(pattern, dtype, rows=rows)


@st.composite
def masks(draw: st.DrawFn, pattern: Pattern, shape: tuple[int, int], *, full: bool = False) -> Tensor:
    """bool `shape` with at most `keep` True in each group; with `full`, exactly `keep`."""
    count = shape[0] * (shape[1] // pattern.group)
    ranks = torch.tensor([draw(st.permutations(range(pattern.group))) for _ in range(count)], dtype=torch.int64).view(
        shape[0], shape[1] // pattern.group, pattern.group
    )
    counts = [pattern.keep if full else draw(st.integers(0, pattern.keep)) for _ in range(count)]
    return (ranks < torch.tensor(counts, dtype=torch.int64).view(ranks.shape[:2])[..., None]).view(shape)


@st.composite
def matrices(
    draw: st.DrawFn,
    pattern: st.SearchStrategy[Pattern] | None = None,
    dtype: st.SearchStrategy[torch.dtype] | None = None,
) -> SparseMatrix:
    """A SparseMatrix with any legal values and groups of 0 to `keep` non-zeros. May be empty."""
    drawn = draw(pattern if pattern is not None else patterns())
    weight = draw(weights(drawn, draw(dtype if dtype is not None else dtypes()), max_groups=3))
    mask = draw(masks(drawn, (weight.shape[0], weight.shape[1])))
    return SparseMatrix.from_dense(weight, drawn, mask=mask)


def _differ(one: Tensor, other: Tensor) -> bool:
    """True if a copy did not keep the bits (torch may quiet a NaN)."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
    return not torch.equal(one.contiguous().view(width), other.contiguous().view(width))
