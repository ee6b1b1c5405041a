"""prune: zeros where the pattern asks for them. check: are they there?"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, PatternError, UnsupportedError
from ..format.pack import numbers
from ..masks import PatternCheck, check_pattern, magnitude, nm_mask
from ..nn import SparseLinear
from ..pattern import Pattern
from ..report import Column, Report, environment
from .layers import Layer, survey, weight_key, why_shape_not
from .progress import track

METHODS = ("magnitude",)

_COLUMNS = (
    Column("layer", "layer"),
    Column("kind", "kind"),
    Column("shape", "shape"),
    Column("action", "action"),
    Column("kept_magnitude", "|W|² kept", "share"),
    Column("reason", "why"),
)


def prune(
    model: nn.Module,
    pattern: Pattern | str = "2:4",
    *,
    method: str = "magnitude",
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    dry_run: bool = False,
    progress: bool | None = None,
) -> Report:
    """Sets weights to zero, in place, so that every Linear and convolution holds `pattern` along its input axis.

    The tensors stay dense; `compress` makes them small and fast. Embeddings, norms and, unless named in `include`, the
    output head are left alone; the report has a line with the reason for each.

    Args:
        model: any nn.Module. Weights of any floating dtype, ranked by their numbers (ties keep the lower index).
        pattern: "2:4", "1:4", "4:8", "2:4x4", "2:4t", ...
        method: "magnitude" keeps the largest |w| of each group.
        include, exclude: shell wildcards over module names, for instance exclude=["*.decoder.*"].
        dry_run: report what would be done; change nothing.
        progress: a progress bar; None shows one on a terminal only.
    Returns:
        Report with a row per layer: action ("pruned", "skipped"; "already" where nothing had to change), the share of
        the sum of squares that is kept, the reason.
    Raises:
        ModelError: no layer can be pruned, a wildcard matches nothing, or a weight has NaN or infinities. Nothing is
            changed then.
        PatternError, UnsupportedError: unknown pattern or method.
    Cost: a few passes over the weights.
    Source: Mishra et al. 2021, arXiv:2104.08378, section 3 (magnitude).
    """
    pattern = Pattern.parse(pattern)
    if method not in METHODS:
        raise UnsupportedError(f"unknown method {method!r}: this version has {', '.join(map(repr, METHODS))}.")
    layers = _survey(model, pattern, include, exclude)
    work = [layer for layer in layers if layer.skip is None and not layer.is_compressed]
    if not work and not any(layer.is_compressed for layer in layers):
        raise ModelError("there is nothing to prune: " + _why_nothing(layers))
    for layer in work:
        _require_finite(layer)

    rows: dict[str, dict[str, Any]] = {}
    done: dict[Hashable, str] = {}
    for layer in track(work, f"prune {pattern}", progress):
        rows[layer.name] = _prune_layer(layer, pattern, dry_run, done)
    for layer in layers:
        if layer.is_compressed and layer.skip is None:
            rows[layer.name] = _compressed_row(layer, pattern)
        elif layer.skip is not None:
            rows[layer.name] = {"action": "skipped", "reason": layer.skip}
    ordered = tuple({**layer.identity(), **rows[layer.name]} for layer in layers)
    pruned = [row for row in ordered if row["action"] in ("pruned", "already")]
    summary = {
        "pattern": str(pattern),
        "method": method,
        "layers pruned": f"{len(pruned)} of {len(ordered)}",
        "weights in pruned layers": sum(int(row["weights"]) for row in pruned),
        "weights in the model": sum(
            parameter.numel()
            for parameter in model.parameters()
            if not isinstance(parameter, nn.UninitializedParameter)
        ),
    }
    notes = ["dry run: nothing was changed"] if dry_run else []
    return Report("prune", _COLUMNS, ordered, summary, tuple(notes), environment())


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
    layers = _survey(model, pattern, include, exclude)
    rows: list[dict[str, Any]] = []
    first_fault: str | None = None
    for layer in layers:
        row = layer.identity()
        if layer.skip is not None:
            row.update(action="skipped", reason=layer.skip)
        else:
            found = _check_layer(layer, pattern)
            row.update(action="holds" if found.holds else "broken", groups=found.groups, broken=found.broken)
            row.update(density=found.nonzero / max(1, int(row["weights"])))
            if not found.holds:
                row.update(reason=found.describe())
            if row["action"] == "broken" and first_fault is None:
                first_fault = f"'{layer.name}' is not {pattern}: {row['reason']}."
        rows.append(row)
    checked = [row for row in rows if row["action"] != "skipped"]
    if not checked:
        raise ModelError("there is nothing to check: " + _why_nothing(layers))
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


def _survey(
    model: nn.Module, pattern: Pattern, include: Sequence[str] | str | None, exclude: Sequence[str] | str | None
) -> list[Layer]:
    """`survey`, with the compressed layers whose shape `pattern` cannot have skipped too."""
    return [
        replace(layer, skip=why_shape_not(layer, pattern)) if layer.is_compressed and layer.skip is None else layer
        for layer in survey(model, pattern, include, exclude)
    ]


def _compressed_row(layer: Layer, pattern: Pattern) -> dict[str, Any]:
    if _check_layer(layer, pattern).holds:
        return {"action": "already", "reason": "already compressed", "kept_magnitude": 1.0}
    assert isinstance(layer.module, SparseLinear)
    return {
        "action": "skipped",
        "reason": f"compressed as {layer.module.pattern}: take it back to dense first (twofour.nn.swap.to_dense_modules)",
    }


def _prune_layer(layer: Layer, pattern: Pattern, dry_run: bool, done: dict[Hashable, str]) -> dict[str, Any]:
    weight = layer.weight
    key = weight_key(weight)
    if key in done:
        return {"action": "pruned", "reason": f"shares its weight with '{done[key]}'", "weights": 0}
    done[key] = layer.name
    scores = magnitude(weight)
    mask = nm_mask(scores, pattern, dim=layer.input_axis)
    squares = scores.double().square()
    total = float(squares.sum())
    kept = float(squares[mask].sum()) / total if total else 1.0
    changes = bool((numbers(weight.detach())[~mask] != 0).any())
    if not dry_run:
        with torch.no_grad():
            weight.copy_(numbers(weight).masked_fill(~mask, 0))  # float8 has no masked_fill; the way there is exact
    return {"action": "pruned" if changes else "already", "kept_magnitude": kept}


def _check_layer(layer: Layer, pattern: Pattern) -> PatternCheck:
    if isinstance(layer.module, SparseLinear):
        own = layer.module.pattern
        if own == pattern:  # SparseMatrix holds what its pattern says: it is checked when it is made
            groups = layer.module.out_features * layer.module.in_features // pattern.group
            return PatternCheck(pattern, groups, 0, None, None, int((numbers(layer.module.values) != 0).sum()))
        return check_pattern(layer.module.matrix.to_dense(), pattern)
    return check_pattern(layer.weight, pattern, dim=layer.input_axis)


def _require_finite(layer: Layer) -> None:
    if layer.weight.is_inference():
        raise ModelError(
            f"'{layer.name}' was made under torch.inference_mode and cannot be changed in place: build the model outside,"
            " or prune a copy.deepcopy of it. Nothing was changed."
        )
    weight: Tensor = numbers(layer.weight.detach())
    bad = ~torch.isfinite(weight)
    if bool(bad.any()):
        first = tuple(bad.nonzero()[0].tolist())
        raise ModelError(
            f"'{layer.name}' has {int(bad.sum())} weights that are NaN or infinite, the first at {list(first)}:"
            " their magnitudes cannot be ranked. Nothing was changed; repair it, or leave it out with exclude=."
        )


def _why_nothing(layers: list[Layer]) -> str:
    if not layers:
        return "the model has no layer with a weight matrix."
    reasons = sorted({layer.skip or "" for layer in layers})
    return f"all {len(layers)} layers are skipped ({'; '.join(reasons)})."
