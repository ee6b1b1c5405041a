"""sensitivity: what pruning each layer alone does to the model's loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import ModelError, PatternError
from ..format.pack import numbers
from ..nn import observe
from ..nn.inputs import Batch, accepting, batches, call, evaluating, output_tensors
from ..nn.survey import Layer, weight_key
from ..pattern import Pattern
from ..report import Column, Report, environment
from ..solvers import Hessian, Recipe, solve
from .check import survey_for, why_nothing
from .oneshot import hessian_of, rounded, write_weight
from .replay import Replay

Evaluate = Callable[[nn.Module], float]


def sensitivity(
    model: nn.Module,
    inputs: Batch | Iterable[Batch],
    options: Sequence[Pattern | str] | Pattern | str = ("2:4",),
    *,
    method: str | Recipe = "sparsegpt",
    evaluate: Evaluate | None = None,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    progress: bool | None = None,
) -> Report:
    """How much the model loses when one layer alone is pruned, for every layer and every pattern asked for.

    Tells which layers to leave dense (`prune(exclude=...)`), or which pattern they bear. The model is not changed. A
    cheap method ranks layers as an expensive one does, so "sparsegpt" is the default here.

    Args:
        inputs: as `calibration` of `prune`; the loss is measured on them too, unless `evaluate` is given.
        options: patterns, for instance ["2:4", "2:4x4"].
        method: as in `prune`.
        evaluate: called with the model, gives its loss (lower is better). Without it: the mean of `.loss` where the
            model's output has one (transformers, with labels among the inputs), otherwise the squared change of all
            its outputs as a share of the squared outputs.
        include, exclude, progress: as in `prune`.
    Returns:
        Report with a row per layer: "loss <option>", how much the loss grows, and "error <option>", the layer's own
        output error. summary: the loss of the dense model, and the layers that lose most.
    Raises:
        ModelError: nothing to prune, or a loss that is no number. CalibrationError, PatternError: as in `prune`.
    Cost: layers * options forwards over the inputs.
    Source: Frantar & Alistarh 2022, arXiv:2203.07259 (ranking layers by the loss of pruning them alone).
    """
    patterns = [Pattern.parse(option) for option in ([options] if isinstance(options, (str, Pattern)) else options)]
    if not patterns:
        raise PatternError("no options: name at least one pattern, as in ['2:4'].")
    recipe = (Recipe(method) if isinstance(method, str) else method).resolved()
    data = batches(inputs)
    surveys = [survey_for(model, pattern, include, exclude) for pattern in patterns]
    usable = {
        str(pattern): {layer.name for layer in found if layer.skip is None and not layer.is_compressed}
        for pattern, found in zip(patterns, surveys, strict=True)
    }
    layers = surveys[0]
    work = [layer for layer in layers if any(layer.name in names for names in usable.values())]
    if not work:
        raise ModelError("there is nothing to prune: " + why_nothing(layers))
    measure = evaluate if evaluate is not None else _own_loss(model, data)
    dense = _number(measure, model, "the dense model")
    rows: dict[str, dict[str, Any]] = {}
    with accepting(model, data[0]):
        replay = Replay(model, work, data)
    try:
        seen: set[Any] = set()
        bar = tqdm(total=len(work) * len(patterns), desc="sensitivity", leave=False, unit="layer",
                   disable=None if progress is None else not progress)  # fmt: skip
        with bar:
            for group in replay.groups:
                hessian = hessian_of(replay, group)
                for layer in group.layers:
                    bar.set_postfix_str(layer.name)
                    key = weight_key(layer.weight)
                    if key in seen:
                        rows[layer.name] = {"action": "skipped", "reason": "shares its weight with a layer above"}
                    else:
                        seen.add(key)
                        own = [pattern for pattern in patterns if layer.name in usable[str(pattern)]]
                        rows[layer.name] = _try(layer, hessian, own, recipe, measure, model, dense)
                    bar.update(len(patterns))
                replay.finish(group)
    finally:
        replay.close()
    for layer in layers:
        if layer.name not in rows:
            reason = layer.skip or "no input reaches it"
            rows[layer.name] = {"action": "skipped", "reason": reason}
    return _report(layers, rows, patterns, recipe, dense, evaluate is not None)


def _try(
    layer: Layer,
    hessian: Hessian,
    patterns: Sequence[Pattern],
    recipe: Recipe,
    measure: Evaluate,
    model: nn.Module,
    dense: float,
) -> dict[str, Any]:
    weight = layer.weight.detach()
    original = weight.clone()
    row: dict[str, Any] = {"action": "measured"}
    try:
        for pattern in patterns:
            found = solve(observe.as_matrix(layer.module, numbers(original)), hessian, pattern, recipe)
            matrix = rounded(found.weight, weight.dtype)
            write_weight(layer, observe.from_matrix(layer.module, matrix, weight.shape))
            row[f"loss {pattern}"] = _number(measure, model, f"'{layer.name}' as {pattern}") - dense
            row[f"error {pattern}"] = found.error
    finally:
        write_weight(layer, original)
    return row


def _own_loss(model: nn.Module, data: Sequence[Batch]) -> Evaluate:
    """The mean of `.loss` over the batches, or the squared change of the outputs where there is none."""
    with evaluating(model), accepting(model, data[0]):
        first = call(model, data[0])
    if isinstance(getattr(first, "loss", None), Tensor):

        def mean_loss(pruned: nn.Module) -> float:
            with evaluating(pruned):
                return sum(float(call(pruned, batch).loss) for batch in data) / len(data)

        return mean_loss
    with evaluating(model):
        expected = [[y.detach().clone() for y in output_tensors(call(model, batch))] for batch in data]
    if not any(expected):
        raise ModelError("the model gives no floating point outputs: pass evaluate=, a function of the model.")
    size = sum(float(y.double().square().sum()) for outputs in expected for y in outputs) or 1.0

    def change(pruned: nn.Module) -> float:
        total = 0.0
        with evaluating(pruned):
            for batch, outputs in zip(data, expected, strict=True):
                for y, wanted in zip(output_tensors(call(pruned, batch)), outputs, strict=True):
                    total += float((y.double() - wanted.double()).square().sum())
        return total / size

    return change


def _number(measure: Evaluate, model: nn.Module, where: str) -> float:
    with torch.no_grad():
        value = float(measure(model))
    if not torch.isfinite(torch.tensor(value)):
        raise ModelError(f"the loss of {where} is {value}: there is nothing to compare it with.")
    return value


def _report(
    layers: Sequence[Layer],
    rows: dict[str, dict[str, Any]],
    patterns: Sequence[Pattern],
    recipe: Recipe,
    dense: float,
    given: bool,
) -> Report:
    ordered = tuple({**layer.identity(), **rows[layer.name]} for layer in layers)
    columns = [Column("layer", "layer"), Column("shape", "shape")]
    columns += [Column(f"loss {pattern}", f"loss +, {pattern}", "loss") for pattern in patterns]
    columns += [Column(f"error {pattern}", f"error, {pattern}", "share") for pattern in patterns]
    columns.append(Column("reason", "why"))
    key = f"loss {patterns[0]}"
    worst = sorted((row for row in ordered if key in row), key=lambda row: -row[key])[:3]
    summary = {
        "method": recipe.method,
        "loss of the dense model": f"{dense:.4g}" if given or dense else "0 (its own outputs)",
        f"lose most as {patterns[0]}": ", ".join(row["layer"] for row in worst),
        "sum over layers": "; ".join(
            f"{pattern}: {sum(row.get(f'loss {pattern}', 0.0) for row in ordered):.3g}" for pattern in patterns
        ),
    }
    return Report("sensitivity", tuple(columns), ordered, summary, (), environment())
