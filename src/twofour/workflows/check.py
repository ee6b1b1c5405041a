"""check: does every layer hold its pattern?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import ModelError, PatternError
from ..format.pack import numbers
from ..masks import PatternCheck, check_pattern
from ..nn import SparseLinear
from ..nn.survey import Layer, survey, why_shape_not
from ..pattern import Pattern
from ..report import Column, Report, environment


def check(
    model: nn.Module,
    pattern: Pattern | str = "2:4",
    *,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
) -> Report:
    """Confirms that every layer `prune` would prune holds `pattern`.

    Args:
        model, pattern, include, exclude: as in `prune`.
    Returns:
        Report with a row per layer: action ("holds", "skipped"), groups, density, reason.
    Raises:
        PatternError: a layer does not hold it; the message names the first bad layer, coordinate and values, and the
            error carries the whole report as `.report`.
        ModelError: there is no layer to check.
    """
    pattern = Pattern.parse(pattern)
    layers = survey_for(model, pattern, include, exclude)
    rows: list[dict[str, Any]] = []
    first_fault: str | None = None
    for layer in layers:
        row = layer.identity()
        if layer.skip is not None:
            row.update(action="skipped", reason=layer.skip)
        else:
            found = check_layer(layer, pattern)
            row.update(action="holds" if found.holds else "broken", groups=found.groups, broken=found.broken)
            row.update(density=found.nonzero / max(1, int(row["weights"])))
            if not found.holds:
                row.update(reason=found.describe())
            if row["action"] == "broken" and first_fault is None:
                first_fault = f"'{layer.name}' is not {pattern}: {row['reason']}."
        rows.append(row)
    checked = [row for row in rows if row["action"] != "skipped"]
    if not checked:
        raise ModelError("there is nothing to check: " + why_nothing(layers))
    broken = sum(row["action"] == "broken" for row in checked)
    summary = {"pattern": str(pattern), "holds": broken == 0, "layers checked": len(checked), "layers broken": broken}
    columns = (
        Column("layer", "layer"),
        Column("kind", "kind"),
        Column("shape", "shape"),
        Column("action", "result"),
        Column("groups", "groups", "count"),
        Column("broken", "broken", "count"),
        Column("density", "non-zero", "share"),
        Column("reason", "why"),
    )
    report = Report("check", columns, tuple(rows), summary, (), environment())
    if first_fault is not None:
        raise CheckFailed(f"{first_fault}\n  Prune it with twofour.prune(model, '{pattern}'), or leave it out.", report)
    return report


class CheckFailed(PatternError):
    """PatternError raised by `check`, with the whole report as `.report`."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


def survey_for(
    model: nn.Module, pattern: Pattern, include: Sequence[str] | str | None, exclude: Sequence[str] | str | None
) -> list[Layer]:
    """`survey`, with the compressed layers whose shape `pattern` cannot have skipped too."""
    return [
        replace(layer, skip=why_shape_not(layer, pattern)) if layer.is_compressed and layer.skip is None else layer
        for layer in survey(model, pattern, include, exclude)
    ]


def check_layer(layer: Layer, pattern: Pattern) -> PatternCheck:
    """`check_pattern` of a layer, dense or compressed."""
    if isinstance(layer.module, SparseLinear):
        own = layer.module.pattern
        if own == pattern:  # SparseMatrix holds what its pattern says: it is checked when it is made
            groups = layer.module.out_features * layer.module.in_features // pattern.group
            return PatternCheck(pattern, groups, 0, None, None, int((numbers(layer.module.values) != 0).sum()))
        return check_pattern(layer.module.matrix.to_dense(), pattern)
    return check_pattern(layer.weight, pattern, dim=layer.input_axis)


def why_nothing(layers: list[Layer]) -> str:
    """What a verb says when `layers` leave it nothing to do."""
    if not layers:
        return "the model has no layer with a weight matrix."
    reasons = sorted({layer.skip or "" for layer in layers})
    return f"all {len(layers)} layers are skipped ({'; '.join(reasons)})."
