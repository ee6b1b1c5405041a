"""Which rows share a mask: found by score, inside windows."""

from __future__ import annotations

import pytest
import torch

from twofour import ShapeError
from twofour.masks import nm_mask
from twofour.masks.rows import WINDOW_ROWS, cluster_rows, clustered_mask


def scores_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("out_features", [4, 60, 64, 68, 132, 200])
@pytest.mark.parametrize(("pattern", "rows"), [("2:4x2", 2), ("2:4x4", 4), ("4:8x4", 4)])
def test_clusters_do_not_cross_windows(out_features: int, pattern: str, rows: int) -> None:
    scores = scores_of(out_features, 32)
    first = cluster_rows(scores, pattern, rounds=3)
    again = cluster_rows(scores, pattern, rounds=3, start=first, seed=1)
    for order in (first, again):
        assert sorted(order.tolist()) == list(range(out_features))
        assert torch.equal(order // WINDOW_ROWS, torch.arange(out_features) // WINDOW_ROWS)
    kept = [float((scores * clustered_mask(scores, pattern, order)).sum()) for order in (first, again)]
    neighbours = float((scores * clustered_mask(scores, pattern, torch.arange(out_features))).sum())
    assert neighbours <= kept[0] * (1 + 1e-6)
    assert kept[0] <= kept[1] * (1 + 1e-6)


def test_wider_windows_keep_more() -> None:
    scores = scores_of(128, 64)
    kept = []
    for window in (4, 16, 64, None):
        order = cluster_rows(scores, "2:4x4", rounds=30, window=window)
        kept.append(float((scores * clustered_mask(scores, "2:4x4", order)).sum()))
    assert kept == sorted(kept)
    assert torch.equal(cluster_rows(scores, "2:4x4", window=4).sort().values, torch.arange(128))


def test_anywhere_is_anywhere() -> None:
    far = nm_mask(scores_of(32, 32), "2:4").repeat(4, 1).float()  # rows r, r + 32, r + 64, r + 96 are alike
    order = cluster_rows(far, "2:4x4", window=None)
    assert (order.view(-1, 4) % 32 == order.view(-1, 4)[:, :1] % 32).all()


def test_wrong_windows_are_said() -> None:
    scores = scores_of(96, 8)
    with pytest.raises(ShapeError, match=r"window=64 for 2:4x3: windows must hold whole clusters of 3 rows"):
        cluster_rows(scores, "2:4x3")
    assert len(cluster_rows(scores, "2:4x3", window=48, rounds=1)) == 96
    crossing = torch.arange(96).view(4, 24).T.flatten()  # 0, 24, 48, 72
    with pytest.raises(ShapeError, match=r"start has clusters of rows from several windows of 64"):
        cluster_rows(scores, "2:4x4", start=crossing)
    with pytest.raises(ShapeError, match=r"start has 8 rows, scores 96"):
        cluster_rows(scores, "2:4x4", start=torch.arange(8))
    assert sorted(cluster_rows(scores, "2:4x4", start=crossing, window=None, rounds=1).tolist()) == list(range(96))
