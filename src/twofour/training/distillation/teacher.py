"""The dense model beside its pruned self: which tensors of both are compared, and the loss that comes of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...errors import ModelError, UnsupportedError
from ...nn.inputs import Batch, call, evaluating
from ...nn.survey import weight_key
from .terms import (
    Modules,
    Outputs,
    Pairs,
    Term,
    by_name,
    checked,
    default_terms,
    device_of,
    dtype_of,
    label_of,
    labels_of,
    loss_of,
    moved,
    unwrapped,
)


class Distillation:
    """The loss of a student against its teacher on a batch, with hooks on both; a context manager that takes them off.

    The teacher is put in eval mode, frozen (`requires_grad` is False from then on) and run without gradients; nothing of it
    is in the student, its parameters or its state dict. The student runs in the mode it is in.

    Args:
        student: pruned or about to be, compressed or not.
        teacher: the dense model; on any device and of any floating dtype. None: a copy of the student as it is now, so
            before it is pruned.
        terms: what is compared, see `Outputs` and `Modules`. None: what the blocks of the model return (its layers, as a
            transformer has them: "relative") and its output: "kl" for `logits`, else "relative" for the sentence
            embedding, the last hidden state or the tensor that it returns. All count alike.
    Raises:
        ModelError: no modules, a teacher that is (a part of) the student, a term that is wrong or matches nothing.
        UnsupportedError: weights on the meta device.
    Cost: a forward of the teacher per batch beside the student's forward and backward, and the teacher's memory.

    >>> import torch, twofour
    >>> from twofour.training import Distillation
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
    >>> with Distillation(model) as distillation:
    ...     report = twofour.prune(model)
    ...     loss, parts = distillation.loss(torch.randn(5, 8))
    >>> sorted(parts), bool(loss > 0)
    (['output'], True)
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None = None, terms: Term | Iterable[Term] | None = None
    ) -> None:
        for what, model in (("student", student), ("teacher", student if teacher is None else teacher)):
            if not isinstance(model, nn.Module):
                raise ModelError(f"the {what} is a {type(model).__name__}: pass a torch.nn.Module.")
        if teacher is not None:
            _require_apart(student, teacher)
        self.student = student
        self.teacher = deepcopy(student) if teacher is None else teacher
        if teacher is None:
            self.teacher.zero_grad()
        for what, model in (("student", student), ("teacher", self.teacher)):
            _require_memory(what, model)
        self.teacher.eval().requires_grad_(False)
        self.terms = None if terms is None else checked(terms)
        self._entered = False
        self._taps: list[_Tap] = []
        self._names = self._find_modules(self.terms or ())

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of all terms, with the student's gradient, and each term alone, detached.

        Args:
            batch: a tensor (one argument), a tuple or list (positional) or a mapping (by name), on any device; not changed.
        Raises:
            ModelError: an output or module that one model has and the other lacks, or that was not called; a loss that no
                trained parameter of the student takes part in.
            ShapeError: tensors of a pair, or a mask, of other shapes; a batch without real tokens.
        """
        batch = moved(tuple(batch) if isinstance(batch, list) else batch, device_of(self.student), None)
        with self._inside():
            terms = self._chosen(batch)
            with torch.no_grad():
                if any(module.training for module in self.teacher.modules()):
                    self.teacher.eval()
                theirs = self._gathered(self.teacher, _as_for(self.teacher, self.student, batch))
            mine = self._gathered(self.student, batch)
            named = by_name(unwrapped(self.student), batch)
            parts: dict[str, Tensor] = {}
            total: Tensor | None = None
            for term, label, student, teacher in zip(terms, labels_of(terms), mine, theirs, strict=True):
                part = loss_of(term, label, student, teacher, batch, named)
                parts[label] = part.detach()
                total = term.weight * part if total is None else total + term.weight * part
        assert total is not None
        if torch.is_grad_enabled() and not total.requires_grad:
            raise ModelError(
                "the loss has no gradient: no parameter of the student that is trained lies before what is compared. Unfreeze"
                " some, or compare later tensors."
            )
        return total, parts

    def evaluate(self, inputs: Batch | Iterable[Batch]) -> float:
        """The mean loss over batches, in eval mode and without gradients; each batch counts alike. Raises as `loss` does."""
        several = [inputs] if isinstance(inputs, (Tensor, tuple, Mapping)) else inputs
        with self._inside(), evaluating(self.student):
            losses = [float(self.loss(batch)[0]) for batch in several]
        if not losses:
            raise ModelError("no batch to take the mean loss of: pass at least one.")
        return sum(losses) / len(losses)

    @property
    def labels(self) -> list[str]:
        """The names of the terms; none before the first batch where they are chosen by it."""
        return labels_of(self.terms or ())

    def __enter__(self) -> Distillation:
        self._attach()
        self._entered = True
        return self

    def __exit__(self, *_: object) -> None:
        self._entered = False
        self._detach()

    def _inside(self) -> AbstractContextManager[object]:
        return nullcontext() if self._entered else self

    def _attach(self) -> None:
        self._detach()
        self._names = self._find_modules(self.terms or ())
        wanted = dict.fromkeys(name for names in self._names for name in names)
        for model in (self.student, self.teacher):
            modules = dict(unwrapped(model).named_modules())
            self._taps += [_Tap(name, model, modules[name]) for name in wanted]

    def _detach(self) -> None:
        for tap in self._taps:
            tap.remove()
        self._taps.clear()

    def _chosen(self, batch: Batch) -> tuple[Term, ...]:
        """The terms; chosen by what the student returns for the first batch, where none were given."""
        if self.terms is None:
            with evaluating(self.student):
                self.terms = default_terms(unwrapped(self.student), self._run(self.student, batch))
            self._attach()
        return self.terms

    def _find_modules(self, terms: Sequence[Term]) -> list[list[str]]:
        """The names of modules that each of the terms stands for, in the student's order."""
        mine, theirs = (dict(unwrapped(model).named_modules()) for model in (self.student, self.teacher))
        found: list[list[str]] = []
        for term in terms:
            wildcards = term.wildcards if isinstance(term, Modules) else ()
            for wildcard in wildcards:
                if not any(fnmatchcase(name, wildcard) for name in mine):
                    examples = ", ".join(f"'{name}'" for name in list(mine)[1:4])
                    raise ModelError(f"{wildcard!r} matches no module of the student. They are called {examples} ...")
            found.append([name for name in mine if any(fnmatchcase(name, wildcard) for wildcard in wildcards)])
            for name in found[-1]:
                if name not in theirs:
                    raise ModelError(
                        f"the student's '{name}' has no fellow in the teacher, a {type(self.teacher).__name__}: modules are"
                        " compared by name. Leave it out of the terms, or compare outputs."
                    )
        return found

    def _gathered(self, model: nn.Module, batch: Batch) -> list[Pairs]:
        """What `model` gives for each of the terms."""
        taps = {tap.name: tap for tap in self._taps if tap.model is model}
        who = "student" if model is self.student else "teacher"
        try:
            output = self._run(model, batch)
            gathered: list[Pairs] = []
            for term, names in zip(self.terms or (), self._names, strict=True):
                if isinstance(term, Outputs):
                    found = _look_up(output, term.name, who)
                    several = isinstance(found, (tuple, list))
                    pairs = [
                        (f"{label_of(term)}.{i}" if several else label_of(term), tensor)
                        for i, tensor in enumerate(found if several else (found,))
                    ]
                else:
                    pairs = [(name, tensor) for name in names for tensor in taps[name].seen]
                    if not pairs:
                        raise ModelError(
                            f"the {who} called none of the {len(names)} modules of '{label_of(term)}', such as"
                            f" '{names[0]}', on this batch: choose others. A model that was compiled before calls"
                            " no hooks: compile it inside `with Distillation(...)`."
                        )
                for name, tensor in pairs:
                    _require_comparable(name, tensor, who)
                gathered.append(pairs)
            return gathered
        finally:
            for tap in taps.values():
                tap.seen.clear()

    def _run(self, model: nn.Module, batch: Batch) -> Any:
        batch = moved(batch, None, None)  # some models write into what they are called with
        if isinstance(batch, dict) and hasattr(unwrapped(model), "config"):
            for term in self.terms or ():
                for extra in ("hidden_states", "attentions"):
                    if isinstance(term, Outputs) and term.name.endswith(extra):
                        batch.setdefault(f"output_{extra}", True)
        taps = [tap for tap in self._taps if tap.model is model]
        fast = torch.backends.mha.get_fastpath_enabled()
        try:
            for tap in taps:
                tap.listens, tap.wants_gradient = True, torch.is_grad_enabled()
            torch.backends.mha.set_fastpath_enabled(False)  # it calls no hooks and cuts padding off
            with _autocast_without_cache(device_of(model).type):
                return call(model, batch)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for tap in taps:
                tap.listens = False


