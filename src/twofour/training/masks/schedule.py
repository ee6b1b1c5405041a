"""Schedules: which rule makes a weight sparse, for how many steps, and what comes after."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ...errors import TwofourError

Rule = Literal["dense", "fixed", "sr-ste", "fst", "s-ste"]
RULES: tuple[str, ...] = get_args(Rule)

_DECAY = {"sr-ste": 2e-4, "fst": 2e-4}
_REFRESH = {"sr-ste": 1, "fst": 40, "s-ste": 1}
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Phase:
    """One rule for a number of optimizer steps.

    Args:
        rule: "dense": nothing is masked. "fixed": the masks in force stay, and dropped weights are zero from here on.
            "sr-ste", "fst": the forward pass sees the weights of the best mask by magnitude, all weights get its gradient,
            and those that are dropped decay towards zero. "s-ste": the forward pass sees the soft threshold of the weights,
            scaled; nothing decays.
        steps: optimizer steps; None: all that come (the last phase only).
        decay: lambda of what dropped weights add to their gradient, lambda * w, before the optimizer sees it; None: 2e-4.
            Not for the other rules.
        refresh: steps between two masks; None: 40 for "fst", 1 for the others. The forward pass of "s-ste" follows the
            weights at every step: there it is the steps between two looks at how many places have changed.
        mvue: the weight gradient of Linear layers is the product of the inputs with an unbiased estimate of the output
            gradient that holds 2:4 along tokens (`twofour.training.mvue`).
    Raises:
        TwofourError: a rule, a number of steps, a decay or an interval that does not exist.
    """

    rule: Rule
    steps: int | None = None
    decay: float | None = None
    refresh: int | None = None
    mvue: bool = False

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise TwofourError(f"{self.rule!r} is no rule of sparse training: they are {', '.join(RULES)}.")
        if self.steps is not None and (not isinstance(self.steps, int) or self.steps < 1):
            raise TwofourError(
                f"a phase of {self.steps!r} steps: give a whole number above 0, or None for all that come."
            )
        if self.decay is not None and self.rule not in _DECAY:
            raise TwofourError(f"decay={self.decay} with {self.rule!r}: only {' and '.join(_DECAY)} have one.")
        if self.decay is not None and not (math.isfinite(self.decay) and self.decay >= 0):
            raise TwofourError(f"decay={self.decay}: it must be a number of at least 0.")
        if self.refresh is not None and (not isinstance(self.refresh, int) or self.refresh < 1):
            raise TwofourError(f"refresh={self.refresh!r}: give a number of steps above 0.")
        if self.mvue and self.rule in ("dense", "fixed"):
            raise TwofourError(f"mvue with {self.rule!r}: only {', '.join(_REFRESH)} estimate gradients.")

    @property
    def is_sparse(self) -> bool:
        """True where the forward pass sees sparse weights."""
        return self.rule != "dense"

    @property
    def lasting_decay(self) -> float:
        """The decay in force; 0 where there is none."""
        return self.decay if self.decay is not None else _DECAY.get(self.rule, 0.0)

    @property
    def interval(self) -> int:
        """Steps between two masks."""
        return self.refresh if self.refresh is not None else _REFRESH.get(self.rule, 1)

    def __str__(self) -> str:
        return self.rule if self.steps is None else f"{self.rule}:{self.steps}"


@dataclass(frozen=True)
class Schedule:
    """Phases, one after the other.

    Args:
        phases: all but the last with a number of steps. The last lasts as long as training does.

    >>> schedule = Schedule.parse("dense:10%, s-ste:80%, dense", steps=1000)
    >>> str(schedule), schedule.at(100).rule, schedule.at(5000).rule
    ('dense:100, s-ste:800, dense', 's-ste', 'dense')
    """

    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "phases", tuple(self.phases))
        if not self.phases:
            raise TwofourError("a schedule of no phases: give at least one, as in Schedule.parse('s-ste').")
        for phase in self.phases:
            if not isinstance(phase, Phase):
                raise TwofourError(
                    f"{phase!r} in a schedule: give phases, Phase('s-ste', 800), or one text of them all."
                )
        for phase in self.phases[:-1]:
            if phase.steps is None:
                raise TwofourError(
                    f"phase '{phase}' has no number of steps and others come after it: write '{phase}:1000', or give"
                    " steps= and a share, '83%'."
                )
        if self.phases[0].rule == "fixed":
            raise TwofourError(
                "the first phase is 'fixed', and there is no mask yet to keep: prune the model and use keep_masks, or begin"
                " with another rule."
            )

    @staticmethod
    def parse(text: str | Schedule | Phase | Iterable[Phase], *, steps: int | None = None) -> Schedule:
        """The schedule that `text` describes: rules with steps, or with shares of `steps`, divided by commas.

        Raises:
            TwofourError: a text that is none, or shares without `steps`.
        """
        if isinstance(text, Schedule):
            return text
        if isinstance(text, Phase):
            return Schedule((text,))
        if not isinstance(text, str):
            return Schedule(tuple(text) if isinstance(text, Iterable) else (text,))
        parts = [part.strip() for part in text.split(",")]
        found = Schedule(tuple(_phase(part, text, steps) for part in parts))
        shares = sum(float(part.rpartition(":")[2][:-1]) for part in parts if part.endswith("%"))
        if shares > 100 + _ROUNDING:
            raise TwofourError(
                f"the shares in the schedule '{text}' add up to {shares:g}%: the last of it would not come."
            )
        return found

    def starts(self) -> list[int]:
        """The first step of each phase, counted from 0."""
        found, step = [], 0
        for phase in self.phases:
            found.append(step)
            step += phase.steps or 0
        return found

    def index(self, step: int) -> int:
        """Which phase the step is in; the last one goes on for ever."""
        return max(index for index, start in enumerate(self.starts()) if start <= step)

    def at(self, step: int) -> Phase:
        """The phase of a step, counted from 0."""
        return self.phases[self.index(step)]

    def with_options(self, **options: float | int | bool | None) -> Schedule:
        """The same phases with `decay`, `refresh` or `mvue` of those that have them."""
        found = []
        for phase in self.phases:
            own = {
                name: value
                for name, value in options.items()
                if value is not None and phase.rule in (_DECAY if name == "decay" else _REFRESH)
            }
            found.append(replace(phase, **own))  # type: ignore[arg-type]
        return Schedule(tuple(found))

    def __str__(self) -> str:
        return ", ".join(str(phase) for phase in self.phases)


def _phase(part: str, text: str, steps: int | None) -> Phase:
    rule, colon, amount = (each.strip() for each in part.partition(":"))
    count: int | None = None
    if colon:
        try:
            count = int(amount) if not amount.endswith("%") else _share(float(amount[:-1]), text, steps)
        except (ValueError, OverflowError):
            raise TwofourError(
                f"'{part}' in the schedule '{text}': write rule:steps or rule:share%, as in 's-ste:800' or 's-ste:80%'."
            ) from None
    return Phase(rule, count)  # type: ignore[arg-type]


def _share(percent: float, text: str, steps: int | None) -> int:
    if steps is None:
        raise TwofourError(f"the schedule '{text}' has shares: say of how many steps, Schedule.parse(text, steps=...).")
    count = max(1, round(percent / 100 * steps))
    if percent <= 0 or steps < 1:
        raise ValueError
    return count
