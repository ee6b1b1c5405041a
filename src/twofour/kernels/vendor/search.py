"""The algorithm that cuSPARSELt found fastest for a shape, searched once in a process, proved, and kept in memory."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import torch_operations


class Algorithm(NamedTuple):
    """What `sparse_mm` is told. The default is cuSPARSELt's own."""

    alg_id: int = 0
    split_k: int = 1
    split_k_mode: int = -1


class Key(NamedTuple):
    """Products that share an algorithm: the same weight shape, and tokens up to the same power of two."""

    rows: int
    columns: int
    tokens: int
    dtype: torch.dtype
    out_dtype: torch.dtype | None
    bias: bool
    device: torch.device


_DEFAULT = Algorithm()
_TRIES = 3
"""Of a found algorithm: some were seen to fail at times only (pytorch#155333)."""

_found: dict[Key, Algorithm] = {}
_lock = threading.Lock()


def key_of(rows: int, compressed: Tensor, dense: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None) -> Key:
    """Of the product of a compressed weight of `rows` rows and dense [columns, tokens]."""
    columns, tokens = dense.shape
    bucket = 1 << (tokens - 1).bit_length()
    return Key(rows, columns, bucket, compressed.dtype, out_dtype, bias is not None, dense.device)


def algorithm(key: Key, compressed: Tensor, dense: Tensor, bias: Tensor | None) -> Algorithm:
    """The one to run. Searches where the key is new, unless a CUDA graph is being captured or torch is to be deterministic.

    Another algorithm adds in another order: without a search, runs agree bit for bit.
    """
    found = _found.get(key)
    if found is not None:
        return found
    if torch.are_deterministic_algorithms_enabled() or torch_operations.installed().capturing():
        return _DEFAULT
    with _lock:  # two searches at once would time each other
        if key not in _found:
            _found[key] = _searched(key, compressed, dense, bias)
        return _found[key]


def give_up(key: Key) -> None:
    """From here on the default: what was found for one number of tokens did not run with another of the same key."""
    with _lock:
        _found[key] = _DEFAULT


def clear() -> None:
    """Forgets every algorithm."""
    with _lock:
        _found.clear()


def arguments(chosen: Algorithm) -> dict[str, Any]:
    """`chosen` by the names that this torch has for it; none for the default, or where torch cannot be told all of it."""
    known = torch_operations.installed().sparse_mm_arguments
    named: dict[str, Any] = {"alg_id": chosen.alg_id} if chosen.alg_id != 0 else {}
    if chosen.split_k != 1:
        named["split_k"] = chosen.split_k
        if "split_k_one_kernel" in known:  # before it was renamed, a bool: 1 is one kernel
            named["split_k_one_kernel"] = bool(chosen.split_k_mode)
        elif chosen.split_k_mode > 0:
            named["split_k_mode"] = chosen.split_k_mode
    return named if known.issuperset(named) else {}


def _searched(key: Key, compressed: Tensor, dense: Tensor, bias: Tensor | None) -> Algorithm:
    operations = torch_operations.installed()
    query = (compressed, dense, bias, None, key.out_dtype, True)
    try:
        if operations.search is not None:
            alg_id, split_k, split_k_mode, *_ = operations.search(*query)
            found = Algorithm(int(alg_id), int(split_k), int(split_k_mode))
        elif operations.search_id is not None:
            found = Algorithm(int(operations.search_id(*query)))
        else:
            return _DEFAULT
        return found if not arguments(found) or _proved(found, key, compressed, dense) else _DEFAULT
    except torch.OutOfMemoryError:
        raise
    except (
        RuntimeError,
        TypeError,
    ):  # a search that this version lacks for the dtype, or an algorithm that does not run
        return _DEFAULT


def _proved(found: Algorithm, key: Key, compressed: Tensor, dense: Tensor) -> bool:
    """Does it give what the default gives, to the bit? Each token is 1 at one place: no order of adding rounds."""
    columns, tokens = dense.shape
    probe = torch.zeros(tokens, columns, dtype=torch.float32, device=dense.device)
    token = torch.arange(tokens, device=dense.device)
    probe[token, token * columns // tokens] = 1  # spread, so that every slice of a split sum has one
    probe = probe.to(dense.dtype).t()
    run = torch_operations.installed().sparse_mm
    common = {"transpose_result": True} | ({} if key.out_dtype is None else {"out_dtype": key.out_dtype})
    expected = run(compressed, probe, **common).float()
    for _ in range(_TRIES):
        y = run(compressed, probe, **common, **arguments(found)).float()
        if not bool(((y == expected) | (y.isnan() & expected.isnan())).all()):
            return False
    return True
