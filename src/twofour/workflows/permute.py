"""permute: the channels of a model, so that pruning keeps more and nothing else changes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind

from ..errors import ModelError, UnsupportedError
from ..masks import magnitude
from ..masks.permute import free_score, improve, kept_score
from ..nn.inputs import Batch, accepting, batches, call, evaluating, output_tensors
from ..nn.survey import Layer, survey, weight_key
from ..pattern import Pattern
from ..report import Column, Report, environment
from .axes import AxisAlgebra, Labels
from .axis_rules import Reader
from .norms import input_norms
from .progress import track

Scores = Callable[[str, Tensor], Tensor] | Mapping[str, Tensor] | Literal["inputs"]
"""From a layer's name and weight its scores, of the weight's shape; or by name the norms of its inputs, [in_features]; or
"inputs": what each weight adds to the squared outputs."""

BOUNDS = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The most that outputs may differ afterwards, as |difference| / |output|: sums in another order, layer after layer. Models
in float64 take norms in float32, often."""

_COLUMNS = (
    Column("layers", "layers that gain"),
    Column("channels", "channels", "count"),
    Column("blocks", "blocks", "count"),
    Column("action", "action"),
    Column("kept_before", "kept", "share"),
    Column("kept_after", "kept after", "share"),
    Column("efficacy", "efficacy"),
    Column("reason", "why"),
)


def permute(
    model: nn.Module,
    inputs: Batch | Iterable[Batch],
    pattern: Pattern | str = "2:4",
    *,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    scores: Scores | None = None,
    sweeps: int = 2000,
    seconds: float | None = None,
    seed: int = 0,
    dry_run: bool = False,
    progress: bool | None = None,
) -> Report:
    """Reorders channels inside the model, in place, so that `prune` will keep more; what it computes stays the same.

    The model is read with torch.export on the first batch. Channels that operators combine are found and permuted together:
    the columns of the layers that read them, the rows and biases of those that write them, norms, embeddings, running
    statistics, along a whole residual stream where there is one. The features of attention heads move inside their head.
    Channels that reach an input or output of the model, or an operator without a rule, stay, and the report says why. At
    run time nothing is added.

    Do this before pruning, and before an optimizer is made: its state is not permuted.

    Args:
        model: in any dtype; what another call than `model(inputs)` would use (say, with other arguments) is not seen.
        inputs: a batch, or several: each is run before and after. Tensors, tuples or mappings.
        pattern: what will be pruned to.
        include, exclude: shell wildcards over the layers that are to gain; others may have channels permuted too.
        scores: None is |w|; or from name and weight the scores; or norms of the inputs by name, which multiply |w|; or
            "inputs": w² times the mean square of its input, measured on `inputs`, for pruning with calibration.
        sweeps, seed: as in `masks.search_permutation`.
        seconds: about how long all searches may take; None: as long as the sweeps take.
        dry_run: search and report; change nothing.
        progress: a progress bar; None shows one on a terminal only.
    Returns:
        Report with a row for each set of channels that layers to prune read: members (their names), channels, blocks (permuted
        each in itself), action ("permuted" or "left"), the share of the scores kept before and after, efficacy in percent, why.
        The summary has the relative error of the outputs.
    Raises:
        ModelError: torch.export cannot read the model, no layer fits, or the outputs differ afterwards by more than
            `BOUNDS`. Nothing is changed then.
        PatternError, UnsupportedError: unknown pattern; scores that cannot be added up.
    Source: Pool & Yu 2021 (NeurIPS, channel permutations for N:M sparsity).

    >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> [(row["layers"], row["action"], row["reason"]) for row in permute(model, torch.randn(4, 16)).rows]
    [('2', 'permuted', None), ('0', 'left', 'input of the model')]
    """
    pattern = Pattern.parse(pattern)
    given = batches(inputs)
    layers = [layer for layer in survey(model, pattern, include, exclude) if layer.skip is None]
    layers = [layer for layer in layers if not layer.is_compressed]
    if not layers:
        raise ModelError(
            "there is nothing to permute for: no layer can be pruned (twofour.prune(dry_run=True) says why)."
        )
    with evaluating(model), accepting(model, given[0]):
        call(model, given[0])
    if scores == "inputs":
        axes = {layer.name: layer.input_axis for layer in layers}
        scores = _squared_outputs(input_norms(model, layers, given), axes)
    elif isinstance(scores, str):
        raise UnsupportedError(f"scores={scores!r}: it is None, 'inputs', a mapping, or a function of name and weight.")
    with evaluating(model):
        graph = _read(model, given[0])
        sets = _channel_sets(graph, layers, pattern)
        _search(sets, pattern, _scorer(scores), sweeps, seconds, seed, progress)
        moves = [move for each in sets for move in each.moves]
        error = 0.0
        if moves and not dry_run:
            before = _outputs(model, given)
            with _moved(graph, moves):
                error = _compare(before, _outputs(model, given))
    rows = [each.row() for each in sets]
    rows.sort(key=lambda row: row["action"] == "left")
    weights = sum(each.total for each in sets)
    summary = {
        "pattern": str(pattern),
        "channels permuted": sum(row["channels"] for row in rows if row["action"] == "permuted"),
        "layers that gain": len({name for each in sets if each.moves for name in each.names()}),
        "kept before": sum(each.before for each in sets) / weights if weights else 1.0,
        "kept after": sum(each.after for each in sets) / weights if weights else 1.0,
        "relative error": error,
    }
    notes = []
    if graph.unseen:
        shown = ", ".join(graph.unseen[:4]) + (", ..." if len(graph.unseen) > 4 else "")
        notes.append(f"{len(graph.unseen)} tensors take no part in this call and were left as they are: {shown}")
    if dry_run:
        notes.append("dry run: nothing was changed")
    return Report("permute", _COLUMNS, tuple(rows), summary, tuple(notes), environment())


