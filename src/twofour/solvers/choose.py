"""Scores -> mask for one layer, with the rows that share a mask found on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masks import nm_mask
from ..masks.rows import WINDOW_ROWS, cluster_rows, clustered_mask
from ..pattern import Pattern

_FIRST_ROUNDS = 60
_LATER_ROUNDS = 10


class Chooser:
    """Called with scores [out_features, any whole groups], gives the best mask of `pattern`.

    Rows that share a mask lie inside a window of WINDOW_ROWS rows where clusters fit into it: so the kernels run them as
    fast as neighbours.

    Args:
        pattern: rows above 1 share a mask: the neighbours, or with `cluster` those that lose least by it.
        scores: [out_features, in_features] of the whole layer, for the first clustering.
        cluster: find rows that need not be neighbours.
    """

    def __init__(self, pattern: Pattern, scores: Tensor, cluster: bool) -> None:
        self.pattern = pattern
        self.order: Tensor | None = None
        self.window = WINDOW_ROWS if WINDOW_ROWS % pattern.rows == 0 else None
        if cluster and pattern.rows > 1:
            self.order = cluster_rows(scores, pattern, rounds=_FIRST_ROUNDS, window=self.window)

    def __call__(self, scores: Tensor) -> Tensor:
        """bool, shape of `scores`."""
        return nm_mask(scores, self.pattern) if self.order is None else clustered_mask(scores, self.pattern, self.order)

    def recluster(self, scores: Tensor, seed: int) -> None:
        """Some more rounds of clustering on other scores of the whole layer."""
        if self.order is not None:
            self.order = cluster_rows(
                scores, self.pattern, start=self.order, rounds=_LATER_ROUNDS, seed=seed, window=self.window
            )

    def neighbours(self, tensor: Tensor) -> Tensor:
        """Rows of `tensor` in an order where those that share a mask are neighbours."""
        return tensor if self.order is None else tensor[self.order]

    def original(self, tensor: Tensor) -> Tensor:
        """The way back from `neighbours`."""
        if self.order is None:
            return tensor
        restored = torch.empty_like(tensor)
        restored[self.order] = tensor
        return restored
