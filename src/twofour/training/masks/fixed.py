"""Fixed masks: what is zero stays zero while a model trains, whatever optimizer trains it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ...errors import ModelError, PatternError
from ...masks import check_pattern, nm_mask
from ...nn import observe
from ...nn.survey import Layer, survey
from ...pattern import Pattern
from ...report import Column, Report, environment
from .distributed import are_same, full, is_sharded, layout, put_back, replicas, several_processes, unwrapped
from .guard import guard, masks_on
from .kept import Kept, packed, unpacked
from .projected import Projected
from .steps import unwatch, watch


def keep_masks(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    pattern: Pattern | str = "2:4",
    *,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
) -> FixedMasks:
    """Zeros stay zero from here on: of every weight that holds `pattern` now, the rest alone is trained.

    Gradients of dropped weights are zeroed as they arrive, so that clipping, scaling and accumulation see those of kept
    weights only, and once more before a step; what an optimizer remembers of each dropped weight (momentum, second moments) is
    zeroed before it steps for the first time and after it has loaded a state; after each step the dropped weights are zero
    again, whatever the optimizer made of them. That holds for every torch.optim.Optimizer over these weights, also for one
    made later.

    `load_state_dict` of the model refuses weights that are not zero where they are dropped, before anything is loaded. A
    weight that was replaced or resized is an error at the next step, before anything has changed. Nothing is patched: names,
    state dicts and classes stay as they are. Copies of the model (`copy.deepcopy`, EMA) are free of masks; the mean of
    masked weights is masked.

    In many processes: call it on each, of a model that is the same on all, inside or around DistributedDataParallel, or after
    `torch.distributed.fsdp.fully_shard` (or another way to DTensor), never before. Masks are those of whole weights; each
    process holds its part. Their `state_dict` is whole, and the same for any number of processes.

    Args:
        model: pruned, by `twofour.prune` or otherwise.
        optimizer: checked to train the masked weights; its state is cleared of dropped ones at once. None: any will do.
        pattern: what weights have to hold; a group with more zeros than it drops may regrow those with the lowest index. A
            weight of nothing but zeros is left: that is how some layers begin.
        include, exclude: shell wildcards over module names, as in `prune`; output heads that hold the pattern are kept
            too. A layer that `include` names must hold.
    Returns:
        FixedMasks: `report` says what is kept and what was left, and why; `remove()` lets go; `masks_of(model)` finds it.
    Raises:
        ModelError: no weight holds the pattern; the optimizer trains none of them; masks of the model are kept already;
            processes have different masks.
        PatternError: a layer that `include` names does not hold it.
        UnsupportedError: a FullyShardedDataParallel.
    Cost: one byte per weight; in each step three passes over gradients and weights. Sharded weights are gathered once, one
    after the other.

    >>> import torch, twofour
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    >>> report = twofour.prune(model)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    >>> masks = twofour.training.keep_masks(model, optimizer)
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(16, 8)).square().mean().backward()
    ...     optimizer.step()
    >>> twofour.check(model).summary["holds"]
    True
    """
    pattern = Pattern.parse(pattern)
    given, model = model, unwrapped(model)
    if masks_on(model) is not None:
        raise ModelError(
            "masks of this model are kept already, and zeros of both would hold: remove() the old ones first;"
            " twofour.training.masks_of(model) finds them."
        )
    if any(isinstance(module, Projected) for module in model.modules()):
        raise ModelError(
            "masks of this model are moved already: finish() what move_masks returned, or give it a 'fixed' phase."
        )
    kept: list[Kept] = []
    rows: list[dict[str, Any]] = []
    for layer in survey(model, pattern, include, exclude, skip_heads=False):
        row = layer.identity()
        rows.append(row)
        weight = full(layer.weight) if layer.skip is None and not layer.is_compressed else None
        reason = layer.skip if layer.skip is not None else _why_no_mask(layer, weight, pattern, kept)
        if include and layer.skip is None and not _may_be_left(layer, kept) and reason is not None:
            raise PatternError(f"'{layer.name}' {reason}: prune it first, or leave it out of include=.")
        if reason is not None:
            row.update(action="left", reason=reason)
            continue
        dropped = ~_mask(layer, cast(Tensor, weight), pattern)
        found = Kept(layer, cast(nn.Parameter, layer.weight), dropped)
        kept.append(found)
        row.update(action="kept", density=1 - float(dropped.sum()) / dropped.numel())
        if not found.weight.requires_grad:
            row.update(reason="frozen: its mask is kept once it is trained")
    if not kept:
        raise ModelError(
            f"no weight of the model holds {pattern}, so there is no mask to keep: twofour.prune(model, '{pattern}') first."
        )
    _require_same(given, kept)
    masks = FixedMasks(model, pattern, kept, rows)
    try:
        if optimizer is not None:
            masks.adopt(optimizer)
    except BaseException:
        masks.remove()
        raise
    return masks


def fixed_masks(model: nn.Module, pattern: Pattern, masks: Sequence[tuple[Layer, Tensor]]) -> FixedMasks:
    """Keeps masks of whole weights that were chosen elsewhere.

    Raises:
        PatternError: a weight is not zero where its mask drops it. Nothing has changed then.
    """
    put_back(model)
    kept = [Kept(layer, cast(nn.Parameter, layer.weight), ~mask) for layer, mask in masks]
    for each in kept:
        if (broken := each.not_zero(each.weight)) is not None:
            raise PatternError(f"{broken} Load the weights that belong to the masks first.")
    return FixedMasks(model, pattern, kept, [{**layer.identity(), "action": "kept"} for layer, _ in masks])


class FixedMasks:
    """Keeps the masks of a model's weights; made by `keep_masks`. A context manager that lets go at its end."""

    def __init__(self, model: nn.Module, pattern: Pattern, kept: list[Kept], rows: list[dict[str, Any]]) -> None:
        self.pattern = pattern
        self._kept = kept
        self._model = weakref.ref(model)
        self._clean: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._loading: weakref.WeakKeyDictionary[Optimizer, RemovableHandle] = weakref.WeakKeyDictionary()
        columns = (
            Column("layer", "layer"),
            Column("shape", "shape"),
            Column("action", "action"),
            Column("density", "density", "share"),
            Column("reason", "why"),
        )
        count = sum(row["action"] == "kept" for row in rows)
        summary = {"pattern": str(pattern), "masks kept": f"{count} of {len(rows)}"}
        self.report = Report("keep_masks", columns, tuple(rows), summary, (), environment())
        self._handles = guard(model, self, {each.layer.name: each.weight for each in kept})  # they keep this alive
        watch(self)
        for each in kept:
            self._watch(each)
        self.apply()

    @property
    def masks(self) -> dict[str, Tensor]:
        """Layer name -> bool, shape of its weight: True where it is kept. Of sharded weights the whole, by a collective."""
        return {each.layer.name: ~each.whole() for each in self._kept}

    def adopt(self, optimizer: Optimizer) -> None:
        """Clears what `optimizer` remembers of dropped weights now, not at its next step.

        Raises:
            ModelError: it trains none of the masked weights.
        """
        if not self._handles:
            raise ModelError("these masks were removed: keep_masks(model, optimizer) makes new ones.")
        trained = _trained(optimizer)
        if not any(id(each.weight) in trained for each in self._kept):
            raise ModelError(
                f"the {type(optimizer).__name__} trains none of the {len(self._kept)} masked weights, such as"
                f" '{self._kept[0].layer.name}': make it from the parameters of this model."
            )
        self._before(optimizer)
        self._with_gradients(optimizer)

    def apply(self) -> None:
        """Zeroes what is dropped, of weights and gradients: for changes that no optimizer made, such as a merged LoRA."""
        with torch.no_grad():
            for each in self._kept:
                if each.is_broken():  # else it may be between forward and backward
                    each.zero()
                each.mask_gradient(each.weight)

    def remove(self) -> None:
        """From now on nothing is masked. Weights stay as they are."""
        for each in self._kept:
            if each.handle is not None:
                each.handle.remove()
                each.handle = None
        for handle in (*self._handles, *self._loading.values()):
            handle.remove()
        unwatch(self)
        self._handles.clear()
        self._loading.clear()
        self._clean.clear()

    def __enter__(self) -> FixedMasks:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def state_dict(self) -> dict[str, Any]:
        """The masks in one bit per weight, for a checkpoint: zeros of a file do not say whether they were kept.

        Of sharded weights the whole masks, by a collective: the same on every process, and for any number of them.
        """
        return {
            "pattern": str(self.pattern),
            "dropped": {each.layer.name: packed(each.whole()) for each in self._kept},
            "shapes": {each.layer.name: list(each.shape) for each in self._kept},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes masks from `state_dict`; the weights must be loaded already.

        An optimizer that was given to keep_masks before has forgotten what it knew of weights that are zero by chance: to
        resume, `keep_masks(model)` first, and `adopt(optimizer)` after this.

        Raises:
            ModelError: masks of another pattern, of other layers or of other shapes.
            PatternError: a weight is not zero where the mask drops it. Nothing has changed then.
        """
        if state["pattern"] != str(self.pattern):
            raise ModelError(
                f"the masks are {state['pattern']}, these here {self.pattern}: keep_masks with that pattern."
            )
        names = {each.layer.name for each in self._kept}
        if names != set(state["dropped"]):
            odd = sorted(names ^ set(state["dropped"]))
            raise ModelError(
                f"masks for other layers: '{odd[0]}' is on one side only. Is it the same model, pruned alike?"
            )
        loaded = []
        for each in self._kept:
            name, shape = each.layer.name, state["shapes"][each.layer.name]
            if list(each.weight.shape) != list(shape):
                raise ModelError(
                    f"'{name}' is {list(each.weight.shape)}, its mask {list(shape)}: is it the same model?"
                )
            dropped = unpacked(state["dropped"][name], each.weight.shape)
            if (broken := each.not_zero(each.weight, dropped)) is not None:
                raise PatternError(f"{broken} Load the weights that belong to the masks first.")
            loaded.append(dropped)
        for each, dropped in zip(self._kept, loaded, strict=True):
            each.take(dropped)
        self._clean.clear()
        self.apply()

    def named(self, name: str) -> Kept:
        """The weight of the layer called `name`, with its mask."""
        return next(each for each in self._kept if each.layer.name == name)

    def put_back(self) -> None:
        """Puts sharded parameters where the model's whole ones are for the time of a forward."""
        model = self._model()
        if model is not None:
            put_back(model)

    def _watch(self, each: Kept) -> None:
        hooks = each.weight._post_accumulate_grad_hooks or ()  # new ones where a conversion swapped the tensor
        if each.weight.requires_grad and (each.handle is None or each.handle.id not in hooks):
            each.handle = each.weight.register_post_accumulate_grad_hook(_masking(weakref.ref(each)))

    def _before(self, optimizer: Optimizer) -> None:
        trained = _trained(optimizer)
        changed = [each for each in self._kept if not self._is_there(each)]
        if changed:
            self.put_back()  # not before: this may be the step of one parameter within a backward that needs whole ones
            model = self._model()
            of_model = model is not None and any(id(parameter) in trained for parameter in model.parameters())
            for each in changed:
                if of_model or id(each.weight) in trained:
                    raise ModelError(self._why_changed(each))
        own = [each for each in self._kept if id(each.weight) in trained]
        for each in own:
            self._watch(each)  # if it was frozen when the masks were made
        if own and optimizer not in self._clean:
            for each in own:
                if several_processes() and (broken := each.not_zero(each.weight)) is not None:
                    raise PatternError(f"{broken} {_CHANGED}")
                each.clear(optimizer.state.get(each.weight) or {})
            self._clean.add(optimizer)
            if optimizer not in self._loading:
                hook = _forgetting(weakref.ref(self))
                self._loading[optimizer] = optimizer.register_load_state_dict_post_hook(hook)

    def _with_gradients(self, optimizer: Optimizer) -> None:
        """They may have come by other ways than `backward`: DDP puts sums back."""
        trained = _trained(optimizer)
        for each in self._kept:
            if id(each.weight) in trained:
                each.mask_gradient(each.weight)

    def _after(self, optimizer: Optimizer) -> None:
        trained = _trained(optimizer)
        with torch.no_grad():
            for each in self._kept:
                if id(each.weight) in trained:
                    each.zero()

    def _is_there(self, each: Kept) -> bool:
        """True where the model holds the weight as it was, or what `fully_shard` puts there for the time of a forward."""
        now = self.weight_now(each.layer)
        if now is each.weight:
            return now.shape == each.shape and layout(now) == each.layout
        model = self._model()
        stands_in = each.layout is not None and isinstance(now, Tensor) and now.shape == each.shape
        return stands_in and model is not None and is_sharded(model)

    def _why_changed(self, each: Kept) -> str:
        now, when = self.weight_now(each.layer), "again"
        if isinstance(now, Tensor) and layout(now) != each.layout:
            what, when = "was sharded anew, as by fully_shard,", "again, after fully_shard"
        elif now is each.weight:
            what = f"is {list(each.weight.shape)} now"
        else:
            what = "was replaced by another parameter"
        return (
            f"the weight of '{each.layer.name}' {what} after keep_masks, so that its zeros would not be kept: remove() these"
            f" masks (twofour.training.masks_of finds them), and keep_masks(model, optimizer) {when}. Nothing has changed."
        )

    def weight_now(self, layer: Layer) -> object:
        """What the model holds where the weight of `layer` was; None where there is nothing."""
        place: object = self._model()
        for part in layer.names[0].split(".") if layer.names[0] else ():
            place = getattr(place, part, None)
        return getattr(place, layer.attribute, None)


def masks_of(model: nn.Module) -> FixedMasks | None:
    """The masks that are kept of `model`, or None: for a handle that was not held on to."""
    return masks_on(model)


def _mask(layer: Layer, weight: Tensor, pattern: Pattern) -> Tensor:
    """bool, shape of the whole `weight`: the pattern's mask that its non-zeros lie in."""
    matrix = observe.as_matrix(layer.module, weight)
    nonzero = matrix != 0
    mask = nm_mask(matrix.abs().float(), pattern)
    if bool((nonzero & ~mask).any()):  # rows that share a mask and are no neighbours
        mask = nonzero
    return observe.from_matrix(layer.module, mask, weight.shape).contiguous()


def _may_be_left(layer: Layer, kept: Sequence[Kept]) -> bool:
    """True where there is nothing to do for a layer that was asked for."""
    return layer.is_compressed or any(other.weight is layer.weight for other in kept)


def _why_no_mask(layer: Layer, weight: Tensor | None, pattern: Pattern, kept: Sequence[Kept]) -> str | None:
    if weight is None:
        return "compressed: it trains its kept values alone"
    if not isinstance(layer.weight, nn.Parameter):
        return "its weight is no parameter"
    for other in kept:
        if other.weight is layer.weight:
            return f"its weight is that of '{other.layer.name}'"
    found = check_pattern(observe.as_matrix(layer.module, weight), pattern)
    if not found.holds:
        return found.describe()
    return None if found.nonzero else "all zeros, from which nothing was chosen"


def _require_same(model: nn.Module, kept: Sequence[Kept]) -> None:
    """Raises ModelError where processes that train the same weights have found different masks."""
    groups = replicas(model, [each.weight for each in kept])
    if not groups:
        return
    digest = sha256()
    for each in kept:
        digest.update(each.layer.name.encode())
        digest.update(each.dropped.cpu().contiguous().numpy().tobytes())
    if not are_same(digest.digest(), groups):
        raise ModelError(
            "processes that train the same weights have different masks, so that their weights would come apart: prune"
            " before DistributedDataParallel, which copies the weights of the first process, or load one checkpoint everywhere."
        )


def _trained(optimizer: Optimizer) -> set[int]:
    return {id(weight) for group in optimizer.param_groups for weight in group["params"]}


_CHANGED = (
    "It was changed after keep_masks, as by DistributedDataParallel, which copies the weights of the first process: keep_masks"
    " after it. If these weights are to be dropped nevertheless, call apply() of the masks."
)


def _forgetting(this: weakref.ref[FixedMasks]) -> Callable[[Optimizer], None]:
    """A hook after which what the optimizer remembers is cleared again before its next step."""

    def hook(optimizer: Optimizer) -> None:
        masks = this()
        if masks is not None:
            masks._clean.discard(optimizer)

    return hook


def _masking(this: weakref.ref[Kept]) -> Callable[[Tensor], None]:
    """The hook of a weight, which must not refer to it: the garbage collector does not look into hooks of tensors."""

    def hook(weight: Tensor) -> None:
        each = this()
        if each is not None:
            each.mask_gradient(weight)

    return hook
