"""What of two models is compared: terms, the pairs of tensors that they mean, and which tokens of these are real."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ModelError, ShapeError
from ...nn.inputs import Batch
from ...nn.survey import blocks_of, survey
from ...pattern import Pattern
from .losses import NAMED, Loss, kl_loss, mse_loss, relative_loss

Mask = str | Callable[[Batch], Tensor | None] | None
PADDING = "attention_mask"

RESERVED = ("step", "seconds", "lr", "loss")
"""Keys of a report's rows beside the terms."""

Pairs = list[tuple[str, Tensor]]
"""What one model gave for a term: name and tensor, in order."""


@dataclass(frozen=True)
class Outputs:
    """Compares something of what the model returns.

    Args:
        name: an attribute, key or index of the output: "logits", "last_hidden_state", "sentence_embedding", "0"; with dots
            for what lies deeper; "" is the output itself. A tuple of tensors, as "hidden_states", counts as their mean.
        loss: "kl", "relative", "cosine", "mse", or a function (student, teacher, mask) -> one number, such as
            `functools.partial(kl_loss, temperature=2)`.
        weight: what the loss is multiplied by in the sum.
        mask: which tokens are real: the name of an argument of the model [batch, tokens], or a function of the batch. An
            "attention_mask" that no batch has is none; None counts all.
    """

    name: str
    loss: str | Loss = "relative"
    weight: float = 1.0
    mask: Mask = PADDING


@dataclass(frozen=True)
class Modules:
    """Compares what modules inside the model return: of each call the first tensor. The mean over all of them counts.

    Args:
        names: shell wildcards over module names; the student's modules are compared with the teacher's of the same names.
            What no forward calls is left out.
        loss, weight, mask: as of `Outputs`.
        label: its name in parts and reports; None: the wildcards.
    """

    names: str | Sequence[str]
    loss: str | Loss = "relative"
    weight: float = 1.0
    mask: Mask = PADDING
    label: str | None = None

    @property
    def wildcards(self) -> tuple[str, ...]:
        """`names`, as a tuple."""
        return (self.names,) if isinstance(self.names, str) else tuple(self.names)


Term = Outputs | Modules


def checked(terms: Term | Iterable[Term]) -> tuple[Term, ...]:
    """The terms, as a tuple. Raises ModelError where one cannot be meant."""
    found = (terms,) if isinstance(terms, (Outputs, Modules)) else tuple(terms)
    if not found:
        raise ModelError("terms is empty: name at least one pair of tensors, or pass None for blocks and output.")
    for term in found:
        if not isinstance(term, (Outputs, Modules)):
            raise ModelError(f"{term!r} in terms: pass twofour.training.Outputs or Modules.")
        if isinstance(term.loss, str) and term.loss not in NAMED:
            raise ModelError(f"loss={term.loss!r}: there are {', '.join(NAMED)}; or pass a function of your own.")
        if not math.isfinite(term.weight) or term.weight <= 0:
            raise ModelError(
                f"weight={term.weight} of '{label_of(term)}': it must be above 0. Leave out what is not to count."
            )
        if isinstance(term, Modules) and not term.wildcards:
            raise ModelError("Modules of no names: pass shell wildcards over module names, as '*.layer.*.output'.")
    return found


def label_of(term: Term) -> str:
    """Its name in parts and reports."""
    if isinstance(term, Outputs):
        return term.name or "output"
    return term.label or ", ".join(term.wildcards)


def labels_of(terms: Sequence[Term]) -> list[str]:
    """Names of the terms, each once."""
    labels: list[str] = []
    for term in terms:
        count = sum(label_of(other) == label_of(term) for other in terms[: len(labels)]) + (label_of(term) in RESERVED)
        labels.append(f"{label_of(term)} {count + 1}" if count else label_of(term))
    return labels


def default_terms(model: nn.Module, output: Any) -> tuple[Term, ...]:
    """Blocks and output of a model that gives `output`, see `Distillation`."""
    layers = [layer for layer in survey(model, Pattern.parse("2:4")) if layer.skip is None]
    blocks = tuple(dict.fromkeys(block for _, block in blocks_of(model, layers).values()))
    terms: list[Term] = [Modules(blocks, _of_block, label="blocks")] if blocks else []
    terms += _default_outputs(output)
    if not terms:
        raise ModelError(
            f"the model has no blocks, and returns a {type(output).__name__} in which nothing is known: name what is to be"
            " compared in terms=, as Outputs('logits', 'kl')."
        )
    return tuple(terms)


def _default_outputs(output: Any) -> list[Term]:
    if isinstance(output, Tensor):
        return [Outputs("", _of_output)]
    if isinstance(output, Mapping):
        logits = [key for key, value in output.items() if str(key).endswith("logits") and isinstance(value, Tensor)]
        if logits:
            return [Outputs(key, _of_logits) for key in logits]
        for key in ("sentence_embedding", "last_hidden_state"):
            if isinstance(output.get(key), Tensor):
                return [Outputs(key)]
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return [Outputs("0", _of_output)]
    return []