class _Tap:
    """A forward hook that keeps what a module returns, while it listens. Copies and pickles of it do nothing."""

    def __init__(self, name: str, model: nn.Module | None, module: nn.Module | None) -> None:
        self.name, self.model = name, model
        self.seen: list[Tensor] = []
        self.listens = self.wants_gradient = False
        self._handle = None if module is None else module.register_forward_hook(self)

    def remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.listens:
            return
        found = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
        if found is None:
            raise ModelError(
                f"'{self.name}' returns no tensor but a {type(output).__name__}: leave it out of the terms."
            )
        if self.wants_gradient and not torch.is_grad_enabled():
            raise ModelError(
                f"the student's '{self.name}' runs without gradients, so that what it returns can teach it nothing: use"
                " gradient checkpointing with use_reentrant=False, or leave it out of the terms."
            )
        self.seen.append(found)

    def __deepcopy__(self, _: object) -> _Tap:
        return _Tap(self.name, None, None)

    def __reduce__(self) -> tuple[type[_Tap], tuple[str, None, None]]:
        return (_Tap, (self.name, None, None))


def _look_up(output: Any, path: str, who: str) -> Any:
    found = output
    for part in path.split(".") if path else ():
        if isinstance(found, Mapping) and part in found:
            found = found[part]
        elif isinstance(found, (tuple, list)) and part.isdigit() and int(part) < len(found):
            found = found[int(part)]
        elif hasattr(found, part):
            found = getattr(found, part)
        else:
            has = f" with {', '.join(map(str, found))}" if isinstance(found, Mapping) else ""
            raise ModelError(
                f"the {who} returns a {type(found).__name__}{has}, without '{part}': name what it has in Outputs(...), or"
                " compare Modules(...)."
            )
    return found


