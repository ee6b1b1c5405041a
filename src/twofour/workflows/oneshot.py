"""Calibrated one-shot pruning of a whole model: layer after layer, each seeing the pruned ones before it."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import CalibrationError, ModelError
from ..format.pack import numbers
from ..nn import observe
from ..nn.inputs import Batch, accepting
from ..nn.survey import Layer, weight_key
from ..pattern import Pattern
from ..report import Report
from ..solvers import Hessian, Recipe, Solution, solve
from . import scaleout
from .blocks import Group
from .checkpoint import Checkpoint
from .dense import DenseInputs, Seen, Steps
from .replay import Replay


class PruneInterrupted(ModelError):
    """ModelError raised by `prune` half-way: layers that were done keep their new weights; `.report` says which."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


@dataclass
class OneShot:
    """One calibrated run.

    Args:
        model, layers: what is pruned, in the model's order.
        batches: calibration inputs.
        pattern, recipe: what every layer gets.
        checkpoint: where finished layers are kept, or None.
        memory_limit: bytes of activations kept in memory.
        progress: as in `prune`.
    """

    model: nn.Module
    layers: Sequence[Layer]
    batches: Sequence[Batch]
    pattern: Pattern
    recipe: Recipe
    checkpoint: Checkpoint | None = None
    memory_limit: int | None = None
    progress: bool | None = None

    def __post_init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []
        self._dense: DenseInputs | None = None

    def run(self) -> None:
        """Prunes the layers in place and fills `rows` (by layer name) and `notes`.

        Raises:
            CalibrationError: no input reaches any layer, or one holds NaN.
            Whatever the model raises on its inputs; `rows` then holds the layers that are done.
        """
        began = time.perf_counter()
        with scaleout.together():
            replay = self._replay()
            if self.recipe.targets == "dense":
                self._dense = DenseInputs(self._replay(), replay)
        try:
            scaleout.require_same([[layer.name for layer in group.layers] for group in replay.groups])
            self._skip_unreached(replay.unreached)
            bar = tqdm(
                total=sum(len(group.layers) for group in replay.groups),
                desc=f"prune {self.pattern} by {self.recipe.method}",
                disable=None if self.progress is None else not self.progress,
                leave=False,
                unit="layer",
            )
            with bar:
                done: dict[Hashable, str] = {}
                for place, group in enumerate(replay.groups):
                    bar.set_postfix_str(group.layers[0].name)
                    self._prune_group(replay, place, done)
                    replay.finish(group)
                    if self._dense is not None:
                        self._dense.finish(place)
                    bar.update(len(group.layers))
        finally:
            replay.close()
            if self._dense is not None:
                self._dense.close()
        self.notes += replay.notes
        self.seconds = time.perf_counter() - began

    def _replay(self) -> Replay:
        limit = self.memory_limit
        if limit is not None and self.recipe.targets == "dense":
            limit //= 2  # two of them
        with accepting(self.model, self.batches[0], "calibration inputs", CalibrationError):
            return Replay(self.model, self.layers, self.batches, limit)

    def _skip_unreached(self, layers: Sequence[Layer]) -> None:
        for layer in layers:
            self.rows[layer.name] = {
                "action": "skipped",
                "reason": "no calibration input reaches it (method='magnitude' needs none)",
            }
        if len(layers) == len(self.layers):
            raise CalibrationError(
                f"no calibration input reaches any of the {len(layers)} layers, '{layers[0].name}' for one: the model"
                " does not call them. Nothing was changed."
            )
        if layers:
            self.notes.append(f"{len(layers)} layers were left alone: no calibration input reaches them")

    def _prune_group(self, replay: Replay, place: int, done: dict[Hashable, str]) -> None:
        waiting = []
        group = replay.groups[place]
        for layer in group.layers:
            key = weight_key(layer.weight)
            if key in done:
                self.rows[layer.name] = {
                    "action": "pruned",
                    "reason": f"shares its weight with '{done[key]}'",
                    "weights": 0,
                }
                continue
            done[key] = layer.name
            kept = self.checkpoint.load(layer) if self.checkpoint is not None else None
            if kept is None:
                waiting.append(layer)
            else:
                self._write(layer, kept.weight)
                self.rows[layer.name] = {**kept.row, "reason": "from the checkpoint"}
        if waiting:
            hessian = hessian_of(replay, group, None if self._dense is None else self._dense.of(place))
            for layer, row, weight in scaleout.share(waiting, lambda layer: self._solve(layer, hessian)):
                self._write(layer, weight)
                self.rows[layer.name] = row
                if self.checkpoint is not None:
                    self.checkpoint.save(layer, layer.weight.detach(), row)

    def _write(self, layer: Layer, weight: Tensor) -> None:
        if self._dense is not None:
            self._dense.remember(layer)
        write_weight(layer, weight)

    def _solve(self, layer: Layer, hessian: Hessian) -> tuple[dict[str, Any], Tensor]:
        """(row of the report, new weight in the layer's own shape and dtype)."""
        weight = layer.weight.detach()
        old = observe.as_matrix(layer.module, numbers(weight))
        try:
            found = solve(old, hessian, self.pattern, self.recipe)
        except CalibrationError as error:
            raise CalibrationError(f"'{layer.name}': {error}") from None
        row = {
            "action": "pruned",
            "method": self.recipe.method,
            "kept_magnitude": _share(old, found),
            "error_masked": found.error_masked,
            "error": found.error,
            "tokens": hessian.tokens,
            "damping": found.damping,
            "seconds": found.seconds,
        }
        reasons = []
        if found.damping > self.recipe.damping:
            reasons.append(f"damping {found.damping:g}: {hessian.tokens} tokens for {hessian.features} inputs")
        if self.recipe.targets == "dense" and hessian.drift is None:
            reasons.append("targets from the pruned model's inputs: the dense model sends it other tokens")
        if reasons:
            row["reason"] = "; ".join(reasons)
        matrix = rounded(found.weight, weight.dtype)
        return row, observe.from_matrix(layer.module, matrix, weight.shape).contiguous()


