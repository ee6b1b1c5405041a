"""The loss that a model or its user computes, without a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ModelError
from ...nn.inputs import Batch, call, evaluating
from ..distillation.terms import device_of, moved

Loss = Callable[[nn.Module, Batch], Tensor]
"""The loss of a model on a batch: a tensor of one number, with its gradient."""


class Supervised:
    """The loss of a model on batches with labels.

    Args:
        model: what is trained.
        loss: computes it; None: what the model itself returns as `loss`, as those of transformers do for batches with
            `labels`.
    """

    def __init__(self, model: nn.Module, loss: Loss | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise ModelError(f"a {type(model).__name__} is not a model: pass a torch.nn.Module.")
        if loss is not None and not callable(loss):
            raise ModelError(f"loss is a {type(loss).__name__}: pass a function of the model and a batch, or None.")
        self._model, self._loss = model, loss

    @property
    def labels(self) -> list[str]:
        """The loss has no parts."""
        return []

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, on any device.

        Raises:
            ModelError: there is none, it is not one number, or nothing that is trained takes part in it.
        """
        batch = moved(tuple(batch) if isinstance(batch, list) else batch, device_of(self._model), None)
        found: Any
        if self._loss is not None:
            found = self._loss(self._model, batch)
        else:
            output = call(self._model, batch)
            found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
            if found is None:
                raise ModelError(
                    f"the {type(self._model).__name__} returned no loss for this batch: give it batches with labels, a loss= of"
                    " your own, or a teacher."
                )
        if not isinstance(found, Tensor) or found.numel() != 1 or not found.is_floating_point():
            what = f"tensor of {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ModelError(f"the loss is a {what}: it must be one floating point number in a tensor.")
        if torch.is_grad_enabled() and not found.requires_grad:
            raise ModelError("the loss has no gradient: no parameter that is trained takes part in it. Unfreeze some.")
        return found.squeeze(), {}

    def evaluate(self, inputs: Batch | Iterable[Batch]) -> float:
        """The mean loss over batches, in eval mode and without gradients; each batch counts alike."""
        several = [inputs] if isinstance(inputs, (Tensor, tuple, Mapping)) else inputs
        with evaluating(self._model):
            losses = [float(self.loss(batch)[0]) for batch in several]
        if not losses:
            raise ModelError("no batch to take the mean loss of: pass at least one.")
        return sum(losses) / len(losses)
