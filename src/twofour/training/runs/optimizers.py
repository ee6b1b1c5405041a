"""The optimizer of a training run, and the state of the model it trains."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ...errors import ModelError, UnsupportedError


def optimizer_for(model: nn.Module, given: Optimizer | None, lr: float | None, otherwise: float) -> Optimizer:
    """The optimizer that was given, or AdamW without weight decay over all parameters that are trained.

    Args:
        lr: the learning rate that was given.
        otherwise: the one without.
    Raises:
        ModelError: both an optimizer and a learning rate; no optimizer; nothing to train.
    """
    if given is not None:
        if lr is not None:
            raise ModelError(f"lr={lr} together with an optimizer, which has its own: give one of the two.")
        if not isinstance(given, Optimizer):
            raise ModelError(
                f"optimizer is a {type(given).__name__}: pass a torch.optim.Optimizer over the model's parameters."
            )
        return given
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ModelError(
            "no parameter of the model is trained: all have requires_grad=False. Unfreeze what is to learn."
        )
    lr = otherwise if lr is None else lr
    if not (lr > 0 and math.isfinite(lr)):
        raise ModelError(f"lr={lr}: a number above 0.")
    fused = all(parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point() for parameter in parameters)
    return torch.optim.AdamW(parameters, lr, weight_decay=0.0, fused=fused)


def require_own(optimizer: Optimizer, model: nn.Module, teacher: nn.Module | None, verb: str) -> None:
    """Refuses an optimizer that trains none of the model, or any of its teacher.

    Raises:
        ModelError, UnsupportedError: it does; it is no optimizer for a loop that knows one loss a step.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UnsupportedError(
            f"LBFGS asks for the loss many times a step, of which {verb} knows one: take AdamW or SGD."
        )
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    name = type(optimizer).__name__
    if teacher is not None and any(id(parameter) in trained for parameter in teacher.parameters()):
        raise ModelError(f"the {name} trains the teacher: make it from the parameters of the model alone.")
    if not any(id(parameter) in trained for parameter in model.parameters()):
        raise ModelError(f"the {name} trains no parameter of the model: make it from model.parameters().")


@contextmanager
def training(model: nn.Module, optimizer: Optimizer, train: bool) -> Iterator[None]:
    """train() or eval(), and gradients for what the optimizer trains alone."""
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    flags = [(module, module.training) for module in model.modules()]
    idle = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in trained]
    try:
        model.train(train)
        for parameter in idle:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, training in flags:
            module.training = training
        for parameter in idle:
            parameter.requires_grad_(True)


@contextmanager
def rates(optimizer: Optimizer) -> Iterator[list[Any]]:
    """The learning rates of its groups, which are there again afterwards."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    try:
        yield peaks
    finally:
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak
