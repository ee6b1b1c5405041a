"""compress: Linear -> SparseLinear where it pays. explain: which kernel runs each layer, and why not a faster one."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, UnsupportedError
from ..format import SparseMatrix
from ..format.pack import VALUE_DTYPES
from ..masks import check_pattern
from ..nn import SparseLinear
from ..nn.swap import replace_module
from ..pattern import Pattern
from ..report import Column, Report, environment
from .inputs import Batch, batches, call, evaluating
from .layers import Layer, dtype_name, is_linear_like, survey
from .progress import track
from .timing import paired

DEFAULT_TOKENS = (1, 128)
"""Token counts a layer is measured at when no inputs are given, or when the inputs never reach it."""

_DENSE = "dense (torch)"

_decisions: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
"""Why `compress` left a layer dense, for `explain`."""


@dataclass
class _Candidate:
    """All layers that share one weight: they are decided together, so that the weight is held once."""

    layers: list[Layer]
    tokens: list[int] = field(default_factory=list)
    sparse: SparseLinear | None = None
    row: dict[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> Layer:
        return self.layers[0]


def compress(
    model: nn.Module,
    inputs: Batch | Sequence[Batch] | None = None,
    *,
    pattern: Pattern | str = "2:4",
    tokens: Sequence[int] | None = None,
    force: bool = False,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    dry_run: bool = False,
    progress: bool | None = None,
) -> Report:
    """Replaces, in place, each Linear that holds `pattern` by a SparseLinear, where that is faster on this machine.

    Each layer's kernel is timed against the dense layer it would replace, in turns, at the token counts that `inputs`
    bring it (or `tokens`, or 1 and 128). A layer that would be slower stays dense, and one that is compressed already
    goes back to dense if it turns out slower now. Nothing is dropped: a layer that does not hold the pattern stays dense.

    Args:
        model: any nn.Module, pruned before.
        inputs: model inputs as in use: a tensor, a tuple, a dict, or a list of these.
        tokens: token counts to decide by, instead of `inputs`.
        force: compress every layer that can be, without timing.
        include, exclude: shell wildcards over module names.
        dry_run: measure and report; change nothing.
        progress: a progress bar; None shows one on a terminal only.
    Returns:
        Report with a row per layer: action ("compressed", "dense", "skipped"), kernel, tokens, dense_us, sparse_us,
        speedup, bytes before and after, reason.
    Raises:
        ModelError: no layer holds the pattern. Nothing is changed then.
    Cost: a run of the model per batch, about 20 runs of each distinct layer, and the packing.
    """
    pattern = Pattern.parse(pattern)
    if inputs is not None and tokens is not None:
        raise ModelError("inputs= and tokens= both say what to measure at: pass one of them.")
    layers = survey(model, pattern, include, exclude, skip_heads=False)
    rows: dict[int, dict[str, Any]] = {id(layer): layer.identity() for layer in layers}
    candidates = _candidates(layers, pattern, rows)
    if not candidates:
        tried = [row for row in rows.values() if row["action"] == "dense"] or list(rows.values())
        reasons = sorted({str(row.get("reason")) for row in tried})
        detail = "; ".join(reasons[:3]) if reasons else "it has no layer with a weight matrix"
        raise ModelError(
            f"no layer holds {pattern}, so there is nothing to compress ({detail}).\n"
            f"  Prune first: twofour.prune(model, '{pattern}')."
        )
    notes: list[str] = []
    if force:
        notes.append("force: every layer that can be was compressed, without timing")
    else:
        _collect_tokens(model, candidates, inputs, tokens, notes)
    times: dict[tuple[Any, ...], tuple[float, float]] = {}
    for candidate in track(candidates, "compress", progress):
        _decide(candidate, pattern, force, times)
        for layer in candidate.layers:
            rows[id(layer)].update(candidate.row)
            if not dry_run:
                _apply(model, layer, candidate)
    if dry_run:
        notes.append("dry run: nothing was changed")
    ordered = tuple(rows[id(layer)] for layer in layers)
    compressed = [row for row in ordered if row["action"] == "compressed"]
    legal = [row for row in ordered if "speedup" in row or row["action"] == "compressed"]
    summary = {
        "layers compressed": f"{len(compressed)} of {len(ordered)}",
        "kept dense because sparse would be slower": len(legal) - len(compressed),
        "weight bytes of those compressed, before": sum(row["dense_bytes"] for row in compressed),
        "weight bytes of those compressed, after": sum(row["bytes"] for row in compressed),
    }
    columns = (
        Column("layer", "layer"),
        Column("shape", "shape"),
        Column("kernel", "kernel"),
        Column("tokens", "tokens"),
        Column("dense_us", "dense µs", "us"),
        Column("sparse_us", "sparse µs", "us"),
        Column("speedup", "speed", "ratio"),
        Column("reason", "why"),
    )
    return Report("compress", columns, ordered, summary, tuple(notes), environment())


def explain(model: nn.Module) -> Report:
    """Which kernel runs each Linear and SparseLinear of `model`, and why no faster one does.

    Returns:
        Report with a row per layer: shape, dtype, kernel, bytes, reason.
    Raises:
        ModelError: the model has no layer with a weight matrix.
    """
    layers = survey(model, Pattern(), None, None, skip_heads=False)
    if not layers:
        raise ModelError("there is nothing to explain: the model has no layer with a weight matrix.")
    rows = []
    for layer in layers:
        row = layer.identity()
        if isinstance(layer.module, SparseLinear):
            choice = layer.module.choice
            row.update(kernel=choice.kernel.label(), bytes=layer.module.nbytes, reason=choice.reason)
        else:
            row.update(kernel=_DENSE, bytes=layer.weight.nbytes, reason=_why_dense(layer))
        rows.append(row)
    columns = (
        Column("layer", "layer"),
        Column("shape", "shape"),
        Column("dtype", "dtype"),
        Column("kernel", "kernel"),
        Column("bytes", "bytes", "bytes"),
        Column("reason", "why not a faster one"),
    )
    sparse = sum(row["kernel"] != _DENSE for row in rows)
    summary = {"layers on a sparse kernel": f"{sparse} of {len(rows)}"}
    return Report("explain", columns, tuple(rows), summary, (), environment())


def _candidates(layers: list[Layer], pattern: Pattern, rows: dict[int, dict[str, Any]]) -> list[_Candidate]:
    by_weight: dict[int, _Candidate] = {}
    for layer in layers:
        row = rows[id(layer)]
        row.update(action="dense", kernel=_DENSE)
        if layer.skip is not None:
            row.update(action="skipped", reason=layer.skip)
        elif not is_linear_like(layer) or layer.keep_dense is not None:
            row["reason"] = layer.keep_dense or f"no sparse kernel for {layer.kind}"
        elif isinstance(layer.module, SparseLinear):
            key = layer.module.values.data_ptr() or id(layer.module)
            by_weight.setdefault(key, _Candidate([])).layers.append(layer)
        elif layer.weight.dtype not in VALUE_DTYPES:
            row["reason"] = f"{dtype_name(layer.weight.dtype)} weights cannot be stored compressed"
        else:
            found = check_pattern(layer.weight, pattern)
            if found.holds:
                by_weight.setdefault(id(layer.weight), _Candidate([])).layers.append(layer)
            else:
                row["reason"] = f"not {pattern} ({found.broken} of {found.groups} groups): prune it first"
    return list(by_weight.values())


def _collect_tokens(
    model: nn.Module,
    candidates: list[_Candidate],
    inputs: Batch | Sequence[Batch] | None,
    tokens: Sequence[int] | None,
    notes: list[str],
) -> None:
    if inputs is not None:
        seen: dict[nn.Module, list[int]] = {}

        def record(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if arguments and isinstance(arguments[0], Tensor) and arguments[0].ndim:
                seen.setdefault(module, []).append(arguments[0].numel() // max(1, arguments[0].shape[-1]))

        modules = {layer.module for candidate in candidates for layer in candidate.layers}
        hooks = [module.register_forward_pre_hook(record) for module in modules]
        try:
            with evaluating(model):
                for batch in batches(inputs):
                    call(model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        for candidate in candidates:
            for layer in candidate.layers:
                candidate.tokens += seen.get(layer.module, [])
        unreached = [candidate.first.name for candidate in candidates if not candidate.tokens]
        if unreached:
            notes.append(
                f"the inputs never reached {', '.join(unreached[:3])}{' ...' if len(unreached) > 3 else ''}:"
                f" measured at {DEFAULT_TOKENS} tokens"
            )
    for candidate in candidates:
        if not candidate.tokens:
            candidate.tokens = list(tokens or DEFAULT_TOKENS)


def _decide(
    candidate: _Candidate, pattern: Pattern, force: bool, times: dict[tuple[Any, ...], tuple[float, float]]
) -> None:
    """Fills `candidate.row`, and `candidate.sparse` where the layer is to be compressed."""
    module = candidate.first.module
    if isinstance(module, SparseLinear):
        sparse = module
        dense_bytes = module.in_features * module.out_features * module.values.dtype.itemsize
    else:
        assert isinstance(module, nn.Linear)
        try:
            sparse = SparseLinear(SparseMatrix.from_dense(module.weight, pattern), module.bias)
        except UnsupportedError as error:
            candidate.row = {"action": "dense", "kernel": _DENSE, "reason": str(error)}
            return
        dense_bytes = module.weight.nbytes
    choice = sparse.choice
    candidate.row = {
        "action": "compressed",
        "kernel": choice.kernel.label(),
        "dense_bytes": dense_bytes,
        "bytes": sparse.nbytes,
        "reason": choice.reason,
    }
    if not force:
        dense_us, sparse_us = _measure(module, sparse, candidate.tokens, times)
        speedup = dense_us / sparse_us
        shown = ", ".join(map(str, sorted(set(candidate.tokens))))
        candidate.row.update(tokens=shown, dense_us=dense_us, sparse_us=sparse_us, speedup=speedup)
        if speedup <= 1:
            reason = f"{choice.kernel.label()} would run at {speedup:.2f}x of dense"
            candidate.row.update(
                action="dense",
                kernel=_DENSE,
                bytes=dense_bytes,
                reason=f"{reason} ({choice.reason})" if choice.reason else reason,
            )
            return
    candidate.sparse = sparse


def _measure(
    module: nn.Module, sparse: SparseLinear, tokens: list[int], times: dict[tuple[Any, ...], tuple[float, float]]
) -> tuple[float, float]:
    """Microseconds of all the given calls, dense and sparse; layers of one shape are measured once."""
    counts = {count: tokens.count(count) for count in sorted(set(tokens)) if count > 0}
    dense_us = sparse_us = 0.0
    dense: nn.Module | None = None
    for count, calls in counts.items():
        key = (sparse.spec, sparse.bias is None, count, torch.get_num_threads())
        if key not in times:
            if dense is None:
                dense = module.to_linear() if isinstance(module, SparseLinear) else module
            x = torch.randn(count, sparse.in_features, device=sparse.values.device).to(sparse.values.dtype)
            bound = _bind(dense, x), _bind(sparse, x)
            with torch.no_grad():
                found = paired({"dense": bound[0], "sparse": bound[1]}, repeats=15, budget_s=1.0)
            times[key] = found["dense"].median_us, found["sparse"].median_us
        dense_us += calls * times[key][0]
        sparse_us += calls * times[key][1]
    return dense_us, sparse_us


def _bind(module: nn.Module, x: Tensor) -> Any:
    forward = module.forward  # without the user's hooks: they must not see timing runs
    return lambda: forward(x)


def _apply(model: nn.Module, layer: Layer, candidate: _Candidate) -> None:
    module = layer.module
    if candidate.sparse is None:
        _decisions[module] = str(candidate.row["reason"])
        if isinstance(module, SparseLinear):
            dense = module.to_linear()
            _decisions[dense] = str(candidate.row["reason"])
            replace_module(model, module, dense)
    elif module is candidate.first.module:
        if module is not candidate.sparse:
            replace_module(model, module, candidate.sparse)
    elif isinstance(module, nn.Linear):
        replace_module(model, module, candidate.sparse.twin(module.bias))


def _why_dense(layer: Layer) -> str:
    if layer.skip is not None:
        return layer.skip
    if layer.keep_dense is not None:
        return layer.keep_dense
    if layer.module in _decisions:
        return _decisions[layer.module]
    if not is_linear_like(layer):
        return f"no sparse kernel for {layer.kind}"
    found = check_pattern(layer.weight, "2:4")
    return "holds 2:4: twofour.compress(model) tries it" if found.holds else "not 2:4: twofour.prune(model) first"
