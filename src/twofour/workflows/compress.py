"""compress: Linear -> SparseLinear where it pays."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..errors import ModelError, UnsupportedError
from ..format import SparseMatrix
from ..format.pack import why_not_stored
from ..kernels import KERNELS, LinearSpec
from ..masks import check_pattern
from ..nn import WEIGHTS, QuantizedSparseLinear, SparseLinear
from ..nn.fused import unfuse
from ..nn.inputs import Batch, accepting, batches, call, evaluating
from ..nn.survey import Layer, is_linear_like, sharing, survey, weight_key
from ..nn.swap import replace_module
from ..pattern import Pattern
from ..report import Column, Report, environment
from .comparison import Comparison, LayerTimes
from .explain import DENSE, decisions, measurements
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
    times: LayerTimes | None = None
    spec: LinearSpec | None = None
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
    remeasure: bool = False,
    weights: Literal["int8", "float8", "bfloat16"] | None = None,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    dry_run: bool = False,
    progress: bool | None = None,
) -> Report:
    """Gives each Linear that holds `pattern`, in place, the kernel that is fastest on this machine.

    Three are timed in turns, at the token counts that `inputs` bring the layer (or `tokens`, or 1 and 128): the Linear
    as torch runs it, oneDNN with the weight packed in advance, and the sparse kernel. A layer becomes a SparseLinear on
    the sparse kernel, a SparseLinear that holds its weight dense for oneDNN, or stays (or goes back to) an nn.Linear,
    whichever wins; the sparse kernel is preferred down to 0.97x of oneDNN, because it holds half the bytes, but never
    where torch's Linear is faster. On a GPU the sparse kernel is the faster of our own and NVIDIA's. One kernel serves
    all token counts of a layer: two would hold its weight twice.
    Nothing is dropped: a layer that does not hold the pattern stays dense.

    Times are kept on disk (`twofour info` says where), so that the next model with these shapes is not timed again.

    Args:
        model: any nn.Module, pruned before.
        inputs: model inputs as in use: a tensor, a tuple, a dict, or a list of these.
        tokens: token counts to decide by, instead of `inputs`.
        force: compress every layer that can be, without timing.
        remeasure: time again what is on disk.
        weights: "bfloat16" rounds the kept values of a float32 model and leaves its inputs and outputs float32: half the
            bytes again, and with few tokens the speed of memory. "int8" stores them with a scale per output row, and
            quantizes inputs token by token inside the layer (QuantizedSparseLinear). "float8" (e4m3) stores as many bytes and
            takes inputs as they are. The report has each layer's weight_error. None keeps every value as it is, and so do
            layers that were rounded before: rounded anew, they would lose more.
        include, exclude: shell wildcards over module names.
        dry_run: measure and report; change nothing.
        progress: a progress bar; None shows one on a terminal only.
    Returns:
        Report with a row per layer: action ("compressed", "packed" for oneDNN, "dense", "skipped"), kernel, tokens,
        dense_us, onednn_us, sparse_us, gain (of the chosen kernel over torch's Linear), speedup and against_best (of
        the sparse kernel over torch's Linear and the best dense), bytes before and after, reason; with
        `weights`, weight_error (|W - rounded W| / |W|, in the Frobenius norm). Times are sums over all calls of a layer:
        those that all `inputs` make, or one at each of `tokens`.
    Raises:
        ModelError: no layer holds the pattern, none that does can be compressed, or the model fails on `inputs`. Nothing is
            changed then.
    Cost: a run of the model per batch, about 20 runs of each distinct layer that was not timed before, and the packing.
    """
    pattern = Pattern.parse(pattern)
    if inputs is not None and tokens is not None:
        raise ModelError("inputs= and tokens= both say what to measure at: pass one of them.")
    if weights not in (None, "bfloat16", *WEIGHTS):
        raise ModelError(
            f"weights={weights!r}: it is {', '.join(map(repr, WEIGHTS))} or 'bfloat16'. Leave it out to keep every value as"
            " it is."
        )
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
    if not dry_run and unfuse(model):
        notes.append("activations that were fused stand alone again: call twofour.fuse(model) after this")
    comparison = None if force else Comparison(remeasure=remeasure)
    for candidate in track(candidates, "compress", progress):
        _decide(candidate, pattern, comparison, weights)
        for layer in candidate.layers:
            rows[id(layer)].update(candidate.row)
            if not dry_run:
                _apply(model, layer, candidate)
    if dry_run:
        notes.append("dry run: nothing was changed")
    if comparison is not None:
        comparison.store.save()
        notes += _timing_notes(comparison, candidates)
    ordered = tuple(rows[id(layer)] for layer in layers)
    compressed = [row for row in ordered if row["action"] == "compressed"]
    packed = [row for row in ordered if row["action"] == "packed"]
    slower = [row for row in ordered if row["action"] == "dense" and "speedup" in row]
    summary: dict[str, Any] = {"layers compressed": f"{len(compressed)} of {len(ordered)}"}
    if packed:
        summary["on dense oneDNN, because sparse would be slower"] = len(packed)
    summary["kept dense because sparse would be slower"] = len(slower)
    summary["weight bytes of those compressed, before"] = sum(row["dense_bytes"] for row in compressed)
    summary["weight bytes of those compressed, after"] = sum(row["bytes"] for row in compressed)
    if packed:
        summary["weight bytes of those on oneDNN, before"] = sum(row["dense_bytes"] for row in packed)
        summary["weight bytes of those on oneDNN, after"] = sum(row["bytes"] for row in packed)
    columns = (
        Column("layer", "layer"),
        Column("shape", "shape"),
        Column("tokens", "tokens"),
        Column("dense_us", "dense µs", "us"),
        Column("onednn_us", "oneDNN µs", "us"),
        Column("sparse_us", "sparse µs", "us"),
        Column("kernel", "kernel"),
        Column("gain", "speed", "ratio"),
        *((Column("weight_error", "rounding", "error"),) if weights is not None else ()),
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
        elif (why := why_not_stored(layer.weight.dtype)) is not None:
            row["reason"] = f"weights of {why}; convert the model first, as model.float() does"
        else:
            found = check_pattern(layer.weight, pattern)
            if found.holds:
                by_weight.setdefault(weight_key(layer.weight), _Candidate([])).layers.append(layer)
            else:
                row["reason"] = f"not {pattern} ({found.broken} of {found.groups} groups): {_PRUNE_FIRST}"
    return list(by_weight.values())


def _why_nothing(rows: list[dict[str, Any]], pattern: Pattern) -> str:
    tried = [row for row in rows if row["action"] == "dense"] or rows
    unpruned = [row for row in tried if str(row.get("reason")).endswith(_PRUNE_FIRST)]
    if unpruned:
        fault = str(unpruned[0]["reason"]).removesuffix(f": {_PRUNE_FIRST}")
        others = f", nor are {len(unpruned) - 1} more layers" if len(unpruned) > 1 else ""
        return (
            f"no layer holds {pattern}, so there is nothing to compress: '{unpruned[0]['layer']}' is {fault}{others}.\n"
            f"  Prune first: twofour.prune(model, '{pattern}')."
        )
    reasons = sorted({str(row.get("reason")) for row in tried})
    detail = "; ".join(reasons[:3]) if reasons else "the model has no layer with a weight matrix"
    return f"there is nothing to compress: {detail}."


def _collect_tokens(
    model: nn.Module,
    candidates: list[_Candidate],
    inputs: Batch | Sequence[Batch] | None,
    tokens: Sequence[int] | None,
    notes: list[str],
) -> None:
    calls = ", one at each number of tokens"
    if inputs is not None:
        given = batches(inputs)
        calls = f", those with all {len(given)} batches" if len(given) > 1 else ""
        seen: dict[nn.Module, list[int]] = {}

        def record(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = next((x for x in (*arguments, *named.values()) if isinstance(x, Tensor) and x.ndim), None)
            if x is not None:
                seen.setdefault(module, []).append(x.numel() // max(1, x.shape[-1]))

        modules = {layer.module for candidate in candidates for layer in candidate.layers}
        hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
        try:
            with evaluating(model):
                for batch in given:
                    with accepting(model, batch):
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
    alike = inputs is None or all(any(candidate.tokens) for candidate in candidates)
    for candidate in candidates:
        if not any(candidate.tokens):
            candidate.tokens = list(tokens if tokens is not None and any(tokens) else DEFAULT_TOKENS)
    if max((len(candidate.tokens) for candidate in candidates), default=0) > 1:
        notes.append(f"times are sums over all calls of a layer{calls if alike else ''}")


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"


def _timing_notes(comparison: Comparison, candidates: list[_Candidate]) -> list[str]:
    now, kept, _ = comparison.counts
    notes = list(comparison.store.notes)
    dates = [candidate.times.kept for candidate in candidates if candidate.times is not None and candidate.times.kept]
    if kept:
        oldest = min(str(date) for date in dates)[:10]
        notes.append(
            f"{kept} of {now + kept} timings were made before, from {oldest} on, and kept in {comparison.store.file}:"
            " remeasure=True times again"
        )
    disturbed = [c.first.name for c in candidates if c.times is not None and c.times.disturbed]
    if disturbed:
        notes.append(
            f"other programs disturbed the timing of {_some(disturbed)}: the choice may be wrong and is not kept for the"
            " next run"
        )
    return notes


def _decide(candidate: _Candidate, pattern: Pattern, comparison: Comparison | None, weights: str | None) -> None:
    """Fills `candidate.row`, and `candidate.sparse` where the layer is to become (or stay) a SparseLinear."""
    module = candidate.first.module
    sparse: SparseLinear
    if isinstance(module, SparseLinear):
        # One that runs on a dense kernel is compared by its compressed form.
        is_dense = KERNELS[module.backend].dense
        sparse = SparseLinear(module.matrix, module.bias).train(module.training) if is_dense else module
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
    exact: SparseMatrix | None = None  # the weight before it was rounded, or what its rounding stands for
    if isinstance(sparse, QuantizedSparseLinear):
        exact = SparseMatrix.from_dense(sparse.dequantized(), pattern)
    if weights in WEIGHTS and not isinstance(sparse, QuantizedSparseLinear):
        exact = sparse.matrix
        try:
            sparse = QuantizedSparseLinear.from_matrix(exact, module.bias, name=candidate.first.name, weights=weights)
        except UnsupportedError as refused:
            candidate.row = {"action": "dense", "kernel": DENSE, "reason": str(refused)}
            return
        rounding = _rounding(exact, sparse.matrix.values.double() * sparse.scales[:, None].double())
    elif weights == "bfloat16" and sparse.values.dtype == torch.float32:
        exact = sparse.matrix
        sparse = SparseLinear(exact.to(torch.bfloat16), module.bias).train(module.training)
        rounding = _rounding(exact, sparse.matrix.values.double())
    choice = sparse.choice
    candidate.sparse = sparse
    candidate.row = {
        "action": "compressed",
        "kernel": choice.kernel.label(),
        "dense_bytes": dense_bytes,
        "bytes": sparse.nbytes,
        "reason": choice.reason,
    }
    if rounding is not None:
        candidate.row["weight_error"] = rounding
    if weights in WEIGHTS and isinstance(module, QuantizedSparseLinear) and module.kind.name != weights:
        stays = (
            f"stays {module.kind.name}: to round it again would lose more, so compress the model that was not rounded"
        )
        candidate.row["reason"] = "; ".join(filter(None, (choice.reason, stays)))
    if comparison is None:
        return
    dense = module if isinstance(module, nn.Linear) else None
    times = comparison.times(sparse, dense, candidate.tokens)
    for other in _others_on_gpu(sparse):
        others = comparison.times(other, dense, candidate.tokens)
        if others.sparse_us < times.sparse_us:
            reason = f"{choice.kernel.label()} would take {times.sparse_us / others.sparse_us:.2f}x the time"
            sparse, times, choice = other, others, other.choice
            candidate.sparse = sparse
            candidate.row.update(kernel=choice.kernel.label(), bytes=sparse.nbytes, reason=reason)
    candidate.times, candidate.spec = times, sparse.spec
    candidate.row.update(
        tokens=", ".join(map(str, sorted(set(candidate.tokens)))),
        dense_us=times.dense_us,
        onednn_us=times.onednn_us,
        sparse_us=times.sparse_us,
        speedup=times.speedup,
        against_best=times.against_best,
        gain=times.dense_us / times.us(times.best),
        measured=times.kept or "now",
    )
    if times.best == "sparse":
        return
    rival, ratio = (
        ("oneDNN", times.us("onednn") / times.sparse_us) if times.best == "onednn" else ("dense", times.speedup)
    )
    reason = f"{choice.kernel.label()} would run at {ratio:.2f}x of {rival}"
    reason = f"{reason} ({choice.reason})" if choice.reason else reason
    if times.best == "onednn":
        if isinstance(module, SparseLinear) and KERNELS[module.backend].dense:
            candidate.sparse = module
        else:
            matrix = sparse.matrix if exact is None else exact
            candidate.sparse = SparseLinear(matrix, sparse.bias, backend="onednn").train(sparse.training)
            candidate.row.pop("weight_error", None)
        kernel = candidate.sparse.choice.kernel.label()
        candidate.row.update(action="packed", kernel=kernel, bytes=candidate.sparse.nbytes, reason=reason)
    else:
        candidate.sparse = None
        candidate.row.pop("weight_error", None)
        candidate.row.update(action="dense", kernel=DENSE, bytes=dense_bytes, reason=reason)


def _others_on_gpu(sparse: SparseLinear) -> list[SparseLinear]:
    """The layer on each other kernel that is for GPUs: which is faster depends on the shape."""
    table = sparse.kind.kernels if isinstance(sparse, QuantizedSparseLinear) else KERNELS
    if not table[sparse.backend].on_gpu:
        return []
    rows = [kernel for kernel in table.values() if kernel.on_gpu and kernel.backend != sparse.backend]
    return [_on(sparse, kernel.backend) for kernel in rows if kernel.why_not(sparse.spec) is None]


def _on(sparse: SparseLinear, backend: str) -> SparseLinear:
    other: SparseLinear
    if isinstance(sparse, QuantizedSparseLinear):
        other = QuantizedSparseLinear(sparse.matrix, sparse.scales, sparse.bias, backend=backend, dtype=sparse.dtype)
    else:
        other = SparseLinear(sparse.matrix, sparse.bias, backend=backend)
    return other.train(sparse.training)


def _rounding(exact: SparseMatrix, stored: Tensor) -> float:
    """|W - stored| / |W| in the Frobenius norm; 0 for a weight of zeros."""
    wanted = exact.values.double()
    return float((wanted - stored).norm() / wanted.norm()) if bool(wanted.any()) else 0.0


def _apply(model: nn.Module, layer: Layer, candidate: _Candidate) -> None:
    module = layer.module
    new: nn.Module = module
    if candidate.sparse is None:
        if isinstance(module, SparseLinear):
            dense = module.to_linear()
            if candidate.dense_weight is None:
                candidate.dense_weight = cast(nn.Parameter, dense.weight)
            dense.weight = candidate.dense_weight
            new = dense
    elif module is candidate.first.module:
        new = candidate.sparse
    elif isinstance(module, nn.Linear) or candidate.first.module is not candidate.sparse:
        new = candidate.sparse.twin(cast("nn.Parameter | None", module.bias))
    if new is not module:
        replace_module(model, module, new)
    if reason := str(candidate.row["reason"]):
        decisions[module] = decisions[new] = reason
    if candidate.times is not None:
        assert candidate.spec is not None
        measurements[module] = measurements[new] = candidate.spec, candidate.times.by_tokens
