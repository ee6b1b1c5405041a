"""A text file as what a model of a folder learns from, and what it is judged on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, TrainingError
from ..nn.inputs import Batch
from .inputs import is_causal, padded, read_text, tokenizer_of

_LOOKED_AT = 256
"""Samples of the held-out part at most: of long texts every n-th is as good, and costs less."""


class Shuffled:
    """Batches of samples, in an order that torch's generator draws anew for each pass.

    Args:
        samples: token ids of each.
        size: samples in a batch; the last may have fewer.
        labels: the model gets the ids a second time, as what it is to predict.
    """

    def __init__(self, samples: Sequence[Sequence[int]], model: nn.Module, size: int, labels: bool) -> None:
        self._samples, self._model, self._size, self._labels = samples, model, size, labels

    def __len__(self) -> int:
        return -(-len(self._samples) // self._size)

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(len(self._samples)).tolist()
        for first in range(0, len(order), self._size):
            yield self.batch(order[first : first + self._size])

    def batch(self, which: Sequence[int]) -> dict[str, Tensor]:
        """The samples of these numbers."""
        found = padded([self._samples[i] for i in which], self._model)
        return found | {"labels": found["input_ids"]} if self._labels else found


@dataclass(frozen=True)
class Texts:
    """A text in two parts.

    Args:
        train: what is learned from.
        validation: batches of what is held out.
        samples, held: how many there are of each.
    """

    train: Shuffled
    validation: list[Batch]
    samples: int
    held: int


def texts(folder: Path, model: nn.Module, path: Path, context: int, size: int, share: float, labels: bool) -> Texts:
    """The text of a file in pieces of `context` tokens (for decoders), or its lines (for encoders); the end is held out.

    Args:
        share: of the samples that is held out; 0: none.
        labels: for a loss of the model's own.
    Raises:
        ModelError: no such file, no UTF-8, no tokenizer, or one whose ids the model has no words for.
        TrainingError: less text than one sample to learn from, and one to hold out.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such text file.")
    tokenizer = tokenizer_of(folder)
    if tokenizer is None:
        raise ModelError(
            f"{folder} has no tokenizer, so a text cannot be its input: save the tokenizer beside the model."
        )
    config: Any = model.config
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < context:
        raise ModelError(f"--context {context} is more than the {longest} positions that {folder} has.")
    text = read_text(path)
    if not text.strip():
        raise TrainingError(f"{path} is empty: there is nothing to learn from.")
    causal = is_causal(model)
    samples = _pieces(tokenizer, text, context) if causal else _lines(tokenizer, text, context)
    held = max(1, round(share * len(samples))) if share else 0
    if len(samples) - held < 1:
        raise TrainingError(f"{path} has {_too_few(tokenizer, text, context if causal else None, len(samples), held)}.")
    largest = max(max(sample) for sample in samples)
    words = getattr(config, "vocab_size", None)
    if words is not None and largest >= words:
        raise ModelError(f"{folder}: its tokenizer gives id {largest}, its model has {words} words.")
    train = Shuffled(samples[: len(samples) - held], model, size, labels)
    rest = samples[len(samples) - held :]
    rest = rest[:: -(-len(rest) // _LOOKED_AT) or 1]
    kept = Shuffled(rest, model, size, labels)
    batches = [kept.batch(range(first, min(first + size, len(rest)))) for first in range(0, len(rest), size)]
    return Texts(train, batches, len(samples) - held, held)


def _too_few(tokenizer: Any, text: str, context: int | None, count: int, held: int) -> str:
    """How many samples there are, how many it takes, and what helps; `context` is None where samples are lines."""
    what = "line" if context is None else "piece"
    given = f"{count} {what}{'' if count == 1 else 's'}" + ("" if context is None else f" of {context} tokens")
    needed = "one to learn from and one to hold out are needed" if held else "one to learn from is needed"
    ways = ["give more text"]
    shorter = 0 if context is None else len(_ids(tokenizer, text)) // (2 if held else 1)
    if shorter > 1:
        ways.append(f"--context {shorter} or less")
    if held and count:
        ways.append("--validation 0, which holds none out")
    return f"{given}, and {needed}: {', or '.join(ways)}"


def _ids(tokenizer: Any, text: str) -> list[int]:
    rows = tokenizer(text.splitlines(keepends=True), add_special_tokens=False)["input_ids"]
    return [token for row in rows for token in row]


def _pieces(tokenizer: Any, text: str, context: int) -> list[list[int]]:
    ids = _ids(tokenizer, text)
    return [ids[first : first + context] for first in range(0, len(ids) - context + 1, context)]


def _lines(tokenizer: Any, text: str, context: int) -> list[list[int]]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [row for row in tokenizer(lines, truncation=True, max_length=context)["input_ids"] if row]
