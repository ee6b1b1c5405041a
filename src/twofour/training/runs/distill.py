"""Recovery in one call: a pruned model learns from the dense one, its zeros stay, and a kill costs a minute."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from ...errors import ModelError
from ...nn.inputs import Batch
from ...nn.survey import survey
from ...pattern import Pattern
from ...report import Report
from ..distillation.teacher import Distillation
from ..distillation.terms import Term
from .budget import Budget
from .loop import Loop, Plan
from .masking import masked
from .optimizers import optimizer_for, rates, require_own, training
from .restart import Checkpoint, Stream

LR, LR_WIDTH = 1e-3, 384
"""The learning rate of layers of up to so many inputs: on all-MiniLM-L6-v2 (384), a hundred steps left a loss of held-out text
of 0.37 at 1e-4, 0.27 at 3e-4, 0.22 at 1e-3. Wider layers get less, in proportion (Yang et al. 2022, arXiv:2203.03466)."""
SAME = (
    "the loss of the first batch is 0: the model gives what its teacher gives, so there is nothing to learn. Was the teacher"
    " copied after the model had been pruned?"
)


def distill(
    model: nn.Module,
    teacher: nn.Module | Distillation,
    data: Iterable[Batch],
    *,
    terms: Term | Iterable[Term] | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    lr: float | None = None,
    optimizer: Optimizer | None = None,
    pattern: Pattern | str | None = "2:4",
    schedule: str = "linear",
    warmup: float = 0.05,
    clip: float | None = 1.0,
    accumulate: int = 1,
    train_mode: bool = False,
    log_every: int = 20,
    checkpoint: str | os.PathLike[str] | None = None,
    save_seconds: float = 60.0,
    progress: bool | None = None,
) -> Report:
    """Trains a pruned model to give what the dense one gives, on inputs without labels; its zeros stay zero.

    The learning rate rises over the first `warmup` of the budget and falls to zero at its end, be it of steps or of seconds.
    A loss or gradient that is not finite ends the run with an error, and the model has the last weights whose loss was finite.
    Inside `torch.autocast` the forwards run as it says; use bfloat16, for nothing scales losses of float16.

    Args:
        model: pruned, on any device; trained in place. Parameters whose `requires_grad` is False stay.
        teacher: the dense model, or a Distillation of the two, as made before pruning.
        data: batches (a tensor, a tuple of arguments, or a mapping of named ones), such as a list or a DataLoader, iterated as
            often as the budget lasts; an iterator, which has one pass, ends the run where it ends. A list in a batch is a
            tuple: DataLoaders make such.
        terms: what is compared, see `Distillation`.
        steps, seconds: the budget; where both are given, what comes first. A step that is expected to end after `seconds`
            is not begun.
            Neither: one pass over `data`, whose length must be known.
        lr: of AdamW without weight decay; not together with `optimizer`. None: 1e-3, for models whose layers have more than
            384 inputs (the median) less, in proportion: 1e-4 at 3840.
        optimizer: over parameters of `model`. The learning rates of its groups are the peaks of the schedule, and are there
            again afterwards.
        pattern: what is masked, by `keep_masks`, unless masks of the model are kept already. None masks nothing, for models
            that are not pruned; compressed layers train where their values do (`requires_grad_values`).
        schedule: "linear", "cosine" or "constant".
        warmup: share of the budget, 0 to 1 without 1.
        clip: the largest norm of all gradients together; None clips nothing.
        accumulate: batches per step; their losses count alike.
        train_mode: run the model in training mode, with dropout and the statistics of batches. Off, the model learns what it
            will give when it is used.
        log_every: steps per row of the report.
        checkpoint: a file to go on from if it is there, written every `save_seconds` and at the end: weights, optimizer, place
            in `data`, torch's random state. On a CPU with a budget of steps the result has the same bits as without the
            break, if `data` gives the same batches from the same random state. A finished run is not run again.
        progress: a bar; None: on a terminal.
    Returns:
        Report: a row for every `log_every` steps with the mean loss since the last, in all and of each term; in the summary
        the loss of the first batch before and after.
    Raises:
        ModelError: models or terms that do not fit each other, before anything is trained; settings that contradict each
            other; a checkpoint of other settings.
        TrainingError: no batches, or a loss or gradient that is not finite.
    Cost: per step a forward and backward of the model and a forward of the teacher; memory for the teacher, gradients, a copy
        of the weights, and the optimizer's state.

    >>> import copy, torch, twofour
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
    >>> teacher = copy.deepcopy(model)
    >>> report = twofour.prune(model)
    >>> report = twofour.training.distill(model, teacher, [torch.randn(64, 16) for _ in range(8)], steps=60, lr=0.01)
    >>> report.summary["loss after"] < report.summary["loss before"] / 2
    True
    >>> twofour.check(model).summary["holds"]
    True
    """
    distillation = distillation_of(model, teacher, terms)
    budget = Budget(steps, seconds, schedule, warmup)
    budget.require_some(data, accumulate)
    plan = Plan("distill", clip, accumulate, log_every, if_zero=SAME)
    file = None if checkpoint is None else Checkpoint(Path(checkpoint), save_seconds, plan.verb)
    optimizer = optimizer_for(model, optimizer, lr, lr_for(model))
    require_own(optimizer, model, distillation.teacher, plan.verb)
    stream = Stream(data)
    optimizer.zero_grad()
    with ExitStack() as stack:
        masks = stack.enter_context(masked(model, pattern))
        stack.enter_context(training(model, optimizer, train_mode))
        stack.enter_context(distillation)
        peaks = stack.enter_context(rates(optimizer))
        loop = Loop(model, distillation, stream, budget, optimizer, plan, masks)
        settings = {"optimizer": type(optimizer).__name__, "pattern": str(pattern), "train_mode": train_mode}
        loop.go(file, peaks, progress, settings)
    return loop.report()


def distillation_of(
    model: nn.Module, teacher: nn.Module | Distillation, terms: Term | Iterable[Term] | None
) -> Distillation:
    """The one that was given, if it is of this model, or one of the two models."""
    if not isinstance(teacher, Distillation):
        return Distillation(model, teacher, terms)
    if teacher.student is not model:
        raise ModelError("the Distillation is of another student: make one of this model, or pass its teacher.")
    if terms is not None:
        raise ModelError("terms= together with a Distillation, which has its own: give them to one of the two.")
    return teacher


def lr_for(model: nn.Module) -> float:
    """The learning rate of a distillation by default."""
    found = [layer.shape[layer.input_axis] for layer in survey(model, None) if layer.skip is None]
    return LR * min(1.0, LR_WIDTH / sorted(found)[len(found) // 2]) if found else LR