def hessian_of(replay: Replay, group: Group, dense: Steps | None = None) -> Hessian:
    """The Hessian of the input that the layers of `group` share, over all batches of all processes.

    Args:
        dense: the same inputs in the dense model; the Hessian then knows how far those of `replay` have drifted.
    Raises:
        CalibrationError: NaN or infinities, told with the layer's name; in every process where one meets them.
    """
    first = group.layers[0]
    matrix = observe.as_matrix(first.module, numbers(first.weight.detach()))
    out_features, in_features = matrix.shape
    alone = len(group.layers) == 1 and 2 * out_features < in_features
    hessian = Hessian(in_features, matrix.device, paired=dense is not None, through=matrix if alone else None)

    def take(x: Tensor, real: Tensor | None) -> None:
        for tokens in observe.tokens(first.module, x, real):
            hessian.add(tokens)

    with scaleout.together():
        try:
            if dense is None:
                replay.run(group, take)
            else:
                _take_pairs(replay, group, dense, hessian)
        except CalibrationError as error:
            raise CalibrationError(f"the inputs of '{first.name}': {error}") from None
    scaleout.add_up(hessian)
    return hessian


def _take_pairs(replay: Replay, group: Group, dense: Steps, hessian: Hessian) -> None:
    module = group.layers[0].module
    now: list[Seen] = []
    before: list[Seen] = []

    def take(x: Tensor, real: Tensor | None) -> None:
        now.append((x.detach().clone(), real))

    for _ in zip(replay.steps(group, take), dense(before), strict=True):
        if [x.shape for x, _ in now] != [x.shape for x, _ in before]:
            hessian.forget_drift()  # such as an expert that other tokens are sent to
        if hessian.drift is None:
            for x, real in now:
                for tokens in observe.tokens(module, x, real):
                    hessian.add(tokens)
        else:
            for (x, real), (wanted, _) in zip(now, before, strict=True):
                pairs = zip(observe.tokens(module, x, real), observe.tokens(module, wanted, real), strict=True)
                for tokens, wanted_tokens in pairs:
                    hessian.add(tokens, wanted_tokens)
        now.clear()
        before.clear()


def _share(old: Tensor, found: Solution) -> float:
    squares = old.double().square()
    total = float(squares.sum())
    return float(squares[found.mask].sum()) / total if total else 1.0


def rounded(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """In the weight's dtype; what would overflow takes the largest number there is. Zeros stay zeros."""
    largest = torch.finfo(dtype).max
    return matrix.clamp(-largest, largest).to(dtype)


def write_weight(layer: Layer, weight: Tensor) -> None:
    """`weight` takes the place of the layer's, in the same memory."""
    with torch.no_grad():
        layer.weight.copy_(weight)
