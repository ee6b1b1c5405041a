"""prune: zeros where the pattern asks for them, and with calibration new values for what is kept."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, ModelError, UnsupportedError
from ..format.pack import numbers
from ..masks import magnitude, nm_mask
from ..nn import SparseLinear
from ..nn.inputs import Batch, batches
from ..nn.survey import Layer, weight_key
from ..pattern import Pattern
from ..report import Column, Report, environment
from ..solvers import METHODS, Recipe
from . import scaleout
from .check import check_layer, survey_for, why_nothing
from .checkpoint import Checkpoint
from .oneshot import OneShot, PruneInterrupted
from .progress import track
from .random_tokens import SHARE, with_random_tokens

_COLUMNS = (
    Column("layer", "layer"),
    Column("kind", "kind"),
    Column("shape", "shape"),
    Column("action", "action"),
    Column("kept_magnitude", "|W|² kept", "share"),
    Column("error_masked", "error, masked", "share"),
    Column("error", "error", "share"),
    Column("seconds", "seconds", "seconds"),
    Column("reason", "why"),
)
_DATA_FREE = tuple(column for column in _COLUMNS if column.key not in ("error_masked", "error", "seconds"))


def prune(
    model: nn.Module,
    pattern: Pattern | str = "2:4",
    *,
    calibration: Batch | Iterable[Batch] | None = None,
    method: str | Recipe | None = None,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    random_tokens: float | None = None,
    memory_limit: int | None = None,
    dry_run: bool = False,
    progress: bool | None = None,
) -> Report:
    """Sets weights to zero, in place, so that every Linear and convolution holds `pattern` along its input axis.

    With calibration inputs the weights that stay get new values, so that each layer's outputs change as little as they
    can: a few hundred inputs like those the model will see, without labels. Layers are done one after the other, each
    seeing what the pruned ones before it give, and "admm" aims at what the dense model's layer gives there: each makes
    up for a part of what those before it have lost.

    The tensors stay dense; `compress` makes them small and fast. Embeddings, norms and, unless named in `include`, the
    output head are left alone; the report has a line with the reason for each.

    Args:
        model: any nn.Module. Weights of any floating dtype, ranked by their numbers (ties keep the lower index) and
            solved for in float32 (float64 weights in float64), then rounded to their own dtype.
        pattern: "2:4", "1:4", "4:8", "2:4x4", "2:4t", ...
        calibration: what the model is called with: a tensor, a tuple of arguments, a dict of named ones, or an iterable
            of these. Tokens that an `attention_mask` marks as padding do not count. Under torchrun every process
            passes its own part, and all get the same masks (those of one process with all inputs and as many threads).
        method: "admm" (default with calibration: ADMM mask, coordinate descent over supports, least squares on the
            mask), "sparsegpt", "wanda", "ria", or "magnitude" (default without): the largest |w| of each group. A
            `twofour.solvers.Recipe` names all that can be chosen, for instance Recipe(targets="pruned"): without the
            dense model beside the pruned one, in two thirds of the time.
        include, exclude: shell wildcards over module names, for instance exclude=["*.decoder.*"].
        checkpoint: a folder that keeps finished layers; the same call after a kill goes on where it was.
        random_tokens: where the inputs hold token ids (integers that the model looks up in its vocabulary), each comes
            a second time, this share of its ids drawn at random, so that words the texts lack are not paid for. It
            doubles the time that the forwards take; 0 leaves it out. None: 0.5 for "admm", 0 for the other methods,
            which are as published.
        memory_limit: bytes of activations kept in memory between layers; what is over it goes to a temporary file.
        dry_run: report what would be done; change nothing.
        progress: a progress bar; None shows one on a terminal only.
    Returns:
        Report with a row per layer: action ("pruned", "skipped"; "already" where nothing had to change), the share of
        the sum of squares that is kept, the reason; with calibration also the squared output error as a share of the
        squared outputs, for the old weights on the mask (error_masked) and for the new ones (error). For "admm" the
        outputs are those nearest to the dense model's that the layer's inputs in the pruned one allow.
    Raises:
        ModelError: no layer can be pruned, a wildcard matches nothing, or a weight has NaN or infinities. Nothing is
            changed then. PruneInterrupted, one of its kind, when the model fails half-way: `.report` has the layers
            that are done, which keep their new weights.
        CalibrationError: inputs that are empty, hold NaN, or reach no layer.
        PatternError, UnsupportedError: unknown pattern or method.
    Cost: a few passes over the weights; with calibration about two forwards of the model over the inputs, for "admm"
        two more of the dense model, which keeps its old weights block by block, and for a layer of n x n some 40 products
        of n x n by n x n.
    Source: Mishra et al. 2021, arXiv:2104.08378, section 3 (magnitude); the others are named in `twofour.solvers`.
    """
    pattern = Pattern.parse(pattern)
    recipe = _recipe(method, calibration is not None)
    inputs = None if calibration is None else _calibration(calibration)
    if inputs is None and random_tokens:
        raise UnsupportedError(
            f"random_tokens={random_tokens} draws some of the calibration's token ids, and there is no calibration: pass"
            " calibration= too, or leave this out."
        )
    layers = survey_for(model, pattern, include, exclude)
    work = [layer for layer in layers if layer.skip is None and not layer.is_compressed]
    if not work and not any(layer.is_compressed for layer in layers):
        raise ModelError("there is nothing to prune: " + why_nothing(layers))
    for layer in work:
        _require_finite(layer)

    rows: dict[str, dict[str, Any]] = {}
    for layer in layers:
        if layer.is_compressed and layer.skip is None:
            rows[layer.name] = _compressed_row(layer, pattern)
        elif layer.skip is not None:
            rows[layer.name] = {"action": "skipped", "reason": layer.skip}
    notes = ["dry run: nothing was changed"] if dry_run else []
    summary: dict[str, Any] = {"pattern": str(pattern), "method": recipe.method}

    def report() -> Report:
        ordered = tuple({**layer.identity(), **rows.get(layer.name, _NOT_DONE)} for layer in layers)
        pruned = [row for row in ordered if row["action"] in ("pruned", "already")]
        counts = {
            "layers pruned": f"{len(pruned)} of {len(ordered)}",
            "weights in pruned layers": sum(int(row["weights"]) for row in pruned),
            "weights in the model": _weights_of(model),
        }
        columns = _DATA_FREE if inputs is None else _COLUMNS
        return Report("prune", columns, ordered, {**summary, **counts, **_errors(ordered)}, tuple(notes), environment())

    if inputs is None:
        done: dict[Hashable, str] = {}
        for layer in track(work, f"prune {pattern}", progress):
            rows[layer.name] = _prune_layer(layer, pattern, dry_run, done)
        return report()
    if not work:
        return report()
    if random_tokens is None:
        random_tokens = SHARE if recipe.method == "admm" else 0.0
    given = len(inputs)
    inputs, drawn = with_random_tokens(model, inputs, random_tokens)
    kept = None
    if checkpoint is not None and not dry_run:
        kept = Checkpoint(checkpoint, work, inputs, pattern, recipe, write=scaleout.rank() == 0)
    originals = {layer.name: layer.weight.detach().clone() for layer in work} if dry_run else {}
    run = OneShot(model, work, inputs, pattern, recipe, kept, memory_limit, progress)
    try:
        run.run()
    except Exception as error:
        finished = sum(row["action"] == "pruned" for row in run.rows.values())
        if not finished or dry_run:
            raise
        rows.update(run.rows)
        notes.append(f"interrupted: {error}")
        raise PruneInterrupted(
            f"the run stopped after {finished} of {len(work)} layers, which keep their new weights (see .report):"
            f" {type(error).__name__}: {error}",
            report(),
        ) from error
    finally:
        with torch.no_grad():
            for layer in work:
                if layer.name in originals:
                    layer.weight.copy_(originals[layer.name])
    rows.update(run.rows)
    notes.extend(run.notes)
    summary["calibration batches"] = given
    if recipe.changes_weights:
        summary["targets"] = f"outputs of the {recipe.targets} model"
    if drawn is not None:
        summary["calibration tokens"] = drawn
    summary["seconds"] = round(run.seconds, 1)
    return report()


_NOT_DONE = {"action": "not done", "reason": "the run stopped before it"}


def _recipe(method: str | Recipe | None, calibrated: bool) -> Recipe:
    if method is None:
        method = "admm" if calibrated else "magnitude"
    if isinstance(method, str):
        method = Recipe(method)
    if not isinstance(method, Recipe):
        raise UnsupportedError(f"method is a {type(method).__name__}: pass one of {METHODS}, or a Recipe.")
    if not calibrated and (method.method != "magnitude" or method.changes_weights):
        raise UnsupportedError(
            f"method {method.method!r} measures what each layer does to inputs: pass calibration=, a few hundred inputs"
            " like those the model will see."
        )
    return method.resolved()


def _calibration(calibration: Any) -> list[Batch]:
    try:
        return batches(calibration)
    except ModelError as error:
        raise CalibrationError(str(error).replace("inputs", "calibration", 1)) from None


def _errors(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    errors = [row["error"] for row in rows if "error" in row]
    if not errors:
        return {}
    masked = [row["error_masked"] for row in rows if "error" in row]
    mean, mean_masked = sum(errors) / len(errors), sum(masked) / len(masked)
    return {"mean output error": f"{mean:.2%} of the squared outputs (the mask alone: {mean_masked:.2%})"}


def _compressed_row(layer: Layer, pattern: Pattern) -> dict[str, Any]:
    if check_layer(layer, pattern).holds:
        return {"action": "already", "reason": "already compressed", "kept_magnitude": 1.0}
    assert isinstance(layer.module, SparseLinear)
    return {
        "action": "skipped",
        "reason": f"compressed as {layer.module.pattern}: take it back to dense first (twofour.nn.swap.to_dense_modules)",
    }


def _weights_of(model: nn.Module) -> int:
    """Numbers in its parameters, shared ones once; of a compressed layer those of its dense matrix."""
    counts: dict[int, int] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or isinstance(parameter, nn.UninitializedParameter):
                continue
            if not (name == "values" and isinstance(module, SparseLinear)):
                counts[id(parameter)] = parameter.numel()
        if isinstance(module, SparseLinear):
            counts[id(module.values)] = module.out_features * module.in_features
    return sum(counts.values())


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