@dataclass
class _Graph:
    """What the model's graph says about its own tensors."""

    algebra: AxisAlgebra
    tensors: dict[Hashable, tuple[str, Tensor, Labels]]
    unseen: list[str]

    def pieces(self, key: Hashable, axis: int) -> Iterator[tuple[int, int, int]]:
        """Root block, first channel and size of each run of channels along an axis of a tensor."""
        start = 0
        for root in self.algebra.blocks.roots(int(self.tensors[key][2].axes[axis].ids)):
            size = self.algebra.blocks.size[root]
            yield root, start, size
            start += size


@dataclass
class _Move:
    """One block and its new order."""

    root: int
    order: Tensor


@dataclass
class _Channels:
    """Blocks that the same layers read: the channels of one stream, or of all heads of a layer."""

    size: int
    reason: str | None
    readers: dict[int, list[tuple[Layer, list[int]]]] = field(default_factory=dict)
    """By block: the layers that read it, and where in their channels it begins."""
    moves: list[_Move] = field(default_factory=list)
    total: float = 0.0
    before: float = 0.0
    after: float = 0.0
    free: float = 0.0

    def names(self) -> list[str]:
        """The layers, in the model's order."""
        return [layer.name or "(model)" for layer, _ in next(iter(self.readers.values()))]

    def row(self) -> dict[str, Any]:
        """One row of the report."""
        names, possible = self.names(), self.free - self.before
        return {
            "layers": f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0],
            "members": names,
            "channels": self.size * len(self.readers),
            "blocks": len(self.readers),
            "action": "permuted" if self.moves else "left",
            "kept_before": self.before / self.total if self.total else None,
            "kept_after": self.after / self.total if self.total else None,
            "efficacy": f"{100 * (self.after - self.before) / possible:.1f} %" if self.moves and possible > 0 else None,
            "reason": self.reason or (None if self.moves else "no order keeps more"),
        }


