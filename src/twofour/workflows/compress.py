"""compress: Linear -> SparseLinear where it pays."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from torch import Tensor, nn

from ..errors import ModelError, UnsupportedError
from ..format import SparseMatrix
from ..format.pack import VALUE_DTYPES
from ..masks import check_pattern
from ..nn import QuantizedSparseLinear, SparseLinear
from ..nn.swap import replace_module
from ..pattern import Pattern
from ..report import Column, Report, environment
from .comparison import Comparison
from .explain import DENSE, decisions
from .inputs import Batch, batches, call, evaluating
from .layers import Layer, dtype_name, is_linear_like, sharing, survey, weight_key
from .progress import track

DEFAULT_TOKENS = (1, 128)
"""Token counts a layer is measured at when no inputs are given, or when the inputs never reach it."""

_PRUNE_FIRST = "prune it first"


@dataclass
class _Candidate:
    """All layers that share one weight: they are decided together, so that the weight is held once."""

    layers: list[Layer]
    tokens: list[int] = field(default_factory=list)
    sparse: SparseLinear | None = None
    dense_weight: nn.Parameter | None = None
    row: dict[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> Layer:
        return self.layers[0]


def compress(
    model: nn.Module,
    inputs: Batch | Sequence[Batch] | None = None,
    *,
    pattern: Pattern | str = "2:4",
    tokens: Sequence[int] | int | None = None,
    force: bool = False,
    weights: Literal["int8"] | None = None,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    dry_run: bool = False,
    progress: bool | None = None,
) -> Report:
    """Replaces, in place, each Linear that holds `pattern` by a SparseLinear, where that is faster on this machine.

    Each layer's kernel is timed against the dense layer it would replace, in turns, at the token counts that `inputs`
    bring it (or `tokens`, or 1 and 128). A layer that would be slower stays dense, and one that is compressed already
    goes back to dense if it turns out slower now. Nothing is dropped: a layer that does not hold the pattern stays dense.
    The report also has the best that torch could do dense: oneDNN with weights packed in advance.

    Args:
        model: any nn.Module, pruned before.
        inputs: model inputs as in use: a tensor, a tuple, a dict, or a list of these.
        tokens: token counts to decide by, instead of `inputs`.
        force: compress every layer that can be, without timing.
        weights: "int8" stores the kept values as int8 with a scale per output row, and quantizes inputs token by token
            inside the layer (QuantizedSparseLinear). That rounds: the report has each layer's weight_error. None keeps
            every value as it is.
        include, exclude: shell wildcards over module names.
        dry_run: measure and report; change nothing.
        progress: a progress bar; None shows one on a terminal only.
    Returns:
        Report with a row per layer: action ("compressed", "dense", "skipped"), kernel, tokens, dense_us, sparse_us,
        speedup, bytes before and after, reason; with int8, weight_error (|W - int8 W| / |W|, in the Frobenius norm).
    Raises:
        ModelError: no layer holds the pattern, or none that does can be compressed. Nothing is changed then.
    Cost: a run of the model per batch, about 20 runs of each distinct layer, and the packing.
    """
    pattern = Pattern.parse(pattern)
    if inputs is not None and tokens is not None:
        raise ModelError("inputs= and tokens= both say what to measure at: pass one of them.")
    if weights not in (None, "int8"):
        raise ModelError(f"weights={weights!r}: pass 'int8', or None to keep every value as it is.")
    tokens = (tokens,) if isinstance(tokens, int) else tokens
    if tokens is not None and not all(isinstance(count, int) for count in tokens):
        raise ModelError(f"tokens={tokens!r}: pass whole numbers, as in tokens=[1, 128].")
    if tokens is not None and any(count < 0 for count in tokens):
        raise ModelError(f"tokens={list(tokens)}: a layer is measured at token counts from 1.")
    layers = survey(model, pattern, include, exclude, skip_heads=False)
    rows: dict[int, dict[str, Any]] = {id(layer): layer.identity() for layer in layers}
    candidates = _candidates(model, layers, pattern, rows)
    if not candidates:
        raise ModelError(_why_nothing(list(rows.values()), pattern))
    notes: list[str] = []
    if force:
        notes.append("force: every layer that can be was compressed, without timing")
    else:
        _collect_tokens(model, candidates, inputs, tokens, notes)
    comparison = None if force else Comparison()
    for candidate in track(candidates, "compress", progress):
        _decide(candidate, pattern, comparison, weights)
        for layer in candidate.layers:
            rows[id(layer)].update(candidate.row)
            if not dry_run:
                _apply(model, layer, candidate)
    if dry_run:
        notes.append("dry run: nothing was changed")
    behind = [row for candidate in candidates if (row := candidate.row).get("against_best", 1) < 1 < row["speedup"]]
    if behind:
        notes.append(
            f"{len(behind)} compressed layers beat torch's Linear but not oneDNN with packed weights (column oneDNN): a"
            " model frozen for oneDNN would run these faster dense"
        )
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
        Column("onednn_us", "oneDNN µs", "us"),
        Column("sparse_us", "sparse µs", "us"),
        Column("speedup", "speed", "ratio"),
        *((Column("weight_error", "rounding"),) if weights is not None else ()),
        Column("reason", "why"),
    )
    return Report("compress", columns, ordered, summary, tuple(notes), environment())


def _candidates(
    model: nn.Module, layers: list[Layer], pattern: Pattern, rows: dict[int, dict[str, Any]]
) -> list[_Candidate]:
    by_weight: dict[Hashable, _Candidate] = {}
    workable = [layer for layer in layers if layer.skip is None]
    tied = sharing(
        [layer for layer in workable if layer.keep_dense is None],
        [layer for layer in workable if layer.keep_dense is not None],
    )
    for layer in layers:
        row = rows[id(layer)]
        row.update(action="dense", kernel=DENSE)
        if layer.skip is not None:
            row.update(action="skipped", reason=layer.skip)
        elif layer.module is model and is_linear_like(layer):
            row["reason"] = (
                "the model is this layer itself, and cannot be replaced in place: SparseLinear.from_linear(layer)"
            )
        elif not is_linear_like(layer) or layer.keep_dense is not None:
            row["reason"] = layer.keep_dense or f"no sparse kernel for {layer.kind}"
        elif layer.name in tied:
            owner = tied[layer.name]
            row["reason"] = f"weight is shared with '{owner.name}' ({owner.kind}), which stays dense"
        elif isinstance(layer.module, SparseLinear):
            key = ("compressed", layer.module.values.data_ptr() or id(layer.module))
            by_weight.setdefault(key, _Candidate([])).layers.append(layer)
        elif layer.weight.dtype not in VALUE_DTYPES:
            row["reason"] = f"{dtype_name(layer.weight.dtype)} weights cannot be stored compressed"
        else:
            found = check_pattern(layer.weight, pattern)
            if found.holds:
                by_weight.setdefault(weight_key(layer.weight), _Candidate([])).layers.append(layer)
            else:
                row["reason"] = f"not {pattern} ({found.broken} of {found.groups} groups): {_PRUNE_FIRST}"
    return list(by_weight.values())


def _why_nothing(rows: list[dict[str, Any]], pattern: Pattern) -> str:
    tried = [row for row in rows if row["action"] == "dense"] or rows
    reasons = sorted({str(row.get("reason")) for row in tried})
    detail = "; ".join(reasons[:3]) if reasons else "the model has no layer with a weight matrix"
    if any(reason.endswith(_PRUNE_FIRST) for reason in reasons):
        return (
            f"no layer holds {pattern}, so there is nothing to compress ({detail}).\n"
            f"  Prune first: twofour.prune(model, '{pattern}')."
        )
    return f"there is nothing to compress: {detail}."


def _collect_tokens(
    model: nn.Module,
    candidates: list[_Candidate],
    inputs: Batch | Sequence[Batch] | None,
    tokens: Sequence[int] | None,
    notes: list[str],
) -> None:
    if inputs is not None:
        seen: dict[nn.Module, list[int]] = {}

        def record(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = next((x for x in (*arguments, *named.values()) if isinstance(x, Tensor) and x.ndim), None)
            if x is not None:
                seen.setdefault(module, []).append(x.numel() // max(1, x.shape[-1]))

        modules = {layer.module for candidate in candidates for layer in candidate.layers}
        hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
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
            notes.append(f"the inputs never reached {_some(unreached)}: measured at {DEFAULT_TOKENS} tokens")
    empty = [candidate.first.name for candidate in candidates if candidate.tokens and not any(candidate.tokens)]
    if empty or (tokens is not None and not any(tokens)):
        what = (
            f"the inputs bring no tokens to {_some(empty)}" if empty else f"tokens={list(tokens or ())} has no tokens"
        )
        notes.append(f"{what}: measured at {DEFAULT_TOKENS} tokens")
    for candidate in candidates:
        if not any(candidate.tokens):
            candidate.tokens = list(tokens if tokens is not None and any(tokens) else DEFAULT_TOKENS)


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"


def _decide(candidate: _Candidate, pattern: Pattern, comparison: Comparison | None, weights: str | None) -> None:
    """Fills `candidate.row`, and `candidate.sparse` where the layer is to be compressed."""
    module = candidate.first.module
    if isinstance(module, SparseLinear):
        sparse = module
        dense_bytes = module.in_features * module.out_features * module.weight.dtype.itemsize
    else:
        assert isinstance(module, nn.Linear)
        try:
            sparse = SparseLinear(SparseMatrix.from_dense(module.weight, pattern), module.bias)
        except UnsupportedError as error:
            candidate.row = {"action": "dense", "kernel": DENSE, "reason": str(error)}
            return
        dense_bytes = module.weight.nbytes
    rounding: float | None = None
    if weights == "int8" and not isinstance(sparse, QuantizedSparseLinear):
        exact = sparse.matrix
        try:
            sparse = QuantizedSparseLinear.from_matrix(exact, module.bias, name=candidate.first.name)
        except UnsupportedError as refused:
            candidate.row = {"action": "dense", "kernel": DENSE, "reason": str(refused)}
            return
        rounding = _rounding(exact, sparse)
    choice = sparse.choice
    candidate.row = {
        "action": "compressed",
        "kernel": choice.kernel.label(),
        "dense_bytes": dense_bytes,
        "bytes": sparse.nbytes,
        "reason": choice.reason,
    }
    if rounding is not None:
        candidate.row["weight_error"] = rounding
    if comparison is not None:
        times = comparison.times(sparse, module if isinstance(module, nn.Linear) else None, candidate.tokens)
        candidate.row.update(
            tokens=", ".join(map(str, sorted(set(candidate.tokens)))),
            dense_us=times.dense_us,
            onednn_us=times.onednn_us,
            sparse_us=times.sparse_us,
            speedup=times.speedup,
            against_best=times.against_best,
        )
        if times.speedup <= 1:
            reason = f"{choice.kernel.label()} would run at {times.speedup:.2f}x of dense"
            candidate.row.update(
                action="dense",
                kernel=DENSE,
                bytes=dense_bytes,
                reason=f"{reason} ({choice.reason})" if choice.reason else reason,
            )
            return
    candidate.sparse = sparse


def _rounding(exact: SparseMatrix, layer: QuantizedSparseLinear) -> float:
    """|W - int8 W| / |W| in the Frobenius norm; 0 for a weight of zeros."""
    wanted = exact.values.double()
    stored = layer.matrix.values.double() * layer.scales[:, None].double()
    return float((wanted - stored).norm() / wanted.norm()) if bool(wanted.any()) else 0.0


def _apply(model: nn.Module, layer: Layer, candidate: _Candidate) -> None:
    module = layer.module
    if candidate.sparse is None:
        decisions[module] = str(candidate.row["reason"])
        if isinstance(module, SparseLinear):
            dense = module.to_linear()
            if candidate.dense_weight is None:
                candidate.dense_weight = cast(nn.Parameter, dense.weight)
            dense.weight = candidate.dense_weight
            decisions[dense] = str(candidate.row["reason"])
            replace_module(model, module, dense)
    elif module is candidate.first.module:
        if module is not candidate.sparse:
            replace_module(model, module, candidate.sparse)
    elif isinstance(module, (nn.Linear, SparseLinear)) and type(module) is not type(candidate.sparse):
        replace_module(model, module, candidate.sparse.twin(module.bias))
