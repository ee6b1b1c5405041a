"""Masks for Lightning's `Trainer`: one callback, and everything else as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from ..errors import UnsupportedError
from ..pattern import Pattern
from .masks.products import Wanted
from .runs.masking import Masking, Phases

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:  # said where one is made
    Callback = object


class MasksCallback(Callback):  # type: ignore[misc]
    """Keeps the zeros of a pruned model while Lightning's `Trainer` trains it, or moves its masks by a schedule.

    Masks begin when training does and end with it: then the model holds the pattern. Checkpoints of moving masks hold the
    weights that learn, dense; the state of the masks is in the same file, and `trainer.fit(ckpt_path=...)` goes on as if it
    had not stopped. `density` and `flip_rate` are logged. An exception lets go of the masks, with the weights as they are.

    Args:
        pattern, include, exclude: as in `twofour.training.keep_masks` and `move_masks`; names are those of the
            LightningModule.
        schedule: phases of moving masks, also with shares of the trainer's steps: "dense:10%, s-ste:80%, fixed". None keeps
            the zeros that are there.
        products: how Linear layers multiply while masks move, as in `move_masks`; "dense" gives the same bits in every run.
    Raises:
        UnsupportedError: lightning is not installed.
        TwofourError: a pattern or schedule that is none.
        ModelError, TrainingError (from `trainer.fit()`): nothing to keep or move; a checkpoint with masks of another kind,
            schedule or model.
    """

    def __init__(
        self,
        pattern: Pattern | str = "2:4",
        schedule: Phases | None = None,
        *,
        include: Sequence[str] | str | None = None,
        exclude: Sequence[str] | str | None = None,
        products: Wanted = "auto",
    ) -> None:
        if Callback is object:
            raise UnsupportedError("a callback for Lightning needs lightning: pip install 'twofour[lightning]'.")
        self.masking = Masking(pattern, schedule, include=include, exclude=exclude, products=products)
        self._resumed: dict[str, Any] | None = None
        """Of the checkpoint that is gone on from: Lightning loads it before there are masks."""
        self._interrupted: dict[str, Any] | None = None
        """Of masks that an exception has ended, for checkpoints that are written after it."""

    def state_dict(self) -> dict[str, Any]:
        return self._interrupted or self.masking.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._resumed = deepcopy(dict(state_dict))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        steps = trainer.estimated_stepping_batches
        state, self._resumed, self._interrupted = self._resumed, None, None
        self.masking.start(pl_module, trainer.optimizers, int(steps) if 0 < steps < float("inf") else None, state)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        every = trainer.log_every_n_steps
        if every and trainer.global_step % every == 0:
            pl_module.log_dict(self.masking.figures())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.masking.finish()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self.masking.masks is not None:
            self._interrupted = self.masking.state_dict()
        self.masking.let_go()
