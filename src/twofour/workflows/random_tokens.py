"""Copies of calibration inputs with random words: against fitting a model to the words its texts happen to use.

A layer's new weights keep the outputs for the inputs they were fitted on. Texts of one kind hold few of the words a model
knows, and the others pay for it: all-MiniLM-L6-v2, fitted on the language reference of Python alone, lost more on everyday
sentences than by Wanda, which fits nothing. With a copy of every text, part of its words drawn from the whole vocabulary,
it loses less, and nothing where calibration and use are of one kind (benchmarks/quality).
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..nn.inputs import Batch, call, evaluating, real_tokens

SHARE = 0.5
"""The share of a copy's ids that is drawn at random when nothing else is asked for."""

LEAST_VOCABULARY = 1000
"""Embeddings of fewer rows count something else: token types, positions, labels."""

_Path = tuple[Any, ...]


def with_random_tokens(model: nn.Module, batches: Sequence[Batch], share: float) -> tuple[list[Batch], str | None]:
    """(batches, then a copy of each with a share of its token ids drawn at random; what was done in words).

    Token ids are integer tensors [batch, tokens] that the model looks up in an embedding of LEAST_VOCABULARY rows or more,
    found by one forward of the first batch; without any there are no copies and no words. A row's first and last real ids
    stay: they often mark its ends. So does padding. What is drawn depends on the batch alone, so that order and number of
    processes do not matter.

    Args:
        share: 0 ... 1; 0 makes no copies.
    Raises:
        UnsupportedError: another share.
    """
    if not 0 <= share <= 1:
        raise UnsupportedError(f"random_tokens={share}: a share of the token ids, 0 up to 1.")
    vocabularies = _vocabularies(model, batches[0]) if share else {}
    if not vocabularies:
        return list(batches), None
    copies = [_copy(batch, vocabularies, share) for batch in batches]
    names = ", ".join(sorted({_name(path) for path in vocabularies}))
    return [*batches, *copies], f"as given, and a copy with {share:.0%} of {names} drawn at random"


def _copy(batch: Batch, vocabularies: Mapping[_Path, int], share: float) -> Batch:
    masks = real_tokens(batch)

    def draw(path: _Path, ids: Tensor) -> Tensor:
        rows = vocabularies.get(path)
        if rows is None or not _is_ids(ids):
            return ids
        mask = masks.get("decoder_attention_mask" if _name(path).startswith("decoder") else "attention_mask")
        return _drawn(ids, rows, share, mask if mask is not None and mask.shape == ids.shape else None)

    return _mapped(batch, draw)


def _name(path: _Path) -> str:
    return path[-1] if path and isinstance(path[-1], str) else "ids"


def _vocabularies(model: nn.Module, batch: Batch) -> dict[_Path, int]:
    """Where in a batch token ids are -> rows of the embedding that looks them up."""
    ids: dict[_Path, Tensor] = {}

    def collect(path: _Path, tensor: Tensor) -> Tensor:
        if _is_ids(tensor):
            ids[path] = tensor
        return tensor

    _mapped(batch, collect)
    found: dict[_Path, int] = {}

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(module, nn.Embedding)
        if args and isinstance(args[0], Tensor):
            for path, tensor in ids.items():
                if args[0].numel() == tensor.numel() and torch.equal(args[0].cpu().view_as(tensor), tensor.cpu()):
                    found[path] = module.num_embeddings

    large = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings >= LEAST_VOCABULARY]
    if not ids or not large:
        return {}
    handles = [module.register_forward_pre_hook(look) for module in large]
    try:
        with evaluating(model):
            call(model, batch)
    except Exception:  # the run itself will meet it, and says it better
        return {}
    finally:
        for handle in handles:
            handle.remove()
    return found


def _is_ids(tensor: Tensor) -> bool:
    """Integers [batch, tokens] that do not just count up."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool or tensor.ndim != 2:
        return False
    return tensor.shape[1] > 2 and not bool((tensor.diff(dim=1) == 1).all())


def _drawn(ids: Tensor, rows: int, share: float, real: Tensor | None) -> Tensor:
    own = ids.detach().cpu().long().contiguous()
    generator = torch.Generator().manual_seed(zlib.crc32(own.numpy().tobytes()))
    other = torch.randint(rows, own.shape, generator=generator)
    chosen = torch.rand(own.shape, generator=generator) < share
    inside = torch.ones_like(chosen) if real is None else real.cpu()
    place = inside.cumsum(1)
    chosen &= inside & (place > 1) & (place < place[:, -1:])
    return torch.where(chosen, other, own).to(ids)


def _mapped(part: Any, change: Callable[[_Path, Tensor], Tensor], path: _Path = ()) -> Any:
    """`part` with `change(path, tensor)` in place of its tensors; what does not change stays the same object."""
    if isinstance(part, Tensor):
        return change(path, part)
    if isinstance(part, Mapping):
        new = {key: _mapped(value, change, (*path, key)) for key, value in part.items()}
        if all(new[key] is part[key] for key in new):
            return part
        try:  # transformers' BatchEncoding stays one
            made = copy.copy(part)
            made.update(new)  # type: ignore[attr-defined]
        except (AttributeError, TypeError):
            return new
        return made
    if isinstance(part, (tuple, list)):
        items = [_mapped(value, change, (*path, place)) for place, value in enumerate(part)]
        if all(a is b for a, b in zip(items, part, strict=True)):
            return part
        return type(part)._make(items) if hasattr(part, "_make") else type(part)(items)
    return part
