"""merge_adapters: low-rank companions into the weights beside them, whose zeros stay zero."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ...errors import CalibrationError, ModelError, UnsupportedError
from ...format import SparseMatrix
from ...nn import QuantizedSparseLinear, SparseLinear, observe
from ...nn.inputs import Batch
from ...nn.survey import survey
from ...pattern import Pattern
from ...report import Column, Report, environment
from ...solvers import Hessian
from ...solvers.hessian import output_error, statistics
from ...solvers.refit import refit
from ..masks.guard import masks_on
from .adapters import named_adapters, owner_of, unwrap
from .lora import AdaptedLinear, kept_of, matrix_of, why_not_adaptable
from .moments import hessians

METHODS = ("mask", "refit")


@dataclass
class _Merge:
    """One layer: which of its weights may be other than zero (None: all), and the weight it gets."""

    name: str
    module: AdaptedLinear
    kept: Tensor | None
    new: Tensor
    row: dict[str, Any] = field(default_factory=dict)


def merge_adapters(
    model: nn.Module,
    *,
    method: Literal["mask", "refit"] | None = None,
    calibration: Batch | Iterable[Batch] | None = None,
    pattern: Pattern | str | None = None,
) -> Report:
    """Adds every companion to the weight beside it, in place, and takes it away; zeros stay zero, so patterns hold.

    W + scale * B A has no zeros. Where W has some to keep, only what is not zero takes the update; the rest of it is lost, and
    the report says how much. Nothing is lost of companions that were `masked` from the start, whose model gives the same
    outputs after the merge (to the bit where the base is a dense nn.Linear), and of layers without zeros. A compressed layer
    gets new values in its kernel's layout. Merged weights stay frozen: model.requires_grad_() trains them again.

    Args:
        model: with adapters, from `add_adapters`.
        method: "mask", the default without calibration, loses what lies at zeros. "refit", the default with it, also sets the
            kept weights anew, all of them, so that each layer's outputs on `calibration` come nearest to those of
            W + scale * B A: least squares on the mask.
        calibration: as in `twofour.prune`: inputs like those the model will see. Refit needs it; "mask" then reports what the
            outputs lose.
        pattern: dense layers that hold it keep their zeros, and all others merge exactly. None: those keep them that have as
            many as the loosest pattern, one in 32, whatever pattern it is. Weights of nothing but zeros merge exactly.
    Returns:
        Report with a row per layer: action ("masked", "refitted", "exact"); update, |scale * B A| / |W|; lost, the part of
        the update at zeros, |.| / |scale * B A| (Frobenius norms); with `calibration` the squared output error as a share of
        the squared outputs, for masking alone (error_masked) and for the new weights (error); the reason.
    Raises:
        ModelError: no adapters, masks are kept of the model, a weight that is shared, or a sum that is not finite.
        UnsupportedError: a layer of 8 bits, another method.
        CalibrationError: refit without inputs, or inputs that tell nothing. Nothing is changed then.
    Cost: B A of each layer, and all new weights at once in memory; with calibration forwards of the model, and 8 *
        in_features² bytes for each layer that loses something; refit up to 60 products of its size.
    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1 (merging); Meng et al. 2024, arXiv:2406.07831 (least squares).

    >>> import twofour
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> pruned, added = twofour.prune(model), twofour.training.add_adapters(model, rank=2, masked=False)
    >>> _ = nn.init.normal_(model[0].lora_b)
    >>> row = merge_adapters(model).rows[0]
    >>> row["action"], 0 < row["lost"] < 1, twofour.check(model).summary["holds"]
    ('masked', True, True)
    """
    method = method or ("mask" if calibration is None else "refit")
    if method not in METHODS:
        raise UnsupportedError(f"unknown method {method!r}: it is one of {', '.join(map(repr, METHODS))}.")
    if method == "refit" and calibration is None:
        raise CalibrationError(
            "method='refit' sets weights by the outputs they give: pass calibration=, a few hundred inputs like those the"
            " model will see."
        )
    pattern = None if pattern is None else Pattern.parse(pattern)
    named = named_adapters(model, replaceable=True)
    if masks_on(model) is not None:
        raise ModelError(
            "masks of this model are kept, which would not find their weights again: remove() them"
            " (twofour.training.masks_of finds them), merge, and keep_masks again."
        )
    _require_mergeable(model, named)
    with torch.no_grad():
        merges = [_masked(name, module, pattern) for name, module in named.items()]
        if calibration is not None:
            losing = {each.name: each for each in merges if each.row["lost"]}
            for name, hessian in hessians(model, {name: named[name] for name in losing}, calibration):
                _measure(losing[name], hessian, method == "refit")
        for each in merges:
            _require_finite(each.name, each.new, "in the sum of weight and update")
        for each in merges:
            _apply(each)
            unwrap(model, each.module)
    return _report(merges, method, calibration is not None)


def _require_mergeable(model: nn.Module, named: dict[str, AdaptedLinear]) -> None:
    """Raises for the first layer that cannot take its update in."""
    layers = {layer.module: layer for layer in survey(model, None, skip_heads=False) if layer.attribute == "weight"}
    for name, module in named.items():
        base = module.base
        if isinstance(base, QuantizedSparseLinear):
            raise UnsupportedError(
                f"'{name}' is {base.kind.name}, and a sum with the update would be rounded anew: merge before"
                f" compress(weights='{base.kind.name}'), or leave the companion beside it. Nothing was changed."
            )
        if base not in layers or why_not_adaptable(base) is not None:
            raise UnsupportedError(
                f"'{name}' holds a {type(base).__name__} now, whose weight is not known. Nothing was changed."
            )
        if not isinstance(base, SparseLinear) and layers[base].weight.is_inference():
            raise ModelError(
                f"'{name}' was made under torch.inference_mode and cannot be changed in place: build the model outside, or"
                " merge a copy.deepcopy of it. Nothing was changed."
            )
        owner = owner_of(layers[base], list(layers.values()))
        if owner is not None:
            raise ModelError(
                f"the weight of '{name}' is shared with '{owner.name}', which a merge would change too: give it one of its"
                " own, or leave the companion beside it. Nothing was changed."
            )


def _masked(name: str, module: AdaptedLinear, pattern: Pattern | None) -> _Merge:
    matrix, update = matrix_of(module.base), module.update()
    _require_finite(name, update, "in the update of its companion")
    kept = matrix != 0 if module.masked else kept_of(module.base, pattern)
    norm = float(update.norm())
    dropped = 0.0 if kept is None or module.masked else float(update.masked_fill(kept, 0.0).norm())
    row: dict[str, Any] = {
        "layer": name or "(model)",
        "shape": f"{matrix.shape[0]}x{matrix.shape[1]}",
        "action": "exact" if kept is None else "masked",
        "rank": module.rank,
        "update": norm / (float(matrix.to(update.dtype).norm()) or 1.0),
        "lost": dropped / norm if norm else 0.0,
    }
    if module.masked:
        row["reason"] = "its companion was masked from the start"
    elif kept is None:
        row["reason"] = "no zeros to keep" if pattern is None else f"does not hold {pattern}"
    new = module.effective(kept)
    return _Merge(name, module, kept, new if kept is None else new.masked_fill_(~kept, 0.0), row)  # no zero is negative


def _measure(each: _Merge, hessian: Hessian, with_refit: bool) -> None:
    """The output errors of a layer that loses something, after it is refitted where that is asked for."""
    if hessian.tokens == 0:
        each.row["reason"] = "no calibration input reaches it" + (": masked, not refitted" if with_refit else "")
        return
    assert each.kept is not None
    module = each.module
    matrix, update = matrix_of(module.base), module.update()
    work = torch.promote_types(torch.promote_types(matrix.dtype, update.dtype), torch.float32)
    target = matrix.to(work) + update.to(work)
    plain = (hessian.second / hessian.tokens).to(work)
    whole = output_error(target, plain) or 1.0
    error = each.row["error_masked"] = output_error(each.new.to(work) - target, plain) / whole
    if with_refit:
        new = _refitted(each, target, hessian).to(matrix.dtype)
        error = output_error(new.to(work) - target, plain) / whole
        each.new = new
        each.row["action"] = "refitted"
    each.row["error"] = error


def _refitted(each: _Merge, target: Tensor, hessian: Hessian) -> Tensor:
    assert each.kept is not None
    try:
        found = statistics(hessian)
    except CalibrationError as error:
        raise CalibrationError(f"the inputs of '{each.name}': {error}") from None
    scale = found.scale.to(target.dtype)
    scaled = (found.matrix / torch.outer(found.scale, found.scale)).to(target.dtype)
    return refit(target * scale, each.kept, scaled, target * scale) / scale


def _require_finite(name: str, numbers: Tensor, where: str) -> None:
    bad = int((~torch.isfinite(numbers)).sum())
    if bad:
        dtype = str(numbers.dtype).removeprefix("torch.")
        raise ModelError(
            f"'{name}' has {bad} numbers that are NaN or infinite as {dtype} {where}. Nothing was changed."
        )


def _apply(each: _Merge) -> None:
    base = each.module.base
    if isinstance(base, SparseLinear):
        old = base.matrix
        values = each.new[old.mask()].view(old.values.shape)
        base._set_matrix(SparseMatrix(values, old.metadata, old.pattern, old.shape))
        return
    weight = cast(Tensor, base.weight)
    weight.copy_(observe.from_matrix(base, each.new, weight.shape))


def _report(merges: Sequence[_Merge], method: str, calibrated: bool) -> Report:
    rows = tuple(each.row for each in merges)
    columns = (
        Column("layer", "layer"),
        Column("shape", "shape"),
        Column("action", "action"),
        Column("rank", "rank", "count"),
        Column("update", "update", "share"),
        Column("lost", "lost", "share"),
        *((Column("error_masked", "error, masked", "share"), Column("error", "error", "share")) if calibrated else ()),
        Column("reason", "why"),
    )
    losing = [row for row in rows if row["lost"]]
    mean = sum(row["lost"] for row in losing) / len(losing) if losing else 0.0
    summary: dict[str, Any] = {
        "layers merged": len(rows),
        "method": method,
        "lost of the updates": f"{100 * mean:.1f} %",
    }
    errors = [(row["error_masked"], row["error"]) for row in rows if "error" in row]
    if errors:
        masked, error = (sum(each) / len(errors) for each in zip(*errors, strict=True))
        summary["mean output error"] = f"{error:.2%} of the squared outputs (the mask alone: {masked:.2%})"
    notes: tuple[str, ...] = ()
    if losing:
        notes = (
            f"{len(losing)} of {len(rows)} layers lost what their update had at zeros: companions that are masked from the"
            " start, as add_adapters has them where nothing else is asked for, lose nothing",
        )
    return Report("merge_adapters", columns, rows, summary, notes, environment())
