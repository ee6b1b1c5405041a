"""add_adapters, remove_adapters: low-rank companions beside the linear layers of a model, and their state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import ModelError
from ...nn import QuantizedSparseLinear, SparseLinear
from ...nn.fused import unfuse
from ...nn.inputs import Batch
from ...nn.survey import Layer, is_linear_like, names_of, sharing, survey
from ...nn.swap import _HOOKS, replace_module
from ...report import Column, Report, environment
from ..masks.guard import masks_on
from .lora import AdaptedLinear, kept_of, require_numbers, why_not_adaptable
from .moments import hessians
from .recover import Recovered, dense_weights, recover

_NOT_MASKED = {
    False: "not masked: it has no zeros to keep, and merges exactly",
    True: "not masked: weights of 8 bits do not merge, and it stays beside them",
}
_A, _B, _SCALE = ".lora_a", ".lora_b", ".lora_scale"


def add_adapters(
    model: nn.Module,
    rank: int = 16,
    *,
    alpha: float | None = None,
    masked: bool | None = None,
    dropout: float = 0.0,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    train: Sequence[str] | str | None = None,
    dense: nn.Module | Mapping[str, Tensor] | None = None,
    calibration: Batch | Iterable[Batch] | None = None,
    moments: Literal["full", "diagonal"] = "full",
    dtype: torch.dtype | None = None,
) -> Report:
    """Puts a trainable low-rank companion beside every linear layer, in place: y = x (W + scale * B A)ᵀ + bias.

    B begins at zero, so the model gives the same outputs as before, to the bit (a compressed layer with `masked`: up to
    rounding). Each layer becomes an `AdaptedLinear` that holds it as `base`, dense or compressed; everything but A and B is
    frozen, so that an optimizer over the parameters that require gradients has state for those alone.

    A companion is made to go into the weight, or to stay beside it. W + scale * B A has no zeros, so `merge_adapters` loses
    what the update has there; `masked` companions, the default, keep out of there in every forward, and merge without loss.
    In examples/05_adapters.py a 2:4 model that knows 10 % of handwritten digits turned on their side learns 93 % of them
    masked, before and after the merge; unmasked 92 %, and after the merge 28 % by the mask alone, 91 % with refit. A masked
    step takes about twice as long, beside a compressed weight three to seven times.

    masked=False is for companions that stay, where a step takes little longer than the base's, compressed ones included:
    `compress`, `save` and `load` work on a model with them (`load` into one that has adapters of the same rank).

    For companions in the last share of a sparse training (SLoPe): remove() the masks of `keep_masks`, add_adapters with
    masked=False and train="*", keep_masks again, and optimizer.add_param_group({"params": adapter_parameters(model)}).

    Args:
        model: pruned or not, compressed or not. Fused activations are taken out first.
        rank: 1 or more.
        alpha: scale = alpha / rank; None: scale 1.
        masked: the update is zero where the weight is, in every forward. Costs the dense product and B A for each call,
            also of compressed layers. None: True, but False with `dense` or `dropout`, which it excludes. Layers without
            zeros to keep are not masked, for they merge exactly anyway, nor are layers of 8 bits, which do not merge.
        dropout: share of the inputs of A that is dropped in training mode.
        include, exclude: shell wildcards over module names, as in `prune`: embeddings, convolutions, output heads (unless
            included), layers of several names for one weight and the output projection of nn.MultiheadAttention, which is
            read and not called, have no companion.
        train: shell wildcards over names of parameters (as they are before the call) that stay as they are and are not
            frozen: "*.bias", "*norm*", "classifier.*"; "*" freezes nothing.
        dense: the model before it was pruned, or its state dict. A and B then begin as the best that their rank can do for
            what pruning took, the largest singular vectors of (dense weight - weight), and outputs change at once.
        calibration: as in `prune`, with `dense`: the best for the layers' outputs on these inputs.
        moments: what of the inputs counts. "full", their second moments, leaves the least error on inputs like these;
            "diagonal", one size for each input, as in SLiM, is fitted to them less closely. Rank 38 beside a MiniLM pruned by
            magnitude or by Wanda, on texts like those of the test or others: errors of 2.2 to 2.5 % against 4.2 to 5.0 %,
            and with either a Spearman's correlation on STS-B of 0.861 to 0.867 (0.821 and 0.857 without, 0.867 dense).
        dtype: of A and B; None: float32, float64 beside float64 weights.
    Returns:
        Report with a row per layer: action ("adapted" or "left"), rank, parameters, masked, reason. With `dense`: error,
        the squared error that is left of the weight, as a share of that without companions; with `calibration` the
        squared output error as a share of the squared outputs, without companions (error_pruned) and with them (error).
    Raises:
        ModelError: no layer can be adapted, a wildcard that matches nothing, numbers out of range, masks are kept of the
            model, `dense` is another model's. CalibrationError: inputs that tell nothing. Nothing is changed then.
    Cost: rank * (in_features + out_features) parameters for each layer. With `dense` a singular value decomposition of
        each; with `calibration` forwards of the model and 8 * in_features² bytes for each layer besides.
    Source: Hu et al. 2021, arXiv:2106.09685 (LoRA); Mozaffari et al. 2024, arXiv:2405.16325 (SLoPe); Mozaffari et al. 2024,
        arXiv:2410.09615 (SLiM: companions from what pruning took).

    >>> import twofour
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> pruned = twofour.prune(model)
    >>> report = twofour.training.add_adapters(model, rank=4)
    >>> [(row["layer"], row["action"], row["parameters"]) for row in report.rows]
    [('0', 'adapted', 512), ('2', 'adapted', 288)]
    >>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    >>> model(torch.randn(16, 64)).square().mean().backward()
    >>> optimizer.step()
    >>> merged = twofour.training.merge_adapters(model)
    >>> twofour.check(model).summary["holds"], merged.summary["lost of the updates"]
    (True, '0.0 %')
    """
    masked = dense is None and not dropout if masked is None else masked
    require_numbers(rank, alpha, dropout, masked)
    if masked and dense is not None:
        raise ModelError(
            "dense= begins with what pruning took, which lies at the zeros, and masked=True keeps the companions out of there:"
            " pass one of them."
        )
    if moments not in ("full", "diagonal"):
        raise ModelError(f"moments={moments!r}: 'full' or 'diagonal'.")
    if dtype is not None and not dtype.is_floating_point:
        raise ModelError(f"dtype={dtype}: adapters are trained, in a floating point dtype.")
    if calibration is not None and dense is None:
        raise ModelError("calibration= says what dense= is to be near to on: pass dense= too, or leave it out.")
    if masks_on(model) is not None:
        raise ModelError(
            "masks of this model are kept, which would not find their weights again: remove() them"
            " (twofour.training.masks_of finds them), add the adapters, and keep_masks again."
        )
    layers = survey(model, None, include, exclude)
    rows = {id(layer): layer.identity() for layer in layers}
    inside = {module.base for module in model.modules() if isinstance(module, AdaptedLinear)}
    work: list[Layer] = []
    for layer in layers:
        reason = _why_not(model, layer, layers, inside)
        if reason is None:
            work.append(layer)
        else:
            rows[id(layer)].update(action="left", reason=reason)
    if not work:
        reasons = sorted({str(row["reason"]) for row in rows.values()})
        detail = "; ".join(reasons[:3]) if reasons else "the model has no layer with a weight matrix"
        raise ModelError(f"there is no layer to adapt: {detail}.")
    free = _free_parameters(model, train)
    modules = {layer.name: layer.module for layer in work}
    starts: dict[str, Recovered] = {}
    if dense is not None:
        weights = dense_weights(dense, modules)
        scale = 1.0 if alpha is None else alpha / rank
        seen = None if calibration is None else dict(hessians(model, modules, calibration))
        starts = {
            name: recover(name, module, weights[name], rank, scale, None if seen is None else seen[name], moments)
            for name, module in modules.items()
        }
    # Nothing has changed up to here.
    notes = (
        ["activations that were fused stand alone again: call twofour.fuse(model) after this"] if unfuse(model) else []
    )
    for layer in work:
        row, base = rows[id(layer)], layer.module
        quantized = isinstance(base, QuantizedSparseLinear)
        holds = masked and not quantized and kept_of(base) is not None
        adapted = AdaptedLinear(base, rank, alpha=alpha, masked=holds, dropout=dropout, dtype=dtype)
        if layer.name in starts:
            start = starts[layer.name]
            with torch.no_grad():
                adapted.lora_a.copy_(start.a)
                adapted.lora_b.copy_(start.b)
            row.update(start.errors)
        _wrap(model, base, adapted)
        row.update(
            action="adapted", rank=rank, parameters=adapted.lora_a.numel() + adapted.lora_b.numel(), masked=holds
        )
        if masked and not holds:
            row.update(reason=_NOT_MASKED[quantized])
    adapters = {id(parameter) for parameter in adapter_parameters(model)}
    for parameter in model.parameters():
        if id(parameter) not in free and id(parameter) not in adapters:
            parameter.requires_grad_(False)
    return _report(model, tuple(rows.values()), tuple(notes), calibration is not None, dense is not None)


def remove_adapters(model: nn.Module) -> int:
    """Takes every companion out of `model`, in place, and puts the layers back as they are; returns how many.

    What the companions had learned is gone: `adapter_state_dict` keeps it. Frozen parameters stay frozen.

    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> report = add_adapters(model, rank=2)
    >>> remove_adapters(model), model
    (1, Sequential(
      (0): Linear(in_features=8, out_features=8, bias=True)
    ))
    """
    named = named_adapters(model, replaceable=True)
    for module in named.values():
        unwrap(model, module)
    return len(named)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every adapter of `model`, in its order: for an optimizer, or a group of one."""
    found = (module for module in model.modules() if isinstance(module, AdaptedLinear))
    return [weight for module in found for weight in (module.lora_a, module.lora_b)]


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters alone: "<layer>.lora_a", "<layer>.lora_b" and "<layer>.lora_scale" (float64, no axes) of each.

    Detached, and not copied: A and B are those of the model. All tensors, so that a safetensors file can hold them.

    Raises:
        ModelError: the model has no adapters.

    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> report = add_adapters(model, rank=2)
    >>> {name: list(tensor.shape) for name, tensor in adapter_state_dict(model).items()}
    {'0.lora_a': [2, 8], '0.lora_b': [8, 2], '0.lora_scale': []}
    """
    state: dict[str, Tensor] = {}
    for name, module in named_adapters(model).items():
        state[(name + _A).lstrip(".")] = module.lora_a.detach()
        state[(name + _B).lstrip(".")] = module.lora_b.detach()
        state[(name + _SCALE).lstrip(".")] = torch.tensor(module.scale, dtype=torch.float64)
    return state


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fills the adapters of `model` with what `adapter_state_dict` gave, in place, rounded to their dtype.

    Raises:
        ModelError: no adapters here, or the state is of other layers, another rank, another scale or another model's
            shapes. Nothing has changed then.
    """
    named = named_adapters(model)
    wanted = {(name + end).lstrip(".") for name in named for end in (_A, _B, _SCALE)}
    if wanted != set(state):
        odd = sorted(wanted ^ set(state))[0]
        where = "the model" if odd in wanted else "the state"
        raise ModelError(
            f"adapters of other layers: '{odd}' is in {where} only. Add adapters to the layers that the state is of, with"
            " include= and exclude=."
        )
    for name, module in named.items():
        for end, own in ((_A, module.lora_a), (_B, module.lora_b)):
            key = (name + end).lstrip(".")
            given, axis = state[key], 0 if end == _A else 1
            if given.ndim == 2 and given.shape[1 - axis] == own.shape[1 - axis] and given.shape[axis] != module.rank:
                raise ModelError(
                    f"'{key}' is of rank {given.shape[axis]}, the model's adapter of rank {module.rank}:"
                    f" add_adapters(model, rank={given.shape[axis]})."
                )
            if given.shape != own.shape:
                raise ModelError(
                    f"'{key}' is {list(given.shape)}, the model's {list(own.shape)}: is it the same model?"
                )
        given_scale = float(state[(name + _SCALE).lstrip(".")])
        if given_scale != module.scale:
            raise ModelError(
                f"'{name}' was trained with scale {given_scale:g} and has {module.scale:g} here: add_adapters with"
                f" alpha={given_scale * module.rank:g}."
            )
    with torch.no_grad():
        for name, module in named.items():
            module.lora_a.copy_(state[(name + _A).lstrip(".")])
            module.lora_b.copy_(state[(name + _B).lstrip(".")])


