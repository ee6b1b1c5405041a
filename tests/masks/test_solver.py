"""Transposable masks of any group: valid, the best by proof, and the same from C++ and from plain Python."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twofour.masks import check_pattern, cpu, nm_mask, solver
from twofour.masks.solver import Block, best_of_blocks
from twofour.pattern import Pattern
from twofour.testing import hostile_tensor, integer_tensor, strategies

PATTERNS = ["1:2t", "1:4t", "3:4t", "2:5t", "1:8t", "2:8t", "4:8t", "7:8t", "5:12t", "8:16t"]


def path(name: str, scores: Tensor, pattern: Pattern) -> Tensor:
    """The mask from C++ or from plain Python."""
    return cpu.transposable_blocks(scores, pattern) if name == "cpp" else best_of_blocks(scores, pattern)


@pytest.fixture(params=["cpp", "python"])
def name(request: pytest.FixtureRequest) -> str:
    if request.param == "cpp":
        request.getfixturevalue("native")
    return str(request.param)


def require_valid(mask: Tensor, pattern: Pattern) -> None:
    for axis in (mask, mask.T):
        assert axis.unflatten(-1, (-1, pattern.group)).sum(-1).unique().tolist() in ([], [pattern.keep])


def all_masks(keep: int, size: int) -> Tensor:
    """bool [masks, size, size]: every mask with `keep` in each row and column."""
    rows = [tuple(int(i in kept) for i in range(size)) for kept in itertools.combinations(range(size), keep)]
    blocks = [b for b in itertools.product(rows, repeat=size) if all(sum(c) == keep for c in zip(*b, strict=True))]
    return torch.tensor(blocks, dtype=torch.bool)


@pytest.mark.of_cpu
@pytest.mark.parametrize(
    ("text", "masks"),
    [("1:2t", 2), ("1:4t", 24), ("2:4t", 90), ("3:4t", 24), ("1:3t", 6), ("2:5t", 2040), ("1:6t", 720)],
)
def test_no_other_mask_is_better(name: str, text: str, masks: int) -> None:
    pattern = Pattern.parse(text)
    every = all_masks(pattern.keep, pattern.group)
    assert len(every) == masks
    for kind in range(40):
        shape = (pattern.group, pattern.group)
        scores = torch.randn(shape) if kind % 2 else integer_tensor(shape, torch.float32, seed=kind)
        kept = scores.double()[path(name, scores, pattern)].sum()
        best = (every * scores.double()).sum((1, 2)).max()
        assert kept == pytest.approx(float(best), rel=1e-14, abs=1e-14)


def test_2_4_is_as_good_by_either_way() -> None:
    scores = integer_tensor((32, 32), torch.float32)
    exact, solved = nm_mask(scores, "2:4t"), best_of_blocks(scores, Pattern.parse("2:4t"))
    assert scores[exact].sum() == scores[solved].sum()


@pytest.mark.parametrize("text", [*PATTERNS, "16:32t", "1:32t"])
@pytest.mark.parametrize("largest", [None, 2])
def test_labels_are_a_dual_of_the_same_worth(text: str, largest: int | None) -> None:
    pattern = Pattern.parse(text)
    size = pattern.group
    scores = (
        torch.randn(size, size) if largest is None else integer_tensor((size, size), torch.float32, largest=largest)
    )
    block = Block(scores.double().tolist(), pattern.keep)
    kept = block.solve()
    places = list(itertools.product(range(size), repeat=2))
    # A fractional mask too: max sum w x, rows and columns of x add up to keep, 0 <= x <= 1. Its dual, with any labels, is
    # never below it; here it is equal to what the mask keeps.
    worth = sum(block.worth[i][j] for i, j in places if kept[i][j])
    surplus = sum(max(0, block.worth[i][j] - block.row_labels[i] + block.column_labels[j]) for i, j in places)
    dual = pattern.keep * (sum(block.row_labels) - sum(block.column_labels)) + surplus
    assert dual == worth
    require_valid(torch.tensor(kept), pattern)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("text", [*PATTERNS, "16:32t"])
@settings(deadline=None, max_examples=15)
@given(st.data(), st.sampled_from([torch.float32, torch.float64]))
def test_cpp_equals_python_for_hostile_scores(text: str, data: st.DataObject, dtype: torch.dtype) -> None:
    pattern = Pattern.parse(text)
    rows = st.sampled_from([0, pattern.group])
    scores = data.draw(strategies.weights(pattern, dtype, rows=rows, max_groups=2))
    mask = nm_mask(scores, pattern)
    require_valid(mask, pattern)
    assert torch.equal(mask, best_of_blocks(scores, pattern))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("size", [1e-320, 1e-44, 1.0, 1e308])
def test_cpp_equals_python_for_numbers_of_any_size(text: str, size: float) -> None:
    pattern = Pattern.parse(text)
    scores = torch.randn(2 * pattern.group, 3 * pattern.group, dtype=torch.float64) * size
    assert torch.equal(nm_mask(scores, pattern), best_of_blocks(scores, pattern))
    scores = scores.float().T.contiguous().T
    assert torch.equal(nm_mask(scores, pattern), best_of_blocks(scores, pattern))


@pytest.mark.of_cpu
@pytest.mark.parametrize("text", ["1:8t", "1:16t"])
def test_one_of_each_is_an_assignment(name: str, text: str) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    pattern = Pattern.parse(text)
    for _ in range(10):
        scores = torch.randn(pattern.group, pattern.group, dtype=torch.float64)
        rows, columns = optimize.linear_sum_assignment(scores.numpy(), maximize=True)
        expected = torch.zeros(scores.shape, dtype=torch.bool)
        expected[rows, columns] = True
        assert torch.equal(path(name, scores, pattern), expected)


@pytest.mark.of_cpu
@pytest.mark.parametrize("text", ["4:8t", "3:12t"])
def test_as_good_as_a_linear_program(name: str, text: str) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    pattern = Pattern.parse(text)
    size = pattern.group
    sums = torch.cat([torch.eye(size).repeat_interleave(size, 1), torch.eye(size).repeat(1, size)])
    for _ in range(5):
        scores = torch.randn(size, size, dtype=torch.float64).abs()
        found = optimize.linprog(
            -scores.flatten().numpy(), A_eq=sums.numpy(), b_eq=[pattern.keep] * 2 * size, bounds=(0, 1)
        )
        assert float(scores[path(name, scores, pattern)].sum()) == pytest.approx(-found.fun, rel=1e-9)


def test_nan_is_kept_last_and_infinities_first(name: str) -> None:
    scores = torch.zeros(8, 8)
    scores[:4] = math.nan
    scores[4:, :4] = 1e38
    scores[0, 0] = -math.inf
    scores[1, 1] = math.inf
    mask = path(name, scores, Pattern(3, 8, transposable=True))
    require_valid(mask, Pattern(3, 8))
    assert bool(mask[0, 0])
    assert bool(mask[1, 1])


@pytest.mark.of_cpu
def test_labels_may_begin_again_at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = Pattern.parse("8:16t")
    scores = torch.randn(16, 16)
    best = scores[best_of_blocks(scores, pattern)].double().sum()
    monkeypatch.setattr(solver, "_LOW_LABEL", 0)
    assert scores[best_of_blocks(scores, pattern)].double().sum() == pytest.approx(float(best), rel=1e-14)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_threads(threads: int) -> None:
    scores = torch.randn(128, 256)
    expected = nm_mask(scores, "4:8t")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(nm_mask(scores, "4:8t"), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.of_cpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_narrow_scores(dtype: torch.dtype) -> None:
    scores = hostile_tensor((16, 24), dtype)
    mask = nm_mask(scores, "4:8t")
    assert torch.equal(mask, best_of_blocks(scores.float(), Pattern(4, 8)))
    kept = torch.where(mask, scores.float(), 0)
    assert check_pattern(kept, "4:8t").holds


def test_without_cpp_the_mask_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(16, 16)
    mask = nm_mask(scores, "4:8t")
    monkeypatch.setattr(cpu, "runs", lambda scores: False)
    assert torch.equal(nm_mask(scores, "4:8t"), mask)


def test_meta_scores_give_the_shape() -> None:
    mask = nm_mask(torch.empty(8, 16, device="meta"), "4:8t")
    assert (mask.device.type, mask.shape, mask.dtype) == ("meta", (8, 16), torch.bool)
