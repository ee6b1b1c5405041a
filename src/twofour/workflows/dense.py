"""The dense model beside the pruned one: what each layer's inputs would be if nothing had been pruned before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from ..errors import CalibrationError
from ..nn.survey import Layer
from .replay import Replay

Seen = tuple[Tensor, Tensor | None]
"""An input of a layer, and which of its tokens are real."""

Steps = Callable[[list[Seen]], Iterator[None]]
"""Steps through the batches, each step adding the inputs of one batch to the list."""


class DenseInputs:
    """Replays the model with its old weights, which take their places back for each step only.

    One copy is kept of the old weights of layers that may still run: those of the block at work, or of all that is
    pruned where the model has no blocks.

    Args:
        replay: of its own, made before anything was pruned.
        beside: the replay of the pruned model, with the same groups of layers.
    Raises:
        CalibrationError: the model called its layers otherwise the second time.
    """

    def __init__(self, replay: Replay, beside: Replay) -> None:
        names = [[[layer.name for layer in group.layers] for group in one.groups] for one in (replay, beside)]
        if names[0] != names[1]:
            raise CalibrationError(
                "the model calls its layers in another order each time it runs on the same inputs, so that a dense model"
                " beside it cannot be followed: pass method=Recipe(targets='pruned'). Nothing was changed."
            )
        self.replay = replay
        self._old: dict[str, tuple[Layer, Tensor]] = {}
        self._group_of = {layer.name: group for group in replay.groups for layer in group.layers}

    def remember(self, layer: Layer) -> None:
        """To be called before the weight of `layer` changes."""
        if layer.name not in self._old:
            self._old[layer.name] = (layer, layer.weight.detach().clone())

    def of(self, place: int) -> Steps:
        """The inputs of the group at `place`, batch by batch."""
        group = self.replay.groups[place]

        def steps(seen: list[Seen]) -> Iterator[None]:
            inner = self.replay.steps(group, lambda x, real: seen.append((x.detach().clone(), real)))
            while True:
                with self._old_weights():
                    if next(inner, _END) is _END:
                        break
                yield
            self._forget()

        return steps

    def finish(self, place: int) -> None:
        """As `Replay.finish`, of the group at `place`."""
        self.replay.finish(self.replay.groups[place])

    def close(self) -> None:
        """Gives everything back."""
        self.replay.close()
        self._old.clear()

    @contextmanager
    def _old_weights(self) -> Iterator[None]:
        new = {name: layer.weight.data for name, (layer, _) in self._old.items()}
        try:
            for layer, weight in self._old.values():
                layer.weight.data = weight
            yield
        finally:
            for name, (layer, _) in self._old.items():
                layer.weight.data = new[name]

    def _forget(self) -> None:
        """Weights of blocks that answer from memory are not needed any more."""
        for name in list(self._old):
            if not self.replay.needs(self._group_of[name]):
                del self._old[name]


_END = object()
