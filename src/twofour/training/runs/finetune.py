"""Fine-tuning in one call: masks that stay or move, held-out data, a page that grows, and a kill costs a minute."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ...errors import ModelError
from ...nn.inputs import Batch, batches
from ...pattern import Pattern
from ...report import Report
from ...report.live import LivePage
from ..distillation.teacher import Distillation
from ..distillation.terms import Term
from ..masks.moving import move_masks
from ..masks.products import Wanted
from ..masks.schedule import Schedule
from .budget import Budget
from .distill import SAME, distillation_of, lr_for
from .loop import Loop, Objective, Plan
from .masking import Phases, masked
from .optimizers import optimizer_for, rates, require_own, training
from .restart import Checkpoint, Stream
from .supervised import Loss, Supervised

_LR = 5e-5
"""Of a loss on labels; what a teacher gives bears more."""
_ROWS = 100
"""Of a report, where the number of steps is known."""


def finetune(
    model: nn.Module,
    data: Iterable[Batch],
    *,
    schedule: Phases | None = None,
    pattern: Pattern | str | None = "2:4",
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    products: Wanted = "auto",
    teacher: nn.Module | Distillation | None = None,
    terms: Term | Iterable[Term] | None = None,
    loss: Loss | None = None,
    validation: Batch | Iterable[Batch] | None = None,
    validate_every: int | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    lr: float | None = None,
    optimizer: Optimizer | None = None,
    lr_schedule: str = "linear",
    warmup: float = 0.05,
    clip: float | None = 1.0,
    accumulate: int = 1,
    train_mode: bool | None = None,
    log_every: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_seconds: float = 60.0,
    settings: Mapping[str, Any] | None = None,
    page: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Report:
    """Trains a model with N:M sparsity: a pruned one whose zeros stay zero, or a dense one whose masks move.

    The loss is the model's own on batches with labels, one of yours, or that against a dense teacher. The model is sparse
    when the run is over. A loss or gradient that is not finite ends it with an error, and the model has the last weights whose
    loss was finite.

    Args:
        model: on any device; trained in place. Pruned, unless there is a schedule.
        data, steps, seconds, optimizer, warmup, clip, accumulate, progress: as in `distill`.
        lr: of AdamW without weight decay; None: with a teacher as in `distill`, else 5e-5.
        schedule: phases of moving masks, as in `move_masks`, also with shares of `steps`: "dense:10%, s-ste:80%, fixed". None
            keeps the zeros that are there.
        pattern: what is masked. None masks nothing.
        include, exclude: shell wildcards over the layers whose masks move. Masks that stay are those of all layers that hold
            the pattern; for others `keep_masks` before the call, which are kept.
        products: how Linear layers multiply while masks move, as in `move_masks`. What "auto" has measured is in the
            checkpoint; "dense" gives the same bits in every run.
        teacher, terms: the dense model, as in `distill`. None: no teacher.
        loss: of the model and a batch; None: what the model returns as `loss`. Not together with a teacher.
        validation: batches that are not learned from. Their loss is taken before, on the way, and at the end.
        validate_every: steps between two looks at them; None: as many as keep it to a tenth of the time.
        lr_schedule: "linear", "cosine" or "constant", from the peak after the warm-up to zero at the end.
        train_mode: run the model in training mode, with dropout. None: with a teacher not, else yes.
        log_every: steps per row of the report; None: a hundredth of `steps`, or 10.
        checkpoint, save_seconds: as in `distill`; with moving masks too.
        settings: more that a checkpoint must have in common with the run: numbers and texts.
        page: an HTML file of the report and its curves, rewritten every few seconds, which loads itself anew until the end.
    Returns:
        Report: rows of step, seconds, lr, loss and its terms, validation_loss where it was taken, flip_rate (moving masks),
        density, tokens_per_second. The summary has the validation loss before (with moving masks: of the model as pruning by
        magnitude would leave it) and after; the page of a run that is not over tells of which step.
    Raises:
        ModelError: nothing to train, keep or move; settings that contradict each other; a checkpoint of other settings.
        TrainingError: no batches, or a loss or gradient that is not finite.
        TwofourError: a schedule that is none.
    Cost: per step a forward and backward, with a teacher its forward too; memory for a copy of the weights, gradients and the
        optimizer's state.

    >>> import torch, twofour
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 1))
    >>> def loss(model, batch):
    ...     return torch.nn.functional.mse_loss(model(batch), batch.sum(1, keepdim=True))
    >>> data = [torch.randn(32, 16) for _ in range(8)]
    >>> report = twofour.training.finetune(
    ...     model, data, loss=loss, schedule="dense:20%, s-ste:60%, fixed", steps=50, lr=0.01, validation=data[0])
    >>> report.summary["phase"], report.summary["validation loss after"] < report.summary["validation loss before"]
    ('fixed', True)
    >>> twofour.check(model).summary["holds"]
    True
    """
    if loss is not None and teacher is not None:
        raise ModelError("loss= together with a teacher, which has losses of its own: give one of the two.")
    if terms is not None and teacher is None:
        raise ModelError("terms= without a teacher to compare with: give one, or leave them out.")
    if schedule is not None and pattern is None:
        raise ModelError("a schedule without a pattern: say which the masks hold.")
    if schedule is None and (include is not None or exclude is not None):
        raise ModelError("include= and exclude= are for moving masks: keep_masks(model, include=...) before the call.")
    distillation = None if teacher is None else distillation_of(model, teacher, terms)
    objective: Objective = Supervised(model, loss) if distillation is None else distillation
    budget = Budget(steps, seconds, lr_schedule, warmup)
    budget.require_some(data, accumulate)
    phases = None if schedule is None else Schedule.parse(schedule, steps=budget.steps)
    if log_every is None:
        log_every = 10 if budget.steps is None else max(1, budget.steps // _ROWS)
    held = [] if validation is None else batches(validation)  # a list: a tuple would be one batch
    plan = Plan(
        "finetune",
        clip,
        accumulate,
        log_every,
        held,
        validate_every,
        detailed=True,
        if_zero=SAME if teacher is not None and phases is None else "",
        page=None if page is None else LivePage(page),
    )
    file = None if checkpoint is None else Checkpoint(Path(checkpoint), save_seconds, plan.verb)
    optimizer = optimizer_for(model, optimizer, lr, _LR if distillation is None else lr_for(model))
    require_own(optimizer, model, None if distillation is None else distillation.teacher, plan.verb)
    stream = Stream(data)
    optimizer.zero_grad()
    train_mode = distillation is None if train_mode is None else train_mode
    with ExitStack() as stack:
        if distillation is not None:
            stack.enter_context(distillation)
        before = None
        if phases is not None and held:
            before = _pruned_loss(model, pattern or "2:4", include, exclude, objective, held)
        masks = stack.enter_context(masked(model, pattern, phases, include, exclude, products))
        stack.enter_context(training(model, optimizer, train_mode))
        peaks = stack.enter_context(rates(optimizer))
        loop = Loop(model, objective, stream, budget, optimizer, plan, masks, before)
        common = {
            "optimizer": type(optimizer).__name__,
            "pattern": str(pattern),
            "masks": "kept" if phases is None else str(phases),
            "products": products,
            "train_mode": train_mode,
        }
        loop.go(file, peaks, progress, {**common, **(settings or {})})
    return loop.report()


def _pruned_loss(
    model: nn.Module,
    pattern: Pattern | str,
    include: Sequence[str] | str | None,
    exclude: Sequence[str] | str | None,
    objective: Objective,
    inputs: list[Batch],
) -> float:
    """The loss of the model as pruning by magnitude would leave it; the model stays as it is."""
    masks = move_masks(model, None, pattern, "sr-ste", include=include, exclude=exclude, products="dense")
    try:
        return objective.evaluate(inputs)
    finally:
        masks.remove()
