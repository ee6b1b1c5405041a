"""Looking into a model's forward: what layers are called with, modules that answer from memory, flags out of the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..errors import CalibrationError
from ..nn.inputs import evaluating
from ..nn.survey import Layer

Key = tuple[Any, ...]
"""Of a tensor that is alive: two that are the same have the same."""


class Reached(BaseException):
    """Ends a forward early: all that was asked for has been seen. No Exception, so that no model catches it."""


@contextmanager
def watching(layer: Layer, owner: nn.Module | None, look: Callable[[Layer, Tensor], None]) -> Iterator[None]:
    """`look` gets every input of `layer`. `owner`: the attention that reads the layer's weight without calling it."""

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen: list[Any] = []
        for x in _inputs(layer, args, kwargs):
            if not isinstance(x, Tensor) or x.is_nested:
                raise CalibrationError(f"'{layer.name}' was called with a {type(x).__name__}, not a plain tensor.")
            if not any(x is one for one in seen):
                seen.append(x)
                look(layer, x)

    inside = False

    def attended(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal inside
        if inside:
            return
        out = layer.module
        assert isinstance(out, nn.Linear)
        eye = torch.eye(out.in_features, dtype=out.weight.dtype, device=out.weight.device)
        replaced = {"out_proj.weight": eye}
        if out.bias is not None:
            replaced["out_proj.bias"] = torch.zeros_like(eye[0])
        inside = True
        try:  # what the projection would get is what comes out of one that changes nothing
            x = torch.func.functional_call(module, replaced, args, kwargs)[0]
        finally:
            inside = False
        look(layer, x)

    watched = layer.module if owner is None else owner
    handle = watched.register_forward_pre_hook(called if owner is None else attended, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _inputs(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """What a call multiplies with the weight: one input, or queries, keys and values for a packed projection."""
    if not isinstance(layer.module, nn.MultiheadAttention):
        return [args[0] if args else next(iter(kwargs.values()), None)]
    names = ("query", "key", "value")
    given = [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]
    if layer.attribute == "in_proj_weight":
        return given
    return [given[("q_proj_weight", "k_proj_weight", "v_proj_weight").index(layer.attribute)]]


@contextmanager
def replaced_by(module: nn.Module, answer: Callable[[], Any]) -> Iterator[None]:
    """`module` gives `answer()` in place of its forward."""
    with _with_forward(module, lambda *args, **kwargs: answer()):
        yield


@contextmanager
def replaced_once_by(module: nn.Module, answer: Callable[[], Any]) -> Iterator[None]:
    """The first call of `module` gives `answer()`; others run, for those may depend on what the first did not."""
    forward, first = module.forward, True

    def answered(*args: Any, **kwargs: Any) -> Any:
        nonlocal first
        if first:
            first = False
            return answer()
        return forward(*args, **kwargs)

    with _with_forward(module, answered):
        yield


@contextmanager
def _with_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A forward of the module's own, as accelerate's hooks set one, comes back."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def plainly(model: nn.Module) -> Iterator[None]:
    """eval(), no gradients; no cache of keys and values in transformers' decoders, no fused or nested attention."""
    found: dict[int, Any] = {id(config): config for m in model.modules() if (config := getattr(m, "config", None))}
    flags = [(config, config.use_cache) for config in found.values() if hasattr(config, "use_cache")]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for config, _ in flags:
            config.use_cache = False
        with evaluating(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for config, flag in flags:
            config.use_cache = flag


def identity(x: Tensor) -> Key:
    version = 0 if x.is_inference() else x._version
    return (x.device, x.data_ptr(), tuple(x.shape), x.stride(), x.dtype, version)


def copied(output: Any) -> Any:
    leaves, spec = tree_flatten(output)
    return tree_unflatten([leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


def fingerprint(arguments: Any) -> list[Any]:
    """Shapes and sums that two sets of arguments have in common only if their tensors are the same, bit for bit."""
    found: list[Any] = []
    for leaf in tree_leaves(arguments):
        if isinstance(leaf, Tensor):
            flat = leaf.detach().double().flatten()
            weights = torch.arange(1, flat.numel() + 1, dtype=torch.float64, device=flat.device).sin()
            flat = flat.nan_to_num(0.5, 3e9, -3e9)
            found.append((tuple(leaf.shape), leaf.dtype, float(flat.sum()), float((flat * weights).sum())))
        elif isinstance(leaf, (int, float, str, bool)) or leaf is None:
            found.append(leaf)
    return found
