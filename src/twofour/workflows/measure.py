"""measure: what a sparse model gains and what it costs, against a dense one, in the same minutes."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..nn import SparseLinear
from ..nn.inputs import Batch, accepting, batches, call, evaluating, output_tensors, tensors_in
from ..nn.swap import to_dense_modules
from ..report import Column, Report, environment
from .progress import track
from .timing import paired


def measure(
    model: nn.Module,
    inputs: Batch | Sequence[Batch],
    *,
    against: nn.Module | None = None,
    backward: bool = False,
    repeats: int = 21,
    progress: bool | None = None,
) -> Report:
    """Speed, bytes and output error of `model` against a dense model, as one record.

    The two models take turns in one process, batch by batch; medians and quartiles are kept. Both run in eval mode
    without gradients, unless `backward` asks for them, and get their training flags back.

    Args:
        model: the sparse model.
        inputs: a tensor, a tuple, a dict, or a list of these; each is one row of the report.
        against: the dense model to compare with. None takes a copy of `model` with every SparseLinear written out
            dense: the speed is then compared at equal weights, and the error is rounding alone.
        backward: time a training step: forward, and backward from the sum of the outputs to every parameter that requires
            gradients. Gradients that parameters had are there again afterwards. What follows an optimizer, such as a new mask,
            is not in it: the report of `training.move_masks` has the times of layers with that.
        repeats: runs of each model per batch.
        progress: a progress bar; None shows one on a terminal only.
    Returns:
        Report with a row per batch (batch: the shape of its first tensor, as in "8x256"; dense_us, sparse_us, quartiles,
        speedup, largest and mean absolute error of the outputs, and their error relative to the dense outputs' root mean
        square) and a summary (speedup and times of all batches, one run of each in sum; bytes; the largest errors).
    Raises:
        ModelError: no inputs, or some that a model fails on, a model without floating point outputs, or outputs of different
            shapes; with `backward`, outputs that no parameter has a gradient of.
    """
    work = batches(inputs)
    if repeats < 1:
        raise ModelError(f"repeats={repeats}: measure needs at least one run of each model.")
    dense = against if against is not None else _dense_copy(model)
    rows = []
    unusual: list[str] = []
    with evaluating(model, dense):
        for index, batch in enumerate(track(work, "measure", progress)):
            with accepting(model, batch):
                sparse_output = call(model, batch)
            with accepting(dense, batch, who="the model" if against is None else "the model of against="):
                dense_output = call(dense, batch)
            error = _error(dense_output, sparse_output)
            if math.isnan(error["largest_error"]):
                unusual.append(f"batch {index} ({_who_is_not_finite(dense_output, sparse_output)})")
            rows.append(
                {"batch": _shape(batch) or str(index), **error, **_speed(model, dense, batch, repeats, backward)}
            )
    dense_us, sparse_us = sum(row["dense_us"] for row in rows), sum(row["sparse_us"] for row in rows)
    dense_bytes, sparse_bytes = model_bytes(dense), model_bytes(model)
    summary = {
        "speedup, all batches": dense_us / sparse_us,
        "dense ms, all batches": dense_us / 1e3,
        "sparse ms, all batches": sparse_us / 1e3,
        "dense bytes": dense_bytes,
        "sparse bytes": sparse_bytes,
        "bytes ratio": sparse_bytes / dense_bytes if dense_bytes else 1.0,
        "largest error": _largest(row["largest_error"] for row in rows),
        "mean error": sum(row["mean_error"] for row in rows) / len(rows),
        "largest relative error": _largest(row["relative_error"] for row in rows),
    }
    notes = []
    if unusual:
        notes.append(
            f"outputs hold NaN or infinities, so that the error is NaN: {', '.join(unusual[:3])}"
            f"{' ...' if len(unusual) > 3 else ''}"
        )
    if against is None:
        notes.append("compared with a dense copy of the same weights; pass against= to compare with the original model")
    if backward:
        notes.append("times are of forward and backward")
    elif not any(isinstance(module, SparseLinear) for module in model.modules()):
        notes.append("no layer of the model is compressed: twofour.compress(model) makes it fast")
    columns = (
        Column("batch", "batch"),
        Column("dense_us", "dense µs", "us"),
        Column("dense_spread", "±", "share"),
        Column("sparse_us", "sparse µs", "us"),
        Column("sparse_spread", "±", "share"),
        Column("speedup", "speed", "ratio"),
        Column("largest_error", "largest error", "error"),
        Column("mean_error", "mean error", "error"),
        Column("relative_error", "relative", "error"),
    )
    return Report("measure", columns, tuple(rows), summary, tuple(notes), environment())


def _shape(batch: Batch) -> str | None:
    return next(("x".join(map(str, x.shape)) or "1" for x in tensors_in(batch)), None)


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage counted once."""
    seen: dict[tuple[int, int], int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        seen[(tensor.data_ptr() or id(tensor), tensor.nbytes)] = tensor.nbytes
    return sum(seen.values())


def _dense_copy(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    if isinstance(twin, SparseLinear):
        return twin.to_linear()
    to_dense_modules(twin)
    return twin


def _speed(model: nn.Module, dense: nn.Module, batch: Batch, repeats: int, backward: bool) -> dict[str, Any]:
    run = _step if backward else call
    with _kept_gradients(model, dense):
        found = paired({"dense": lambda: run(dense, batch), "sparse": lambda: run(model, batch)}, repeats=repeats)
    record: dict[str, Any] = {"speedup": found["dense"].median_us / found["sparse"].median_us}
    for name, timing in found.items():
        record[f"{name}_us"] = timing.median_us
        record[f"{name}_low_us"], record[f"{name}_high_us"] = timing.low_us, timing.high_us
        record[f"{name}_spread"] = timing.spread
    return record


def _step(model: nn.Module, batch: Batch) -> None:
    """Forward and backward; gradients do not add up."""
    for parameter in model.parameters():
        parameter.grad = None
    with torch.enable_grad():
        outputs = [output for output in output_tensors(call(model, batch)) if output.requires_grad]
        if not outputs:
            raise ModelError(
                "no output has a gradient: no parameter of the model requires one, so there is no step to time."
            )
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])