def _of_block(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Relative, of tokens; of whole images, whose axis of channels may be any, where there are four axes or more."""
    if student.ndim <= 3 or mask is not None or student.shape != teacher.shape:
        return relative_loss(student, teacher, mask)
    return relative_loss(student, teacher, dim=tuple(range(1, student.ndim)))


def _of_output(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    if student.ndim < 2:
        return mse_loss(student.reshape(-1, 1), teacher.reshape(-1, 1))
    if student.shape[-1] == 1:  # which may be near zero
        return mse_loss(student, teacher, mask)
    return _of_block(student, teacher, mask)


def _of_logits(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    if student.shape[-1] == 1:  # a regression
        return mse_loss(student, teacher, mask)
    return kl_loss(student, teacher, mask, dim=-1 if student.ndim <= 3 else 1)  # of images the classes come first


def loss_of(term: Term, label: str, student: Pairs, teacher: Pairs, batch: Batch, named: Mapping[str, Any]) -> Tensor:
    """A term's loss, without its weight: the mean over its pairs.

    Args:
        named: the batch's arguments, by name.
    """
    if [name for name, _ in student] != [name for name, _ in teacher]:
        odd = sorted({name for name, _ in student} ^ {name for name, _ in teacher}) or [student[0][0]]
        raise ModelError(
            f"'{label}' is {len(student)} tensors of the student and {len(teacher)} of the teacher: '{odd[0]}' was not given as"
            " often by both. Only models of one structure can be compared tensor by tensor: name others in terms=."
        )
    loss = NAMED[term.loss] if isinstance(term.loss, str) else term.loss
    mask = _mask_of(term, label, batch, named)
    losses = []
    for (name, mine), (_, theirs) in zip(student, teacher, strict=True):
        try:
            one = loss(mine, theirs.to(mine.device), None if mask is None else _fitting(mask, mine))
        except ShapeError as error:
            raise ShapeError(f"'{name}': {error}") from None
        if not isinstance(one, Tensor) or one.numel() != 1:
            what = list(one.shape) if isinstance(one, Tensor) else f"a {type(one).__name__}"
            raise ModelError(f"the loss of '{label}' gives {what}: it must give a tensor with one number.")
        losses.append(one.reshape(()))
    return torch.stack(losses).mean()


def _mask_of(term: Term, label: str, batch: Batch, named: Mapping[str, Any]) -> Tensor | None:
    if term.mask is None:
        return None
    mask = term.mask(batch) if callable(term.mask) else _search(named, term.mask)
    if mask is None:
        if isinstance(term.mask, str) and term.mask != PADDING:
            raise ModelError(
                f"the batch has no {term.mask!r}, the mask of '{label}': it has {', '.join(named) or 'no names'}."
            )
        return None
    if not isinstance(mask, Tensor) or (mask.is_floating_point() and not bool(((mask == 0) | (mask == 1)).all())):
        what = "numbers other than 0 and 1" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ModelError(
            f"the mask of '{label}' is {what}: pass mask= a function of the batch that gives True for what is real."
        )
    return mask != 0


def _fitting(mask: Tensor, tensor: Tensor) -> Tensor | None:
    """The mask for the tokens of `tensor`; None where it has one row per sequence."""
    if mask.shape == tensor.shape[:-1]:
        return mask
    if tensor.ndim == 3 and mask.ndim > 2 and mask.flatten(0, -2).shape == tensor.shape[:2]:
        return mask.flatten(0, -2)  # choices, which the model takes for sequences
    if tensor.ndim <= 2 and mask.ndim >= 2:
        return mask.flatten() if tensor.ndim == 2 and len(tensor) == mask.numel() != len(mask) else None
    raise ShapeError(
        f"the mask {list(mask.shape)} does not say which tokens of {list(tensor.shape)} are real. Give the term another, as"
        " mask='decoder_attention_mask' or a function of the batch, or mask=None where all are."
    )


def _search(part: Any, name: str) -> Any:
    """The first value called `name` in a batch."""
    if isinstance(part, Mapping):
        if name in part:
            return part[name]
        part = tuple(part.values())
    if isinstance(part, (tuple, list)):
        return next((found for one in part if (found := _search(one, name)) is not None), None)
    return None


def by_name(model: nn.Module, batch: Batch) -> Mapping[str, Any]:
    """A batch's arguments by name, also where they are given by place."""
    if isinstance(batch, Mapping):
        return batch
    arguments = batch if isinstance(batch, tuple) else (batch,)
    try:
        return inspect.signature(model.forward).bind_partial(*arguments).arguments
    except (TypeError, ValueError):
        return {"": batch}


def moved(part: Any, device: torch.device | None, dtype: torch.dtype | None) -> Any:
    """A copy of the containers; of the tensors only where they move."""
    if isinstance(part, Tensor):
        return part.to(device=device, dtype=dtype if part.is_floating_point() else None)
    if isinstance(part, Mapping):
        return {key: moved(value, device, dtype) for key, value in part.items()}
    if type(part) in (tuple, list):
        return type(part)(moved(value, device, dtype) for value in part)
    return part


def device_of(model: nn.Module) -> torch.device:
    """Of the first parameter; the CPU where there is none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """Of the first floating point parameter."""
    return next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in the wrappers that train it in parallel, whose names are the teacher's."""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    return model
