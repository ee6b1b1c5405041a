"""The best transposable mask of a block of any size, in plain Python: the specification of csrc/cpu/masks_solver.cpp.

A block of scores is a bipartite graph, rows against columns, and a mask keeps the same number of edges at every node. It
starts with the best edges that still fit, is completed by exchanges, and is then improved along alternating cycles that gain
until there is none: then no mask is better (Klein 1967). Scores become whole numbers first, so that sums are exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..pattern import Pattern

_BITS = 53
_INFINITY = 1 << 66
_NAN = -2048 * _INFINITY
_LOW_LABEL, _LOW_LABEL_WIDE = -(1 << 58), -(1 << 110)

Worths = list[list[int]]


def best_of_blocks(scores: Tensor, pattern: Pattern) -> Tensor:
    """`transposable_mask` for any pattern, block by block: milliseconds for an 8x8 block, a hundred for 32x32."""
    size = pattern.group
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for row in range(0, scores.shape[0], size):
        for column in range(0, scores.shape[1], size):
            block = scores[row : row + size, column : column + size].double().tolist()
            mask[row : row + size, column : column + size] = torch.tensor(Block(block, pattern.keep).solve())
    return mask


class Block:
    """A mask in the making.

    Attributes:
        worth: the scores as whole numbers: x * 2**p, rounded to nearest even, with the power p that puts the largest |x|
            between 2**53 and 2**54; more or less than all of these can add up to for infinities and NaN.
        kept: bool [size][size].
        row_labels, column_labels: after `solve` a dual, which proves that no mask is better: worth <= row label - column
            label wherever nothing is kept, and >= wherever something is.
    """

    def __init__(self, scores: list[list[float]], keep: int) -> None:
        sizes = [abs(x) for row in scores for x in row if math.isfinite(x)]
        largest = max(sizes, default=0.0)
        power = _BITS + 1 - math.frexp(largest)[1] if largest else 0
        wide = len(sizes) < len(scores) ** 2
        self.worth: Worths = [[_whole(x, power) for x in row] for row in scores]
        self.keep = keep
        self.range = range(len(scores))
        self.kept = [[False for _ in self.range] for _ in self.range]
        self.row_labels, self.column_labels = [0 for _ in self.range], [0 for _ in self.range]
        self._low_label = _LOW_LABEL_WIDE if wide else _LOW_LABEL

    def solve(self) -> list[list[bool]]:
        """The best mask."""
        self._start()
        self._complete()
        while self._improve():
            pass
        return self.kept

    def _row_has_room(self, row: int) -> bool:
        return sum(self.kept[row]) < self.keep

    def _column_has_room(self, column: int) -> bool:
        return sum(row[column] for row in self.kept) < self.keep

    def _start(self) -> None:
        """The best edges first, wherever both ends have room."""
        edges = [(row, column) for row in self.range for column in self.range]
        for row, column in sorted(edges, key=lambda edge: -self.worth[edge[0]][edge[1]]):
            if self._row_has_room(row) and self._column_has_room(column):
                self.kept[row][column] = True

    def _complete(self) -> None:
        """A row and a column with room gain an edge each by an exchange, the one that costs least."""
        worth, kept = self.worth, self.kept
        for row in self.range:
            while self._row_has_room(row):
                column = next(c for c in self.range if self._column_has_room(c))
                exchanges = [
                    (worth[row][c] + worth[r][column] - worth[r][c], -r, -c)
                    for r in self.range
                    for c in self.range
                    if kept[r][c] and not kept[r][column] and not kept[row][c]
                ]
                _, r, c = max(exchanges)
                kept[row][-c] = kept[-r][column] = True
                kept[-r][-c] = False

    def _improve(self) -> bool:
        """Exchanges along cycles that gain, which are circles among the predecessors of shortest paths; False: none."""
        if min(self.row_labels + self.column_labels) < self._low_label:
            self.row_labels, self.column_labels = [0 for _ in self.range], [0 for _ in self.range]
        rows, columns = self.row_labels, self.column_labels
        row_from: list[int | None] = [None for _ in self.range]
        column_from: list[int] = [0 for _ in self.range]  # of columns that a row came from: those have one
        reached = [False for _ in self.range]
        while True:
            changed = False
            for row in self.range:
                for column in self.range:
                    label = rows[row] - self.worth[row][column]
                    if label < columns[column] and not self.kept[row][column]:
                        columns[column], column_from[column], reached[column] = label, row, True
            for row in self.range:
                for column in self.range:
                    label = columns[column] + self.worth[row][column]
                    if self.kept[row][column] and label < rows[row]:
                        rows[row], row_from[row], changed = label, column, True
            if not changed:
                return False
            before = [None if at is None or not reached[at] else column_from[at] for at in row_from]
            if self._exchange_along_cycles(before, row_from):
                return True

    def _exchange_along_cycles(self, before: list[int | None], row_from: list[int | None]) -> bool:
        seen: list[int | None] = [None for _ in self.range]
        found = False
        for first in self.range:
            row: int | None = first
            while row is not None and seen[row] is None:
                seen[row] = first
                row = before[row]
            if row is None or seen[row] != first:
                continue
            found = True
            at = row
            while True:
                column, previous = row_from[at], before[at]
                assert column is not None
                assert previous is not None
                self.kept[at][column], self.kept[previous][column] = False, True
                at = previous
                if at == row:
                    break
        return found


def _whole(x: float, power: int) -> int:
    if math.isnan(x):
        return _NAN
    if math.isinf(x):
        return _INFINITY if x > 0 else -_INFINITY
    return round(math.ldexp(x, power))
