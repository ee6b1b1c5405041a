"""explain: which kernel runs each layer, and why not a faster one."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from ..kernels import KERNELS, LinearSpec, choose, told_of
from ..kernels.choices import Measured, Store
from ..masks import check_pattern
from ..nn import QuantizedSparseLinear, SparseLinear
from ..nn.survey import Layer, is_linear_like, survey
from ..pattern import Pattern
from ..report import Column, Report, environment
from ..report.record import format_value
from .comparison import form

DENSE = "dense (torch)"
"""What the kernel column says of a layer that torch runs dense."""

decisions: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
"""Why `compress` did not put a layer on a sparse kernel, or not on the fastest."""

measurements: weakref.WeakKeyDictionary[nn.Module, tuple[LinearSpec, Mapping[int, Measured]]]
measurements = weakref.WeakKeyDictionary()
"""What `compress` decided by, by token count; of the layer as it was then."""


def explain(model: nn.Module, *, kernels: bool = False) -> Report:
    """Which kernel runs each Linear and SparseLinear of `model`, and why no faster one does.

    Args:
        kernels: every kernel of the table for each layer, with its time where it was measured on this machine (by this
            or an earlier `compress`, on this many threads), and why it was not chosen.
    Returns:
        Report with a row per layer: shape, dtype, kernel, bytes, reason. With `kernels`, a row per layer and kernel:
        kernel, chosen, us ({tokens: microseconds}), times (the same as text), reason.
    Raises:
        ModelError: the model has no layer with a weight matrix.
    """
    layers = survey(model, Pattern(), None, None, skip_heads=False)
    if not layers:
        raise ModelError("there is nothing to explain: the model has no layer with a weight matrix.")
    if kernels:
        return _explain_kernels(layers)
    rows = []
    for layer in layers:
        row = layer.identity()
        if isinstance(layer.module, SparseLinear):
            choice = layer.module.choice
            was_decided = choice.kernel.dense or choice.kernel.on_gpu
            reason = decisions.get(layer.module, choice.reason) if was_decided else choice.reason
            row.update(kernel=choice.kernel.label(), bytes=layer.module.nbytes, reason=reason)
        else:
            row.update(kernel=DENSE, bytes=layer.weight.nbytes, reason=_why_dense(layer))
        rows.append(row)
    columns = (
        Column("layer", "layer"),
        Column("shape", "shape"),
        Column("dtype", "dtype"),
        Column("kernel", "kernel"),
        Column("bytes", "bytes", "bytes"),
        Column("reason", "why not a faster one"),
    )
    return Report("explain", columns, tuple(rows), _summary(layers), (), environment())


def _summary(layers: list[Layer]) -> dict[str, str]:
    on_dense = [isinstance(x.module, SparseLinear) and KERNELS[x.module.backend].dense for x in layers]
    sparse = sum(isinstance(layer.module, SparseLinear) for layer in layers) - sum(on_dense)
    summary = {"layers on a sparse kernel": f"{sparse} of {len(layers)}"}
    if any(on_dense):
        summary["layers on dense oneDNN"] = f"{sum(on_dense)} of {len(layers)}"
    return summary


def _explain_kernels(layers: list[Layer]) -> Report:
    store = Store.open()
    rows: list[dict[str, Any]] = []
    for layer in layers:
        rows += _kernel_rows(layer, store)
    columns = (
        Column("layer", "layer"),
        Column("shape", "shape"),
        Column("kernel", "kernel"),
        Column("times", "tokens: µs"),
        Column("chosen", "chosen"),
        Column("reason", "why not"),
    )
    notes = [*store.notes]
    if not any(row.get("us") for row in rows):
        notes.append("nothing was measured here yet: twofour.compress(model) does")
    return Report("explain", columns, tuple(rows), _summary(layers), tuple(notes), environment())


def _kernel_rows(layer: Layer, store: Store) -> list[dict[str, Any]]:
    """The table of kernels for one layer: those of the registry, and torch's Linear."""
    module = layer.module
    if not is_linear_like(layer) or layer.skip is not None or layer.keep_dense is not None:
        return [{**layer.identity(), "kernel": DENSE, "chosen": "yes", "reason": _why_dense(layer)}]
    if isinstance(module, SparseLinear):
        spec, running, has_bias = module.spec, module.backend, module.bias is not None
    else:
        assert isinstance(module, nn.Linear)
        spec = LinearSpec(module.out_features, module.in_features, Pattern(), layer.weight.dtype, layer.weight.device)
        running, has_bias = DENSE, module.bias is not None
    quantized = isinstance(module, QuantizedSparseLinear)
    table = module.kind.kernels if isinstance(module, QuantizedSparseLinear) else KERNELS
    default = running if quantized else choose(spec).kernel.backend
    measured_as, found = measurements.get(module, (None, {}))
    if measured_as != spec:  # never, or before it was converted
        kernel = form(module) if isinstance(module, SparseLinear) and running == default else default
        found = store.known(spec, kernel, has_bias, torch.get_num_threads())
    rivals = {default: "sparse", "onednn": "packed", DENSE: "dense"}
    rows = []
    for name in (*(name for name, kernel in table.items() if told_of(kernel, spec.device)), DENSE):
        why_not = table[name].why_not(spec) if name in table else None
        us = {t: m.us[rivals[name]] for t, m in found.items() if name in rivals and rivals[name] in m.us}
        chosen = name == running
        if chosen:
            reason = ""
        elif why_not is not None:
            reason = why_not
        elif us:
            best = {t: m.us[rivals[running]] for t, m in found.items()} if running in rivals else {}
            reason = f"{sum(best.values()) / sum(us.values()):.2f}x of the chosen" if best else "measured"
        elif name == "reference":
            reason = "writes the weight out dense at each call"
        else:
            reason = _unmeasured(layer)
        rows.append(
            {
                **layer.identity(),
                "kernel": table[name].label() if name in table and why_not is None else name,
                "us": us,
                "times": ", ".join(f"{tokens}: {format_value(value, 'us')}" for tokens, value in us.items()),
                "chosen": "yes" if chosen else "",
                "reason": reason,
            }
        )
    return rows


def _unmeasured(layer: Layer) -> str:
    if not layer.is_compressed and not check_pattern(layer.weight, "2:4").holds:
        return "not 2:4: twofour.prune(model) first"
    return "not measured here"


def _why_dense(layer: Layer) -> str:
    if layer.skip is not None:
        return layer.skip
    if layer.keep_dense is not None:
        return layer.keep_dense
    if layer.module in decisions:
        return decisions[layer.module]
    if not is_linear_like(layer):
        return f"no sparse kernel for {layer.kind}"
    found = check_pattern(layer.weight, "2:4")
    return "holds 2:4: twofour.compress(model) tries it" if found.holds else "not 2:4: twofour.prune(model) first"
