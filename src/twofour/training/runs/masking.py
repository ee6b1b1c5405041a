"""The masks of one training run, kept or moved: what loops and the callbacks of trainers have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ...errors import ModelError, TrainingError
from ...nn import SparseLinear
from ...pattern import Pattern
from ..masks.distributed import is_sharded
from ..masks.fixed import FixedMasks, keep_masks, masks_of
from ..masks.moving import MovingMasks, move_masks
from ..masks.products import Wanted
from ..masks.schedule import Phase, Schedule
from .restart import digest

Phases = Schedule | Phase | Iterable[Phase] | str
"""What `Schedule.parse` reads."""


def density(masks: FixedMasks | MovingMasks) -> float:
    """The share of the masked weights that is kept; 1 in a dense phase. Looks at no mask."""
    if isinstance(masks, MovingMasks):
        return masks.pattern.density if masks.phase.is_sparse else 1.0
    kept = masks.report.where(action="kept")
    survivors: float = sum(row["density"] * row["weights"] for row in kept)
    weights: int = sum(row["weights"] for row in kept)
    return survivors / weights


def flip_rate(masks: FixedMasks | MovingMasks | None) -> float | None:
    """The flip rate of masks that move now; None where they do not."""
    if not isinstance(masks, MovingMasks) or masks.phase.rule in ("dense", "fixed"):
        return None
    return masks.flip_rate


@contextmanager
def masked(
    model: nn.Module,
    pattern: Pattern | str | None,
    schedule: Schedule | None = None,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    products: Wanted = "auto",
) -> Iterator[FixedMasks | MovingMasks | None]:
    """Masks for as long as this lasts: moved by `schedule`, or those that are kept already, or those of `pattern`.

    None for compressed models, and where `pattern` is None.
    """
    if schedule is not None:
        moving = move_masks(
            model, None, pattern or "2:4", schedule, include=include, exclude=exclude, products=products
        )
        with moving:
            yield moving
        return
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


class Masking:
    """Keeps or moves the masks of a model between `start` and `finish`, for a trainer that calls from outside.

    Args:
        pattern, include, exclude: as in `keep_masks` and `move_masks`.
        schedule: phases of moving masks, as in `move_masks`, also with shares of the trainer's steps ("s-ste:80%, fixed");
            None keeps the zeros that are there.
        products: as in `move_masks`.
    Raises:
        TwofourError: a pattern or a schedule that is none.
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
        self.pattern = Pattern.parse(pattern)
        self.schedule = (
            tuple(schedule) if isinstance(schedule, Iterable) and not isinstance(schedule, str) else schedule
        )
        if self.schedule is not None:
            Schedule.parse(self.schedule, steps=1000)  # what is wrong with it is said before training
        self.include, self.exclude, self.products = include, exclude, products
        self.masks: FixedMasks | MovingMasks | None = None
        self._model: nn.Module | None = None
        self._optimizers: list[Optimizer] = []

    @property
    def phases(self) -> int:
        """How many phases the schedule has; 1 without one."""
        return 1 if self.schedule is None else len(Schedule.parse(self.schedule, steps=1000).phases)

    def start(
        self,
        model: nn.Module,
        optimizers: Iterable[Optimizer] = (),
        steps: int | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """From here on masks are kept or moved. What an interrupted run has left on the model is let go of first.

        Args:
            optimizers: at least one of them must train the weights, if there are any.
            steps: of the whole run, for schedules with shares.
            state: of an earlier run's `state_dict`, to go on from; model and optimizers must be loaded already.
        Raises:
            ModelError: as `keep_masks` and `move_masks`; a state of another kind, schedule or model.
            TrainingError: a state that was written after the masks were finished, or with other weights.
        """
        self.let_go()
        optimizers = [getattr(each, "optimizer", each) for each in optimizers]  # out of accelerate's wrapper
        if self.schedule is None:
            self.masks = keep_masks(model, None, self.pattern, include=self.include, exclude=self.exclude)
        else:
            schedule = Schedule.parse(self.schedule, steps=steps)
            self.masks = move_masks(
                model, None, self.pattern, schedule, include=self.include, exclude=self.exclude, products=self.products
            )
        self._model, self._optimizers = model, optimizers
        try:
            if state is not None:
                self._load(state)
            self._adopt()
        except BaseException:
            self.let_go()
            raise

    def figures(self) -> dict[str, float]:
        """For logs: the density, and where masks move the flip rate."""
        if self.masks is None:
            return {}
        flips = flip_rate(self.masks)
        return {"density": density(self.masks)} | ({} if flips is None else {"flip_rate": flips})

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides weights, optimizer and random state: tensors, numbers and texts.

        Cost: one pass over all weights, which it notes a checksum of.
        """
        if self.masks is None:
            return {"finished": True}
        return {"kind": self._kind, "masks": self.masks.state_dict(), "digest": self._digest()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the masks of a checkpoint whose weights the model has already, while masks are in force.

        Raises: as `start` does.
        """
        self._load(state)
        self._adopt()

    def finish(self) -> None:
        """The end of training: sparse weights are in the model, and masks are let go of."""
        if isinstance(self.masks, MovingMasks):
            self.masks.finish()
        self.let_go()

    def let_go(self) -> None:
        """Nothing is masked any more; weights stay as they are."""
        if self.masks is not None:
            self.masks.remove()
        self.masks, self._model, self._optimizers = None, None, []

    @property
    def _kind(self) -> str:
        return "fixed" if self.schedule is None else "moving"

    def _load(self, state: Mapping[str, Any]) -> None:
        assert self.masks is not None
        if state.get("finished"):
            raise TrainingError(
                "the checkpoint was written after its masks were finished, and they cannot go on moving: resume from an"
                " earlier one, or keep the masks that are there, with schedule=None."
            )
        if state["kind"] != self._kind:
            raise ModelError(
                f"the checkpoint has {state['kind']} masks, this run {self._kind} ones: give it"
                f" {'no schedule' if state['kind'] == 'fixed' else 'the schedule that it had'}."
            )
        if state["digest"] is not None and self._digest() != state["digest"]:
            raise TrainingError(
                "the masks of the checkpoint belong to other weights than the model has: load the weights that were saved with"
                " them, in the dtype that they were saved in."
            )
        self.masks.load_state_dict(state["masks"])

    def _adopt(self) -> None:
        """Tells the optimizers that train masked weights; raises what the first said where none does."""
        assert self.masks is not None
        refusals = []
        for optimizer in self._optimizers:
            try:
                self.masks.adopt(optimizer)
            except ModelError as error:
                refusals.append(error)
        if refusals and len(refusals) == len(self._optimizers):
            raise refusals[0]

    def _digest(self) -> int | None:
        """Of the model; None where its parameters are spread over processes."""
        assert self._model is not None
        return None if is_sharded(self._model) else digest(self._model)
