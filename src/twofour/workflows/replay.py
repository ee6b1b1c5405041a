"""Runs a model over calibration inputs again and again, a part at a time: blocks that are done answer from memory.

One-shot pruning wants each layer to see the pruned ones before it, so the inputs have to pass once for every layer. Whole
models would cost layers x model; here the model's own forward runs, but a block that is done returns what it returned the
last time, and the pass ends as soon as the layers asked for have been called.

That is right only where a block depends on those before it through the last of them alone. `Replay` finds the blocks
(children of a ModuleList or Sequential) and tries on the first batch whether each gets the same inputs, bit for bit,
when all before it answer from memory; if one does not, every pass runs the whole model up to the layers asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..errors import CalibrationError
from .inputs import Batch, call, evaluating, real_tokens
from .layers import Layer
from .spool import Spool

_Key = tuple[Any, ...]
Take = Callable[[Tensor, Tensor | None], None]
"""Called with the input of a layer, and which of its tokens are real (bool [batch, tokens], or None)."""


@dataclass
class Group:
    """Layers that multiply the same input: they share one Hessian.

    Args:
        layers: in the order of their calls.
        block: the block they are in, or None.
        calls: how often each is called in a forward.
    """

    layers: list[Layer]
    block: _Block | None
    calls: int = 1


@dataclass(eq=False)
class _Block:
    """One child of a chain, such as a transformer's layer."""

    name: str
    chain: str
    module: nn.Module
    done: bool = False
    groups: list[Group] = field(default_factory=list)


class _Reached(BaseException):
    """Ends a forward early: all that was asked for has been seen. No Exception, so that no model catches it."""


