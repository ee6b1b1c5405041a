"""Which axes of which tensors must be permuted together: blocks of channels, found equal by union.

A block stands for a run of neighbouring channels and one unknown permutation of them. The axis of a tensor is a block; it
may be a different one for each index of other ("outer") axes, as the features of attention heads are. Blocks are unified
where an operator adds up or combines their channels, cut where it takes part of an axis, joined where it lays axes one
after the other, and pinned, with the reason, where channels must stay where they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Letter = Hashable


class Blocks:
    """All blocks of one model: a forest in which a block is itself, the same as another, or a row of smaller ones."""

    def __init__(self) -> None:
        self.size: list[int] = []
        self._same: list[int] = []
        self._parts: list[tuple[int, ...]] = []
        self._reason: list[str | None] = []

    def new(self, size: int, reason: str | None = None) -> int:
        """A block; with a reason it is pinned."""
        self.size.append(size)
        self._same.append(len(self._same))
        self._parts.append(())
        self._reason.append(reason)
        return len(self.size) - 1

    def roots(self, block: int) -> list[int]:
        """What it consists of, in order: blocks that are neither the same as an older one nor cut."""
        found, waiting = [], [block]
        while waiting:
            block = self._find(waiting.pop())
            if self._parts[block]:
                waiting.extend(reversed(self._parts[block]))
            else:
                found.append(block)
        return found

    def reason(self, block: int) -> str | None:
        """Why it is pinned, in any part; None for a free one."""
        return next((why for root in self.roots(block) if (why := self._reason[root]) is not None), None)

    def is_pinned(self, block: int) -> bool:
        """True where no part may move."""
        return all(self._reason[root] is not None for root in self.roots(block))

    def pin(self, block: int, reason: str) -> None:
        """Its channels stay where they are; the first reason counts."""
        for root in self.roots(block):
            if self._reason[root] is None:
                self._reason[root] = reason

    def join(self, blocks: Sequence[int]) -> int:
        """One block that lays others one after the other."""
        if len(blocks) == 1:
            return blocks[0]
        joined = self.new(sum(self.size[block] for block in blocks))
        self._parts[joined] = tuple(blocks)
        return joined

    def part(self, block: int, start: int, stop: int) -> int:
        """Its channels start ... stop - 1: no permutation crosses these borders from now on."""
        if (start, stop) == (0, self.size[block]):
            return block
        self._cut(block, start)
        self._cut(block, stop)
        inside, at = [], 0
        for root in self.roots(block):
            if start <= at and at + self.size[root] <= stop and self.size[root]:
                inside.append(root)
            at += self.size[root]
        return self.join(inside) if inside else self.new(0, "empty")

    def unify(self, a: int, b: int) -> None:
        """Both are permuted alike from now on. Equal sizes."""
        if a == b:
            return
        for one, other in ((a, b), (b, a)):
            if self.is_pinned(one):
                self.pin(other, self.reason(one) or "")
                return
        left, right = self.roots(a)[::-1], self.roots(b)[::-1]
        while left and right:
            lefts, rights = self.roots(left.pop()), self.roots(right.pop())
            left.extend(reversed(lefts[1:]))
            right.extend(reversed(rights[1:]))
            first, second = lefts[0], rights[0]
            if first == second:
                continue
            size = min(self.size[first], self.size[second])
            for root, rest in ((first, left), (second, right)):
                if self.size[root] > size:
                    self._cut(root, size)
                    rest.append(self._parts[root][1])
            first, second = self.roots(first)[0], self.roots(second)[0]
            if first != second:
                self._union(first, second)

    def _find(self, block: int) -> int:
        while self._same[block] != block:
            self._same[block] = self._same[self._same[block]]
            block = self._same[block]
        return block

    def _union(self, a: int, b: int) -> None:
        self._same[b] = a
        if self._reason[a] is None:
            self._reason[a] = self._reason[b]

    def _cut(self, block: int, at: int) -> None:
        begin = 0
        for root in self.roots(block):
            if begin < at < begin + self.size[root]:
                reason = self._reason[root]
                size = self.size[root]
                self._parts[root] = (self.new(at - begin, reason), self.new(begin + size - at, reason))
                return
            begin += self.size[root]


@dataclass(frozen=True)
class Axis:
    """The block of an axis for each index of the axes `outer` of the same tensor; ids has their sizes as its shape."""

    ids: Ids
    outer: tuple[int, ...] = ()


@dataclass(frozen=True)
class Labels:
    """The axes of one tensor."""

    shape: tuple[int, ...]
    axes: tuple[Axis, ...]


class AxisAlgebra:
    """What operators do to labels."""

    def __init__(self) -> None:
        self.blocks = Blocks()
        self._one = Axis(np.array(self.blocks.new(1, "a single channel")))

    def new(self, shape: Iterable[int], reason: str | None = None) -> Labels:
        """Labels of a tensor that is related to no other; with a reason they are pinned."""
        shape = tuple(shape)
        return Labels(shape, tuple(self._new_axis(size, reason) for size in shape))

    def pin(self, labels: Labels, reason: str, axes: Iterable[int] | None = None) -> None:
        """Pins some axes, or all."""
        for position in range(len(labels.shape)) if axes is None else axes:
            for block in np.unique(labels.axes[position].ids):
                self.blocks.pin(int(block), reason)

    def combine(
        self, operands: Sequence[tuple[Labels, Sequence[Letter]]], out: Sequence[Letter], shape: Sequence[int]
    ) -> Labels:
        """The result of an einsum, or of anything that treats every index of a letter in the same way.

        Axes of one letter are permuted alike (an axis of size 1 is spread over the others'); what is not in `out` is summed.
        A letter of no operand is a new, free axis: the same numbers for every index.
        """
        letters: list[Letter] = []
        found: dict[Letter, Axis] = {}
        for _, own in operands:
            for letter in own:
                if letter not in letters:
                    letters.append(letter)
        for labels, own in operands:
            for position, letter in enumerate(own):
                if labels.shape[position] == 1:
                    continue
                axis = labels.axes[position]
                axis = Axis(axis.ids, tuple(letters.index(own[outer]) for outer in axis.outer))
                found[letter] = self._unify(found[letter], axis) if letter in found else axis
        axes = []
        for letter, size in zip(out, shape, strict=True):
            if letter not in found:
                axes.append(self._new_axis(size, None))
                continue
            axis = found[letter]
            for outer in axis.outer:
                if letters[outer] not in out:
                    axis = self._without(axis, outer)
            axes.append(Axis(axis.ids, tuple(list(out).index(letters[outer]) for outer in axis.outer)))
        return Labels(tuple(shape), tuple(axes))

    def part(self, labels: Labels, axis: int, start: int, stop: int) -> Labels:
        """A slice of one axis. An outer axis keeps the blocks of the indices that are left."""
        axes = []
        for position, own in enumerate(labels.axes):
            ids = own.ids
            if position == axis:
                ids = self._map(lambda block: self.blocks.part(block, start, stop), ids)
            elif axis in own.outer:
                ids = np.take(ids, range(start, stop), own.outer.index(axis))
                if stop - start == 1:  # axes of size 1 are never outer ones
                    axes.append(self._row(Axis(ids, own.outer), axis, 0))
                    continue
            axes.append(Axis(ids, own.outer))
        shape = (*labels.shape[:axis], stop - start, *labels.shape[axis + 1 :])
        return Labels(shape, tuple(axes))

    def select(self, labels: Labels, axis: int, index: int, reason: str) -> Labels:
        """One index of an axis, which is pinned and gone."""
        self.pin(labels, reason, [axis])
        axes = []
        for position, own in enumerate(labels.axes):
            if position == axis:
                continue
            if axis in own.outer:
                own = self._row(own, axis, index)
            axes.append(Axis(own.ids, tuple(outer - (outer > axis) for outer in own.outer)))
        return Labels(labels.shape[:axis] + labels.shape[axis + 1 :], tuple(axes))

    def repeat(self, labels: Labels, axis: int, times: int, reason: str) -> Labels:
        """Every index of an axis `times` times, neighbours; the axis is pinned."""
        self.pin(labels, reason, [axis])
        axes = [
            Axis(np.repeat(own.ids, times, own.outer.index(axis)), own.outer) if axis in own.outer else own
            for own in labels.axes
        ]
        size = labels.shape[axis] * times
        axes[axis] = self._new_axis(size, reason)
        return Labels((*labels.shape[:axis], size, *labels.shape[axis + 1 :]), tuple(axes))

    def concatenate(self, parts: Sequence[Labels], axis: int, reason: str) -> Labels:
        """One after the other along an axis; the others are permuted alike."""
        if any(axis in own.outer for labels in parts for own in labels.axes):
            for labels in parts:
                self.pin(labels, reason)
        letters = list(range(len(parts[0].shape)))
        size = sum(labels.shape[axis] for labels in parts)
        shape = (*parts[0].shape[:axis], size, *parts[0].shape[axis + 1 :])
        named = [(labels, [*letters[:axis], ("part", i), *letters[axis + 1 :]]) for i, labels in enumerate(parts)]
        merged = self.combine(named, letters, shape)
        outer = tuple(sorted({position for labels in parts for position in labels.axes[axis].outer}))
        tables = [self._spread(labels.axes[axis], outer) for labels in parts]
        broadcast = np.broadcast_arrays(*tables) if outer else tables
        joined = np.empty(broadcast[0].shape, dtype=np.int64)
        for index in np.ndindex(joined.shape):
            joined[index] = self.blocks.join([int(table[index]) for table in broadcast])
        axes = list(merged.axes)
        axes[axis] = Axis(joined, outer)
        return Labels(shape, tuple(axes))

    def reshape(self, labels: Labels, shape: Sequence[int], reason: str) -> Labels:
        """A view: an axis cut into rows (features by head) or rows laid one after the other; else what changed is pinned."""
        shape = tuple(shape)
        steps = _matched(labels.shape, shape)
        between = [_refined([labels.shape[i] for i in before], [shape[i] for i in after]) for before, after in steps]
        if any(len(before) > 1 and len(after) > 1 and cut for (before, after), cut in zip(steps, between, strict=True)):
            # [batch, heads * features] as [batch * heads, features]: cut first, then merge.
            finer = [
                size
                for cut, (before, _) in zip(between, steps, strict=True)
                for size in cut or (labels.shape[i] for i in before)
            ]
            return self.reshape(self.reshape(labels, finer, reason), shape, reason)
        axes: dict[int, Axis] = {}
        for before, after in steps:
            if len(before) == 1 and len(after) == 1:
                axes[after[0]] = self._renumbered(labels.axes[before[0]], labels, shape, steps)
            elif len(before) == 1:
                axes.update(self._split(labels, before[0], after, shape, steps, reason))
            elif len(after) == 1:
                axes[after[0]] = self._merge(labels, before, shape, steps, reason)
            else:
                self.pin(labels, reason, before)
                axes.update({position: self._new_axis(shape[position], reason) for position in after})
        return Labels(shape, tuple(axes.get(position, self._one) for position in range(len(shape))))

    def _split(
        self, labels: Labels, axis: int, after: list[int], shape: tuple[int, ...], steps: Any, reason: str
    ) -> dict[int, Axis]:
        own = self._renumbered(labels.axes[axis], labels, shape, steps)
        leading, size = [shape[position] for position in after[:-1]], shape[after[-1]]
        axes = {position: self._new_axis(shape[position], reason) for position in after[:-1]}
        if self.is_pinned(own):
            why = self.blocks.reason(int(own.ids.flat[0])) or reason
            return {**axes, after[-1]: self._new_axis(size, why)}
        ids = np.empty((*own.ids.shape, int(np.prod(leading))), dtype=np.int64)
        for index in np.ndindex(ids.shape):
            ids[index] = self.blocks.part(int(own.ids[index[:-1]]), index[-1] * size, (index[-1] + 1) * size)
        axes[after[-1]] = Axis(ids.reshape(*own.ids.shape, *leading), (*own.outer, *after[:-1]))
        return axes

    def _merge(self, labels: Labels, before: list[int], shape: tuple[int, ...], steps: Any, reason: str) -> Axis:
        last = labels.axes[before[-1]]
        self.pin(labels, reason, before[:-1])
        if self.is_pinned(last):
            why = self.blocks.reason(int(last.ids.flat[0])) or reason
            return self._new_axis(int(np.prod([labels.shape[position] for position in before])), why)
        rows = before[:-1]
        elsewhere = tuple(position for position in last.outer if position not in rows)
        table = self._spread(last, (*elsewhere, *rows))
        kept = table.shape[: len(elsewhere)]
        table = np.broadcast_to(table, (*kept, *(labels.shape[position] for position in rows))).reshape(*kept, -1)
        ids = np.empty(kept, dtype=np.int64)
        for index in np.ndindex(kept):
            ids[index] = self.blocks.join([int(block) for block in table[index]])
        return self._renumbered(Axis(ids, elsewhere), labels, shape, steps)

    def _renumbered(self, axis: Axis, labels: Labels, shape: tuple[int, ...], steps: Any) -> Axis:
        """The same with its outer axes where the new shape has them."""
        for before, after in steps:
            inside = [position for position in before if position in axis.outer]
            if not inside:
                continue
            others = tuple(position for position in axis.outer if position not in inside)
            table = self._spread(axis, (*others, *before))
            kept = table.shape[: len(others)]
            full = np.broadcast_to(table, (*kept, *(labels.shape[position] for position in before)))
            ids = full.reshape(*kept, *(shape[position] for position in after))
            # New places are marked as ~place until all are there, so that they are not taken for old ones.
            axis = Axis(ids, (*others, *(~position for position in after)))
        return Axis(axis.ids, tuple(~position if position < 0 else position for position in axis.outer))

    def _unify(self, a: Axis, b: Axis) -> Axis:
        outer = tuple(sorted({*a.outer, *b.outer}))
        left, right = np.broadcast_arrays(self._spread(a, outer), self._spread(b, outer))
        for one, other in {(int(x), int(y)) for x, y in zip(left.flat, right.flat, strict=True)}:
            self.blocks.unify(one, other)
        return Axis(left, outer)

    @staticmethod
    def _row(axis: Axis, outer: int, index: int) -> Axis:
        at = axis.outer.index(outer)
        return Axis(np.take(axis.ids, index, at), axis.outer[:at] + axis.outer[at + 1 :])

    def _without(self, axis: Axis, outer: int) -> Axis:
        """Alike for every index of an outer axis that goes away."""
        at = axis.outer.index(outer)
        table = np.moveaxis(axis.ids, at, 0)
        for row in table[1:]:
            for one, other in zip(table[0].flat, row.flat, strict=True):
                self.blocks.unify(int(one), int(other))
        return Axis(table[0], axis.outer[:at] + axis.outer[at + 1 :])

    def _spread(self, axis: Axis, outer: Sequence[int]) -> Ids:
        """ids with one dimension for each of `outer`, of size 1 where the axis does not depend on it."""
        order = sorted(range(len(axis.outer)), key=lambda i: list(outer).index(axis.outer[i]))
        ids = axis.ids.transpose(order)
        sizes = iter(ids.shape)
        return ids.reshape([next(sizes) if position in axis.outer else 1 for position in outer])

    def _map(self, function: Any, ids: Ids) -> Ids:
        seen = {int(block): function(int(block)) for block in np.unique(ids)}
        return np.array([seen[int(block)] for block in ids.flat], dtype=np.int64).reshape(ids.shape)

    def is_pinned(self, axis: Axis) -> bool:
        """True where no part of it may move."""
        return all(self.blocks.is_pinned(int(block)) for block in np.unique(axis.ids))

    def _new_axis(self, size: int, reason: str | None) -> Axis:
        return self._one if size == 1 else Axis(np.array(self.blocks.new(size, reason)))


def _matched(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The fewest neighbouring axes whose sizes have equal products, as positions; axes of size 1 belong to none."""
    left = [position for position, size in enumerate(before) if size != 1]
    right = [position for position, size in enumerate(after) if size != 1]
    steps = []
    while left and right:
        a, b = [left.pop(0)], [right.pop(0)]
        have, want = before[a[0]], after[b[0]]
        while have != want:
            if have < want and left:
                a.append(left.pop(0))
                have *= before[a[-1]]
            elif right:
                b.append(right.pop(0))
                want *= after[b[-1]]
            else:
                break
        steps.append((a, b))
    return steps


def _refined(before: list[int], after: list[int]) -> list[int]:
    """The coarsest sizes that both can be cut into, if those are other than each of them; else none."""
    borders = set()
    for sizes in (before, after):
        product = 1
        for size in reversed(sizes):
            product *= size
            borders.add(product)
    ordered = sorted(borders)
    if any(large % small for small, large in itertools.pairwise(ordered)):
        return []
    finer = [ordered[0], *(large // small for small, large in itertools.pairwise(ordered))][::-1]
    return finer if finer not in (before, after) else []
