"""One layer, sparse against dense: torch's Linear and the strongest rival, in turns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import SparseLinear, onednn
from .timing import paired


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Microseconds of all calls: the Linear as torch runs it, oneDNN with packed weights (None where it cannot), sparse."""

    dense_us: float
    onednn_us: float | None
    sparse_us: float

    @property
    def speedup(self) -> float:
        """How many times faster the sparse layer is than the Linear it would replace."""
        return self.dense_us / self.sparse_us

    @property
    def against_best(self) -> float:
        """How many times faster it is than the best dense kernel."""
        return min(self.dense_us, self.onednn_us or self.dense_us) / self.sparse_us


class Comparison:
    """Times layers, each distinct shape once."""

    def __init__(self) -> None:
        self._found: dict[tuple[Any, ...], LayerTimes] = {}

    def times(self, sparse: SparseLinear, dense: nn.Linear | None, tokens: Sequence[int]) -> LayerTimes:
        """The times of calls with the given token counts (repeats count), in sum.

        Args:
            sparse: the layer.
            dense: its dense twin; None makes one.
        """
        dense_us = sparse_us = 0.0
        onednn_us: float | None = 0.0
        for count, calls in sorted(Counter(tokens).items()):
            if count == 0:
                continue
            key = (sparse.spec, sparse.weight.dtype, sparse.bias is None, count, torch.get_num_threads())
            if key not in self._found:
                dense = dense if dense is not None else sparse.to_linear()
                self._found[key] = _measure(sparse, dense, count)
            found = self._found[key]
            dense_us += calls * found.dense_us
            sparse_us += calls * found.sparse_us
            onednn_us = None if onednn_us is None or found.onednn_us is None else onednn_us + calls * found.onednn_us
        return LayerTimes(dense_us, onednn_us, sparse_us)


def _measure(sparse: SparseLinear, dense: nn.Linear, tokens: int) -> LayerTimes:
    device = sparse.values.device
    own = torch.Generator(device).manual_seed(0)  # the user's random numbers must not depend on what was timed
    x = torch.randn(tokens, sparse.in_features, device=device, generator=own).to(sparse.weight.dtype)
    # forward, not the call: the user's hooks must not see timing runs.
    rivals = {"dense": _bind(dense.forward, x), "sparse": _bind(sparse.forward, x)}
    with torch.random.fork_rng(devices=[]):  # why_not makes a Linear to try, which draws its weights
        has_rival = x.is_cpu and onednn.why_not(x.dtype) is None
    if has_rival:
        rivals["onednn"] = _bind(onednn.prepacked_linear(dense.weight, dense.bias), x)
    with torch.no_grad():
        found = paired(rivals, repeats=15, budget_s=1.0)
    packed = found.get("onednn")
    # First quartiles: what other programs do to a measurement only adds time, and a decision follows.
    return LayerTimes(found["dense"].low_us, packed.low_us if packed else None, found["sparse"].low_us)


def _bind(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    return lambda: function(x)
