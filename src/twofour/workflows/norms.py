"""How large each layer's inputs are, channel by channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..nn import observe
from ..nn.inputs import Batch
from ..nn.survey import Layer
from .blocks import Group
from .replay import Replay


def input_norms(model: nn.Module, layers: Sequence[Layer], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """float64 [input channels] by layer name: the root mean square of each input channel, over tokens that are real.

    Layers that no input reaches are missing. Places of a convolution's kernel count alike.

    Cost: about two forwards over the batches.
    """
    found: dict[str, Tensor] = {}
    replay = Replay(model, layers, batches)
    try:
        for group in replay.groups:
            norms = _norms(replay, group)
            found.update((layer.name, norms) for layer in group.layers)
            replay.finish(group)
    finally:
        replay.close()
    return found


def _norms(replay: Replay, group: Group) -> Tensor:
    layer = group.layers[0]
    channels = layer.weight.shape[layer.input_axis]
    squares = torch.zeros(channels, dtype=torch.float64, device=layer.weight.device)
    count = 0

    def take(x: Tensor, real: Tensor | None) -> None:
        nonlocal squares, count
        for tokens in observe.tokens(layer.module, x, real):
            rows = tokens.detach().reshape(-1, channels)
            squares += rows.double().square().sum(0)
            count += len(rows)

    replay.run(group, take)
    return (squares / max(1, count)).sqrt()
