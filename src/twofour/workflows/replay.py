"""Runs a model over calibration inputs again and again, a part at a time: what is done answers from memory.

One-shot pruning wants each layer to see the pruned ones before it, so the inputs have to pass once for every layer. Whole
models would cost layers x model; here the model's own forward runs, but a block that is done returns what it returned the
last time, and the pass ends as soon as the layers asked for have been called. Inside the block at work, the attention, say,
answers from memory once its layers are done: each layer runs about once with its new weight.

That is right only where a block depends on those before it through the last of them alone. `Replay` finds the blocks
(children of a ModuleList or Sequential) and tries on the first batch whether each gets the same inputs, bit for bit,
when all before it answer from memory; if one does not, every pass runs the whole model up to the layers asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..nn.inputs import Batch, call, mask_of, real_tokens
from ..nn.survey import Layer
from .blocks import Block, Group, Part, Trial, find_blocks
from .hooks import Key, Reached, identity, plainly, replaced_by, replaced_once_by, watching
from .spool import Spool

Take = Callable[[Tensor, Tensor | None], None]
"""Called with the input of a layer, and which of its tokens are real (bool [batch, tokens], or None)."""

_FEWEST_FOR_PARTS = 4
"""With fewer batches, to try on one of them what parts may answer from memory costs as much as it saves."""

_MOST_FOR_PARTS = 2 << 30
"""Bytes of outputs of parts: a part costs little to run again, so that no file and no great memory is worth it."""


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
        self._memory_limit = memory_limit
        self._parts = Spool()
        self._last: dict[str, Block] = {}
        self._owners: dict[nn.Module, nn.Module] = {
            m.out_proj: m for m in model.modules() if isinstance(m, nn.MultiheadAttention)
        }
        self.unreached: list[Layer] = []
        self.groups = self._trace(layers)
        blocks = {id(group.block): group.block for group in self.groups if group.block is not None}
        self._blocks: list[Block] = list(blocks.values())
        if self._blocks:
            self._try_blocks()

    def close(self) -> None:
        """Gives the kept activations back."""
        self._spool.close()
        self._parts.close()

    def run(self, group: Group, take: Take) -> None:
        """Calls `take` with every input of `group`, batch by batch."""
        for _ in self.steps(group, take):
            pass

    def steps(self, group: Group, take: Take) -> Iterator[None]:
        """`run`, one step for each batch. Between steps the model is as it was, and others may use it."""
        passed = self._passed()
        ahead = self._ahead(passed)
        front = min(self._waiting, default=len(self._order))
        running = [block for block in self._blocks if block not in passed and block.parts]
        for index, batch in enumerate(self.batches):
            with plainly(self.model):
                real = real_tokens(batch)
                seen: dict[Key, Tensor] = {}
                calls = 0

                def look(
                    layer: Layer, x: Tensor, real: Any = real, seen: dict[Key, Tensor] = seen, index: int = index
                ) -> None:
                    nonlocal calls
                    calls += 1
                    if (key := identity(x)) not in seen:
                        seen[key] = x
                        take(x, mask_of(real, layer.name, x))
                    if group.calls == 1 and calls == len(group.layers):
                        raise Reached

                with ExitStack() as stack:
                    for block in passed:
                        kept = (self._last[block.chain].name, index)
                        stack.enter_context(replaced_by(block.module, partial(self._spool.get, kept)))
                    for block in ahead:
                        stack.enter_context(self._keep_output(block, index))
                    for block in running:
                        self._parts_answer(stack, block, front, index)
                    for layer in group.layers:
                        stack.enter_context(watching(layer, self._owners.get(layer.module), look))
                    with suppress(Reached):
                        call(self.model, batch)
            yield
        for block in ahead:
            self._settle(block)

    def finish(self, group: Group) -> None:
        """Says that the layers of `group` will not change any more."""
        self._waiting.difference_update(self._order[layer.name] for layer in group.layers)
        if group.block is not None:
            group.block.waiting.remove(group)

    def needs(self, group: Group) -> bool:
        """True until the block of `group` answers from memory: its layers may still be called."""
        return group.block is None or group.block not in self._passed()

    def _passed(self) -> list[Block]:
        """Blocks that answer from memory: up to the last kept one of each chain."""
        passed: list[Block] = []
        for chain, last in self._last.items():
            own = [block for block in self._blocks if block.chain == chain]
            passed += own[: own.index(last) + 1]
        return passed

    def _ahead(self, passed: Sequence[Block]) -> list[Block]:
        """Blocks that are done, with all before them in their chain, and whose outputs are not kept yet."""
        ahead: list[Block] = []
        stopped: set[str] = set()
        for block in self._blocks:
            if not block.done:
                stopped.add(block.chain)
            elif block.chain not in stopped and block not in passed:
                ahead.append(block)
        return ahead

    @contextmanager
    def _keep_output(self, block: Block, index: int) -> Iterator[None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._spool.put((block.name, index), output)

        handle = block.module.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def _settle(self, block: Block) -> None:
        """From now on the chain of `block` answers with its outputs."""
        for part in block.parts:
            self._forget(part)
        block.parts = []
        old = self._last.get(block.chain)
        self._last[block.chain] = block
        if old is not None:
            for index in range(len(self.batches)):
                self._spool.drop((old.name, index))

    def _parts_answer(self, stack: ExitStack, block: Block, front: int, index: int) -> None:
        """Within `stack` the parts of `block` that are done answer from memory, or are kept for the next pass.

        Args:
            front: place of the first layer that is not finished: all before it are.
        """
        for part in block.parts:
            if part.until >= front:
                continue
            if (part.name, index) in self._parts:
                stack.enter_context(replaced_once_by(part.module, partial(self._parts.get, (part.name, index))))
            elif part.outer is None or part.outer.until >= front:
                stack.enter_context(self._keep_part(part, block, index))

    @contextmanager
    def _keep_part(self, part: Part, block: Block, index: int) -> Iterator[None]:
        first = True

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal first
            if first and self._parts.offer((part.name, index), output, self._room_for_parts()):
                for other in block.parts:
                    if other.inside(part):
                        self._parts.drop((other.name, index))
            first = False

        handle = part.module.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def _room_for_parts(self) -> int:
        if self._memory_limit is None:
            return _MOST_FOR_PARTS
        return min(_MOST_FOR_PARTS, self._memory_limit - self._spool.bytes_in_memory)

    def _forget(self, part: Part) -> None:
        for index in range(len(self.batches)):
            self._parts.drop((part.name, index))

    def _try_blocks(self) -> None:
        trial = Trial(self.model, self._blocks, self.batches[0])
        if (reason := trial.why_not_blockwise()) is not None:
            self.notes.append(f"every pass runs the whole model, because {reason}")
            for group in self.groups:
                group.block = None
            self._blocks = []
        elif self._one_forward_has_all and len(self.batches) >= _FEWEST_FOR_PARTS:
            trial.find_parts(self._order, self._owners)

    def _trace(self, layers: Sequence[Layer]) -> list[Group]:
        """One forward, or more until every layer was reached: what is called when, and who shares an input."""
        calls: dict[str, list[Key]] = {}
        order: list[Layer] = []
        block_calls: dict[str, int] = {}
        blocks = find_blocks(self.model, layers)
        kept: list[Tensor] = []  # so that no memory is given to a second tensor

        def look(layer: Layer, x: Tensor) -> None:
            if layer.name not in calls:
                order.append(layer)
            calls.setdefault(layer.name, []).append(identity(x))
            kept.append(x)

        def count(name: str) -> Callable[..., None]:
            def counted(*_: Any) -> None:
                block_calls[name] = block_calls.get(name, 0) + 1

            return counted

        with plainly(self.model), ExitStack() as stack:
            for layer in layers:
                stack.enter_context(watching(layer, self._owners.get(layer.module), look))
            handles = [
                block.module.register_forward_pre_hook(count(block.name))
                for block in {id(block): block for block in blocks.values()}.values()
            ]
            for handle in handles:
                stack.callback(handle.remove)
            first = 0
            for batch in self.batches:
                call(self.model, batch)
                first = first or len(order)
                kept.clear()
                for handle in handles:
                    handle.remove()
                if len(order) == len(layers):
                    break
        self.unreached = [layer for layer in layers if layer.name not in calls]
        self._order = {layer.name: place for place, layer in enumerate(order)}
        self._waiting = set(self._order.values())
        self._one_forward_has_all = first == len(order)
        chained = all(block_calls.get(b.name, 0) <= 1 for b in blocks.values())
        if blocks and not chained:
            self.notes.append("every pass runs the whole model, because a block is called more than once in a forward")
        groups: list[Group] = []
        by_keys: dict[tuple[Key, ...], Group] = {}
        for layer in order:
            block = blocks.get(layer.name) if chained else None
            keys = tuple(calls[layer.name])
            group = by_keys.get(keys)
            if group is None or group.block is not block:
                group = by_keys[keys] = Group([], block, len(keys))
                groups.append(group)
                if block is not None:
                    block.groups.append(group)
                    block.waiting.append(group)
            group.layers.append(layer)
        return groups