def _require_comparable(name: str, tensor: Any, who: str) -> None:
    if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.is_nested:
        return
    what = type(tensor).__name__
    if isinstance(tensor, Tensor):
        what = "nested tensor" if tensor.is_nested else f"tensor of {str(tensor.dtype).removeprefix('torch.')}"
    raise ModelError(
        f"'{name}' of the {who} is a {what}, no plain floating point tensor. Outputs that a model gives only when asked need"
        " the argument in the batch; else compare Modules(...)."
    )


def _require_apart(student: nn.Module, teacher: nn.Module) -> None:
    theirs = {weight_key(parameter) for parameter in teacher.parameters()}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and weight_key(parameter) in theirs:
            raise ModelError(
                f"the teacher has the student's '{name}' and would learn along: give it weights of its own, as a"
                " copy.deepcopy of the model made before it is pruned has."
            )


def _require_memory(what: str, model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UnsupportedError(
                f"the {what}'s '{name}' is on the meta device and has no numbers: load its weights first."
            )


def _as_for(teacher: nn.Module, student: nn.Module, batch: Batch) -> Batch:
    """The batch on the teacher's device, and of its dtype where that differs from the student's."""
    device, dtype = device_of(teacher), dtype_of(teacher)
    return moved(batch, device if device != device_of(student) else None, dtype if dtype != dtype_of(student) else None)


@contextmanager
def _autocast_without_cache(device: str) -> Iterator[None]:
    """Weights that autocast has cast and kept are without gradients after a run without, and old after a step."""
    if not torch.is_autocast_enabled(device):
        yield
        return
    with torch.autocast(device, dtype=torch.get_autocast_dtype(device), cache_enabled=False):
        yield
