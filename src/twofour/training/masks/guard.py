"""Keeps a state dict with other zeros from being loaded into a model whose masks are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...errors import PatternError

if TYPE_CHECKING:
    from .fixed import FixedMasks

_NOT_LOADED = "It was not loaded. For a checkpoint with other masks: remove() these, load it, and keep_masks again."
_IN_PLACE = (
    "It is in the model already: it was written into the weights themselves, as torch.distributed.checkpoint.load does, and"
    " set_model_state_dict with broadcast_from_rank0. Load the checkpoint that these masks belong to; for one with other masks"
    " remove() these before, and keep_masks again."
)


class LoadGuard:
    """A pre-hook of `load_state_dict`. Copies and pickles of it, with those of the model, let everything pass.

    Args:
        masks: None lets everything pass.
        keys: of the module's state dict -> the layer whose weight is there.
    """

    def __init__(self, masks: FixedMasks | None, keys: Mapping[str, str]) -> None:
        self.masks = masks
        self._keys = keys

    def __call__(self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        if self.masks is None:
            return
        self.masks.put_back()
        for key, name in self._keys.items():
            weight, kept = state_dict.get(prefix + key), self.masks.named(name)
            # Other shapes torch refuses itself; a layer that was replaced has no mask any more.
            if not isinstance(weight, Tensor) or weight.shape != kept.shape or weight.is_meta:
                continue
            if _at(module, key) is kept.weight and (broken := kept.not_zero(weight)) is not None:
                raise PatternError(f"{broken} {_IN_PLACE if kept.is_same_memory(weight) else _NOT_LOADED}")

    def __deepcopy__(self, _: object) -> LoadGuard:
        return LoadGuard(None, {})

    def __reduce__(self) -> tuple[type[LoadGuard], tuple[None, dict[str, str]]]:
        return (LoadGuard, (None, {}))


def guard(model: nn.Module, masks: FixedMasks, weights: Mapping[str, Tensor]) -> list[RemovableHandle]:
    """Guards on every module above a masked weight, under all names it has: before anything below it is loaded.

    The model then keeps `masks` alive.
    """
    names = {id(weight): name for name, weight in weights.items()}
    handles = []
    for module in model.modules():
        keys = {
            key: names[id(weight)]
            for key, weight in module.named_parameters(remove_duplicate=False)
            if id(weight) in names
        }
        if keys:
            handles.append(module.register_load_state_dict_pre_hook(LoadGuard(masks, keys)))
    return handles


def masks_on(model: nn.Module) -> FixedMasks | None:
    """The masks that guard `model` or a part of it; None where there are none."""
    for module in model.modules():
        for hook in module._load_state_dict_pre_hooks.values():
            found = getattr(hook, "hook", hook)
            if isinstance(found, LoadGuard) and found.masks is not None:
                return found.masks
    return None


def _at(module: nn.Module, key: str) -> object:
    place: object = module
    for part in key.split("."):
        place = getattr(place, part, None)
    return place
