"""Where a model can be cut: blocks of a chain, and the parts inside them, that may answer from memory once they are done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from ..nn.inputs import Batch, call
from ..nn.survey import Layer, blocks_of
from .hooks import Reached, copied, fingerprint, plainly, replaced_by, watching

Owners = Mapping[nn.Module, nn.Module]
"""Output projection -> the attention that reads its weight without calling it."""


@dataclass
class Group:
    """Layers that multiply the same input: they share one Hessian.

    Args:
        layers: in the order of their calls.
        block: the block they are in, or None.
        calls: how often each is called in a forward.
    """

    layers: list[Layer]
    block: Block | None
    calls: int = 1


@dataclass(eq=False)
class Block:
    """One child of a chain, such as a transformer's layer.

    Args:
        groups: in the order of their calls.
        waiting: those of them that are not finished.
        parts: modules inside that may answer from memory, outer ones before inner ones.
    """

    name: str
    chain: str
    module: nn.Module
    groups: list[Group] = field(default_factory=list)
    waiting: list[Group] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """True where no layer in it will change any more."""
        return not self.waiting


@dataclass(eq=False)
class Part:
    """A module inside a block, called once in a forward.

    Args:
        until: place, among all layers in the order of their calls, of the last layer in it.
        outer: the next larger part around it.
    """

    name: str
    module: nn.Module
    until: int
    outer: Part | None

    def inside(self, other: Part) -> bool:
        """True where `other` is a part around this one."""
        return self.outer is not None and (self.outer is other or self.outer.inside(other))


def find_blocks(model: nn.Module, layers: Sequence[Layer]) -> dict[str, Block]:
    """Layer name -> its block, of `blocks_of`."""
    modules = dict(model.named_modules())
    blocks: dict[str, Block] = {}
    return {
        layer: blocks.setdefault(name, Block(name, chain, modules[name]))
        for layer, (chain, name) in blocks_of(model, layers).items()
    }


class Trial:
    """Tries on one batch what may answer from memory: whether all that comes later gets the same inputs, bit for bit.

    Args:
        blocks: in the order of their calls.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], batch: Batch) -> None:
        self.model = model
        self.blocks = blocks
        self.batch = batch
        self._outputs: dict[str, Any] = {}

    def why_not_blockwise(self) -> str | None:
        """Why a block depends on more than the last one before it in each chain; None where none does."""
        inputs: dict[str, Any] = {}

        def look(name: str) -> Callable[..., None]:
            return lambda module, args, kwargs: inputs.__setitem__(name, fingerprint((args, kwargs)))

        def keep(name: str) -> Callable[..., None]:
            return lambda module, args, output: self._outputs.__setitem__(name, copied(output))

        with plainly(self.model), ExitStack() as stack:
            for block in self.blocks:
                before = block.module.register_forward_pre_hook(look(block.name), with_kwargs=True)
                stack.callback(before.remove)
                stack.callback(block.module.register_forward_hook(keep(block.name)).remove)
            call(self.model, self.batch)
        for block in self.blocks[1:]:
            if block.name not in inputs:
                continue
            again: list[Any] = []

            def stop(module: nn.Module, args: Any, kwargs: Any, again: list[Any] = again) -> None:
                again.append(fingerprint((args, kwargs)))
                raise Reached

            with plainly(self.model), self._earlier_answer(block):
                handle = block.module.register_forward_pre_hook(stop, with_kwargs=True)
                try:
                    call(self.model, self.batch)
                except Reached:
                    pass
                except Exception as error:
                    return f"without the blocks before it '{block.name}' raises {type(error).__name__}"
                finally:
                    handle.remove()
            if again != [inputs[block.name]]:
                return f"'{block.name}' depends on more than the block before it"
        return None

    def find_parts(self, order: Mapping[str, int], owners: Owners) -> None:
        """Fills the blocks' `parts`; after `why_not_blockwise` has found nothing.

        Args:
            order: places of all layers, by name, in the order of their calls.
        """
        for block in self.blocks:
            if len(block.groups) > 1:
                block.parts = self._parts(block, order, owners)

    def _parts(self, block: Block, order: Mapping[str, int], owners: Owners) -> list[Part]:
        layers = [layer for group in block.groups for layer in group.layers]
        outputs: dict[nn.Module, list[Any]] = {}
        within: dict[str, list[Layer]] = {}
        modules = dict(block.module.named_modules(prefix=block.name))
        del modules[block.name]
        for name, module in modules.items():
            inside = set(module.modules())
            within[name] = [layer for layer in layers if layer.module in inside]
        with ExitStack() as stack:
            for name, module in modules.items():
                if not within[name]:
                    continue
                outputs[module] = []
                hook = module.register_forward_hook(lambda m, args, output: outputs[m].append(copied(output)))
                stack.callback(hook.remove)
            wanted = self._inputs(block, layers, owners)
        parts: list[Part] = []
        for name, module in modules.items():  # outer modules come first
            if len(outputs.get(module, ())) == 1:
                until = max(order[layer.name] for layer in within[name])
                around = [part for part in parts if name.startswith(part.name + ".")]
                parts.append(Part(name, module, until, around[-1] if around else None))
        for earlier, group in zip(block.groups, block.groups[1:], strict=False):
            front = max(order[layer.name] for layer in earlier.layers)
            with ExitStack() as stack:
                for part in parts:
                    if part.until <= front:
                        (output,) = outputs[part.module]
                        stack.enter_context(replaced_by(part.module, partial(copied, output)))
                try:
                    found = self._inputs(block, group.layers, owners)
                except Exception:
                    return []
            if any(found[layer.name] != wanted[layer.name] for layer in group.layers):
                return []
        return parts

    def _inputs(self, block: Block, layers: Sequence[Layer], owners: Owners) -> dict[str, list[Any]]:
        """Fingerprints of what each of `layers` is called with; the forward ends with `block`."""
        found: dict[str, list[Any]] = {layer.name: [] for layer in layers}

        def stop(*_: Any) -> None:
            raise Reached

        with plainly(self.model), self._earlier_answer(block), ExitStack() as stack:
            for layer in layers:
                stack.enter_context(
                    watching(layer, owners.get(layer.module), lambda layer, x: found[layer.name].append(fingerprint(x)))
                )
            stack.callback(block.module.register_forward_hook(stop).remove)
            with suppress(Reached):
                call(self.model, self.batch)
        return found

    @contextmanager
    def _earlier_answer(self, block: Block) -> Iterator[None]:
        """Blocks before `block` give what the last of their chain before it gave in the first forward."""
        earlier = self.blocks[: self.blocks.index(block)]
        last = {one.chain: self._outputs[one.name] for one in earlier if one.name in self._outputs}
        with ExitStack() as stack:
            for one in earlier:
                if one.name in self._outputs:
                    stack.enter_context(replaced_by(one.module, partial(copied, last[one.chain])))
            yield
