"""Model inputs as users have them: a tensor, a tuple, a dict, or several of these."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import CalibrationError, DeviceError, ModelError

Batch = Any
"""One call's arguments: a tensor (one argument), a tuple (positional), a mapping (by name)."""


def batches(inputs: Batch | Iterable[Batch]) -> list[Batch]:
    """`inputs` as a list of batches: one tensor, tuple or mapping is one batch, anything else is iterated.

    Raises:
        ModelError: no batch, or something that is no batch.
    """
    if isinstance(inputs, (Tensor, tuple, Mapping)):
        return [inputs]
    if isinstance(inputs, (str, bytes)) or not isinstance(inputs, Iterable):
        raise ModelError(
            f"inputs is a {type(inputs).__name__}: pass a tensor, a tuple of arguments, a dict of named arguments, or a"
            " list of these."
        )
    found = list(inputs)
    if not found:
        raise ModelError("inputs is empty: pass at least one batch.")
    for batch in found:
        if not isinstance(batch, (Tensor, tuple, Mapping)):
            raise ModelError(f"inputs holds a {type(batch).__name__}: a batch is a tensor, a tuple or a dict.")
    return found


def call(model: nn.Module, batch: Batch) -> Any:
    """model(*batch), model(**batch) or model(batch)."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple):
        return model(*batch)
    return model(batch)


def tensors_in(batch: Batch) -> list[Tensor]:
    """The tensors of a batch, in order; dicts and tuples are looked into."""
    leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


@contextmanager
def accepting(
    model: nn.Module,
    batch: Batch,
    what: str = "inputs",
    error: type[ModelError | CalibrationError] = ModelError,
    who: str = "the model",
) -> Iterator[None]:
    """Inside, `model` is called with `batch`, one of its `what`: where it fails, an `error` tells what it got."""
    try:
        yield
    except (CalibrationError, DeviceError):
        raise
    except Exception as reason:
        given = ", ".join(f"{list(x.shape)} {_name(x.dtype)} on {x.device}" for x in tensors_in(batch)) or "no tensor"
        own = next((x for x in (*model.parameters(), *model.buffers()) if x.is_floating_point()), None)
        weights = "" if own is None else f"; the weights are {_name(own.dtype)} on {own.device}"
        raise error(
            f"{who} fails on the {what}: {type(reason).__name__}: {str(reason).rstrip('.')}. It got {given}{weights}."
            " Pass what the model can be called with. Nothing was changed."
        ) from reason


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def real_tokens(batch: Batch) -> dict[str, Tensor]:
    """Attention masks [batch, tokens] inside a batch's mappings, by name, as bool."""
    found: dict[str, Tensor] = {}

    def search(part: Any) -> None:
        if isinstance(part, Mapping):
            for name, value in part.items():
                if isinstance(value, Tensor) and str(name).endswith("attention_mask") and value.ndim == 2:
                    found[str(name)] = value != 0
                else:
                    search(value)
        elif isinstance(part, (tuple, list)):
            for value in part:
                search(value)

    search(batch)
    return found


def mask_of(real: Mapping[str, Tensor], layer: str, x: Tensor) -> Tensor | None:
    """The mask of `real_tokens` for the sequence that `x`, an input of `layer`, is: by shape, and by name where encoder and
    decoder have the same."""
    fitting = {name: mask for name, mask in real.items() if x.ndim == 3 and mask.shape == x.shape[:2]}
    in_decoder = "decoder" in layer.split(".")
    for name, mask in fitting.items():
        if name.startswith("decoder") == in_decoder:
            return mask
    return next(iter(fitting.values()), None)


def output_tensors(output: Any) -> list[Tensor]:
    """The floating point tensors of a model's output, in order; transformers' outputs and dicts are looked into."""
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """eval() and no gradients inside; each module's own training flag comes back afterwards."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training
