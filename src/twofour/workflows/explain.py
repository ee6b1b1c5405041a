"""explain: which kernel runs each layer, and why not a faster one."""

from __future__ import annotations

import weakref

from torch import nn

from ..errors import ModelError
from ..masks import check_pattern
from ..nn import SparseLinear
from ..pattern import Pattern
from ..report import Column, Report, environment
from .layers import Layer, is_linear_like, survey

DENSE = "dense (torch)"
"""What the kernel column says of a layer that torch runs dense."""

decisions: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
"""Why `compress` left a layer dense."""


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
    sparse = sum(row["kernel"] != DENSE for row in rows)
    summary = {"layers on a sparse kernel": f"{sparse} of {len(rows)}"}
    return Report("explain", columns, tuple(rows), summary, (), environment())


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
