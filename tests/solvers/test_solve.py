"""One matrix: every method holds its pattern, does what its paper says, and is no worse than the one before it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from twofour.errors import CalibrationError, ShapeError, UnsupportedError
from twofour.masks import check_pattern, nm_mask
from twofour.masks.rows import WINDOW_ROWS, clustered_mask
from twofour.pattern import Pattern
from twofour.solvers import METHODS, Hessian, Recipe, solve
from twofour.solvers.choose import Chooser
from twofour.solvers.hessian import DRIFT_DAMPING, corrected, inverse_factor, output_error, statistics
from twofour.solvers.refit import refit
from twofour.solvers.sparsegpt import sparsegpt
from twofour.solvers.supports import descend, descends


def inputs(features: int, tokens: int = 2000, seed: int = 0) -> Tensor:
    """Correlated inputs of very different sizes, off zero."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator, dtype=torch.float64) / features**0.5
    x = torch.randn(tokens, features, generator=generator, dtype=torch.float64) @ (mix + 0.3 * torch.eye(features))
    return x * torch.rand(features, generator=generator, dtype=torch.float64).exp().square() + 0.2


def weights(rows: int, features: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen(x: Tensor) -> Hessian:
    hessian = Hessian(x.shape[1], x.device)
    hessian.add(x)
    return hessian


def scaled(hessian: Hessian) -> tuple[Tensor, Tensor]:
    found = statistics(hessian)
    return found.matrix / torch.outer(found.scale, found.scale), found.scale


def test_hessian_is_the_mean_of_x_xt_in_any_order() -> None:
    x = inputs(24)
    whole, parts = seen(x), Hessian(24, x.device)
    for part in reversed(x.view(10, 200, 24).split(3)):
        parts.add(part)
    assert parts.tokens == whole.tokens == 2000
    torch.testing.assert_close(whole.second, x.T @ x)
    torch.testing.assert_close(parts.second, whole.second, rtol=1e-13, atol=0)
    merged = seen(x[:700])
    merged.merge(seen(x[700:]))
    torch.testing.assert_close(merged.second, whole.second, rtol=1e-13, atol=0)
    torch.testing.assert_close(merged.first, x.sum(0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_hessian_refuses_what_is_no_number_and_keeps_what_it_had(bad: float) -> None:
    hessian = seen(inputs(8))
    before = hessian.second.clone()
    x = torch.ones(4, 8)
    x[2, 3] = bad
    with pytest.raises(CalibrationError, match=r"1 of 4 tokens hold NaN or infinities"):
        hessian.add(x)
    assert torch.equal(hessian.second, before)
    assert hessian.tokens == 2000
    with pytest.raises(ShapeError, match=r"x is \[4, 7\]: its last axis must be the layer's 8 in_features"):
        hessian.add(torch.ones(4, 7))


def paired(x: Tensor, wanted: Tensor, through: Tensor | None = None) -> Hessian:
    hessian = Hessian(x.shape[1], x.device, paired=True, through=through)
    for part, wanted_part in zip(x.split(700), wanted.split(700), strict=True):
        hessian.add(part, wanted_part)
    return hessian


def test_paired_hessian_sums_how_far_inputs_have_drifted() -> None:
    wanted = inputs(24)
    x = wanted + 0.1 * inputs(24, seed=5)
    hessian = paired(x, wanted)
    assert hessian.drift is not None
    torch.testing.assert_close(hessian.drift, (wanted - x).T @ x)
    torch.testing.assert_close(hessian.second, x.T @ x)
    merged = paired(x[:700], wanted[:700])
    merged.merge(paired(x[700:], wanted[700:]))
    torch.testing.assert_close(merged.drift, hessian.drift)
    merged.merge(seen(x))
    assert merged.drift is None


def test_paired_hessian_refuses_what_is_no_pair_and_keeps_what_it_had() -> None:
    hessian = paired(inputs(8), inputs(8))
    assert hessian.drift is not None
    before = hessian.drift.clone(), hessian.second.clone()
    with pytest.raises(
        ShapeError, match=r"wanted None: the same shape where the Hessian is paired, .* this one is paired"
    ):
        hessian.add(torch.ones(4, 8))
    with pytest.raises(ShapeError, match=r"x is \[4, 8\], wanted \[3, 8\]"):
        hessian.add(torch.ones(4, 8), torch.ones(3, 8))
    with pytest.raises(ShapeError, match="this one is not paired"):
        seen(inputs(8)).add(torch.ones(4, 8), torch.ones(4, 8))
    for bad in (0, 1):
        pair = [torch.ones(4, 8), torch.ones(4, 8)]
        pair[bad][1, 2] = float("nan")
        with pytest.raises(CalibrationError, match="1 of 4 tokens hold NaN"):
            hessian.add(*pair)
    assert torch.equal(hessian.drift, before[0])
    assert torch.equal(hessian.second, before[1])
    assert hessian.tokens == 2000


def test_corrected_weight_is_the_ridge_regression_of_the_wanted_outputs() -> None:
    wanted = inputs(24)
    x = wanted @ (torch.eye(24) + 0.2 * weights(24, 24, seed=7)) + 0.3 * inputs(24, seed=5)
    weight, hessian = weights(16, 24), paired(x, wanted)
    found = corrected(weight, hessian, statistics(hessian))
    # The minimum of |V x - W x'|² + λ|V - W|²: its gradient is zero.
    strength = DRIFT_DAMPING * x.square().sum(0).mean()
    gradient = (x @ found.T - wanted @ weight.T).T @ x + strength * (found - weight)
    assert gradient.abs().max() < 1e-9 * (x @ weight.T).abs().max() * len(x)
    assert torch.equal(corrected(weight, seen(x), statistics(seen(x))), weight)
    lost = (x @ weight.T - wanted @ weight.T).square().mean()
    assert (x @ found.T - wanted @ weight.T).square().mean() < 0.7 * lost


def test_drift_through_a_weight_corrects_that_weight_alone() -> None:
    wanted = inputs(24)
    x = wanted + 0.3 * inputs(24, seed=5)
    weight, whole = weights(6, 24), paired(x, wanted)
    hessian = paired(x, wanted, weight)
    assert hessian.drift is not None
    torch.testing.assert_close(hessian.drift, weight.double() @ (wanted - x).T @ x)
    found = statistics(hessian)
    torch.testing.assert_close(corrected(weight, hessian, found), corrected(weight, whole, found))
    with pytest.raises(CalibrationError, match="drift of another weight's outputs"):
        corrected(2 * weight, hessian, found)
    merged = paired(x[:700], wanted[:700], weight)
    merged.merge(paired(x[700:], wanted[700:], weight))
    torch.testing.assert_close(merged.drift, hessian.drift)
    for other in (paired(x, wanted), paired(x, wanted, 2 * weight)):
        with pytest.raises(CalibrationError, match="drifts of different weights' outputs have no sum"):
            merged.merge(other)
    with pytest.raises(ShapeError, match=r"through is \[6, 24\]: it must be \[out_features, 8\]"):
        Hessian(8, paired=True, through=weight)
    merged.forget_drift()
    assert merged.through is None
    merged.add(x)


@pytest.mark.parametrize("method", ["sparsegpt", "admm"])
def test_dense_targets_come_nearer_to_the_dense_outputs(method: str) -> None:
    wanted = inputs(32)
    x = wanted @ (torch.eye(32) + 0.1 * weights(32, 32, seed=7)) + 0.2 * inputs(32, seed=5)
    weight, hessian = weights(16, 32), paired(x, wanted)
    lost = {}
    for targets in ("dense", "pruned"):
        found = solve(weight, hessian, "2:4", Recipe(method, targets=targets))
        assert check_pattern(found.mask, "2:4").holds
        lost[targets] = float((x @ found.weight.T - wanted @ weight.T).square().mean())
        plain = solve(weight, seen(x), "2:4", Recipe(method, targets=targets)).weight
        if targets == "pruned":
            torch.testing.assert_close(found.weight, plain, rtol=1e-9, atol=1e-9)  # sums of other parts
    assert lost["dense"] < 0.8 * lost["pruned"]


def test_large_half_precision_inputs_do_not_overflow() -> None:
    hessian = Hessian(4)
    hessian.add(torch.full((100, 4), 60000.0, dtype=torch.float16))
    assert float(hessian.second[0, 0]) == pytest.approx(100 * 60000.0**2, rel=1e-6)


def test_too_few_tokens_are_damped_and_said() -> None:
    few = statistics(seen(inputs(64, tokens=3)), damping=0.0)
    assert few.damping > 0
    assert bool(torch.isfinite(torch.linalg.cholesky(few.matrix)).all())
    enough = statistics(seen(inputs(64)), damping=0.01)
    assert enough.damping == 0.01
    with pytest.raises(CalibrationError, match="no tokens reached the layer"):
        statistics(Hessian(8))
    with pytest.raises(CalibrationError, match="every input of the layer was zero"):
        statistics(seen(torch.zeros(5, 8)))


def test_inverse_factor() -> None:
    found = statistics(seen(inputs(40)))
    matrix = found.matrix / torch.outer(found.scale, found.scale)
    upper = inverse_factor(found)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper @ matrix, torch.eye(40, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(found.factor @ found.factor.T, found.matrix)


@pytest.mark.parametrize("features", [1, 256, 300, 2200])  # one block, whole blocks, a rest, more than eight
def test_output_error_is_the_plain_product(features: int) -> None:
    found = statistics(seen(inputs(features, tokens=100)))
    change = torch.randn(3, features, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain = float(((change @ found.matrix) * change).sum())
    assert output_error(change, found.matrix) == pytest.approx(plain, rel=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "2:4x2", "2:4x4", "2:4t", "3:8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_method_holds_every_pattern(method: str, pattern: str, dtype: torch.dtype) -> None:
    weight = weights(16, 48).to(dtype)
    hessian = seen(inputs(48))
    found = solve(weight, hessian, pattern, Recipe(method))
    assert check_pattern(found.weight, pattern).holds
    assert not bool(found.weight[~found.mask].any())
    assert bool(torch.isfinite(found.weight).all())
    kept, group = Pattern.parse(pattern).keep, Pattern.parse(pattern).group
    assert int(found.mask.sum()) == 16 * 48 * kept // group
    if method in ("magnitude", "wanda", "ria"):
        assert torch.equal(found.weight[found.mask], weight.to(found.weight.dtype)[found.mask])
        assert found.error == pytest.approx(found.error_masked)
    else:
        assert found.error < found.error_masked


def test_each_method_is_better_than_the_one_before_it() -> None:
    weight, hessian = weights(64, 128), seen(inputs(128, 4000))
    errors = {method: solve(weight, hessian, "2:4", Recipe(method)).error for method in METHODS}
    assert errors["magnitude"] > errors["wanda"] > errors["sparsegpt"] > errors["admm"]
    assert errors["admm"] < 0.8 * errors["sparsegpt"]
    refitted = solve(weight, hessian, "2:4", Recipe("wanda", refit=True))
    assert refitted.error < 0.8 * errors["wanda"]


def test_sparsegpt_is_the_algorithm_of_the_paper() -> None:
    """Against the loop of the paper's algorithm 1, column by column and without blocks, in float64."""
    weight, hessian = weights(12, 300), seen(inputs(300))
    inverse = torch.linalg.inv(statistics(hessian).matrix)
    upper = torch.linalg.cholesky(inverse, upper=True)
    expected, mask = weight.clone(), torch.zeros_like(weight, dtype=torch.bool)
    for j in range(300):
        if j % 4 == 0:
            scores = (expected[:, j : j + 4] / upper.diagonal()[j : j + 4]).square()
            mask[:, j : j + 4] = nm_mask(scores, "2:4")
        error = torch.where(mask[:, j], 0.0, expected[:, j]) / upper[j, j]
        expected[:, j:] -= torch.outer(error, upper[j, j:])
    expected[~mask] = 0.0
    found = solve(weight, hessian, "2:4", Recipe("sparsegpt"))
    assert torch.equal(found.mask, mask)
    torch.testing.assert_close(found.weight, expected, atol=1e-9, rtol=0)
    assert not torch.equal(found.weight, weight * mask)


def test_sparsegpt_does_not_touch_its_input() -> None:
    weight = weights(4, 8)
    before = weight.clone()
    sparsegpt(weight, inverse_factor(statistics(seen(inputs(8)))), 4, lambda scores: nm_mask(scores, "2:4"))
    assert torch.equal(weight, before)


def test_refit_is_least_squares_on_the_mask() -> None:
    matrix, _ = scaled(seen(inputs(32)))
    target = weights(6, 32)
    mask = torch.rand(6, 32, generator=torch.Generator().manual_seed(3)) < 0.4
    mask[5] = False  # a row with nothing kept
    found = refit(target, mask, matrix, target, iterations=500, tolerance=1e-13)
    for row in range(5):
        kept = mask[row]
        expected = torch.linalg.solve(matrix[kept][:, kept], matrix[kept] @ target[row])
        torch.testing.assert_close(found[row, kept], expected, atol=1e-9, rtol=1e-9)
    assert not bool(found[~mask].any())


def test_refit_never_makes_a_row_worse() -> None:
    matrix, _ = scaled(seen(inputs(64)))
    target = weights(8, 64)
    mask = nm_mask(target.abs(), "2:4")
    errors = []
    for steps in range(6):
        change = refit(target, mask, matrix, target, iterations=steps) - target
        errors.append(((change @ matrix) * change).sum(1))
    assert all(bool((after <= before * (1 + 1e-12)).all()) for before, after in itertools.pairwise(errors))
    assert bool((errors[-1] < errors[0]).all())


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:4x4", "4:8"])
def test_coordinate_descent_ends_where_no_group_can_do_better(pattern: str) -> None:
    parsed = Pattern.parse(pattern)
    matrix, _ = scaled(seen(inputs(24)))
    target = weights(8, 24)
    mask = nm_mask(target.square(), pattern)
    start = refit(target, mask, matrix, target)
    found, chosen = descend(target, start, matrix, parsed, sweeps=40)
    assert check_pattern(found, pattern).holds
    assert not bool(found[~chosen].any())

    def error(weight: Tensor) -> float:
        return output_error(weight - target, matrix)

    assert error(found) <= error(start)
    assert error(descend(target, start, matrix, parsed, sweeps=1)[0]) >= error(found)
    for at in range(0, 24, parsed.group):  # every other support of every group, with all else as it is
        for support in itertools.combinations(range(parsed.group), parsed.keep):
            other = found.clone()
            columns = torch.tensor([at + i for i in support])
            for row in range(0, 8, parsed.rows):
                block = slice(row, row + parsed.rows)
                rest = other[block].clone()
                rest[:, at : at + parsed.group] = 0
                pull = ((target[block] - rest) @ matrix)[:, columns]
                rest[:, columns] = torch.linalg.solve(matrix[columns][:, columns], pull.T).T
                other[block] = rest
                assert error(other) >= error(found) - 1e-9
                other[block] = found[block]


def test_patterns_without_free_groups_are_left_to_the_refit() -> None:
    assert descends(Pattern.parse("2:4"))
    assert descends(Pattern.parse("4:8"))
    assert not descends(Pattern.parse("2:4t"))
    assert not descends(Pattern.parse("8:16"))
    assert not descends(Pattern.parse("16:32"))


def test_rows_that_share_a_mask_are_found_anywhere_in_their_window() -> None:
    """Rows made in fours and shuffled are found again: then sharing costs nothing."""
    generator = torch.Generator().manual_seed(5)
    mask = nm_mask(torch.rand(8, 64, generator=generator), "2:4").repeat_interleave(4, dim=0)
    target = torch.where(mask, weights(32, 64).sign() * 2, 0.01 * weights(32, 64, seed=9))
    shuffled = target[torch.randperm(32, generator=generator)]
    side_by_side = Chooser(Pattern.parse("2:4x4"), shuffled.square(), cluster=False)
    anywhere = Chooser(Pattern.parse("2:4x4"), shuffled.square(), cluster=True)
    assert torch.equal(anywhere(shuffled.square()), shuffled.abs() > 1)
    assert not torch.equal(side_by_side(shuffled.square()), shuffled.abs() > 1)
    assert torch.equal(anywhere.original(anywhere.neighbours(shuffled)), shuffled)
    assert anywhere.order is not None
    assert sorted(anywhere.order.tolist()) == list(range(32))
    assert torch.equal(
        clustered_mask(shuffled.square(), Pattern.parse("2:4x4"), anywhere.order), anywhere(shuffled.square())
    )


def test_clustering_costs_less_than_neighbours() -> None:
    weight, hessian = weights(64, 64), seen(inputs(64))
    for method in ("wanda", "sparsegpt", "admm"):
        near = solve(weight, hessian, "2:4x4", Recipe(method, cluster=False))
        found = solve(weight, hessian, "2:4x4", Recipe(method))
        assert found.error < near.error
        masks = {tuple(row.tolist()) for row in found.mask}
        assert len(masks) <= 16


def test_clusters_stay_inside_the_windows_of_the_kernels() -> None:
    weight = weights(136, 16)
    choose = Chooser(Pattern.parse("2:4x4"), weight.square(), cluster=True)
    choose.recluster(weight.square(), seed=3)
    assert choose.order is not None
    clusters = choose.order.view(-1, 4)
    assert torch.equal(clusters // WINDOW_ROWS, clusters[:, :1].expand(-1, 4) // WINDOW_ROWS)
    assert Chooser(Pattern.parse("2:4x3"), weight[:99].square(), cluster=True).window is None


def test_dead_inputs_keep_their_largest_weights() -> None:
    x = inputs(16)
    x[:, 4:8] = 0.0
    weight = weights(8, 16)
    found = solve(weight, seen(x), "2:4")
    expected = nm_mask(weight[:, 4:8].abs(), "2:4")
    assert torch.equal(found.mask[:, 4:8], expected)
    torch.testing.assert_close(found.weight[:, 4:8], weight[:, 4:8] * expected)


def test_wrong_use_is_said() -> None:
    with pytest.raises(UnsupportedError, match="unknown targets 'sparse': 'dense' or 'pruned'"):
        Recipe(targets="sparse")
    with pytest.raises(UnsupportedError, match="method 'wanda' keeps weights as they are .* targets='dense' needs one"):
        Recipe("wanda", targets="dense")
    assert Recipe("wanda", refit=True, targets="dense").resolved().targets == "dense"
    assert [Recipe(method).resolved().targets for method in ("admm", "sparsegpt")] == ["dense", "pruned"]
    with pytest.raises(UnsupportedError, match=r"unknown method 'obc': it is one of 'magnitude', 'wanda', 'ria'"):
        Recipe("obc")
    with pytest.raises(UnsupportedError, match=r"damping=-1, shrinkage=0.0, sweeps=None: damping is 0 or more"):
        Recipe(damping=-1)
    with pytest.raises(ShapeError, match=r"weight is \[8, 12\]: its Hessian has 16 in_features"):
        solve(weights(8, 12), seen(inputs(16)), "2:4")
