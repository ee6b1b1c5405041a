"""Masks chosen in C++: the bits of the specification in torch, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twofour import ShapeError, UnsupportedError
from twofour import native as native_module
from twofour.masks import cpu, keep_best, magnitude, nm_mask
from twofour.masks.select import best_of_groups
from twofour.masks.transposable import best_of_90
from twofour.pattern import Pattern
from twofour.testing import assert_same_bits, hostile_tensor, strategies

pytestmark = pytest.mark.usefixtures("native")

ISAS = native_module.LOADED.masks_isas() if native_module.LOADED is not None else ["none"]
DTYPES = [torch.float32, torch.float64]


def test_the_plainest_instruction_set_is_always_there() -> None:
    assert ISAS[0] == "baseline"


# ---- transposable --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from(DTYPES))
def test_transposable_equals_torch_for_hostile_scores(isa: str, data: st.DataObject, dtype: torch.dtype) -> None:
    scores = data.draw(strategies.weights(Pattern(2, 4), dtype, rows=st.sampled_from([0, 4, 8]), max_groups=11))
    assert torch.equal(cpu.transposable_2_4(scores, isa=isa), best_of_90(scores))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [4, 8, 12, 16, 20, 28, 32, 36, 64, 4 * 61])
def test_transposable_equals_torch_at_every_edge_of_a_vector(isa: str, dtype: torch.dtype, columns: int) -> None:
    for scores in (
        torch.randn(12, columns, dtype=dtype),
        torch.randn(12, columns, dtype=dtype).exp2() ** 40,  # sums are rounded
        torch.randint(-2, 3, (12, columns)).to(dtype),  # ties
        hostile_tensor((12, columns), dtype),
        hostile_tensor((12, columns), dtype, finite=True),
    ):
        assert torch.equal(cpu.transposable_2_4(scores, isa=isa), best_of_90(scores))


# ---- groups --------------------------------------------------------------------------------------------------------

SHARED = ("2:4x2", "2:4x4", "1:4x3", "4:8x2", "3:7x2")


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=100)
@given(st.data(), strategies.patterns() | strategies.patterns(*SHARED), st.sampled_from(DTYPES))
def test_groups_equal_torch_for_hostile_scores(
    isa: str, data: st.DataObject, pattern: Pattern, dtype: torch.dtype
) -> None:
    rows = st.integers(0, 2).map(lambda bands: bands * pattern.rows)
    scores = data.draw(strategies.weights(pattern, dtype, rows=rows, max_groups=11))
    assert torch.equal(cpu.best_of_groups(scores, pattern, isa=isa), best_of_groups(scores, pattern))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", ["1:2", "2:4", "1:4", "3:7", "4:8", "8:16", "31:32", *SHARED])
def test_groups_equal_torch_at_every_edge(isa: str, dtype: torch.dtype, text: str) -> None:
    pattern = Pattern.parse(text)
    for groups in (1, 2, 3, 7, 8, 9, 16, 17, 63, 64, 65, 513, 1030):  # lanes, chunks of 2048
        shape = (2 * pattern.rows, groups * pattern.group)
        for scores in (torch.randn(shape, dtype=dtype), hostile_tensor(shape, dtype)):
            assert torch.equal(cpu.best_of_groups(scores, pattern, isa=isa), best_of_groups(scores, pattern))


def test_zeros_tie_and_nan_of_either_sign_rank_below_infinity() -> None:
    nan, inf = float("nan"), float("inf")
    for dtype in DTYPES:
        scores = torch.tensor([-0.0, 0.0, -0.0, 0.0, -inf, nan, -nan, -nan, nan, -nan, -inf, nan], dtype=dtype)
        scores[6] = -scores[5].abs()
        assert nm_mask(scores, "1:4").nonzero().flatten().tolist() == [0, 4, 10]


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=60)
@given(st.data(), strategies.patterns("2:4", "1:4", "3:7", "8:16", *SHARED), st.sampled_from(DTYPES))
def test_keep_best_is_where_of_the_mask(isa: str, data: st.DataObject, pattern: Pattern, dtype: torch.dtype) -> None:
    rows = st.integers(0, 2).map(lambda bands: bands * pattern.rows)
    x = data.draw(strategies.weights(pattern, dtype, rows=rows, max_groups=11))
    expected = torch.where(best_of_groups(magnitude(x), pattern), x, 0)
    out = torch.full_like(x, 7.0, memory_format=torch.contiguous_format)
    cpu.keep_best(x, pattern, out, isa=isa)
    assert_same_bits(out, expected)
    assert_same_bits(keep_best(x, pattern), expected)
    assert keep_best(x, pattern, out=x) is x
    assert_same_bits(x, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("text", ["2:4", "2:4t", "2:4x2"])
def test_keep_best_of_any_dtype_and_stride(dtype: torch.dtype, text: str) -> None:
    x = hostile_tensor((8, 24), dtype)
    expected = torch.where(nm_mask(magnitude(x), text), x, 0)
    assert_same_bits(keep_best(x, text), expected)
    columns = x.T.contiguous().T
    assert_same_bits(keep_best(columns, text), expected)
    wide = torch.full((8, 30), 7.0, dtype=dtype)
    keep_best(x, text, out=wide[:, 3:27])
    assert_same_bits(wide[:, 3:27].contiguous(), expected)
    assert bool((wide[:, :3] == 7).all() & (wide[:, 27:] == 7).all())
    keep_best(columns, text, out=columns)
    assert_same_bits(columns.contiguous(), expected)
    leaf = torch.nn.Parameter(x.clone())
    assert not keep_best(leaf, text).requires_grad


def test_keep_best_of_vectors_and_batches() -> None:
    x = torch.randn(3, 5, 8)
    assert torch.equal(keep_best(x, "2:4"), torch.where(nm_mask(x.abs(), "2:4"), x, 0))
    assert torch.equal(keep_best(x[0, 0], "2:4"), torch.where(nm_mask(x[0, 0].abs(), "2:4"), x[0, 0], 0))


def test_keep_best_refuses_what_does_not_fit() -> None:
    with pytest.raises(ShapeError, match=r"out is \[4, 4\] torch.float32 on cpu, x is \[4, 8\] torch.float32 on cpu"):
        keep_best(torch.zeros(4, 8), "2:4", out=torch.zeros(4, 4))
    with pytest.raises(ShapeError, match=r"scores are \[4, 6\]: axis -1 is not a multiple of 4"):
        keep_best(torch.zeros(4, 6), "2:4")
    with pytest.raises(UnsupportedError, match=r"scores are torch.int8"):
        keep_best(torch.zeros(4, 8, dtype=torch.int8), "2:4")


# ---- all masks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_bits_do_not_depend_on_threads(dtype: torch.dtype, threads: int) -> None:
    scores = torch.randn(260, 1040, dtype=dtype)
    expected = best_of_90(scores)
    expected_groups = best_of_groups(scores, Pattern(2, 4, rows=4))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(nm_mask(scores, "2:4t"), expected)
        assert torch.equal(nm_mask(scores, "2:4x4"), expected_groups)
    finally:
        torch.set_num_threads(before)
    assert native_module.module().last_kernel() in ISAS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_narrow_scores_are_chosen_in_cpp_too(dtype: torch.dtype) -> None:
    scores = hostile_tensor((16, 64), dtype)
    assert torch.equal(nm_mask(scores, "2:4t"), best_of_90(scores.float()))
    assert torch.equal(nm_mask(scores, "2:4"), best_of_groups(scores.float(), Pattern(2, 4)))
    assert native_module.module().last_kernel() in ISAS


def test_instruction_sets_that_are_not_here() -> None:
    with pytest.raises(ValueError, match="masks have no instruction set 'sse9' on this machine, which has: baseline"):
        cpu.transposable_2_4(torch.randn(4, 4), isa="sse9")


def test_what_is_left_to_torch() -> None:
    plain = torch.randn(4, 8)
    assert cpu.runs(plain)
    assert cpu.runs(torch.nn.Parameter(plain))
    assert not cpu.runs(plain.half())
    assert not cpu.runs(plain.to("meta"))
    assert not cpu.runs(plain.to_sparse())
    seen = []
    torch.vmap(lambda scores: (seen.append(cpu.runs(scores)), scores)[1])(plain)
    assert seen == [False]