def named_adapters(model: nn.Module, *, replaceable: bool = False) -> dict[str, AdaptedLinear]:
    """The adapted layers of `model` by their first names.

    Raises:
        ModelError: there are none, or the model is one itself, where it is to be `replaceable` in place.
    """
    named = {names[0]: module for module, names in names_of(model).items() if isinstance(module, AdaptedLinear)}
    if not named:
        raise ModelError("the model has no adapters: twofour.training.add_adapters(model) adds them.")
    if replaceable and "" in named:
        raise ModelError(
            "the model is an adapted layer itself, and cannot be replaced in place: put it into an nn.Sequential."
        )
    return named


def unwrap(model: nn.Module, module: AdaptedLinear) -> None:
    """Puts the base of `module` back in its place, with the hooks of both."""
    own = {hooks: getattr(module.base, hooks, None) for hooks in _HOOKS}
    replace_module(model, module, module.base)
    for hooks, before in own.items():
        now = getattr(module.base, hooks, None)
        if before and isinstance(now, dict) and now is not before:
            now.update(before)


def owner_of(layer: Layer, layers: Sequence[Layer]) -> Layer | None:
    """Another of `layers` that shares its weight with `layer`."""
    others = [other for other in layers if other.module is not layer.module]
    if isinstance(layer.module, SparseLinear):
        place = layer.module.values.data_ptr()
        return next(
            (o for o in others if isinstance(o.module, SparseLinear) and place and o.module.values.data_ptr() == place),
            None,
        )
    return sharing([layer], others).get(layer.name)


