"""Masks chosen in C++: the bits of the specification in torch, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twofour import native as native_module
from twofour.masks import cpu, nm_mask
from twofour.masks.transposable import best_of_90
from twofour.pattern import Pattern
from twofour.testing import hostile_tensor, strategies

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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_bits_do_not_depend_on_threads(dtype: torch.dtype, threads: int) -> None:
    scores = torch.randn(260, 1040, dtype=dtype)
    expected = best_of_90(scores)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(nm_mask(scores, "2:4t"), expected)
    finally:
        torch.set_num_threads(before)
    assert native_module.module().last_kernel() in ISAS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_narrow_scores_are_chosen_in_cpp_too(dtype: torch.dtype) -> None:
    scores = hostile_tensor((16, 64), dtype)
    assert torch.equal(nm_mask(scores, "2:4t"), best_of_90(scores.float()))
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
