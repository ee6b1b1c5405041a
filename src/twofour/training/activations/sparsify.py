"""The squared ReLUs of a model: found, and switched between dense and 2:4 all at once."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ...errors import ModelError
from ...nn.survey import _wildcards, names_of
from ...nn.swap import replace_module
from ...pattern import Pattern
from ...report import Column, Report, environment
from .squared_relu import SquaredReLU, require_of_tokens

_OF_TRANSFORMERS = "transformers.activations.ReLUSquaredActivation"


def sparsify_activations(
    model: nn.Module,
    pattern: Pattern | str | None = "2:4",
    *,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
) -> Report:
    """Every squared ReLU of `model` keeps the best of each group from here on, or with None everything again. In place.

    What it finds are modules: `SquaredReLU`, whose pattern is set, and the ReLUSquaredActivation of transformers (hidden_act
    "relu2"), whose place a `SquaredReLU` takes. Names and state dicts stay as they are, and optimizers know nothing of
    it, so that it may be called between two steps: train dense for a while, then sparse. A function that a forward calls
    is not seen: call `squared_relu` there.

    Args:
        pattern: "2:4" or another KEEP:GROUP of `squared_relu`; None for dense.
        include, exclude: shell wildcards over module names.
    Returns:
        Report with a row per squared ReLU: layer, kind, action ("set", "replaced" or "left"), pattern, reason.
    Raises:
        ModelError: no squared ReLU, or a wildcard that matches none; the model itself is one of transformers.
        PatternError: "2:4x4" and "2:4t". Nothing has changed then.

    >>> model = nn.Sequential(nn.Linear(8, 16), SquaredReLU(), nn.Linear(16, 8))
    >>> report = sparsify_activations(model)
    >>> model[1]
    SquaredReLU(pattern='2:4')
    """
    wanted = require_of_tokens(pattern)
    found = choose_modules(squared_relus(model), include, exclude, "squared ReLU")
    if wanted is not None and is_of_transformers(model):
        raise ModelError(
            f"the model is a {type(model).__name__} itself, which cannot be replaced in place: use SquaredReLU('{wanted}')."
        )
    rows: list[dict[str, Any]] = []
    for name, module, chosen in found:
        row: dict[str, Any] = {"layer": name or "(model)", "kind": type(module).__name__, "action": "left"}
        rows.append(row)
        if isinstance(module, SquaredReLU):
            if chosen:
                module.pattern = wanted
                row["action"] = "set"
            row["pattern"] = _text(module.pattern)
        elif chosen and wanted is not None:
            replace_module(model, module, SquaredReLU(wanted))
            row.update(action="replaced", pattern=_text(wanted))
        else:
            row["pattern"] = _text(None)
        if row["action"] == "left":
            row["reason"] = "dense already" if chosen else "excluded, or not included"
    columns = (
        Column("layer", "layer"),
        Column("kind", "kind"),
        Column("action", "action"),
        Column("pattern", "pattern"),
        Column("reason", "why"),
    )
    count = sum(row["pattern"] == _text(wanted) for row in rows)
    summary = {"pattern": _text(wanted), "activations": f"{count} of {len(rows)}"}
    return Report("sparsify_activations", columns, tuple(rows), summary, (), environment())


def squared_relus(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """The modules of `model` that compute a squared ReLU, dense or sparse, with all their names."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"a {type(model).__name__} is not a model: pass a torch.nn.Module.")
    found = {module: names for module, names in names_of(model).items() if is_squared_relu(module)}
    if not found:
        raise ModelError(
            "the model has no module that computes a squared ReLU: neither twofour.training.SquaredReLU nor transformers'"
            " ReLUSquaredActivation. Where a forward computes it by functions, call twofour.training.squared_relu there."
        )
    return found


def is_squared_relu(module: nn.Module) -> bool:
    """True for `SquaredReLU` and its twin of transformers, unless their forward was replaced."""
    if "forward" in vars(module):
        return False
    own = isinstance(module, SquaredReLU) and type(module).forward is SquaredReLU.forward
    return own or is_of_transformers(module)


def is_of_transformers(module: nn.Module) -> bool:
    """True for the dense squared ReLU of transformers."""
    return f"{type(module).__module__}.{type(module).__qualname__}" == _OF_TRANSFORMERS


def choose_modules(
    modules: dict[nn.Module, tuple[str, ...]],
    include: Sequence[str] | str | None,
    exclude: Sequence[str] | str | None,
    what: str,
) -> list[tuple[str, nn.Module, bool]]:
    """(first name, module, whether the wildcards choose it) of each of `modules`.

    Raises:
        ModelError: a wildcard that matches none of them.
    """
    include, exclude = _wildcards(include), _wildcards(exclude)
    for argument, wildcards in (("include", include), ("exclude", exclude)):
        for wildcard in wildcards:
            if not any(_matches(names, (wildcard,)) for names in modules.values()):
                shown = ", ".join(f"'{names[0]}'" for names in list(modules.values())[:3])
                raise ModelError(f"{argument}={wildcard!r} matches no {what}. They are called {shown} ...")
    return [
        (names[0], module, (not include or _matches(names, include)) and not _matches(names, exclude))
        for module, names in modules.items()
    ]


def _matches(names: tuple[str, ...], wildcards: Sequence[str]) -> bool:
    return any(fnmatchcase(name, wildcard) for name in names for wildcard in wildcards)


def _text(pattern: Pattern | None) -> str:
    return "dense" if pattern is None else str(pattern)
