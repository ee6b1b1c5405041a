"""Keeps a state dict with other zeros from being loaded into a model whose masks are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import PatternError
from ..nn.survey import Layer

if TYPE_CHECKING:
    from .fixed import FixedMasks


class LoadGuard:
    """A pre-hook of `load_state_dict`. Copies and pickles of it, with those of the model, let everything pass.

    Args:
        masks: None lets everything pass.
        keys: of the module's state dict -> the layer whose weight is there.
    """

    def __init__(self, masks: FixedMasks | None, keys: Mapping[str, str]) -> None:
        self._masks = masks
        self._keys = keys

    def __call__(self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        if self._masks is None:
            return
        for key, name in self._keys.items():
            weight, dropped = state_dict.get(prefix + key), self._masks.dropped_of(name)
            if isinstance(weight, Tensor) and weight.shape == dropped.shape:  # other shapes torch refuses itself
                require_zeros(
                    name,
                    weight,
                    dropped,
                    "Nothing was loaded. For a checkpoint with other masks: remove() these, load it, and keep_masks again.",
                )

    def __deepcopy__(self, _: object) -> LoadGuard:
        return LoadGuard(None, {})

    def __reduce__(self) -> tuple[type[LoadGuard], tuple[None, dict[str, str]]]:
        return (LoadGuard, (None, {}))


def guard(model: nn.Module, masks: FixedMasks, layers: Mapping[str, Layer]) -> list[RemovableHandle]:
    """Guards on the model, before anything of it is loaded, and on every masked layer, for those loaded alone.

    The model then keeps `masks` alive.
    """
    handles = []
    for name, layer in layers.items():
        if layer.module is not model:
            own = LoadGuard(masks, {layer.attribute: name})
            handles.append(layer.module.register_load_state_dict_pre_hook(own))
    keys = {
        f"{path}.{layer.attribute}" if path else layer.attribute: name
        for name, layer in layers.items()
        for path in layer.names
    }
    handles.append(model.register_load_state_dict_pre_hook(LoadGuard(masks, keys)))
    return handles


def require_zeros(name: str, weight: Tensor, dropped: Tensor, way_out: str) -> None:
    """Raises PatternError where `weight` is not zero although `dropped` says so."""
    broken = (weight.detach().to(dropped.device) != 0) & dropped
    if bool(broken.any()):
        where = ", ".join(str(int(i)) for i in broken.nonzero()[0])
        raise PatternError(
            f"'{name}' is not zero at {int(broken.sum())} places that its mask drops, the first at [{where}]. {way_out}"
        )
