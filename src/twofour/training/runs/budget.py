"""How long a training run lasts, and what its learning rate is on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ...errors import ModelError

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda left: left,
    "cosine": lambda left: (1 - math.cos(math.pi * left)) / 2,
    "constant": lambda left: 1.0,
}
"""Share of what is left after the warm-up -> factor of the learning rate."""


class Budget:
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
        """One pass over `data` where there is no budget. Raises ModelError where its length is not known."""
        if self.steps is not None or self.seconds is not None:
            return
        try:
            self.steps = max(1, len(data) // accumulate)
        except TypeError:
            raise ModelError(
                f"no budget, and a {type(data).__name__} does not say how many batches it has: give steps= or seconds=."
            ) from None

    def why_over(self, step: int, elapsed: float, per_step: float) -> str | None:
        """What has ended the run; None where there is time for another step."""
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
        """What a checkpoint must have in common."""
        return {"steps": self.steps, "seconds": self.seconds, "schedule": self.schedule, "warmup": self.warmup}
