"""Calibration over several processes (torchrun): each sees its own batches, all get the same masks.

Nothing here does anything unless `torch.distributed` is initialised with more than one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed

from ..errors import CalibrationError
from ..nn.survey import Layer
from ..solvers import Hessian

Row = dict[str, Any]


def processes() -> int:
    """How many work together: 1 without torch.distributed."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """This process's number."""
    return distributed.get_rank() if processes() > 1 else 0


def add_up(hessian: Hessian) -> None:
    """Every process gets the sums over all of them, the same bits everywhere."""
    if processes() == 1:
        return
    distributed.all_reduce(hessian.second)
    distributed.all_reduce(hessian.first)
    unpaired = hessian.drift is None
    counts = torch.tensor([hessian.tokens, unpaired], dtype=torch.int64, device=hessian.second.device)
    distributed.all_reduce(counts)
    hessian.tokens = int(counts[0])
    if counts[1]:
        hessian.forget_drift()
    else:
        distributed.all_reduce(hessian.drift)


@contextmanager
def together() -> Iterator[None]:
    """What fails inside in one process fails in all: none waits for another that has stopped."""
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        if processes() == 1:
            raise
        problem = error
    if processes() > 1:
        told: list[str | None] = [None] * processes()
        distributed.all_gather_object(told, None if problem is None else f"{type(problem).__name__}: {problem}")
        if problem is not None:
            raise problem
        for process, other in enumerate(told):
            if other is not None:
                raise CalibrationError(f"process {process} failed: {other}")


def require_same(found: Any) -> None:
    """Raises CalibrationError where processes did not find the same."""
    if processes() == 1:
        return
    everywhere: list[Any] = [None] * processes()
    distributed.all_gather_object(everywhere, found)
    if any(other != everywhere[0] for other in everywhere):
        raise CalibrationError(
            "the processes' inputs reach different layers: give each process batches that reach all of them."
        )


def share(layers: Sequence[Layer], solve: Callable[[Layer], tuple[Row, Tensor]]) -> list[tuple[Layer, Row, Tensor]]:
    """`solve` of every layer, the work dealt out over the processes; all get all answers, in order."""
    count = processes()
    if count == 1:
        return [(layer, *solve(layer)) for layer in layers]
    own = {}
    with together():
        own = {i: solve(layer) for i, layer in enumerate(layers) if i % count == rank()}
    answers = []
    for i, layer in enumerate(layers):
        like = layer.weight.detach()
        row, weight = own.get(i, ({}, torch.empty(like.shape, dtype=like.dtype, device=like.device)))
        told = [row]
        distributed.broadcast_object_list(told, src=i % count)
        distributed.broadcast(weight.view(torch.uint8), src=i % count)  # as bytes: not every backend sends every dtype
        answers.append((layer, told[0], weight))
    return answers
