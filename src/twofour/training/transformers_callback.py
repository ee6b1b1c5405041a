"""Masks for `transformers.Trainer`: one callback, and everything else as it was."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError, TrainingError, UnsupportedError
from ..pattern import Pattern
from .masks.products import Wanted
from .runs.masking import Masking, Phases
from .runs.restart import write_state

try:
    from transformers import TrainerCallback
except ImportError:  # said where one is made
    TrainerCallback = object  # type: ignore[assignment, misc]

FILE = "twofour_masks.pt"
"""Beside the weights in each checkpoint folder of the trainer."""


class MasksCallback(TrainerCallback):
    """Keeps the zeros of a pruned model while a `transformers.Trainer` trains it, or moves its masks by a schedule.

    Masks begin when training does and end with it: then the model holds the pattern, and `trainer.save_model()` saves it so.
    Checkpoints of moving masks hold the weights that learn, dense. Beside them lies `twofour_masks.pt`, with which
    `trainer.train(resume_from_checkpoint=...)` goes on as if it had not stopped. Logs of the loss have `density` and
    `flip_rate` too; reporting integrations come before callbacks and see them where this one is put first, by
    `trainer.callback_handler.callbacks.insert(0, callback)` instead of `callbacks=`.

    Args:
        pattern, include, exclude: as in `twofour.training.keep_masks` and `move_masks`.
        schedule: phases of moving masks, also with shares of the trainer's steps: "dense:10%, s-ste:80%, fixed". None keeps
            the zeros that are there.
        products: how Linear layers multiply while masks move, as in `move_masks`; "dense" gives the same bits in every run.
        resume_from: the checkpoint folder that training goes on from, where it is not in the trainer's `output_dir`.
    Raises:
        UnsupportedError: transformers is not installed.
        TwofourError: a pattern or schedule that is none.
        ModelError, TrainingError (from `trainer.train()`): nothing to keep or move; a checkpoint without masks, or with
            those of other weights; `load_best_model_at_end` with several phases.

    >>> import torch, twofour
    >>> from twofour.training.transformers_callback import MasksCallback
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    >>> report = twofour.prune(model)
    >>> callback = MasksCallback()  # Trainer(model, args, ..., callbacks=[callback])
    """

    def __init__(
        self,
        pattern: Pattern | str = "2:4",
        schedule: Phases | None = None,
        *,
        include: Sequence[str] | str | None = None,
        exclude: Sequence[str] | str | None = None,
        products: Wanted = "auto",
        resume_from: str | os.PathLike[str] | None = None,
    ) -> None:
        if TrainerCallback is object:
            raise UnsupportedError(
                "a callback for transformers needs transformers: pip install 'twofour[transformers]'."
            )
        self.masking = Masking(pattern, schedule, include=include, exclude=exclude, products=products)
        self._resume_from = None if resume_from is None else Path(resume_from)

    def remove(self) -> None:
        """Lets go of the masks, with the weights as they are: after a training that an error has ended."""
        self.masking.let_go()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.load_best_model_at_end and self.masking.phases > 1:
            raise ModelError(
                f"load_best_model_at_end with {self.masking.phases} phases: the best weights may be of an earlier phase, and"
                " dense. Leave it off, or give a schedule of one rule."
            )
        found = None
        if state.global_step:
            found = _read(self._checkpoint(args, state.global_step) / FILE)
        self.masking.start(kwargs["model"], [kwargs["optimizer"]], state.max_steps, found)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        found = self.masking.figures()
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.masking.masks is None or state.is_hyper_param_search:  # no trial is resumed
            return
        found = self.masking.state_dict()
        if args.should_save:
            write_state(Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE, found)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.masking.load_state_dict(_read(Path(state.best_model_checkpoint) / FILE))
        self.masking.finish()

    def _checkpoint(self, args: Any, step: int) -> Path:
        if self._resume_from is not None:
            return self._resume_from
        if isinstance(args.resume_from_checkpoint, str) and Path(args.resume_from_checkpoint).is_dir():
            return Path(args.resume_from_checkpoint)
        return Path(args.output_dir) / f"checkpoint-{step}"


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise TrainingError(
            f"there is no {path}, so the masks cannot go on from there. Resume from a checkpoint that has the file, or name"
            " the checkpoint's folder with resume_from=."
        )
    try:
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        found.keys()
    except Exception as error:
        raise TrainingError(
            f"{path} holds no masks ({type(error).__name__}): resume from another checkpoint."
        ) from error
    return found
