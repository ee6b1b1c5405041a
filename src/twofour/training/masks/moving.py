"""Moving masks: a model learns which of its weights to keep while it trains."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ...errors import ModelError, PatternError, TwofourError
from ...nn.survey import Layer, survey
from ...pattern import Pattern
from ...report import Column, Report, environment
from .distributed import full, layout, put_back, several_processes, unwrapped
from .fixed import FixedMasks, fixed_masks
from .guard import masks_on
from .kept import packed, unpacked
from .moved import Moved, require_numbers
from .products import LayerProducts, Wanted
from .projected import Projected, Sparsity, project, restore, why_not_projected
from .schedule import Phase, Rule, Schedule
from .steps import is_rehearsal, unwatch, watch


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
    (`twofour.training.Phase`). `finish()` writes the sparse weights into the model and lets go.

    Steps of any optimizer over these weights are counted, and move the schedule on: with closures, of several optimizers
    that share the weights out (one step, whichever comes first), of optimizers that are made anew. A step that GradScaler
    skips is none. A weight that was replaced, resized or tied, and a model that reads a weight past its layer, are errors
    at the next step, before anything has changed.

    Parameters, their names and state dicts stay those of the dense model: a checkpoint holds the weights that learn.
    Layers are the same objects; their classes are subclasses for the time being. `state_dict()` has what a resumed run
    needs besides. Evaluation sees the sparse weights too; copies of the model (`copy.deepcopy`, EMA) follow their own
    weights under the rule that was in force, until `finish_copy`.

    Masks are of whole weights: inside or around DistributedDataParallel, and before or after
    `torch.distributed.fsdp.fully_shard`, every process has the same, and trains as one alone would. With `fully_shard` masks
    are made by the forward pass, which has the whole weight; `masks`, `refresh` and `finish` are collectives.

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
        UnsupportedError: a FullyShardedDataParallel; in the first forward pass, weights of tensor parallelism.
        TwofourError: a schedule that is none.
    Cost: a byte for each weight, on every process, and with `fully_shard` the sparse weights from forward to backward, unless
        activations are checkpointed; a mask for each refresh, and two passes over the weights in each forward pass.
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
    projected = [module for module in model.modules() if isinstance(module, Projected)]
    if projected and all(module.sparsity.copied for module in projected):
        raise ModelError("this model is a copy of one whose masks are moved: finish_copy(model) first.")
    if projected or masks_on(model) is not None:
        raise ModelError(
            "masks of this model are kept or moved already: remove() them first; twofour.training.masks_of(model) finds"
            " those that are kept."
        )
    for phase in schedule.phases:
        if phase.rule == "s-ste" and pattern.transposable and (pattern.keep, pattern.group) != (2, 4):
            raise PatternError(f"'s-ste' with {pattern}: of transposable patterns it knows 2:4t alone. Use 'fst'.")
    moved: list[Moved] = []
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
        moved.append(Moved([layer], Sparsity(pattern, products=LayerProducts(products))))
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


class MovingMasks:
    """Moves the masks of a model through the phases of a schedule; made by `move_masks`."""

    def __init__(
        self,
        model: nn.Module,
        pattern: Pattern,
        schedule: Schedule,
        moved: list[Moved],
        rows: list[dict[str, Any]],
    ) -> None:
        self.pattern, self.schedule = pattern, schedule
        self.step = 0
        """Optimizer steps so far, without those that GradScaler skipped."""
        self.curve: list[dict[str, Any]] = []
        """One record for each refresh: step, rule, flip_rate."""
        self._model = model
        self._moved = moved
        self._rows = rows
        self._index = 0  # of the phase in force
        self._round: set[Moved] = set()  # what optimizers have stepped over since the step began
        self._usual = set(moved)  # and what they did in the one before
        self._adopted = False
        self._rehearsing: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._is_waiting = False  # for the others of the round, with what comes after the step
        self._is_renewed = False  # the masks are of after this step
        self._refreshed = self._since = 0  # the steps from which the next refresh, and the next flip rate, are counted
        self._fixed: FixedMasks | None = None
        self._handles: list[RemovableHandle] = []
        try:
            for each in moved:
                for layer in each.layers:
                    project(layer.module, each.sparsity)
                    self._handles.append(layer.module.register_load_state_dict_post_hook(_Loading(self, each)))
            self._begin_phase(0)
        except BaseException:
            self.remove()
            raise
        watch(self)

    @property
    def phase(self) -> Phase:
        """The phase that the next step is in."""
        return self.schedule.at(self.step)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Layer name -> bool, shape of its whole weight: True where the mask in force keeps it. Empty in a dense phase.

        With `fully_shard` a collective.
        """
        self._settle()
        if not self.phase.is_sparse:
            return {}
        if self._fixed is not None:
            return self._fixed.masks
        return {each.layer.name: self._mask(each) for each in self._moved}

    @property
    def flip_rate(self) -> float | None:
        """The share of places that the last new mask dropped or took up, for each step since the one before; None at first.

        ||m_t - m_(t-1)||_1 / D of Hu et al. 2024, arXiv:2404.01847, section 3. It should rise early and then fade: where it
        does not fade, a larger decay makes it. With `fully_shard` the last new mask is that of the last forward pass.
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
            Column("dense_us", "dense µs", "us"),
            Column("sparse_us", "sparse µs", "us"),
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
        """Checks that `optimizer` trains what is made sparse. Of several, adopt each: then the first step waits for all.

        Raises:
            ModelError: it trains none of it, or is no torch.optim.Optimizer, whose steps can be counted.
        """
        self._require_on()
        if not isinstance(optimizer, Optimizer):
            raise ModelError(
                f"a {type(optimizer).__name__} is no torch.optim.Optimizer: nobody is told of its steps, so that phases"
                " and masks would stand still."
            )
        self._require_as_they_were(optimizer)
        own = set(self._own(optimizer))
        if not own:
            raise ModelError(
                f"the {type(optimizer).__name__} trains none of the {len(self._moved)} weights that are made sparse, such as"
                f" '{self._moved[0].layer.name}': make it from the parameters of this model."
            )
        self._usual = self._usual | own if self._adopted else own
        self._adopted = True

    def refresh(self) -> None:
        """Makes all masks anew now, of the parameters that the layers have now: after weights were changed or replaced by
        other means than an optimizer and `load_state_dict`. With `fully_shard` a collective."""
        self._require_on()
        self._settle()
        for each in self._moved:
            each.take_up()
            if each.sparsity.is_active:
                self._forget_scale(each)
                each.refresh()

    def finish(self) -> Report:
        """Writes the sparse weights into the model, lets go, and reports.

        After a dense phase the weights stay dense. Call it after all of training; `prune` and `keep_masks` are for going on.
        """
        if self._handles:
            self._settle()
        report = self.report
        if self._handles:
            put_back(self._model)
            with torch.no_grad():
                for each in self._moved:
                    if each.sparsity.is_active:
                        each.write(each.sparsity.sparse_weight(each.layer.module, full(each.weight)))
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
        stopped. Masks are whole, and the same for any number of processes; ask all of them. Keys and shapes are the same at
        every step, as `torch.distributed.checkpoint` wants them.
        """
        self._settle()
        self._note()
        masks = {each.layer.name: each.sparsity.mask for each in self._moved}
        return {
            "pattern": str(self.pattern),
            "schedule": str(self.schedule),
            "step": self.step,
            "refreshed": [self._refreshed, self._since],
            "curve": [[point["step"], point["rule"], point["flip_rate"]] for point in self.curve],
            "layers": [each.layer.name for each in self._moved],
            "masks": {
                each.layer.name: packed(
                    torch.zeros(each.weight.shape, dtype=torch.bool)
                    if each.sparsity.mask is None
                    else each.sparsity.mask
                )
                for each in self._moved
            },
            "masked": [name for name, mask in masks.items() if mask is not None],
            "stale": [each.layer.name for each in self._moved if each.sparsity.stale],
            "scales": {each.layer.name: each.sparsity.scale for each in self._moved},
            "products": {each.layer.name: each.sparsity.products.state() for each in self._moved},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`; the weights must be loaded already.

        Raises:
            ModelError: of another pattern, schedule or model; or these masks were finished.
            PatternError: it is of a fixed phase, and a weight is not zero where its mask drops it.
                Nothing has changed then.
        """
        self._require_on()
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
        put_back(self._model)
        masks: dict[Moved, Tensor | None] = {}
        for each in self._moved:
            each.take_up()
            bits = state["masks"][each.layer.name]
            if len(bits) != -(-each.weight.numel() // 8):
                raise ModelError(f"'{each.layer.name}' has another shape in the checkpoint. Is it the same model?")
            is_masked = each.layer.name in state["masked"]
            masks[each] = unpacked(bits, each.weight.shape).to(each.weight.device) if is_masked else None
        index = self.schedule.index(state["step"])
        phase, fixed = self.schedule.phases[index], None
        if phase.rule == "fixed":
            fixed = fixed_masks(self._model, self.pattern, [(e.layer, m) for e, m in masks.items() if m is not None])
        if self._fixed is not None:
            self._fixed.remove()
        self._fixed, self._index, self.step = fixed, index, state["step"]
        self._round.clear()
        self._is_waiting = self._is_renewed = False
        self._refreshed, self._since = state["refreshed"]
        self.curve = [{"step": step, "rule": rule, "flip_rate": rate} for step, rule, rate in state["curve"]]
        for each, mask in masks.items():
            sparsity, name = each.sparsity, each.layer.name
            sparsity.rule, sparsity.mvue, sparsity.scale = phase.rule, phase.mvue, state["scales"][name]
            sparsity.mask, sparsity.stale, sparsity.changes = mask, name in state["stale"], None
            sparsity.products.load(state["products"][name])

    # ---- what happens at the steps of optimizers ---------------------------------------------------------------------
    #
    # A step is a round: it begins with the first optimizer that steps over a weight again. What comes after it, new masks or
    # the next phase, waits until every weight that was trained in the round before has had its turn, so that the gradients of
    # one backward pass meet one rule and one mask, whichever optimizer comes first. At the latest it comes when the next
    # round begins, or when someone asks for the masks.

    def _own(self, optimizer: Optimizer) -> list[Moved]:
        trained = _trained(optimizer)
        return [each for each in self._moved if id(each.weight) in trained]

    def _before(self, optimizer: Optimizer) -> None:
        self._require_as_they_were(optimizer)
        own = self._own(optimizer)
        self._rehearsing.discard(optimizer)
        if own and is_rehearsal(optimizer):
            self._rehearsing.add(optimizer)
        elif any(each in self._round for each in own):
            self._settle()
            self._usual = set(self._round)
            self._round.clear()

    def _with_gradients(self, optimizer: Optimizer) -> None:
        own, phase = self._own(optimizer), self.schedule.phases[self._index]
        if not own or not _is_active(phase) or optimizer in self._rehearsing:
            return
        unused = next((each for each in own if each.weight.grad is not None and not each.sparsity.used), None)
        if unused is not None:
            raise ModelError(
                f"the weight of '{unused.layer.name}' has a gradient, but the layer was not called since move_masks: the model"
                " reads its weight past it, and would train it dense. Leave it out by exclude=, or zero the gradient if it is"
                " from before. Nothing has changed."
            )
        if getattr(optimizer, "found_inf", None) is None:  # else GradScaler looks after it
            require_numbers(own)
        if phase.lasting_decay:
            with torch.no_grad():
                for each in own:
                    if each.weight.grad is not None:
                        each.decay(self._mask(each), optimizer, phase.lasting_decay)

    def _after(self, optimizer: Optimizer) -> None:
        own = self._own(optimizer)
        for each in own:
            each.forget_gradient()
        skipped = getattr(
            optimizer, "found_inf", None
        )  # by optimizers that leave it to themselves what GradScaler found
        if not own or (skipped is not None and bool(skipped)) or optimizer in self._rehearsing:
            return
        if not self._round:
            self._note()
            self.step += 1
            self._is_waiting = True
        self._round.update(own)
        if self._is_waiting:
            if all(each in self._round for each in self._usual if each.weight.requires_grad):
                self._settle()
        elif self._is_renewed:
            self._outdate(own, again=True)

    def _settle(self) -> None:
        """What comes after a step, if that is still to come."""
        if not self._is_waiting:
            return
        self._is_waiting = False
        index = self.schedule.index(self.step)
        phase = self.schedule.phases[index]
        is_new = index != self._index
        self._is_renewed = _is_active(phase) and (is_new or self._is_due(phase))
        if is_new:
            self._begin_phase(index)
        elif self._is_renewed:
            self._refreshed = self.step
            self._outdate(self._moved)

    def _is_due(self, phase: Phase) -> bool:
        return self.step - self._refreshed >= phase.interval

    def _is_early(self) -> bool:
        """True while DistributedDataParallel may still put the weights of the first process into the others."""
        return self.step == 0 and several_processes()

    def _outdate(self, moved: Iterable[Moved], again: bool = False) -> None:
        """Masks are made anew: now, or in the next forward pass where only that sees the whole weight.

        Args:
            again: for the same step.
        """
        for each in moved:
            sparsity = each.sparsity
            is_first = again and sparsity.changes is None  # there was no mask before the step
            sparsity.stale = True
            if layout(each.weight) is None and not each.weight.is_meta and not self._is_early():
                each.refresh()
                sparsity.changes = None if is_first else sparsity.changes

    def _begin_phase(self, index: int) -> None:
        phase = self.schedule.phases[index]
        if phase.rule == "fixed":
            if self._fixed is None:
                self._fix()
        elif self._fixed is not None:
            self._fixed.remove()
            self._fixed = None
        self._note()
        for each in self._moved:
            sparsity = each.sparsity
            sparsity.rule, sparsity.mvue, sparsity.scale = phase.rule, phase.mvue, None
            if not phase.is_sparse:
                sparsity.mask = None
        self._index, self._refreshed = index, self.step
        if not phase.is_sparse or self._moved[0].sparsity.mask is None:
            self._since = self.step
        if _is_active(phase):
            self._outdate(self._moved)

    def _fix(self) -> None:
        """Writes the sparse weights, as `finish` would, and keeps their zeros from here on."""
        ended = self.schedule.phases[self._index]
        put_back(self._model)
        kept: list[tuple[Layer, Tensor]] = []
        with torch.no_grad():
            for each in self._moved:
                sparsity, whole = each.sparsity, full(each.weight)
                if sparsity.mask is None or sparsity.stale or sparsity.rule == "s-ste" or self._is_due(ended):
                    sparsity.refresh(each.layer.module, whole)
                mask = cast(Tensor, sparsity.mask)
                sparse = sparsity.sparse_weight(each.layer.module, whole)
                each.write(torch.where(mask.to(sparse.device), sparse, 0.0))
                kept.append((each.layer, mask))
        self._fixed = fixed_masks(self._model, self.pattern, kept)

    def _note(self) -> None:
        """Puts what changed at the last refresh into the curve."""
        changes = [each.sparsity.changes for each in self._moved if each.sparsity.changes is not None]
        for each in self._moved:
            each.sparsity.changes = None
        if changes:
            total = sum(each.weight.numel() for each in self._moved)
            steps = max(1, self.step - self._since)
            flips = sum(int(count) for count in changes)
            rule = self.schedule.phases[self._index].rule
            self.curve.append({"step": self.step, "rule": rule, "flip_rate": flips / total / steps})
            self._since = self.step

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

    def _mask(self, each: Moved) -> Tensor:
        """The mask in force, of the whole weight."""
        sparsity, phase = each.sparsity, self.schedule.phases[self._index]
        is_made = sparsity.mask is not None and not sparsity.stale
        if (self._is_early() and not is_made) or (is_made and sparsity.rule == "s-ste" and phase.interval > 1):
            return sparsity.mask_of(
                each.layer.module, full(each.weight)
            )  # what a forward pass would have, not to be kept
        if not is_made:
            each.refresh()
        return cast(Tensor, sparsity.mask)

    def _loaded(self, each: Moved) -> None:
        """Other weights were loaded into a layer: the mask of the old ones says nothing of them."""
        each.take_up()
        if each.sparsity.is_active:
            each.sparsity.mask = each.sparsity.changes = None
            self._forget_scale(each)
            self._outdate([each])

    def _forget_scale(self, each: Moved) -> None:
        """It is of the weights with which the phase begins, and they are others, unless it has begun."""
        if self.step == self.schedule.starts()[self._index]:
            each.sparsity.scale = None

    def _require_on(self) -> None:
        if not self._handles:
            raise ModelError("these masks were finished or removed: move_masks(model, optimizer) makes new ones.")

    def _require_as_they_were(self, optimizer: Optimizer) -> None:
        if self._fixed is not None:
            return  # it looks itself
        lost = [(each, why) for each in self._moved if (why := each.why_lost(self._model)) is not None]
        twice = {id(each.weight): each for each in self._moved}
        for each in self._moved:
            if (other := twice[id(each.weight)]) is not each:
                lost.append((each, f"the weight of '{each.layer.name}' has become that of '{other.layer.name}'"))
        if not lost:
            return
        trained = _trained(optimizer)
        of_model = any(id(parameter) in trained for parameter in self._model.parameters())
        if of_model or any(id(each.weight) in trained for each, _ in lost):
            raise ModelError(
                f"{lost[0][1]}, so that its mask would be that of another: call refresh() of the masks if it was replaced;"
                " remove() them, and move_masks again, if layers were resized, tied or untied. Nothing has changed."
            )


def finish_copy(model: nn.Module, *, rule: Rule | None = None) -> nn.Module:
    """Writes the sparse weights of a copy of a model (an EMA, for instance) into it and makes its layers plain again.

    Args:
        model: a copy that was made while `move_masks` was in force on the original.
        rule: by which they are sparse. None takes the one that was in force when the copy was made, as its forward pass
            does. An EMA that has gone through several phases wants that of the original, `masks.phase.rule`: "s-ste" with its
            scales, "fixed" with its masks; "dense" leaves the weights as they are.
    Returns:
        `model`, changed in place.
    Raises:
        ModelError: it is no copy: the handle of `move_masks` finishes the original; the original has gone on to another
            phase, and no rule is given; "fixed", and the original is in no fixed phase. Nothing has changed then.
    """
    layers = [module for module in model.modules() if isinstance(module, Projected)]
    if not layers:
        raise ModelError("no layer of this model is under move_masks: it was copied before, or is finished already.")
    for module in layers:
        sparsity, origin = module.sparsity, module.sparsity.origin
        if not sparsity.copied:
            raise ModelError("this is the model that trains, not a copy: call finish() of what move_masks returned.")
        if rule is None and origin is not None and origin.rule != sparsity.rule:
            raise ModelError(
                f"the copy was made in a phase '{sparsity.rule}', and the model is in '{origin.rule}' now: say by which its"
                f" weights are sparse, finish_copy(model, rule='{origin.rule}')."
            )
        if rule == "fixed" and sparsity.rule != "fixed" and (origin is None or origin.rule != "fixed"):
            raise ModelError("rule='fixed', and the model that was copied is in no fixed phase: it has no such masks.")
    with torch.no_grad():
        done: set[int] = set()
        for module in layers:
            weight = cast(Tensor, module.weight)
            if id(weight) not in done:
                weight.copy_(_sparse_copy(module, weight, rule))
                done.add(id(weight))
    for module in layers:
        restore(module)
    return model


def _sparse_copy(module: Projected, weight: Tensor, rule: Rule | None) -> Tensor:
    sparsity, origin = module.sparsity, module.sparsity.origin
    if rule is None or rule == sparsity.rule:
        return sparsity.sparse_weight(module, weight)
    same = origin if origin is not None and origin.rule == rule else None
    if rule == "fixed" and same is not None and same.mask is not None:
        return torch.where(same.mask.to(weight.device), weight, 0.0)
    asked = Sparsity(sparsity.pattern, rule, scale=None if same is None else same.scale)
    return asked.sparse_weight(module, weight)


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


def _is_active(phase: Phase) -> bool:
    """True where the forward pass sees other weights than the parameters."""
    return phase.rule not in ("dense", "fixed")


def _trained(optimizer: Optimizer) -> set[int]:
    return {id(weight) for group in optimizer.param_groups for weight in group["params"]}


class _Loading:
    """A hook after which a mask is made anew: other weights were loaded. Copies of it, with those of the model, do nothing."""

    def __init__(self, masks: MovingMasks | None = None, moved: Moved | None = None) -> None:
        self._masks, self._moved = masks, moved

    def __call__(self, *_: Any) -> None:
        if self._masks is not None and self._moved is not None:
            self._masks._loaded(self._moved)

    def __deepcopy__(self, _: object) -> _Loading:
        return _Loading()

    def __reduce__(self) -> tuple[type[_Loading], tuple[()]]:
        return (_Loading, ())
