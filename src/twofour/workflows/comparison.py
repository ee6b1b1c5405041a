"""One layer on every kernel that could run it: torch's Linear, oneDNN with packed weights, and sparse, in turns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..format import SparseMatrix
from ..kernels import KERNELS, cpu
from ..kernels.choices import Measured, Store, bucket, key
from ..kernels.onednn import prepacked_linear
from ..nn import SparseLinear
from ..nn.survey import dtype_name
from .timing import paired

TIE = 0.97
"""A compressed layer may be this much of the best dense kernel's speed, for half the bytes; never slower than torch's."""

_CALM = 1.25
"""Other programs were in the way where a median is more than this many times the first quartile."""

_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Microseconds of all calls: the Linear as torch runs it, oneDNN with packed weights (None where it cannot), sparse.

    `packed_us` is oneDNN inside a SparseLinear, some microseconds more than on its own: what would run. `kept` is the
    date of the oldest time that was not measured now but before, or None; `disturbed` tells that other programs were in
    the way; `by_tokens` has the parts, for one call each.
    """

    dense_us: float
    onednn_us: float | None
    sparse_us: float
    packed_us: float | None = None
    kept: str | None = None
    disturbed: bool = False
    by_tokens: Mapping[int, Measured] = field(default_factory=dict)

    @property
    def speedup(self) -> float:
        """How many times faster the sparse layer is than the Linear it would replace."""
        return self.dense_us / self.sparse_us

    @property
    def against_best(self) -> float:
        """How many times faster it is than the best dense kernel."""
        return self.best_dense_us / self.sparse_us

    @property
    def best_dense_us(self) -> float:
        """The faster of torch's Linear and oneDNN."""
        return min(self.dense_us, self.dense_us if self.onednn_us is None else self.onednn_us)

    @property
    def best(self) -> str:
        """ "sparse", "onednn" or "dense": what the layer should run.

        Sparse where it beats torch's Linear and is at least TIE of the speed of a layer on oneDNN; oneDNN where it is
        really faster than torch's Linear (by more than 3 %, because it holds more bytes); else the Linear as it is.
        """
        if self.sparse_us < self.dense_us and (self.packed_us is None or self.packed_us / self.sparse_us >= TIE):
            return "sparse"
        if self.packed_us is not None and self.packed_us < TIE * self.dense_us:
            return "onednn"
        return "dense"

    def us(self, rival: str) -> float:
        """The time of a layer that runs one of the three."""
        found = {"dense": self.dense_us, "onednn": self.packed_us, "sparse": self.sparse_us}[rival]
        assert found is not None
        return found


class Comparison:
    """Times layers, each distinct shape and token count once, and never again on this machine unless asked."""

    def __init__(self, store: Store | None = None, *, remeasure: bool = False) -> None:
        self.store = Store.open() if store is None else store
        self._remeasure = remeasure
        self._found: dict[str, tuple[Measured, bool, bool]] = {}

    @property
    def counts(self) -> tuple[int, int, int]:
        """Measurements made now, taken from the store, and disturbed."""
        kept = sum(from_store for _, from_store, _ in self._found.values())
        return len(self._found) - kept, kept, sum(disturbed for *_, disturbed in self._found.values())

    def times(self, sparse: SparseLinear, dense: nn.Linear | None, tokens: Sequence[int]) -> LayerTimes:
        """The times of calls with the given token counts (repeats count), in sum.

        Args:
            sparse: the layer on the kernel that holds it compressed.
            dense: its dense twin; None makes one where it is needed.
        """
        sums: dict[str, float | None] = dict.fromkeys(("dense", "onednn", "sparse", "packed"), 0.0)
        dates: list[str] = []
        any_disturbed = False
        by_tokens: dict[int, Measured] = {}
        for count, calls in sorted(Counter(tokens).items()):
            if count == 0:
                continue
            standing = bucket(count)
            name = key(sparse.spec, form(sparse, dense), sparse.bias is not None, standing, torch.get_num_threads())
            if name not in self._found:
                self._found[name] = self._look_up_or_measure(name, sparse, dense, standing)
            measured, from_store, disturbed = self._found[name]
            scale = calls * count / standing
            for rival, total in sums.items():
                us = measured.us.get(rival)
                sums[rival] = None if total is None or us is None else total + scale * us
            dates += [measured.date] if from_store else []
            any_disturbed |= disturbed
            by_tokens[standing] = measured
        dense_us, sparse_us = sums["dense"], sums["sparse"]
        assert dense_us is not None
        assert sparse_us is not None
        return LayerTimes(
            dense_us, sums["onednn"], sparse_us, sums["packed"], min(dates, default=None), any_disturbed, by_tokens
        )

    def _look_up_or_measure(
        self, name: str, sparse: SparseLinear, dense: nn.Linear | None, tokens: int
    ) -> tuple[Measured, bool, bool]:
        kept = None if self._remeasure else self.store.get(name)
        if kept is not None:
            return kept, True, False
        if sparse.activation is not None:  # layers are compared without what follows them
            sparse = sparse.twin(sparse.bias)
            sparse.activation = None
        measured, disturbed = _measure(sparse, dense if dense is not None else sparse.to_linear(), tokens)
        if not disturbed:
            self.store.add(name, measured)
        return measured, False, disturbed


def form(sparse: SparseLinear, dense: nn.Linear | None = None) -> str:
    """The kernel that a time belongs to: the backend, the dtype of inputs if not the values', rows that share a mask."""
    dtype = sparse.weight.dtype if dense is None else dense.weight.dtype
    inputs = f" of {dtype_name(dtype)}" if dtype != sparse.spec.dtype else ""
    shared = (
        cpu.packed_sharing(sparse.metadata, sparse.out_features, sparse.in_features)
        if sparse.spec.dtype != torch.int8 and sparse.backend == "cpu"
        else 1
    )
    return f"{sparse.backend}{inputs}{f' x{shared}' if shared > 1 else ''}"


def _measure(sparse: SparseLinear, dense: nn.Linear, tokens: int) -> tuple[Measured, bool]:
    """First quartiles, and whether they were disturbed to the last: what other programs do only adds time."""
    device = sparse.values.device
    own = torch.Generator(device).manual_seed(0)  # the user's random numbers must not depend on what was timed
    x = torch.randn(tokens, sparse.in_features, device=device, generator=own).to(dense.weight.dtype)
    # forward, not the call: the user's hooks must not see timing runs.
    rivals = {"dense": _bind(dense.forward, x), "sparse": _bind(sparse.forward, x)}
    if KERNELS["onednn"].why_not(replace(sparse.spec, dtype=x.dtype)) is None:
        rivals["onednn"] = _bind(prepacked_linear(dense.weight, dense.bias), x)
        held = SparseMatrix.from_dense(dense.weight, sparse.pattern)
        rivals["packed"] = _bind(SparseLinear(held, dense.bias, backend="onednn").forward, x)
    lowest: dict[str, float] = {}
    for _ in range(_ATTEMPTS):
        with torch.no_grad():
            found = paired(rivals, repeats=15, budget_s=1.0)
        lowest = {name: min(timing.low_us, lowest.get(name, timing.low_us)) for name, timing in found.items()}
        disturbed = any(timing.median_us > _CALM * timing.low_us for timing in found.values())
        if not disturbed:
            break
    return Measured.now(lowest), disturbed


def _bind(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    return lambda: function(x)