class Replay:
    """Passes of `model` over `batches`.

    Args:
        layers: those whose inputs will be asked for.
        memory_limit: bytes of activations kept in memory between passes; more goes to a temporary file.
    Raises:
        whatever the model raises on its inputs. The model is in eval mode, without gradients, inside each call only.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], batches: Sequence[Batch], memory_limit: int | None = None
    ) -> None:
        self.model = model
        self.batches = batches
        self.notes: list[str] = []
        self._spool = Spool(memory_limit)
        self._last: dict[str, _Block] = {}
        self._owners: dict[nn.Module, nn.Module] = {
            m.out_proj: m for m in model.modules() if isinstance(m, nn.MultiheadAttention)
        }
        self.unreached: list[Layer] = []
        self.groups = self._trace(layers)
        blocks = {id(group.block): group.block for group in self.groups if group.block is not None}
        self._blocks: list[_Block] = list(blocks.values())
        if self._blocks and (reason := self._why_not_blockwise()) is not None:
            self.notes.append(f"every pass runs the whole model, because {reason}")
            for group in self.groups:
                group.block = None
            self._blocks = []

    def close(self) -> None:
        """Gives the kept activations back."""
        self._spool.close()

    def run(self, group: Group, take: Take) -> int:
        """Calls `take` with every input of `group`, batch by batch. Returns how many tensors were taken."""
        taken = 0
        passed = self._passed()
        ahead = self._ahead(passed)
        with _plainly(self.model):
            for index, batch in enumerate(self.batches):
                real = real_tokens(batch)
                seen: dict[_Key, Tensor] = {}
                calls = 0

                def look(
                    layer: Layer, x: Tensor, real: Any = real, seen: dict[_Key, Tensor] = seen, index: int = index
                ) -> None:
                    nonlocal calls, taken
                    calls += 1
                    if (key := _key(x)) not in seen:
                        seen[key] = x
                        taken += 1
                        take(x, _matching(real, layer, x))
                    if group.calls == 1 and calls == len(group.layers):
                        raise _Reached

                with ExitStack() as stack:
                    for block in passed:
                        kept = (self._last[block.chain].name, index)
                        stack.enter_context(_replaced(block.module, partial(self._spool.get, kept)))
                    for block in ahead:
                        stack.enter_context(self._keep_output(block, index))
                    for layer in group.layers:
                        stack.enter_context(_watching(layer, self._owners.get(layer.module), look))
                    with suppress(_Reached):
                        call(self.model, batch)
        for block in ahead:
            self._settle(block)
        return taken

    def finish(self, group: Group) -> None:
        """Says that the layers of `group` will not change any more."""
        block = group.block
        if block is not None:
            block.groups.remove(group)
            block.done = not block.groups

    def _passed(self) -> list[_Block]:
        """Blocks that answer from memory: up to the last kept one of each chain."""
        passed: list[_Block] = []
        for chain, last in self._last.items():
            own = [block for block in self._blocks if block.chain == chain]
            passed += own[: own.index(last) + 1]
        return passed

    def _ahead(self, passed: Sequence[_Block]) -> list[_Block]:
        """Blocks that are done, with all before them in their chain, and whose outputs are not kept yet."""
        ahead: list[_Block] = []
        stopped: set[str] = set()
        for block in self._blocks:
            if not block.done:
                stopped.add(block.chain)
            elif block.chain not in stopped and block not in passed:
                ahead.append(block)
        return ahead

    @contextmanager
    def _keep_output(self, block: _Block, index: int) -> Iterator[None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._spool.put((block.name, index), output)

        handle = block.module.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def _settle(self, block: _Block) -> None:
        """From now on the chain of `block` answers with its outputs."""
        old = self._last.get(block.chain)
        self._last[block.chain] = block
        if old is not None:
            for index in range(len(self.batches)):
                self._spool.drop((old.name, index))

    def _trace(self, layers: Sequence[Layer]) -> list[Group]:
        """One forward, or more until every layer was reached: what is called when, and who shares an input."""
        calls: dict[str, list[_Key]] = {}
        order: list[Layer] = []
        block_calls: dict[str, int] = {}
        blocks = _find_blocks(self.model, layers)
        kept: list[Tensor] = []  # so that no memory is given to a second tensor

        def look(layer: Layer, x: Tensor) -> None:
            if layer.name not in calls:
                order.append(layer)
            calls.setdefault(layer.name, []).append(_key(x))
            kept.append(x)

        def count(name: str) -> Callable[..., None]:
            def counted(*_: Any) -> None:
                block_calls[name] = block_calls.get(name, 0) + 1

            return counted

        with _plainly(self.model), ExitStack() as stack:
            for layer in layers:
                stack.enter_context(_watching(layer, self._owners.get(layer.module), look))
            handles = [
                block.module.register_forward_pre_hook(count(block.name))
                for block in {id(block): block for block in blocks.values()}.values()
            ]
            for handle in handles:
                stack.callback(handle.remove)
            for batch in self.batches:
                call(self.model, batch)
                kept.clear()
                for handle in handles:
                    handle.remove()
                if len(order) == len(layers):
                    break
        self.unreached = [layer for layer in layers if layer.name not in calls]
        chained = all(block_calls.get(b.name, 0) <= 1 for b in blocks.values())
        if blocks and not chained:
            self.notes.append("every pass runs the whole model, because a block is called more than once in a forward")
        groups: list[Group] = []
        by_keys: dict[tuple[_Key, ...], Group] = {}
        for layer in order:
            block = blocks.get(layer.name) if chained else None
            keys = tuple(calls[layer.name])
            group = by_keys.get(keys)
            if group is None or group.block is not block:
                group = by_keys[keys] = Group([], block, len(keys))
                groups.append(group)
                if block is not None:
                    block.groups.append(group)
            group.layers.append(layer)
        return groups

    def _why_not_blockwise(self) -> str | None:
        """Tries, on the first batch, whether blocks get the same inputs when those before them answer from memory."""
        batch = self.batches[0]
        inputs: dict[str, Any] = {}
        outputs: dict[str, Any] = {}

        def before(name: str, into: dict[str, Any]) -> Callable[..., None]:
            def look(module: nn.Module, args: Any, kwargs: Any) -> None:
                into[name] = _fingerprint((args, kwargs))

            return look

        with _plainly(self.model):
            with ExitStack() as stack:
                for block in self._blocks:
                    handle = block.module.register_forward_pre_hook(before(block.name, inputs), with_kwargs=True)
                    stack.callback(handle.remove)

                    def keep(module: nn.Module, args: Any, output: Any, name: str = block.name) -> None:
                        outputs[name] = _copied(output)

                    stack.callback(block.module.register_forward_hook(keep).remove)
                call(self.model, batch)
            latest: dict[str, str] = {}
            for position, block in enumerate(self._blocks):
                if position and block.name in inputs:
                    again: dict[str, Any] = {}

                    def stop(module: nn.Module, args: Any, kwargs: Any, again: dict[str, Any] = again) -> None:
                        again["inputs"] = _fingerprint((args, kwargs))
                        raise _Reached

                    with ExitStack() as stack:
                        for earlier in self._blocks[:position]:
                            if earlier.name in outputs:
                                kept = outputs[latest[earlier.chain]]
                                stack.enter_context(_replaced(earlier.module, partial(_copied, kept)))
                        stack.callback(block.module.register_forward_pre_hook(stop, with_kwargs=True).remove)
                        try:
                            call(self.model, batch)
                        except _Reached:
                            pass
                        except Exception as error:
                            return f"without the blocks before it '{block.name}' raises {type(error).__name__}"
                    if again.get("inputs") != inputs[block.name]:
                        return f"'{block.name}' depends on more than the block before it"
                latest[block.chain] = block.name
        return None


def _matching(real: Mapping[str, Tensor], layer: Layer, x: Tensor) -> Tensor | None:
    """The mask of the sequence that `x` is: by shape, and by name where encoder and decoder have the same."""
    fitting = {name: mask for name, mask in real.items() if x.ndim == 3 and mask.shape == x.shape[:2]}
    in_decoder = "decoder" in layer.name.split(".")
    for name, mask in fitting.items():
        if name.startswith("decoder") == in_decoder:
            return mask
    return next(iter(fitting.values()), None)


def _find_blocks(model: nn.Module, layers: Sequence[Layer]) -> dict[str, _Block]:
    """Layer name -> the outermost child of a ModuleList or Sequential that it lives in, where that has several."""
    modules = dict(model.named_modules())
    found: dict[str, _Block] = {}
    blocks: dict[str, _Block] = {}
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
                    found[layer.name] = blocks.setdefault(name, _Block(name, chain, child))
                    break
    return found


@contextmanager
def _watching(layer: Layer, owner: nn.Module | None, look: Callable[[Layer, Tensor], None]) -> Iterator[None]:
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
def _replaced(module: nn.Module, answer: Callable[[], Any]) -> Iterator[None]:
    """`module` gives `answer()` in place of its forward."""
    module.forward = lambda *args, **kwargs: answer()
    try:
        yield
    finally:
        del module.forward


@contextmanager
def _plainly(model: nn.Module) -> Iterator[None]:
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


def _key(x: Tensor) -> _Key:
    version = 0 if x.is_inference() else x._version
    return (x.device, x.data_ptr(), tuple(x.shape), x.stride(), x.dtype, version)


def _copied(output: Any) -> Any:
    leaves, spec = tree_flatten(output)
    return tree_unflatten([leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


def _fingerprint(arguments: Any) -> list[Any]:
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
