"""What an N:M pattern would take from activations: of a tensor, and of a model while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...errors import CalibrationError, ShapeError, UnsupportedError
from ...masks import keep_best
from ...nn.survey import names_of
from ...pattern import Pattern
from ...report import Column, Report, environment
from .sparsify import choose_modules, is_squared_relu, squared_relus
from .squared_relu import require_of_tokens, squared_relu


@dataclass(frozen=True, slots=True)
class ActivationSparsity:
    """Counts and squared norms of activations; those of several batches add up.

    Args:
        numbers: how many activations.
        nonzero: how many of them are not zero.
        dropped: how many of those the pattern drops.
        groups: how many groups.
        crowded: how many groups have more than `keep` non-zeros.
        energy: the sum of all squares.
        lost: the sum of the squares of what is dropped.
    """

    numbers: int = 0
    nonzero: int = 0
    dropped: int = 0
    groups: int = 0
    crowded: int = 0
    energy: float = 0.0
    lost: float = 0.0

    @property
    def share_zero(self) -> float:
        """Of all numbers, those that are zero before anything is dropped."""
        return _share(self.numbers - self.nonzero, self.numbers)

    @property
    def share_crowded(self) -> float:
        """Of all groups, those with more than `keep` non-zeros: they lose something."""
        return _share(self.crowded, self.groups)

    @property
    def share_dropped(self) -> float:
        """Of all non-zeros, those that are dropped."""
        return _share(self.dropped, self.nonzero)

    @property
    def share_lost(self) -> float:
        """Of the squared norm, what is dropped."""
        return _share(self.lost, self.energy)

    def __add__(self, other: ActivationSparsity) -> ActivationSparsity:
        return ActivationSparsity(
            *(getattr(self, name) + getattr(other, name) for name in ActivationSparsity.__slots__)
        )


def activation_sparsity(y: Tensor, pattern: Pattern | str = "2:4") -> ActivationSparsity:
    """What keeping the `keep` largest magnitudes of each group would take from activations `y`.

    Args:
        y: [..., features] floating point, dense, as `squared_relu(x)` gives them.
        pattern: as in `squared_relu`.
    Raises:
        ShapeError: no whole groups along the last axis.
        PatternError: "2:4x4" and "2:4t".
        UnsupportedError: not floating point.
        CalibrationError: NaN or infinities, of which there are no shares.
    Cost: about ten passes, some in float64.

    >>> found = activation_sparsity(torch.tensor([3., 0., 4., 5., 0., 1., 0., 0.]))
    >>> found.share_zero, found.share_crowded, found.share_dropped, round(found.share_lost, 3)
    (0.5, 0.5, 0.25, 0.176)
    """
    parsed = require_of_tokens(pattern)
    assert parsed is not None
    if not y.dtype.is_floating_point:
        raise UnsupportedError(f"y is {y.dtype}: activations are floating point. Pass y.float().")
    if y.ndim == 0 or y.shape[-1] % parsed.group:
        raise ShapeError(
            f"y is {list(y.shape)}: its last axis is not a multiple of {parsed.group}, so it has no whole {parsed} groups."
        )
    y = y.detach()
    if not y.numel():
        return ActivationSparsity()
    rows = y.reshape(-1, y.shape[-1])
    rows = rows if rows.dtype.itemsize > 2 else rows.float()
    if not bool(rows.isfinite().all()):
        raise CalibrationError(
            "y holds NaN or infinities, of which there are no shares: find out where they come from."
        )
    nonzero = rows != 0
    counts = nonzero.unflatten(-1, (-1, parsed.group)).sum(-1)
    dropped = torch.where(keep_best(rows, parsed) == 0, rows, 0)
    return ActivationSparsity(
        numbers=rows.numel(),
        nonzero=int(nonzero.sum()),
        dropped=int((dropped != 0).sum()),
        groups=counts.numel(),
        crowded=int((counts > parsed.keep).sum()),
        energy=float(rows.double().square().sum()),
        lost=float(dropped.double().square().sum()),
    )


def observe_activations(
    model: nn.Module,
    pattern: Pattern | str = "2:4",
    *,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
) -> ActivationObserver:
    """Watches what `pattern` would take from the squared ReLUs of `model` while it runs, which changes nothing.

    Of those that are sparse already it watches what they would give dense. Run it over some batches before you switch.
    Normal numbers are what to compare with: half of their squared ReLU is zero, 31 % of the groups are crowded, and 2:4
    takes 1 % of the squared norm.

    Args:
        model: not compiled by torch.compile, which leaves out hooks of later.
        pattern: as in `squared_relu`.
        include, exclude: shell wildcards over module names. `include` may name any other module: its output is watched.
    Returns:
        A context manager that stops at its end; `report` at any time.
    Raises:
        ModelError: no squared ReLU, or a wildcard that matches nothing.
        PatternError: "2:4x4" and "2:4t".
    Cost: with each call that of `activation_sparsity`.

    >>> from twofour.training import SquaredReLU
    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch...
    >>> model = nn.Sequential(nn.Linear(8, 64), SquaredReLU(), nn.Linear(64, 8))
    >>> with observe_activations(model) as observer:
    ...     y = model(torch.randn(100, 8))
    >>> [row["layer"] for row in observer.report.rows], 0.002 < observer.report.summary["lost"] < 0.05
    (['1'], True)
    """
    return ActivationObserver(model, pattern, include, exclude)


class ActivationObserver:
    """Watches activations; made by `observe_activations`. A context manager that stops at its end."""

    def __init__(
        self,
        model: nn.Module,
        pattern: Pattern | str,
        include: Sequence[str] | str | None,
        exclude: Sequence[str] | str | None,
    ) -> None:
        parsed = require_of_tokens(Pattern.parse(pattern))
        assert parsed is not None
        self.pattern = parsed
        modules = names_of(model) if include and isinstance(model, nn.Module) else squared_relus(model)
        chosen = choose_modules(modules, include, exclude, "module" if include else "squared ReLU")
        self._watched = [_Watched(name or "(model)", module, parsed) for name, module, wanted in chosen if wanted]

    @property
    def found(self) -> dict[str, ActivationSparsity]:
        """Layer name -> what was seen of it so far."""
        return {each.name: each.seen for each in self._watched}

    @property
    def report(self) -> Report:
        """What the pattern would have taken so far.

        Rows: layer, kind, calls, zeros, crowded, dropped, lost (the shares of `ActivationSparsity`), reason (why calls are
        left out). Summary: pattern, activations, and lost, the share of the squared norm of all of them.

        Raises:
            CalibrationError: nothing ran.
        """
        if not any(each.calls for each in self._watched):
            raise CalibrationError(
                f"none of the {len(self._watched)} activations ran while they were watched. Call the model itself, as it was"
                " before torch.compile, after observe_activations and before remove()."
            )
        total = sum((each.seen for each in self._watched), ActivationSparsity())
        columns = (
            Column("layer", "layer"),
            Column("kind", "kind"),
            Column("calls", "calls", "count"),
            Column("zeros", "zeros", "share"),
            Column("crowded", "crowded groups", "share"),
            Column("dropped", "non-zeros dropped", "share"),
            Column("lost", "squared norm lost", "share"),
            Column("reason", "left out"),
        )
        summary = {
            "pattern": str(self.pattern),
            "activations": sum(each.seen.numbers > 0 for each in self._watched),
            "lost": total.share_lost,
        }
        rows = tuple(each.row() for each in self._watched)
        return Report("observe_activations", columns, rows, summary, (), environment())

    def remove(self) -> None:
        """Stops watching; what was seen stays."""
        for each in self._watched:
            each.handle.remove()

    def __enter__(self) -> ActivationObserver:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class _Watched:
    """One module, and what was seen of it."""

    def __init__(self, name: str, module: nn.Module, pattern: Pattern) -> None:
        self.name = name
        self.kind = type(module).__name__
        self.pattern = pattern
        self.seen = ActivationSparsity()
        self.calls = 0
        self.left_out: dict[str, int] = {}
        self._of_input = is_squared_relu(module)
        self.handle: RemovableHandle = module.register_forward_hook(self._look, with_kwargs=True)

    def row(self) -> dict[str, Any]:
        seen = self.seen
        row: dict[str, Any] = {"layer": self.name, "kind": self.kind, "calls": self.calls}
        if seen.numbers:
            row.update(
                zeros=seen.share_zero, crowded=seen.share_crowded, dropped=seen.share_dropped, lost=seen.share_lost
            )
        if self.left_out:
            row["reason"] = " ".join(f"{count} of {self.calls}: {why}" for why, count in self.left_out.items())
        return row

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.calls += 1
        y = output
        try:
            with torch.no_grad():
                if self._of_input:
                    y = squared_relu((*args, *kwargs.values())[0])
                if not isinstance(y, Tensor):
                    raise UnsupportedError(f"its output is a {type(y).__name__}, not a tensor.")
                self.seen += activation_sparsity(y, self.pattern)
        except (ShapeError, UnsupportedError, CalibrationError) as error:  # the run is not ours to stop
            self.left_out[str(error)] = self.left_out.get(str(error), 0) + 1


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