class _Tensors(nn.Module):
    """The model, returning its floating point tensors alone: caches are of no type that torch.export knows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return tuple(output_tensors(self.model(*args, **kwargs)))


def _read(model: nn.Module, batch: Batch) -> _Graph:
    args: tuple[Any, ...] = () if isinstance(batch, Mapping) else batch if isinstance(batch, tuple) else (batch,)
    kwargs = dict(batch) if isinstance(batch, Mapping) else {}
    whole = _Tensors(model)
    whole.eval()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator for a whole nn.TransformerEncoderLayer shows nothing
    try:
        program = torch.export.export(whole, args, kwargs, strict=False)
    except Exception as error:  # whatever the user's code does when it is traced
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"torch.export cannot read {type(model).__name__}: {first}\n  Nothing was changed. Permute a part that it can read"
            " (its inputs and outputs stay as they are), or prune without permuting."
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)

    algebra = AxisAlgebra()
    own = dict(
        itertools.chain(whole.named_parameters(remove_duplicate=False), whole.named_buffers(remove_duplicate=False))
    )
    tensors: dict[Hashable, tuple[str, Tensor, Labels]] = {}
    found: list[Any] = []
    seen: set[Hashable] = set()
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    for spec, node in zip(program.graph_signature.input_specs, nodes, strict=True):
        value = node.meta.get("val")
        tensor = own.get(spec.target or "")
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and tensor is not None:
            key = weight_key(tensor)
            if node.users:
                seen.add(key)
            if key not in tensors:
                name = (spec.target or "").removeprefix("model.")
                reason = None if type(tensor) in (Tensor, nn.Parameter) else f"'{name}' is a {type(tensor).__name__}"
                tensors[key] = (name, tensor, algebra.new(tensor.shape, reason))
            found.append(tensors[key][2])
        elif isinstance(value, Tensor):
            reason = "input of the model" if spec.kind == InputKind.USER_INPUT else f"constant '{spec.target}'"
            found.append(algebra.new(map(int, value.shape), reason))
        else:
            found.append(value)
    _pin_overlaps(algebra, tensors, own)
    reader = Reader(algebra)
    outputs = reader.read(program.graph_module, found)
    for labels in _leaves(outputs):
        algebra.pin(labels, "output of the model")
    unseen = [name.removeprefix("model.") for name, tensor in own.items() if weight_key(tensor) not in seen]
    return _Graph(algebra, tensors, unseen)


def _leaves(outputs: Any) -> Iterator[Labels]:
    for output in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
        if isinstance(output, Labels):
            yield output
        elif isinstance(output, (tuple, list)):
            yield from _leaves(output)


def _pin_overlaps(
    algebra: AxisAlgebra, tensors: dict[Hashable, tuple[str, Tensor, Labels]], own: Mapping[str, Tensor]
) -> None:
    """Tensors that share some memory, but not as the same tensor, stay as they are."""
    places: dict[Hashable, list[tuple[int, int, Hashable, str]]] = {}
    for name, tensor in own.items():
        if tensor.is_meta or not tensor.numel():
            continue
        last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        start = tensor.data_ptr()
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        entry = (start, start + (last + 1) * tensor.itemsize, weight_key(tensor), name.removeprefix("model."))
        if all(entry[2] != other[2] for other in places.setdefault(storage, [])):
            places[storage].append(entry)
    for entries in places.values():
        for (first, end, key, name), (start, stop, other, other_name) in itertools.combinations(entries, 2):
            if first < stop and start < end:
                for one, why in ((key, other_name), (other, name)):
                    if one in tensors:
                        algebra.pin(tensors[one][2], f"memory is shared with '{why}'")


def _channel_sets(graph: _Graph, layers: Sequence[Layer], pattern: Pattern) -> list[_Channels]:
    readers: dict[int, dict[str, tuple[Layer, list[int]]]] = {}
    seen: set[Hashable] = set()
    for layer in layers:
        key = weight_key(layer.weight)
        if key in seen or key not in graph.tensors:
            continue
        seen.add(key)
        for root, start, _ in graph.pieces(key, layer.input_axis):
            readers.setdefault(root, {}).setdefault(layer.name, (layer, []))[1].append(start)
    sets: dict[Hashable, _Channels] = {}
    blocks = graph.algebra.blocks
    for root, by_name in readers.items():
        size, reason = blocks.size[root], blocks.reason(root)
        starts = [start for _, every in by_name.values() for start in every]
        if reason is None and (size % pattern.group or any(start % pattern.group for start in starts)):
            reason = f"groups of {pattern.group} cross the borders of blocks of {size} channels"
        if reason is None and size == pattern.group:
            reason = "its channels are one group"
        # Heads have a block each, read at other places by the same layers.
        same = (tuple((name, len(every)) for name, (_, every) in by_name.items()), size, reason)
        sets.setdefault(same, _Channels(size, reason)).readers[root] = list(by_name.values())
    return list(sets.values())


def _squared_outputs(norms: Mapping[str, Tensor], axes: Mapping[str, int]) -> Callable[[str, Tensor], Tensor]:
    """w² E[x²]; zeros for a layer that no input reaches."""

    def score(name: str, weight: Tensor) -> Tensor:
        found = magnitude(weight).square()
        if name not in norms:
            return torch.zeros_like(found)
        sizes = [1] * weight.ndim
        sizes[axes[name]] = -1
        return found * norms[name].square().to(found).view(sizes)

    return score


def _scorer(scores: Callable[[str, Tensor], Tensor] | Mapping[str, Tensor] | None) -> Callable[[Layer], Tensor]:
    """Scores of a layer's weight as [rows, input channels]."""

    def score(layer: Layer) -> Tensor:
        weight = layer.weight.detach()
        if scores is None:
            found = magnitude(weight)
        elif isinstance(scores, Mapping):
            if layer.name not in scores:
                raise ModelError(
                    f"scores= has no input norms for '{layer.name}'. Leave it out with exclude=, or add them."
                )
            norms = scores[layer.name].to(weight.device)
            if norms.shape != (weight.shape[layer.input_axis],):
                raise ModelError(
                    f"scores=['{layer.name}'] is {list(norms.shape)}: the weight reads"
                    f" {weight.shape[layer.input_axis]} channels."
                )
            sizes = [1] * weight.ndim
            sizes[layer.input_axis] = -1
            found = magnitude(weight) * norms.view(sizes)
        else:
            found = scores(layer.name, weight)
            if found.shape != weight.shape:
                raise ModelError(
                    f"scores= gave {list(found.shape)} for '{layer.name}', whose weight is {list(weight.shape)}."
                )
        return found.movedim(layer.input_axis, -1).flatten(0, -2)

    return score


