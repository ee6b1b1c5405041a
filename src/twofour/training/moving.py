"""Moving masks: a model learns which of its weights to keep while it trains."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..errors import ModelError, PatternError, TwofourError
from ..nn.survey import Layer, survey
from ..pattern import Pattern
from ..report import Column, Report, environment
from .distributed import full, local, local_part, put_back, unwrapped
from .fixed import FixedMasks, fixed_masks
from .guard import masks_on
from .kept import packed, unpacked
from .products import LayerProducts, Wanted
from .projected import Projected, Sparsity, projected_class, restore, why_not_projected
from .schedule import Phase, Schedule
from .steps import unwatch, watch


def move_masks(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    pattern: Pattern | str = "2:4",
    schedule: Schedule | Phase | Iterable[Phase] | str = "s-ste",
    *,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    products: Wanted = "auto",
) -> MovingMasks:
    """From here on `model` trains with sparse weights whose masks follow the weights, phase after phase.

    The forward pass sees weights that hold `pattern`; all of each weight keeps learning, so that a weight that was dropped
    may come back. What does that is the rule of the phase that the schedule is in: "s-ste", "sr-ste" or "fst"
    (`twofour.training.Phase`). Steps of any optimizer over these weights are counted, and move the schedule on. `finish()`
    writes the sparse weights into the model and lets go.

    Parameters, their names and state dicts stay those of the dense model: a checkpoint holds the weights that learn.
    Layers are the same objects; their classes are subclasses for the time being. `state_dict()` has what a resumed run
    needs besides. Evaluation sees the sparse weights too; copies of the model (`copy.deepcopy`, EMA) follow their own
    weights under the rule that was in force, until `finish_copy`.

    Masks are of whole weights: with DDP and `fully_shard` (called before or after) every rank has the same.

    Args:
        model: dense. Linear layers and convolutions of its inside are made sparse; the report says why others are not.
        optimizer: checked to train the layers. None: any will do.
        pattern: "2:4t" makes the input gradient a 2:4 product as well; "fst" is meant for it.
        schedule: phases, or their text: "s-ste"; "dense:100, fst:800, dense". Begins at the next step.
        include, exclude: shell wildcards over module names, as in `prune`.
        products: how Linear layers multiply. "auto": forward and, with a transposable pattern, the input gradient by sparse
            kernels where those are faster, packing included, measured at the first batch of each size; the report has the
            times, and `state_dict` too. "sparse": wherever a kernel applies. "dense": never, and so "auto" under
            `torch.use_deterministic_algorithms`: sparse kernels round in another order.
    Returns:
        MovingMasks, a context manager: finishes at its end, or lets go without a change where an error leaves it.
    Raises:
        ModelError: nothing can be made sparse; the optimizer trains none of it; masks of the model are kept already.
        TwofourError: a schedule that is none.
    Cost: a byte for each weight; a mask for each refresh, and two passes over the weights in each forward pass.
    Source: Zhou et al. 2021 (SR-STE), arXiv:2102.04010, equation 9; Hu et al. 2024 (FST), arXiv:2404.01847, equation 10;
        Hu et al. 2024 (S-STE), arXiv:2409.09099.

    >>> import torch, twofour
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    >>> with twofour.training.move_masks(model, optimizer, "2:4", "dense:1, s-ste") as masks:
    ...     for _ in range(4):
    ...         optimizer.zero_grad()
    ...         model(torch.randn(16, 8)).square().mean().backward()
    ...         optimizer.step()
    >>> masks.step, masks.phase.rule, twofour.check(model).summary["holds"]
    (4, 's-ste', True)
    """
    pattern = Pattern.parse(pattern)
    schedule = Schedule.parse(schedule)
    if products not in get_args(Wanted):
        raise TwofourError(f"products={products!r}: it is one of {', '.join(get_args(Wanted))}.")
    model = unwrapped(model)
    if masks_on(model) is not None or any(isinstance(module, Projected) for module in model.modules()):
        raise ModelError(
            "masks of this model are kept or moved already: remove() them first; twofour.training.masks_of(model) finds"
            " those that are kept."
        )
    for phase in schedule.phases:
        if phase.rule == "s-ste" and pattern.transposable and (pattern.keep, pattern.group) != (2, 4):
            raise PatternError(f"'s-ste' with {pattern}: of transposable patterns it knows 2:4t alone. Use 'fst'.")
    moved: list[_Moved] = []
    rows: list[dict[str, Any]] = []
    for layer in survey(model, pattern, include, exclude):
        row = layer.identity()
        rows.append(row)
        reason = layer.skip if layer.skip is not None else _why_left(layer)
        if reason is not None:
            row.update(action="left", reason=reason)
            continue
        shared = next((each for each in moved if each.weight is layer.weight), None)
        if shared is not None:
            shared.layers.append(layer)
            row.update(action="left", reason=f"its weight is that of '{shared.layer.name}'")
            continue
        moved.append(_Moved([layer], Sparsity(pattern, products=LayerProducts(products))))
        row.update(action="moved")
    if not moved:
        raise ModelError(f"no layer of the model can be made {pattern}, so there is nothing to train sparse.")
    masks = MovingMasks(model, pattern, schedule, moved, rows)
    if optimizer is not None:
        try:
            masks.adopt(optimizer)
        except BaseException:
            masks.remove()
            raise
    return masks


@dataclass(eq=False)
class _Moved:
    """A weight, the layers that have it, and how it is made sparse."""

    layers: list[Layer]
    sparsity: Sparsity

    @property
    def layer(self) -> Layer:
        return self.layers[0]

    @property
    def weight(self) -> nn.Parameter:
        """What the layer has now: `fully_shard` puts another parameter in its place."""
        return cast(nn.Parameter, self.layer.module._parameters["weight"])

    def refresh(self) -> None:
        self.sparsity.refresh(self.layer.module, full(self.weight.detach()))


class MovingMasks:
    """Moves the masks of a model through the phases of a schedule; made by `move_masks`."""

    def __init__(
        self,
        model: nn.Module,
        pattern: Pattern,
        schedule: Schedule,
        moved: list[_Moved],
        rows: list[dict[str, Any]],
    ) -> None:
        self.pattern, self.schedule = pattern, schedule
        self.step = 0
        """Optimizer steps so far."""
        self.curve: list[dict[str, Any]] = []
        """One record for each refresh: step, rule, flip_rate."""
        self._model = weakref.ref(model)
        self._moved = moved
        self._rows = rows
        self._stepped: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._refreshed = 0
        self._fixed: FixedMasks | None = None
        self._handles: list[RemovableHandle] = []
        for each in moved:
            for layer in each.layers:
                layer.module.__class__ = projected_class(cast(Any, type(layer.module)))
                layer.module.sparsity = each.sparsity  # type: ignore[assignment]
        self._handles.append(model.register_load_state_dict_post_hook(_Outdating(self)))
        self._begin_phase()
        watch(self)

    @property
    def phase(self) -> Phase:
        """The phase that the next step is in."""
        return self.schedule.at(self.step)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Layer name -> bool, shape of its whole weight: True where the mask in force keeps it. Empty in a dense phase."""
        if not self.phase.is_sparse:
            return {}
        if self._fixed is not None:
            return self._fixed.masks
        return {each.layer.name: self._mask(each) for each in self._moved}

    @property
    def flip_rate(self) -> float | None:
        """The share of places that the last new mask dropped or took up, for each step since the one before; None at first.

        ||m_t - m_(t-1)||_1 / D of Hu et al. 2024, arXiv:2404.01847, section 3. It should rise early and then fade: where it
        does not fade, a larger decay makes it.
        """
        self._note()
        return self.curve[-1]["flip_rate"] if self.curve else None

    @property
    def report(self) -> Report:
        """A row for each layer, and where the schedule is."""
        self._note()
        columns = (
            Column("layer", "layer"),
            Column("shape", "shape"),
            Column("action", "action"),
            Column("tokens", "tokens", "count"),
            Column("dense_us", "dense us", "us"),
            Column("sparse_us", "sparse us", "us"),
            Column("products", "products"),
            Column("reason", "why"),
        )
        rows = [{**row, **self._products(row["layer"])} for row in self._rows]
        count = sum(row["action"] == "moved" for row in self._rows)
        summary: dict[str, Any] = {
            "pattern": str(self.pattern),
            "schedule": str(self.schedule),
            "step": self.step,
            "phase": self.phase.rule,
            "layers made sparse": f"{count} of {len(self._rows)}",
        }
        if self.curve:
            summary["flip rate"] = self.curve[-1]["flip_rate"]
        return Report("move_masks", columns, tuple(rows), summary, (), environment())

    def adopt(self, optimizer: Optimizer) -> None:
        """Checks that `optimizer` trains what is made sparse.

        Raises:
            ModelError: it trains none of it.
        """
        if not self._handles:
            raise ModelError("these masks were finished or removed: move_masks(model, optimizer) makes new ones.")
        if not self._own(optimizer):
            raise ModelError(
                f"the {type(optimizer).__name__} trains none of the {len(self._moved)} weights that are made sparse, such as"
                f" '{self._moved[0].layer.name}': make it from the parameters of this model."
            )

    def refresh(self) -> None:
        """Makes all masks anew now: after weights were changed by other means than an optimizer."""
        for each in self._moved:
            if each.sparsity.is_active:
                each.refresh()

    def finish(self) -> Report:
        """Writes the sparse weights into the model, lets go, and reports.

        After a dense phase the weights stay dense. Call it after all of training; `prune` and `keep_masks` are for going on.
        """
        report = self.report
        if self._handles:
            self._put_back()
            self._write_sparse_weights()
            self.remove()
        return report

    def remove(self) -> None:
        """Lets go: layers are what they were, with the weights that learned, dense."""
        unwatch(self)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._fixed is not None:
            self._fixed.remove()
        for each in self._moved:
            for layer in each.layers:
                if isinstance(layer.module, Projected):
                    restore(layer.module)

    def __enter__(self) -> MovingMasks:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        else:
            self.remove()

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is, the masks in force in one bit per weight, and frozen scales: for a checkpoint.

        A run that loads the model, the optimizer, this, and torch's random state (for `mvue`) goes on as if it had not
        stopped.
        """
        self._note()
        made = [each for each in self._moved if each.sparsity.mask is not None]
        return {
            "pattern": str(self.pattern),
            "schedule": str(self.schedule),
            "step": self.step,
            "refreshed": self._refreshed,
            "curve": [dict(point) for point in self.curve],
            "layers": [each.layer.name for each in self._moved],
            "masks": {each.layer.name: packed(cast(Tensor, each.sparsity.mask)) for each in made},
            "scales": {each.layer.name: each.sparsity.scale for each in self._moved},
            "products": {each.layer.name: each.sparsity.products.state() for each in self._moved},
            "fixed": None if self._fixed is None else self._fixed.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`; the weights must be loaded already.

        Raises:
            ModelError: of another pattern, schedule or model. Nothing has changed then.
        """
        for what, own in (("pattern", str(self.pattern)), ("schedule", str(self.schedule))):
            if state[what] != own:
                raise ModelError(
                    f"the checkpoint has the {what} '{state[what]}', these masks '{own}': move_masks with that one."
                )
        names = [each.layer.name for each in self._moved]
        if set(names) != set(state["layers"]):
            odd = sorted(set(names) ^ set(state["layers"]))
            raise ModelError(
                f"the checkpoint is of other layers: '{odd[0]}' is on one side only. Is it the same model?"
            )
        for each in self._moved:
            found = state["masks"].get(each.layer.name)
            if found is not None and len(found) != -(-each.weight.numel() // 8):
                raise ModelError(f"'{each.layer.name}' has another shape in the checkpoint. Is it the same model?")
        self.step = state["step"]
        self._stepped.clear()
        self._begin_phase(write=False)
        self.curve, self._refreshed = [dict(point) for point in state["curve"]], state["refreshed"]
        for each in self._moved:
            sparsity = each.sparsity
            sparsity.scale = state["scales"][each.layer.name]
            sparsity.products.load(state["products"][each.layer.name])
            found = state["masks"].get(each.layer.name)
            sparsity.mask = None if found is None else unpacked(found, each.weight.shape).to(each.weight.device)
            sparsity.stale, sparsity.changes = found is None, None
        if state["fixed"] is not None and self._fixed is not None:
            self._fixed.load_state_dict(state["fixed"])

    # ---- what happens at the steps of optimizers ---------------------------------------------------------------------

    def _own(self, optimizer: Optimizer) -> list[_Moved]:
        trained = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        return [each for each in self._moved if id(each.weight) in trained]

    def _before(self, optimizer: Optimizer) -> None:
        self._put_back()
        own = self._own(optimizer)
        phase = self.phase
        if not own or phase.rule in ("dense", "fixed"):
            return
        for each in own:
            sparsity = each.sparsity
            if sparsity.mask is not None and sparsity.mask.shape != each.weight.shape:
                raise ModelError(
                    f"the weight of '{each.layer.name}' is {list(each.weight.shape)} now, its mask"
                    f" {list(sparsity.mask.shape)}: remove() these masks before layers are resized. Nothing has changed."
                )
        if getattr(optimizer, "found_inf", None) is None:  # else GradScaler looks after it
            _require_numbers(own)
        if phase.lasting_decay:
            scale = getattr(optimizer, "grad_scale", None)  # the optimizer divides by it
            with torch.no_grad():
                for each in own:
                    if each.weight.grad is not None:
                        _decay(each, phase.lasting_decay, scale)

    def _after(self, optimizer: Optimizer) -> None:
        if not self._own(optimizer):
            return
        for each in self._moved:
            each.sparsity.products.forget()
        if not self._stepped or optimizer in self._stepped:  # of several optimizers each steps once for a step
            self._stepped.clear()
            self._next_step()
        elif self.phase.rule not in ("dense", "fixed"):
            self._outdate()
        self._stepped.add(optimizer)

    def _put_back(self) -> None:
        """Sharded parameters in the places of those that a forward pass has gathered."""
        model = self._model()
        if model is not None:
            put_back(model)

    def _next_step(self) -> None:
        self._note()
        before = self.schedule.index(self.step)
        self.step += 1
        if self.schedule.index(self.step) != before:
            self._begin_phase()
        elif self.phase.rule not in ("dense", "fixed") and self.step - self._refreshed >= self.phase.interval:
            self._outdate()

    def _outdate(self) -> None:
        """Masks are made anew: now, or in the next forward pass where only that sees the whole weight."""
        for each in self._moved:
            if local(each.weight) is each.weight and not each.weight.is_meta:
                each.refresh()
            else:
                each.sparsity.stale = True

    def _begin_phase(self, write: bool = True) -> None:
        phase = self.phase
        if phase.rule == "fixed":
            kept = [(each.layer, self._mask(each)) for each in self._moved]
            if write:
                self._write_sparse_weights()
            model = self._model()
            if model is not None and self._fixed is None:
                self._fixed = fixed_masks(model, self.pattern, kept)
        elif self._fixed is not None:
            self._fixed.remove()
            self._fixed = None
        for each in self._moved:
            sparsity = each.sparsity
            sparsity.rule, sparsity.mvue = phase.rule, phase.mvue
            sparsity.scale, sparsity.stale = None, True
            if not phase.is_sparse:
                sparsity.mask = None
        self._refreshed = self.step
        if phase.rule not in ("dense", "fixed"):
            self._outdate()

    def _note(self) -> None:
        """Puts what changed at the last refresh into the curve."""
        changes = [each.sparsity.changes for each in self._moved if each.sparsity.changes is not None]
        for each in self._moved:
            each.sparsity.changes = None
        if changes:
            total = sum(each.weight.numel() for each in self._moved)
            steps = max(1, self.step - self._refreshed)
            flips = sum(int(count) for count in changes)
            self.curve.append({"step": self.step, "rule": self.phase.rule, "flip_rate": flips / total / steps})
            self._refreshed = self.step

    def _products(self, name: str) -> dict[str, Any]:
        """How the layer multiplied the last kind of batch that it measured."""
        each = next((each for each in self._moved if (each.layer.name or "(model)") == name), None)
        if each is None:
            return {}
        products = each.sparsity.products
        if products.times:
            last = list(products.times.values())[-1]
            chosen = "sparse" if last.pays else "dense"
            return {"tokens": last.tokens, "dense_us": last.dense_us, "sparse_us": last.sparse_us, "products": chosen}
        return {} if products.why_dense is None else {"products": "dense", "reason": products.why_dense}

    def _mask(self, each: _Moved) -> Tensor:
        """The mask in force, of the whole weight."""
        if each.sparsity.mask is None or each.sparsity.stale:
            each.refresh()
        assert each.sparsity.mask is not None
        return each.sparsity.mask

    def _write_sparse_weights(self) -> None:
        """Into the parameters: what the forward pass sees."""
        with torch.no_grad():
            for each in self._moved:
                if each.sparsity.is_active:
                    whole = full(each.weight.detach())
                    sparse = each.sparsity.sparse_weight(each.layer.module, whole)
                    local(each.weight).copy_(local_part(sparse, each.weight))


def finish_copy(model: nn.Module) -> nn.Module:
    """Writes the sparse weights of a copy of a model (an EMA, for instance) into it and makes its layers plain again.

    Args:
        model: a copy that was made while `move_masks` was in force on the original.
    Returns:
        `model`, changed in place.
    Raises:
        ModelError: it is no copy: the handle of `move_masks` finishes the original.
    """
    layers = [module for module in model.modules() if isinstance(module, Projected)]
    for module in layers:
        if not module.sparsity.copied:
            raise ModelError("this is the model that trains, not a copy: call finish() of what move_masks returned.")
    done: set[int] = set()
    with torch.no_grad():
        for module in layers:
            weight = cast(Tensor, module.weight)
            if id(weight) not in done:
                weight.copy_(module.sparse_weight())
                done.add(id(weight))
    for module in layers:
        restore(module)
    return model


def _why_left(layer: Layer) -> str | None:
    if layer.is_compressed:
        return "compressed: there is nothing left to choose from"
    if layer.attribute != "weight":
        return layer.keep_dense
    if layer.keep_dense is not None and "MultiheadAttention" in layer.keep_dense:
        return layer.keep_dense
    if not isinstance(layer.weight, nn.Parameter):
        return "its weight is no parameter"
    if not layer.weight.requires_grad:
        return "frozen"
    return why_not_projected(layer.module)


def _require_numbers(own: Sequence[_Moved]) -> None:
    gradients = [each for each in own if each.weight.grad is not None]
    if not gradients:
        return
    sums = torch.stack([local(cast(Tensor, each.weight.grad)).sum().float().cpu() for each in gradients])
    if bool(sums.isfinite().all()):
        return
    bad = next((each for each in gradients if not bool(local(cast(Tensor, each.weight.grad)).isfinite().all())), None)
    if bad is not None:
        raise ModelError(
            f"the gradient of '{bad.layer.name}' is not finite, and masks would follow it: lower the learning rate, clip, or"
            " skip the step. Nothing has changed."
        )


def _decay(each: _Moved, decay: float, scale: Tensor | None) -> None:
    """g + decay * w where the mask drops w, in place, before the optimizer makes anything of it."""
    if each.sparsity.mask is None:
        return
    weight, grad = local(each.weight), local(cast(Tensor, each.weight.grad))
    mask = local_part(each.sparsity.mask, each.weight).to(weight.device)
    lost = torch.where(mask, 0.0, weight).to(grad.dtype)
    if scale is not None:
        lost = lost * scale.to(lost.device)
    grad.add_(lost, alpha=decay)


class _Outdating:
    """A hook after which masks are made anew: other weights were loaded. Copies of it, with those of the model, do nothing."""

    def __init__(self, masks: MovingMasks | None) -> None:
        self._masks = masks

    def __call__(self, *_: Any) -> None:
        if self._masks is not None:
            for each in self._masks._moved:
                each.sparsity.stale = True

    def __deepcopy__(self, _: object) -> _Outdating:
        return _Outdating(None)

    def __reduce__(self) -> tuple[type[_Outdating], tuple[None]]:
        return (_Outdating, (None,))
