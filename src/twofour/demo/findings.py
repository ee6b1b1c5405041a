"""What a run of the demo found, as plain JSON values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

Row = dict[str, Any]


@dataclass
class Findings:
    """Rows of every part of the demo; each row has a `dtype` ("float32", "bfloat16").

    Args:
        timed: dtypes whose speed was measured.
        prune: layers, texts of the calibration, shares: of the squared magnitude that is kept, of the squared outputs that
            are lost with the mask alone and after the kept weights were solved for.
        kernels: layer, shape, kernel, whether it is sparse, reason.
        speed: a row per batch size, see `speed.throughput`.
        layers: a row per layer, see `speed.layers`.
        sweep: a row per shape and number of tokens, see `speed.sweep`.
        size: what, dense and sparse bytes, share.
        search: model, kept, first, found; shares of 1.
        checks: what was verified, and the outcome.
        notes: what a reader must know about this run, such as what could not be measured.
        facts: counts of texts, queries, layers.
    """

    timed: list[str] = field(default_factory=list)
    prune: list[Row] = field(default_factory=list)
    kernels: list[Row] = field(default_factory=list)
    speed: list[Row] = field(default_factory=list)
    layers: list[Row] = field(default_factory=list)
    sweep: list[Row] = field(default_factory=list)
    size: list[Row] = field(default_factory=list)
    search: list[Row] = field(default_factory=list)
    checks: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: Row = field(default_factory=dict)

    def size_row(self, dtype: str, what: str) -> Row | None:
        """The line of bytes of that name, if there is one."""
        return next((row for row in self.size if (row["dtype"], row["what"]) == (dtype, what)), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)