def _search(
    sets: Sequence[_Channels],
    pattern: Pattern,
    score: Callable[[Layer], Tensor],
    sweeps: int,
    seconds: float | None,
    seed: int,
    progress: bool | None,
) -> None:
    """Fills in what each set keeps, before and after, and the moves of those that gain."""
    work = [(each, root) for each in sets for root in each.readers]
    start = time.monotonic()
    scored_for, scored = None, dict[str, Tensor]()
    for done, (each, root) in enumerate(track(work, f"permute for {pattern}", progress)):
        if each is not scored_for:  # heads are cut from the same scores
            scored_for, scored = each, {}
        parts = []
        for layer, starts in each.readers[root]:
            if layer.name not in scored:
                scored[layer.name] = score(layer)
            parts += [scored[layer.name][:, first : first + each.size] for first in starts]
        stacked = torch.cat(parts)
        if not bool(stacked.isfinite().all()) or bool((stacked < 0).any()):
            names = ", ".join(f"'{layer.name}'" for layer, _ in each.readers[root])
            raise ModelError(
                f"scores of {names} are NaN, infinite or negative: they cannot be added up. Nothing was changed; repair the"
                " weights, or leave them out with exclude=."
            )
        each.total += float(stacked.sum(dtype=torch.float64))
        if each.size % pattern.group:
            continue
        left = None if seconds is None else (seconds - (time.monotonic() - start)) / (len(work) - done)
        if each.reason is None and left is not None and left <= 0:
            each.reason = "the time was up"
        if each.reason is not None:
            kept = kept_score(stacked, pattern)
            each.before += kept
            each.after += kept
            continue
        order, before, after = improve(stacked, pattern, sweeps=sweeps, seconds=left, seed=seed)
        each.before += before
        each.after += after
        each.free += free_score(stacked, pattern)
        if after > before:
            each.moves.append(_Move(root, order))


@contextmanager
def _moved(graph: _Graph, moves: Sequence[_Move]) -> Iterator[None]:
    """Permutes every axis of every tensor that has the blocks; takes it all back if what is inside raises."""
    orders = {move.root: move.order for move in moves}
    changes: list[tuple[Tensor, int, Tensor]] = []
    for key, (name, tensor, labels) in graph.tensors.items():
        for axis in range(tensor.ndim):
            order = torch.arange(tensor.shape[axis])
            for root, start, size in graph.pieces(key, axis) if labels.shape[axis] > 1 else ():
                if root in orders:
                    order[start : start + size] = start + orders[root].cpu()
            if not torch.equal(order, torch.arange(len(order))):
                if tensor.is_inference():
                    raise ModelError(
                        f"'{name}' was made under torch.inference_mode and cannot be changed in place: build the model"
                        " outside, or permute a copy.deepcopy of it. Nothing was changed."
                    )
                changes.append((tensor, axis, order.to(tensor.device)))
    done: list[tuple[Tensor, int, Tensor]] = []
    try:
        for tensor, axis, order in changes:
            moved = tensor.detach().index_select(axis, order)
            done.append((tensor, axis, order))
            tensor.detach().copy_(moved)
        yield
    except BaseException:
        for tensor, axis, order in reversed(done):
            tensor.detach().copy_(tensor.detach().index_select(axis, order.argsort()))
        raise


def _outputs(model: nn.Module, given: Sequence[Batch]) -> list[Tensor]:
    return [output.detach().clone() for batch in given for output in output_tensors(call(model, batch))]


def _compare(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest |difference| / |output|.

    Raises:
        ModelError: one is above its bound.
    """
    largest = 0.0
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        numbers = old.isfinite()
        error = float("inf")
        if torch.equal(numbers, new.isfinite()):
            old64, new64 = (torch.where(numbers, y, 0.0).double() for y in (old, new))
            size = float(old64.norm())
            error = float((new64 - old64).norm()) / size if size else float(new64.norm())
        bound = BOUNDS.get(old.dtype, 5e-2)
        if not error <= bound:
            raise ModelError(
                f"output {index} differs by {error:.1e} of its size after permuting, more than {bound:.0e} for"
                f" {str(old.dtype).removeprefix('torch.')}: the model does something with its channels that its graph does"
                " not show, or is not deterministic. Everything was put back; leave the layers out with exclude=."
            )
        largest = max(largest, error)
    return largest