def _why_not(model: nn.Module, layer: Layer, layers: Sequence[Layer], inside: set[nn.Module]) -> str | None:
    module = layer.module
    if isinstance(module, AdaptedLinear):
        return "a companion itself"
    if layer.skip is not None:
        return layer.skip.replace("to prune it", "to adapt it")
    if module in inside:
        return "has a companion already"
    if module is model:
        return "the model is this layer itself, and cannot be replaced in place: AdaptedLinear(layer)"
    if is_linear_like(layer) and layer.keep_dense is not None:
        return layer.keep_dense
    if not isinstance(module, SparseLinear):  # a fused activation is taken out first
        reason = why_not_adaptable(module)
        if reason is not None:
            return f"{layer.kind}: {reason}"
    owner = owner_of(layer, layers)
    return None if owner is None else f"its weight is shared with '{owner.name}', which a merge would change too"


def _wrap(model: nn.Module, base: nn.Module, adapted: AdaptedLinear) -> None:
    replace_module(model, base, adapted)
    for hooks in _HOOKS:  # they are the adapted layer's now
        held = getattr(base, hooks, None)
        if isinstance(held, dict):
            setattr(base, hooks, type(held)())
        elif held is not None:
            setattr(base, hooks, None)


def _free_parameters(model: nn.Module, train: Sequence[str] | str | None) -> set[int]:
    """The ids of the parameters that one of the wildcards names."""
    wildcards = () if train is None else (train,) if isinstance(train, str) else tuple(train)
    free: set[int] = set()
    names = [(name, id(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False)]
    for wildcard in wildcards:
        found = {identity for name, identity in names if fnmatchcase(name, wildcard)}
        if not found:
            examples = ", ".join(f"'{name}'" for name, _ in names[:3])
            raise ModelError(f"train={wildcard!r} matches no parameter. They are called {examples} ...")
        free |= found
    return free


def _report(
    model: nn.Module, rows: tuple[dict[str, Any], ...], notes: tuple[str, ...], calibrated: bool, recovered: bool
) -> Report:
    columns = (
        Column("layer", "layer"),
        Column("kind", "kind"),
        Column("shape", "shape"),
        Column("action", "action"),
        Column("rank", "rank", "count"),
        Column("parameters", "parameters", "count"),
        *((Column("error_pruned", "error, pruned", "share"),) if calibrated else ()),
        *((Column("error", "error", "share"),) if recovered else ()),
        Column("reason", "why"),
    )
    done = [row for row in rows if row["action"] == "adapted"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    summary: dict[str, Any] = {
        "layers adapted": f"{len(done)} of {len(rows)}",
        "masked": sum(bool(row["masked"]) for row in done),
        "parameters of adapters": sum(int(row["parameters"]) for row in done),
        "parameters that are trained": trained,
    }
    return Report("add_adapters", columns, rows, summary, notes, environment())
