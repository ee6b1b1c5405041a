"""Recovery in one call: a pruned model learns from the dense one, its zeros stay, and a kill costs a minute."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from ..errors import ModelError, TrainingError, UnsupportedError
from ..nn import SparseLinear
from ..nn.inputs import Batch
from ..pattern import Pattern
from ..report import Column, Report, environment
from .fixed import FixedMasks, keep_masks, masks_of
from .restart import Checkpoint, LastGood, Stream, random_state, set_random_state
from .teacher import Distillation
from .terms import Term, device_of

LR = 1e-3
"""all-MiniLM-L6-v2, 100 steps of 64 texts: the loss of other texts is 0.37 with 1e-4, 0.27 with 3e-4, 0.22 with 1e-3."""
DATA_ENDED = "data ended"
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda left: left,
    "cosine": lambda left: (1 - math.cos(math.pi * left)) / 2,
    "constant": lambda left: 1.0,
}
"""Share of what is left after the warm-up -> factor of the learning rate."""


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
        lr: of AdamW without weight decay, 1e-3 if None (large models want less); not together with `optimizer`.
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
    if isinstance(teacher, Distillation):
        if teacher.student is not model:
            raise ModelError("the Distillation is of another student: make one of this model, or pass its teacher.")
        if terms is not None:
            raise ModelError("terms= together with a Distillation, which has its own: give them to one of the two.")
    distillation = teacher if isinstance(teacher, Distillation) else Distillation(model, teacher, terms)
    budget = _Budget(steps, seconds, schedule, warmup)
    budget.require_some(data, accumulate)
    for name, value, least in (("accumulate", accumulate, 1), ("log_every", log_every, 1)):
        if value < least:
            raise ModelError(f"{name}={value}: at least {least}.")
    if clip is not None and not clip > 0:
        raise ModelError(f"clip={clip}: the largest norm of the gradients must be above 0; None clips nothing.")
    file = None if checkpoint is None else Checkpoint(Path(checkpoint), save_seconds)
    optimizer = _optimizer(model, optimizer, lr)
    _require_own(optimizer, distillation)
    run = _Run(distillation, Stream(data), budget, optimizer, clip, accumulate, log_every)
    optimizer.zero_grad()
    with ExitStack() as stack:
        run.masks = stack.enter_context(_masked(model, pattern))
        stack.enter_context(_training(model, optimizer, train_mode))
        stack.enter_context(distillation)
        peaks = stack.enter_context(_rates(optimizer))
        settings = {"optimizer": type(optimizer).__name__, "pattern": str(pattern), "train_mode": train_mode}
        run.go(file, peaks, progress, settings)
    return run.report()


class _Budget:
    """How long a run lasts, and where in its schedule it is."""

    def __init__(self, steps: int | None, seconds: float | None, schedule: str, warmup: float) -> None:
        if steps is not None and steps < 1:
            raise ModelError(f"steps={steps}: at least 1.")
        if seconds is not None and not (seconds > 0 and math.isfinite(seconds)):
            raise ModelError(f"seconds={seconds}: a number above 0.")
        if schedule not in SCHEDULES:
            raise ModelError(f"schedule={schedule!r}: there are {', '.join(SCHEDULES)}.")
        if not 0 <= warmup < 1:
            raise ModelError(f"warmup={warmup}: a share of the budget, from 0 up to, but not, 1.")
        self.steps, self.seconds, self.schedule, self.warmup = steps, seconds, schedule, warmup

    def require_some(self, data: Any, accumulate: int) -> None:
        if self.steps is not None or self.seconds is not None:
            return
        try:
            self.steps = max(1, len(data) // accumulate)
        except TypeError:
            raise ModelError(
                f"no budget, and a {type(data).__name__} does not say how many batches it has: give steps= or seconds=."
            ) from None

    def why_over(self, step: int, elapsed: float, per_step: float) -> str | None:
        if self.steps is not None and step >= self.steps:
            return "steps"
        if self.seconds is not None and elapsed + per_step > self.seconds:
            return "seconds"
        return None

    def factor(self, step: int, elapsed: float) -> float:
        """Of the learning rate, at the step of that number, counted from 0."""
        at = 0.0
        if self.steps is not None:
            at = (step + 1) / (self.steps + 1)
        if self.seconds is not None:
            at = max(at, min(1.0, elapsed / self.seconds))
        at = max(at, 1e-3)  # the first step of a budget of seconds
        if at < self.warmup:
            return at / self.warmup
        return SCHEDULES[self.schedule]((1 - at) / (1 - self.warmup))

    def settings(self) -> dict[str, Any]:
        return {"steps": self.steps, "seconds": self.seconds, "schedule": self.schedule, "warmup": self.warmup}


class _Run:
    """Steps and what they left behind; `distill` puts it together."""

    masks: FixedMasks | None

    def __init__(
        self,
        distillation: Distillation,
        stream: Stream,
        budget: _Budget,
        optimizer: Optimizer,
        clip: float | None,
        accumulate: int,
        log_every: int,
    ) -> None:
        self._distillation, self._stream, self._budget, self._optimizer = distillation, stream, budget, optimizer
        self._clip, self._accumulate, self._log_every = clip, accumulate, log_every
        self._device = device_of(distillation.student)
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._began = time.monotonic()
        self._step = 0
        self._sums: dict[str, float] = {}
        self._summed = 0
        self._rows: list[dict[str, Any]] = []
        self._before = self._after = math.nan
        self._stopped: str | None = None
        self._resumed: int | None = None
        self._ended: float | None = None

    @property
    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def go(self, file: Checkpoint | None, peaks: list[Any], progress: bool | None, settings: Mapping[str, Any]) -> None:
        """Trains.

        Args:
            peaks: learning rates of the optimizer's groups.
            settings: what a checkpoint must have in common with this run.
        """
        first = self._stream.next(self._device)
        if first is None:
            raise TrainingError("data has no batch: pass at least one.")
        self._before = self._loss_of_first(first)
        self._good = LastGood(self._distillation.student, self._optimizer)
        settings = {
            **settings,
            **self._budget.settings(),
            "clip": self._clip,
            "accumulate": self._accumulate,
            "lr": [float(peak) for peak in peaks],
            "terms": self._distillation.labels,
            "trained": {name: list(tensor.shape) for name, tensor in self._good.of.items()},
        }
        pending: Batch | None = first
        state = None if file is None else file.load(settings)
        if state is not None:
            pending = self._resume(state, first)
            if self._stopped is not None:
                self._ended = state["seconds"]
                return
        from_step, from_second = self._step, self._elapsed
        with tqdm(desc="distill", total=self._budget.steps, initial=self._step, leave=False, unit="step",
                  disable=None if progress is None else not progress) as bar:  # fmt: skip
            while True:
                per_step = (self._elapsed - from_second) / max(1, self._step - from_step)
                self._stopped = self._budget.why_over(self._step, self._elapsed, per_step)
                if self._stopped is not None:
                    break
                place = self._place(pending is not None) if file is not None and file.is_due else None
                if not self._gradients(pending):
                    self._stopped = DATA_ENDED
                    break
                pending = None
                self._good.remember()
                if file is not None and place is not None:  # not before its loss was finite
                    self._save(file, settings, place)
                for group, peak in zip(self._optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * self._budget.factor(self._step, self._elapsed)
                self._optimizer.step()
                self._optimizer.zero_grad()
                self._step += 1
                bar.update()
                if self._step % self._log_every == 0:
                    self._log()
                    bar.set_postfix(loss=f"{self._rows[-1]['loss']:.3g}")
        if not self._step:
            raise TrainingError(
                f"no step was done: seconds={self._budget.seconds} ended before, or data before {self._accumulate} batches."
                " Give more."
            )
        if self._summed:
            self._log()
        self._after = self._distillation.evaluate([first])
        if not (math.isfinite(self._after) and self._good.is_finite()):
            self._give_up(f"after the last step the loss is {self._after:.4g}, or a weight is not finite")
        self._ended = self._elapsed
        if file is not None:
            self._save(file, settings, self._place(False))

    def _loss_of_first(self, batch: Batch) -> float:
        """Finds out whether all fits, before anything is trained."""
        loss = self._distillation.evaluate([batch])
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss of the first batch is {loss} before anything is trained: look for numbers that are not finite in the"
                " batch and in the weights of both models."
            )
        if loss == 0:
            raise ModelError(
                "the loss of the first batch is 0: the model gives what its teacher gives, so there is nothing to learn. Was"
                " the teacher copied after the model had been pruned?"
            )
        return loss

    def _gradients(self, pending: Batch | None) -> bool:
        """The gradients of one step; False where data has ended."""
        sums: dict[str, float] = {}
        for _ in range(self._accumulate):
            batch = pending if pending is not None else self._stream.next(self._device)
            pending = None
            if batch is None:
                self._optimizer.zero_grad()
                return False
            loss, parts = self._distillation.loss(batch)
            values = {"loss": float(loss.detach())} | {label: float(part) for label, part in parts.items()}
            if not math.isfinite(values["loss"]):
                self._give_up(
                    f"the loss of step {self._step + 1} is "
                    + ", ".join(f"{value:.4g} ({label})" for label, value in values.items())
                )
            for label, value in values.items():
                sums[label] = sums.get(label, 0.0) + value / self._accumulate
            with torch.autocast(self._device.type, enabled=False):
                (loss / self._accumulate).backward()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, math.inf if self._clip is None else self._clip)
        if not bool(norm.isfinite()):
            self._give_up(
                f"the norm of all gradients of step {self._step + 1} is {float(norm)}, its loss {sums['loss']:.4g}"
            )
        for label, value in sums.items():
            self._sums[label] = self._sums.get(label, 0.0) + value
        self._summed += 1
        return True

    def _give_up(self, what: str) -> NoReturn:
        self._optimizer.zero_grad()
        self._good.restore()
        raise TrainingError(
            f"{what}. The model has the last weights again whose loss was finite. The batch was number {self._stream.taken} of"
            f" pass {self._stream.epoch + 1} through data: look at it, or train with a smaller lr= or clip=."
        )

    def _log(self) -> None:
        means = {label: value / self._summed for label, value in self._sums.items()}
        rate = max(float(group["lr"]) for group in self._optimizer.param_groups)
        self._rows.append({"step": self._step, "seconds": round(self._elapsed, 3), "lr": rate, **means})
        self._sums, self._summed = {}, 0

    def _place(self, pending: bool) -> dict[str, Any]:
        """Where the run is between two steps, with the buffers, which forwards may change.

        Args:
            pending: a batch was taken and not used.
        """
        stream = self._stream
        return {
            "step": self._step,
            "seconds": self._elapsed,
            "epoch": stream.epoch,
            "taken": stream.taken - pending,
            "epoch_random": stream.random,
            "random": random_state(self._device),
            "sums": dict(self._sums),
            "summed": self._summed,
            "rows": [dict(row) for row in self._rows],
            "before": self._before,
            "after": self._after,
            "stopped": self._stopped,
            "buffers": {name: value.clone() for name, value in self._distillation.student.named_buffers()},
        }

    def _save(self, file: Checkpoint, settings: Mapping[str, Any], place: dict[str, Any]) -> None:
        weights = {**self._good.of, **place.pop("buffers")}
        masks = None if self.masks is None else self.masks.state_dict()
        optimizer = self._optimizer.state_dict()
        file.save({"settings": dict(settings), **place, "weights": weights, "masks": masks, "optimizer": optimizer})

    def _resume(self, state: Mapping[str, Any], first: Batch) -> Batch | None:
        """Takes up the run, and gives the batch that was taken and not used."""
        mine: dict[str, Tensor] = {} if self.masks is None else self.masks.state_dict()["dropped"]
        theirs: dict[str, Tensor] = {} if state["masks"] is None else state["masks"]["dropped"]
        if mine.keys() != theirs.keys() or any(not torch.equal(mine[name], theirs[name]) for name in mine):
            raise ModelError(
                "the checkpoint has other masks than the model: prune the model as it was when the run began."
            )
        self._good.load(state["weights"])
        self._optimizer.load_state_dict(state["optimizer"])
        if state["taken"]:
            self._stream.seek(state["epoch"], state["taken"], state["epoch_random"], self._device)
        set_random_state(state["random"], self._device)
        self._step = self._resumed = state["step"]
        self._began = time.monotonic() - state["seconds"]
        self._sums, self._summed, self._rows = dict(state["sums"]), state["summed"], list(state["rows"])
        self._before, self._after, self._stopped = state["before"], state["after"], state["stopped"]
        return None if state["taken"] else first

    def report(self) -> Report:
        """What happened."""
        columns = [
            Column("step", "step", "count"),
            Column("seconds", "s", "seconds"),
            Column("lr", "learning rate", "error"),
            Column("loss", "loss", "loss"),
            *(Column(label, label, "loss") for label in self._distillation.labels),
        ]
        kept = "none" if self.masks is None else self.masks.report.summary["masks kept"]
        summary = {
            "steps": self._step,
            "seconds": round(self._elapsed if self._ended is None else self._ended, 3),
            "loss before": self._before,
            "loss after": self._after,
            "stopped by": self._stopped,
            "masks kept": kept,
        }
        notes = []
        if self._resumed is not None:
            notes.append(f"Taken up at step {self._resumed} from the checkpoint.")
        if self._stopped == DATA_ENDED:
            notes.append(
                "The data ended before the budget, and with it the run: the learning rate had not fallen to zero."
            )
        return Report("distill", tuple(columns), tuple(self._rows), summary, tuple(notes), environment())


def _optimizer(model: nn.Module, given: Optimizer | None, lr: float | None) -> Optimizer:
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
    lr = LR if lr is None else lr
    if not (lr > 0 and math.isfinite(lr)):
        raise ModelError(f"lr={lr}: a number above 0.")
    fused = all(parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point() for parameter in parameters)
    return torch.optim.AdamW(parameters, lr, weight_decay=0.0, fused=fused)


def _require_own(optimizer: Optimizer, distillation: Distillation) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UnsupportedError(
            "LBFGS asks for the loss many times a step, of which distill knows one: take AdamW or SGD."
        )
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    name = type(optimizer).__name__
    if any(id(parameter) in trained for parameter in distillation.teacher.parameters()):
        raise ModelError(f"the {name} trains the teacher: make it from the parameters of the model alone.")
    if not any(id(parameter) in trained for parameter in distillation.student.parameters()):
        raise ModelError(f"the {name} trains no parameter of the model: make it from model.parameters().")


@contextmanager
def _masked(model: nn.Module, pattern: Pattern | str | None) -> Iterator[FixedMasks | None]:
    """The masks that are kept already, or those of `pattern` for as long as this lasts; None for compressed models."""
    there = masks_of(model)
    if there is not None or pattern is None:
        yield there
        return
    try:
        masks = keep_masks(model, None, pattern)
    except ModelError:
        if not any(isinstance(module, SparseLinear) for module in model.modules()):
            raise
        yield None
        return
    with masks:
        yield masks


@contextmanager
def _training(model: nn.Module, optimizer: Optimizer, train: bool) -> Iterator[None]:
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
def _rates(optimizer: Optimizer) -> Iterator[list[Any]]:
    """The learning rates of its groups, which are there again afterwards."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    try:
        yield peaks
    finally:
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak
