"""The survey of a model: every layer with a weight matrix, and what may be done with it, or why not."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..pattern import Pattern
from .linear import SparseLinear
from .observe import is_transposed
from .swap import why_not_swappable

HEAD_NAMES = ("lm_head", "classifier", "score", "head", "qa_outputs", "output_projection")
"""Last part of a module's name that marks an output head, with all that is inside it.

What transformers calls output embeddings is one too.
"""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Layer:
    """One weight of one module.

    Args:
        name: the module's name; "in_proj_weight" and its like are appended for weights that are not called "weight".
        names: all names of the module, when it is used under several.
        module: the module.
        kind: its class name.
        attribute: the weight's attribute name.
        input_axis: the axis of the weight that groups run along.
        skip: why the weight cannot be pruned, or None.
        keep_dense: why the layer cannot run compressed although its weight may hold the pattern, or None.
    """

    name: str
    names: tuple[str, ...]
    module: nn.Module
    kind: str
    attribute: str
    input_axis: int
    skip: str | None = None
    keep_dense: str | None = None

    @property
    def weight(self) -> Tensor:
        """The parameter (not for SparseLinear)."""
        weight = getattr(self.module, self.attribute)
        assert isinstance(weight, Tensor)
        return weight

    @property
    def is_compressed(self) -> bool:
        """True for a SparseLinear."""
        return isinstance(self.module, SparseLinear)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight; () while a lazy layer has none."""
        if isinstance(self.module, SparseLinear):
            return (self.module.out_features, self.module.in_features)
        return () if isinstance(self.weight, nn.UninitializedParameter) else tuple(self.weight.shape)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weight."""
        return self.module.weight.dtype if isinstance(self.module, SparseLinear) else self.weight.dtype

    def identity(self) -> dict[str, Any]:
        """The keys that begin every report's row: layer, kind, shape, dtype, weights (how many)."""
        return {
            "layer": self.name or "(model)",
            "kind": self.kind,
            "shape": "x".join(map(str, self.shape)),
            "dtype": dtype_name(self.dtype),
            "weights": math.prod(self.shape) if self.shape else 0,
        }


def survey(
    model: nn.Module,
    pattern: Pattern | None,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    *,
    skip_heads: bool = True,
) -> list[Layer]:
    """All layers of `model` with a weight of two or more axes, in the model's order, with reasons where they are left.

    Args:
        pattern: what the weights' shapes have to fit; None: any shape will do.
        include: shell wildcards over module names; only matching layers are worked on (an output head too).
        exclude: shell wildcards over module names; matching layers are left alone.
        skip_heads: leave output heads alone unless they are included.
    Raises:
        ModelError: not a module, or a wildcard that matches no layer.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"a {type(model).__name__} is not a model: pass a torch.nn.Module.")
    include, exclude = _wildcards(include), _wildcards(exclude)
    found = _find(model)
    _require_matches(found, include, "include")
    _require_matches(found, exclude, "exclude")
    heads = _output_heads(model) if skip_heads else set()
    layers = []
    for layer in found:
        skip = layer.skip
        if _matches(layer, exclude):
            skip = "excluded"
        elif include and not _matches(layer, include):
            skip = "not included"
        elif skip is None and not include and layer.module in heads:
            skip = "output head (name it in include= to prune it)"
        elif skip is None and not layer.is_compressed:
            skip = _why_not(layer, pattern)
        layers.append(replace(layer, skip=skip))
    return _respect_sharing(layers)


def is_linear_like(layer: Layer) -> bool:
    """True where a SparseLinear could take the place of the layer, or already has."""
    return isinstance(layer.module, (nn.Linear, SparseLinear)) and layer.attribute == "weight"


def names_of(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Every module of `model` with all the names it has."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return {module: tuple(all_names) for module, all_names in names.items()}


def blocks_of(model: nn.Module, layers: Sequence[Layer]) -> dict[str, tuple[str, str]]:
    """Layer name -> (chain, block): the outermost child of a ModuleList or Sequential it lives in, where that has several."""
    modules = dict(model.named_modules())
    found: dict[str, tuple[str, str]] = {}
    for layer in layers:
        parts = layer.name.split(".")
        for depth in range(len(parts) - 1):
            chain = ".".join(parts[:depth])
            name = ".".join(parts[: depth + 1])
            container, child = modules.get(chain), modules.get(name)
            if isinstance(container, (nn.ModuleList, nn.Sequential)) and isinstance(child, nn.Module):
                inside = {
                    other.name.split(".")[depth]
                    for other in layers
                    if other.name.startswith(f"{chain}." if chain else "")
                }
                if len(inside) > 1:
                    found[layer.name] = (chain, name)
                    break
    return found


def _find(model: nn.Module) -> list[Layer]:
    in_attention: dict[nn.Module, str] = {}
    layers: list[Layer] = []
    for module, names in names_of(model).items():
        name = names[0]
        kind = type(module).__name__
        if isinstance(module, nn.MultiheadAttention):
            in_attention[module.out_proj] = name
            reason = "nn.MultiheadAttention reads its packed projection itself: prunable, but it cannot run compressed"
            for attribute in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                if isinstance(getattr(module, attribute, None), Tensor):
                    path = f"{name}.{attribute}" if name else attribute
                    skip = _why_computed(module, attribute)
                    layers.append(Layer(path, names, module, kind, attribute, 1, skip=skip, keep_dense=reason))
        elif isinstance(module, SparseLinear):
            layers.append(Layer(name, names, module, kind, "weight", 1))
        elif isinstance(module, (nn.Linear, *_CONVOLUTIONS)) and not isinstance(
            getattr(module, "weight", None), Tensor
        ):
            continue
        elif isinstance(module, nn.Linear):
            if (skip := _why_computed(module, "weight")) is not None:
                layers.append(Layer(name, names, module, kind, "weight", 1, skip=skip))
                continue
            keep_dense = why_not_swappable(module)
            if module in in_attention:
                keep_dense = f"nn.MultiheadAttention '{in_attention[module]}' reads its weight without calling it"
            layers.append(Layer(name, names, module, kind, "weight", 1, keep_dense=keep_dense))
        elif isinstance(module, _CONVOLUTIONS) and not isinstance(module, _TRANSPOSED):
            skip = f"grouped convolution (groups={module.groups})" if module.groups != 1 else None
            skip = _why_computed(module, "weight") or skip
            layers.append(
                Layer(name, names, module, kind, "weight", 1, skip=skip, keep_dense="no kernel for convolutions yet")
            )
        elif is_transposed(module):
            reason = "transformers' Conv1D holds its weight as [in, out]: no compressed twin yet"
            skip = _why_computed(module, "weight")
            layers.append(Layer(name, names, module, kind, "weight", 0, skip=skip, keep_dense=reason))
        else:
            for attribute, parameter in module.named_parameters(recurse=False):
                if parameter.ndim >= 2:
                    path = name if attribute == "weight" else f"{name}.{attribute}" if name else attribute
                    layers.append(
                        Layer(path, names, module, kind, attribute, 1, skip=_foreign_reason(module, parameter))
                    )
    return layers


def _why_computed(module: nn.Module, attribute: str) -> str | None:
    """Why changing the weight would be undone at the next call; None where it is a parameter."""
    if nn.utils.parametrize.is_parametrized(module, attribute):
        return "its weight is parametrized (computed from others)"
    if attribute not in module._parameters:  # legacy hooks keep it as a plain attribute
        return (
            "its weight is recomputed by a hook: call torch.nn.utils.remove_weight_norm, remove_spectral_norm or"
            " torch.nn.utils.prune.remove first"
        )
    return None


def _foreign_reason(module: nn.Module, parameter: Tensor) -> str:
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if isinstance(module, _TRANSPOSED):
        return "transposed convolution"
    return f"{type(module).__name__} is not a Linear or convolution"


def weight_key(weight: Tensor) -> Hashable:
    """Equal for weights that are the same numbers in the same memory, also by way of different Parameter objects."""
    if not _has_memory(weight):
        return id(weight)
    return (weight.device, weight.data_ptr(), tuple(weight.shape), weight.stride(), weight.dtype)


def sharing(layers: Iterable[Layer], owners: Iterable[Layer]) -> dict[str, Layer]:
    """Names of those `layers` whose weight has memory in common with a weight of `owners` -> that owner."""
    by_object: dict[int, Layer] = {}
    by_storage: dict[tuple[torch.device, int], list[tuple[int, int, Layer]]] = {}
    for owner in owners:
        if owner.is_compressed:
            continue
        by_object.setdefault(id(owner.weight), owner)
        if (place := _place(owner.weight)) is not None:
            by_storage.setdefault(place[0], []).append((*place[1], owner))
    found: dict[str, Layer] = {}
    for layer in layers:
        if layer.is_compressed:
            continue
        match = by_object.get(id(layer.weight))
        if match is None and (place := _place(layer.weight)) is not None:
            start, end = place[1]
            # Ranges, not storages alone: many parameters may be cut from one flat buffer.
            match = next((o for first, last, o in by_storage.get(place[0], ()) if first < end and start < last), None)
        if match is not None:
            found[layer.name] = match
    return found


def _place(weight: Tensor) -> tuple[tuple[torch.device, int], tuple[int, int]] | None:
    """A weight's storage, and the bytes from its first to its last element; None without memory."""
    if not _has_memory(weight):
        return None
    start = weight.data_ptr()
    last = sum((size - 1) * step for size, step in zip(weight.shape, weight.stride(), strict=True))
    return (weight.device, weight.untyped_storage().data_ptr()), (start, start + (last + 1) * weight.itemsize)


def _has_memory(weight: Tensor) -> bool:
    """False where a weight is nowhere yet, or is a wrapper (DTensor) around memory that it does not name."""
    return not (weight.is_meta or isinstance(weight, nn.UninitializedParameter)) and weight.data_ptr() != 0


def _respect_sharing(layers: list[Layer]) -> list[Layer]:
    """A weight that is shared with a layer that must not change must not change either."""
    owners = sharing(
        [layer for layer in layers if layer.skip is None], [layer for layer in layers if layer.skip is not None]
    )
    return [
        replace(layer, skip=f"weight is shared with '{owner.name}' ({owner.kind}), which is left as it is")
        if layer.skip is None and (owner := owners.get(layer.name)) is not None
        else layer
        for layer in layers
    ]


def _why_not(layer: Layer, pattern: Pattern | None) -> str | None:
    weight = layer.weight
    if isinstance(weight, nn.UninitializedParameter):
        return "lazy: run the model once before"
    if weight.is_meta:
        return "weight is on the meta device: load it first"
    if not weight.dtype.is_floating_point:
        return f"weight is {str(weight.dtype).removeprefix('torch.')}, not floating point"
    if pattern is None:
        return None if weight.numel() else "weight is empty"
    return why_shape_not(layer, pattern)


def why_shape_not(layer: Layer, pattern: Pattern) -> str | None:
    """Why a layer, dense or compressed, is of no shape for `pattern`; None where it fits."""
    shape = layer.shape
    channels = shape[layer.input_axis]
    if channels % pattern.group:
        axis = "in_features" if len(shape) == 2 else "input channels"
        return f"{axis} {channels} is not a multiple of {pattern.group}"
    if math.prod(shape) == 0:
        return "weight is empty"
    rows_needed = pattern.group if pattern.transposable else pattern.rows
    if rows_needed > 1 and (len(shape) != 2 or layer.input_axis != 1):
        return f"{pattern} is for weights [out_features, in_features]"
    if rows_needed > 1 and shape[0] % rows_needed:
        return f"out_features {shape[0]} is not a multiple of {rows_needed}"
    return None


def _output_heads(model: nn.Module) -> set[nn.Module]:
    found = {module for name, module in model.named_modules() if name.rpartition(".")[2] in HEAD_NAMES}
    for module in model.modules():
        output_embeddings = getattr(module, "get_output_embeddings", None)
        if callable(output_embeddings):
            try:
                head = output_embeddings()
            except (AttributeError, NotImplementedError):  # transformers raises these for models without a head
                continue
            if isinstance(head, nn.Module):
                found.add(head)
    return {part for head in found for part in head.modules()}


def _wildcards(patterns: Iterable[str] | str | None) -> tuple[str, ...]:
    if patterns is None:
        return ()
    found = (
        (patterns,) if isinstance(patterns, str) else tuple(patterns) if isinstance(patterns, Iterable) else (patterns,)
    )
    for wildcard in found:
        if not isinstance(wildcard, str):
            raise ModelError(
                f"{wildcard!r} in include= or exclude=: pass shell wildcards over layer names, as '*.mlp.*'."
            )
    return found


def _matches(layer: Layer, wildcards: Sequence[str]) -> bool:
    return any(fnmatchcase(name, wildcard) for wildcard in wildcards for name in (layer.name, *layer.names))


def _require_matches(layers: list[Layer], wildcards: Sequence[str], argument: str) -> None:
    for wildcard in wildcards:
        if not any(_matches(layer, [wildcard]) for layer in layers):
            examples = ", ".join(f"'{layer.name}'" for layer in layers[:3]) or "none with a weight matrix"
            raise ModelError(f"{argument}={wildcard!r} matches no layer. The layers are called {examples} ...")


def dtype_name(dtype: torch.dtype) -> str:
    """float32, bfloat16, ..."""
    return str(dtype).removeprefix("torch.")
