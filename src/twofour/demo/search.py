"""What pruning costs: the answers of a search, sparse against dense."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .model import encode
from .text import SearchTask

TOP = 10
_BATCH = 32


def answers(encoder: Any, task: SearchTask) -> Tensor:
    """int64 [queries, TOP]: the paragraphs nearest to each query by cosine, best first."""
    corpus = encode(encoder, task.corpus, _BATCH).float()
    queries = encode(encoder, task.queries, _BATCH).float()
    return torch.topk(queries @ corpus.T, min(TOP, len(task.corpus)), dim=1).indices


def kept_share(reference: Tensor, other: Tensor) -> float:
    """Share of the reference's answers that the other gives too, in any order, averaged over queries; 1 for all."""
    return float((reference[:, :, None] == other[:, None, :]).any(-1).float().mean())


def found_share(answer: Tensor, task: SearchTask) -> float:
    """Share of the queries whose own paragraph is among the answers."""
    return float((answer == torch.tensor(task.home)[:, None]).any(-1).float().mean())


def same_first(reference: Tensor, other: Tensor) -> float:
    """Share of the queries whose best answer is the same."""
    return float((reference[:, 0] == other[:, 0]).float().mean())