@contextlib.contextmanager
def _kept_gradients(*models: nn.Module) -> Iterator[None]:
    """Gradients come back when the block ends."""
    kept = [(parameter, parameter.grad) for model in models for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


def _error(dense_output: Any, sparse_output: Any) -> dict[str, float]:
    expected, got = output_tensors(dense_output), output_tensors(sparse_output)
    if not expected:
        raise ModelError("the model returns no floating point tensor: there is nothing to compare.")
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in got]:
        raise ModelError(
            f"the models return different shapes: {[list(t.shape) for t in expected]} dense,"
            f" {[list(t.shape) for t in got]} sparse. against= must be the same model before pruning."
        )
    difference = torch.cat([(a.double() - b.double()).abs().flatten() for a, b in zip(got, expected, strict=True)])
    reference = torch.cat([tensor.double().flatten() for tensor in expected])
    if difference.numel() == 0:
        return {"largest_error": 0.0, "mean_error": 0.0, "relative_error": 0.0}
    scale = _root_mean_square(reference)
    return {
        "largest_error": float(difference.max()),
        "mean_error": float(difference.mean()),
        "relative_error": _root_mean_square(difference) / scale if scale else float(difference.max() > 0),
    }


def _who_is_not_finite(dense_output: Any, sparse_output: Any) -> str:
    outputs = {"dense": dense_output, "sparse": sparse_output}
    bad = [
        name for name, output in outputs.items() if not all(bool(t.isfinite().all()) for t in output_tensors(output))
    ]
    return " and ".join(bad)


def _largest(errors: Iterable[float]) -> float:
    """The largest; NaN if there is one, wherever it stands."""
    found = list(errors)
    return next((error for error in found if math.isnan(error)), max(found))


def _root_mean_square(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
