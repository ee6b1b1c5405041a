"""The loop of training runs: steps until a budget ends, rows of a report, and a file to go on from."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from ...errors import ModelError, TrainingError, TwofourError
from ...nn.inputs import Batch, real_tokens
from ...report import Column, Report, environment
from ...report.live import LivePage
from ..distillation.terms import device_of
from ..masks.fixed import FixedMasks
from ..masks.moving import MovingMasks
from .budget import Budget
from .masking import density, flip_rate
from .restart import Checkpoint, Interruption, LastGood, Stream, random_state, set_random_state

DATA_ENDED, INTERRUPTED = "data ended", "interrupted"
_VALIDATION_SHARE = 0.1
"""Of the time, where nothing else is asked for."""


class Objective(Protocol):
    """What a run makes smaller."""

    @property
    def labels(self) -> list[str]:
        """The names of its parts."""

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss with its gradient, and its parts."""

    def evaluate(self, inputs: Batch | Iterable[Batch]) -> float:
        """The mean loss over batches, in eval mode and without gradients."""


@dataclass(frozen=True)
class Plan:
    """How steps are made and what is told of them.

    Args:
        verb: of the report, and in the words of errors.
        clip: the largest norm of all gradients together; None clips nothing.
        accumulate: batches per step.
        log_every: steps per row of the report.
        validation: batches that are not learned from.
        validate_every: steps between two looks at them; None: as many as keep it to a tenth of the time.
        detailed: rows tell tokens, density and flips.
        if_zero: the error where the loss is 0 before anything is trained; empty: that is allowed.
        page: is shown the report of every row.
    Raises:
        ModelError: numbers out of range.
    """

    verb: str
    clip: float | None = 1.0
    accumulate: int = 1
    log_every: int = 20
    validation: Sequence[Batch] = ()
    validate_every: int | None = None
    detailed: bool = False
    if_zero: str = ""
    page: LivePage | None = None

    def __post_init__(self) -> None:
        for name in ("accumulate", "log_every", "validate_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ModelError(f"{name}={value}: at least 1.")
        if self.clip is not None and not self.clip > 0:
            raise ModelError(
                f"clip={self.clip}: the largest norm of the gradients must be above 0; None clips nothing."
            )


class Loop:
    """Steps of one run and what they left behind.

    Args:
        model: trained in place, in the mode that it is in.
        stream: its batches.
        optimizer: over parameters of the model.
        masks: in force on the model for as long as the run lasts.
        before: the validation loss that the last one is compared with; None: that of the model as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        stream: Stream,
        budget: Budget,
        optimizer: Optimizer,
        plan: Plan,
        masks: FixedMasks | MovingMasks | None,
        before: float | None = None,
    ) -> None:
        self._model, self._objective, self._stream = model, objective, stream
        self._budget, self._optimizer, self._plan, self._masks = budget, optimizer, plan, masks
        self._device = device_of(model)
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._began = time.monotonic()
        self._step = 0
        self._sums: dict[str, float] = {}
        self._summed = 0
        self._rows: list[dict[str, Any]] = []
        self._before = self._after = math.nan
        self._tokens = self._row_tokens = 0
        self._row_seconds = 0.0
        self._validation_before = before
        self._validation: float | None = None
        self._validated_at, self._validation_seconds = 0.0, 0.0
        self._stopped: str | None = None
        self._resumed: int | None = None
        self._ended: float | None = None
        self._notes: list[str] = []

    @property
    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def go(self, file: Checkpoint | None, peaks: list[Any], progress: bool | None, settings: Mapping[str, Any]) -> None:
        """Trains.

        Args:
            peaks: learning rates of the optimizer's groups.
            settings: what a checkpoint must have in common with this run.
        """
        try:
            self._go(file, peaks, progress, settings)
        except BaseException as error:
            if self._plan.page is not None:
                self._stopped = INTERRUPTED if isinstance(error, KeyboardInterrupt) else type(error).__name__
                with suppress(TwofourError):
                    self._plan.page.show(self.report, running=False)
            raise
        if self._plan.page is not None:
            try:
                self._plan.page.show(self.report, running=False)
            except TwofourError as error:  # the model is worth more
                self._notes.append(str(error))

    def _go(
        self, file: Checkpoint | None, peaks: list[Any], progress: bool | None, settings: Mapping[str, Any]
    ) -> None:
        first = self._stream.next(self._device)
        if first is None:
            raise TrainingError("data has no batch: pass at least one.")
        self._before = self._loss_of_first(first)
        self._good = LastGood(self._model, self._optimizer)
        settings = {
            "verb": self._plan.verb,
            **settings,
            **self._budget.settings(),
            "clip": self._plan.clip,
            "accumulate": self._plan.accumulate,
            "lr": [float(peak) for peak in peaks],
            "terms": self._objective.labels,
            "trained": {name: list(tensor.shape) for name, tensor in self._good.of.items()},
        }
        pending: Batch | None = first
        state = None if file is None else file.load(settings)
        if state is not None:
            pending = self._resume(state, first)
            if self._stopped is not None:
                self._ended = state["seconds"]
                return
        elif self._plan.validation and self._validation_before is None:
            self._validation_before = self._validate()
        from_step, from_second = self._step, self._elapsed
        with Interruption() if file is not None else nullcontext() as interruption, \
             tqdm(desc=self._plan.verb, total=self._budget.steps, initial=self._step, leave=False, unit="step",
                  disable=None if progress is None else not progress) as bar:  # fmt: skip
            while True:
                leaving = interruption is not None and interruption.asked
                per_step = (self._elapsed - from_second) / max(1, self._step - from_step)
                self._stopped = self._budget.why_over(self._step, self._elapsed, per_step)
                if self._stopped is not None:
                    break
                began = time.monotonic()
                place = self._place(pending is not None) if file is not None and (file.is_due or leaving) else None
                if not self._gradients(pending):
                    self._stopped = DATA_ENDED
                    break
                pending = None
                self._good.remember()
                if file is not None and place is not None:  # not before its loss was finite
                    self._save(file, settings, place)
                    if leaving:
                        self._optimizer.zero_grad()
                        raise KeyboardInterrupt(f"after step {self._step}, which the checkpoint {file.path} has")
                for group, peak in zip(self._optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * self._budget.factor(self._step, self._elapsed)
                self._optimizer.step()
                self._optimizer.zero_grad()
                self._step += 1
                self._row_seconds += time.monotonic() - began
                bar.update()
                if self._step % self._plan.log_every == 0 or self._must_validate:
                    self._log()
                    bar.set_postfix(self._words())
        if not self._step:
            raise TrainingError(
                f"no step was done: seconds={self._budget.seconds} ended before, or data before {self._plan.accumulate}"
                " batches. Give more."
            )
        if self._summed:
            self._log()
        self._after = self._objective.evaluate([first])
        if not (math.isfinite(self._after) and self._good.is_finite()):
            self._give_up(f"after the last step the loss is {self._after:.4g}, or a weight is not finite")
        if self._plan.validation and "validation_loss" not in self._rows[-1]:
            self._rows[-1]["validation_loss"] = self._validate()
        self._ended = self._elapsed
        if file is not None:
            self._save(file, settings, self._place(False))

    def _loss_of_first(self, batch: Batch) -> float:
        """Finds out whether all fits, before anything is trained."""
        loss = self._objective.evaluate([batch])
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss of the first batch is {loss} before anything is trained: look for numbers that are not finite in the"
                " batch and in the weights of the model, and of its teacher."
            )
        if loss == 0 and self._plan.if_zero:
            raise ModelError(self._plan.if_zero)
        return loss

    def _gradients(self, pending: Batch | None) -> bool:
        """The gradients of one step; False where data has ended."""
        sums: dict[str, float] = {}
        accumulate, tokens = self._plan.accumulate, 0
        for _ in range(accumulate):
            batch = pending if pending is not None else self._stream.next(self._device)
            pending = None
            if batch is None:
                self._optimizer.zero_grad()
                return False
            loss, parts = self._objective.loss(batch)
            values = {"loss": float(loss.detach())} | {label: float(part) for label, part in parts.items()}
            if not math.isfinite(values["loss"]):
                self._give_up(
                    f"the loss of step {self._step + 1} is "
                    + ", ".join(f"{value:.4g} ({label})" for label, value in values.items())
                )
            for label, value in values.items():
                sums[label] = sums.get(label, 0.0) + value / accumulate
            with torch.autocast(self._device.type, enabled=False):
                (loss / accumulate).backward()
            tokens += _tokens(batch)
        clip = math.inf if self._plan.clip is None else self._plan.clip
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, clip)
        if not bool(norm.isfinite()):
            self._give_up(
                f"the norm of all gradients of step {self._step + 1} is {float(norm)}, its loss {sums['loss']:.4g}"
            )
        for label, value in sums.items():
            self._sums[label] = self._sums.get(label, 0.0) + value
        self._summed += 1
        self._tokens += tokens
        self._row_tokens += tokens
        return True

    def _give_up(self, what: str) -> NoReturn:
        self._optimizer.zero_grad()
        self._good.restore()
        raise TrainingError(
            f"{what}. The model has the last weights again whose loss was finite. The batch was number {self._stream.taken} of"
            f" pass {self._stream.epoch + 1} through data: look at it, or train with a smaller lr= or clip=."
        )

    @property
    def _must_validate(self) -> bool:
        every = self._plan.validate_every
        return bool(self._plan.validation) and every is not None and self._step % every == 0

    def _validate(self) -> float:
        began = self._elapsed
        loss = self._objective.evaluate(list(self._plan.validation))
        self._validated_at, self._validation_seconds = self._elapsed, self._elapsed - began
        self._validation = loss
        return loss

    def _log(self) -> None:
        means = {label: value / self._summed for label, value in self._sums.items()}
        rate = max(float(group["lr"]) for group in self._optimizer.param_groups)
        row = {"step": self._step, "seconds": round(self._elapsed, 3), "lr": rate, **means}
        rested = self._elapsed - self._validated_at
        adapts = self._plan.validate_every is None and rested * _VALIDATION_SHARE >= self._validation_seconds
        if self._plan.validation and (self._must_validate or adapts):
            row["validation_loss"] = self._validate()
        if self._plan.detailed:
            row["tokens_per_second"] = round(self._row_tokens / max(self._row_seconds, 1e-9))
            if self._masks is not None:
                row["density"] = density(self._masks)
            flips = flip_rate(self._masks)
            if flips is not None:
                row["flip_rate"] = flips
        self._rows.append(row)
        self._sums, self._summed = {}, 0
        self._row_tokens, self._row_seconds = 0, 0.0
        if self._plan.page is not None:
            self._plan.page.show(self.report)

    def _words(self) -> dict[str, str]:
        """For the bar: the last row, and what is left where steps do not tell."""
        row = self._rows[-1]
        words = {"loss": f"{row['loss']:.3g}"}
        if self._validation is not None:
            words["validation"] = f"{self._validation:.3g}"
        if "tokens_per_second" in row:
            words["tokens/s"] = f"{row['tokens_per_second']:,}"
        if self._budget.steps is None and self._budget.seconds is not None:
            words["left"] = tqdm.format_interval(max(0.0, self._budget.seconds - self._elapsed))
        return words

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
            "tokens": [self._tokens, self._row_tokens],
            "row_seconds": self._row_seconds,
            "validation": [self._validation_before, self._validation],
            "stopped": self._stopped,
            "buffers": {name: value.clone() for name, value in self._model.named_buffers()},
        }

    def _save(self, file: Checkpoint, settings: Mapping[str, Any], place: dict[str, Any]) -> None:
        weights = {**self._good.of, **place.pop("buffers")}
        masks = None if self._masks is None else self._masks.state_dict()
        optimizer = self._optimizer.state_dict()
        file.save({"settings": dict(settings), **place, "weights": weights, "masks": masks, "optimizer": optimizer})

    def _resume(self, state: Mapping[str, Any], first: Batch) -> Batch | None:
        """Takes up the run, and gives the batch that was taken and not used."""
        if not isinstance(self._masks, MovingMasks):
            mine: dict[str, Tensor] = {} if self._masks is None else self._masks.state_dict()["dropped"]
            theirs: dict[str, Tensor] = {} if state["masks"] is None else state["masks"]["dropped"]
            if mine.keys() != theirs.keys() or any(not torch.equal(mine[name], theirs[name]) for name in mine):
                raise ModelError(
                    "the checkpoint has other masks than the model: prune the model as it was when the run began."
                )
        self._good.load(state["weights"])
        if isinstance(self._masks, MovingMasks):
            self._masks.refresh()  # a 'fixed' phase would zero what the masks of the old weights drop
            self._masks.load_state_dict(state["masks"])
        self._optimizer.load_state_dict(state["optimizer"])
        if state["taken"]:
            self._stream.seek(state["epoch"], state["taken"], state["epoch_random"], self._device)
        set_random_state(state["random"], self._device)
        self._step = self._resumed = state["step"]
        self._began = time.monotonic() - state["seconds"]
        self._sums, self._summed, self._rows = dict(state["sums"]), state["summed"], list(state["rows"])
        self._before, self._after, self._stopped = state["before"], state["after"], state["stopped"]
        (self._tokens, self._row_tokens), self._row_seconds = state["tokens"], state["row_seconds"]
        self._validation_before, self._validation = state["validation"]
        return None if state["taken"] else first

    def report(self) -> Report:
        """What happened so far."""
        columns = [
            Column("step", "step", "count"),
            Column("seconds", "s", "seconds"),
            Column("lr", "learning rate", "error"),
            Column("loss", "loss", "loss"),
            *(Column(label, label, "loss") for label in self._objective.labels),
        ]
        seconds = self._elapsed if self._ended is None else self._ended
        summary: dict[str, Any] = {"steps": self._step, "seconds": round(seconds, 3)}
        if self._plan.validation:
            columns.append(Column("validation_loss", "validation loss", "loss"))
            at = next((row["step"] for row in reversed(self._rows) if "validation_loss" in row), None)
            summary["validation loss before"] = self._validation_before
            if at is not None:
                name = f"at step {at:,}" if self._ended is None else "after"
                summary[f"validation loss {name}"] = self._validation
        else:
            summary["loss before"] = self._before
            if self._ended is not None:
                summary["loss after"] = self._after
        if self._stopped is not None:
            summary["stopped by"] = self._stopped
        summary = {name: value for name, value in summary.items() if value is not None}
        if isinstance(self._masks, MovingMasks):
            about = self._masks.report.summary
            summary |= {key: about[key] for key in ("pattern", "schedule", "phase", "layers made sparse")}
        else:
            summary["masks kept"] = "none" if self._masks is None else self._masks.report.summary["masks kept"]
        if self._plan.detailed:
            columns += [
                Column("flip_rate", "flip rate", "error"),
                Column("density", "density", "share"),
                Column("tokens_per_second", "tokens/s", "count"),
            ]
            summary["tokens"] = self._tokens
        notes = list(self._notes)
        if self._resumed is not None:
            notes.append(f"Taken up at step {self._resumed} from the checkpoint.")
        if self._stopped == DATA_ENDED:
            notes.append(
                "The data ended before the budget, and with it the run: the learning rate had not fallen to zero."
            )
        return Report(self._plan.verb, tuple(columns), tuple(self._rows), summary, tuple(notes), environment())


def _tokens(batch: Batch) -> int:
    """Of a batch: what its attention masks count; else the numbers of its first tensor, or its rows where they are features."""
    real = real_tokens(batch)
    if real:
        return sum(int(mask.sum()) for mask in real.values())
    first = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)), None)
    if first is None:
        return 0
    return first[..., 0].numel() if first.is_floating_point() and first.ndim and first.shape[-1] else first.numel()
