"""What a model of a folder is called with: token ids of texts, pixels, or tensors from a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import CalibrationError, ModelError, UnsupportedError
from ..nn.inputs import Batch

PYTHON = "python"
"""In place of a file: the documentation that Python carries."""


def one_batch(folder: Path, model: nn.Module, size: int, length: int, text: Path | None) -> Batch:
    """A batch to time `model` on: `size` sequences of `length` tokens of running text, or random pixels."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        if text is not None:
            raise ModelError(f"{folder} is a vision model, measured on random pixels: leave out --text.")
        side = getattr(config, "image_size", 224)
        height, width = (side, side) if isinstance(side, int) else tuple(side)
        pixels = torch.randn(size, getattr(config, "num_channels", 3), height, width, generator=generator)
        return {"pixel_values": pixels.to(next(model.parameters()).dtype)}
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None:
        raise UnsupportedError(
            f"{folder} is neither a text nor a vision model: measure it from Python, twofour.measure()."
        )
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and length > longest:
        raise ModelError(f"--length {length} is more than the {longest} positions the model has.")
    tokenizer = tokenizer_of(folder)
    if tokenizer is None:
        if text is not None:
            raise ModelError(f"{folder} has no tokenizer, so --text cannot be used.")
        ids = torch.randint(0, vocabulary, (size, length), generator=generator)
    else:
        ids = _text_ids(tokenizer, read_text(text), size, length)
        if int(ids.max()) >= vocabulary:
            raise ModelError(f"{folder}: its tokenizer gives id {int(ids.max())}, its model has {vocabulary} words.")
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = ids
    return batch


def calibration_batches(
    folder: Path, model: nn.Module, source: str, samples: int, length: int, size: int
) -> list[Batch]:
    """Batches for `prune`: lines of a text file, or input tensors by name from a .safetensors file.

    Encoders get a line each, padded; decoders running text, cut into pieces of `length` tokens.

    Raises:
        CalibrationError: no such file, nothing in it, tensors of different lengths.
        ModelError: a model without a tokenizer.
    """
    path = Path(source)
    if path.suffix == ".safetensors":
        return _tensor_batches(path, samples, size)
    if source != PYTHON and not path.is_file():
        raise CalibrationError(
            f"--calibration {source}: no such file. Name a text file, or '{PYTHON}' for its documentation."
        )
    text = read_text(path if path.is_file() else None)
    tokenizer = tokenizer_of(folder)
    if tokenizer is None:
        raise ModelError(
            f"{folder} has no tokenizer, so texts cannot be its inputs: pass a .safetensors file of input tensors, named"
            " as the model's arguments."
        )
    longest = getattr(model.config, "max_position_embeddings", None)
    length = min(length, longest) if isinstance(longest, int) and longest > 0 else length
    if is_causal(model):
        return _running_text(tokenizer, text, samples, length, size)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise CalibrationError(f"--calibration {source}: the text is empty.")
    step = max(1, len(lines) // samples)  # from all over the file
    rows = [tokenizer(line, truncation=True, max_length=length)["input_ids"] for line in lines[::step][:samples]]
    rows.sort(key=len)  # little padding
    return [padded(rows[first : first + size], model) for first in range(0, len(rows), size)]


def is_causal(model: nn.Module) -> bool:
    """True for decoders with a head that predicts the next token: they read running text."""
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    return not encoder_decoder and type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def padded(rows: Sequence[Sequence[int]], model: nn.Module) -> dict[str, Tensor]:
    """Token ids of different lengths as one batch for `model`, with the mask of what is no padding."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if getattr(model.config, "is_encoder_decoder", False):
        batch |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    return batch


def _running_text(tokenizer: Any, text: str, samples: int, length: int, size: int) -> list[Batch]:
    ids: list[int] = []
    for line in text.splitlines(keepends=True):
        ids += tokenizer(line, add_special_tokens=False)["input_ids"]
        if len(ids) >= samples * length:
            break
    pieces = min(samples, len(ids) // length)
    if not pieces:
        raise CalibrationError(f"the text has {len(ids)} tokens, less than one piece of {length}: give more of it.")
    return [{"input_ids": part} for part in torch.tensor(ids[: pieces * length]).view(pieces, length).split(size)]


def _tensor_batches(path: Path, samples: int, size: int) -> list[Batch]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"--calibration {path}: {error}") from None
    lengths = {len(tensor) if tensor.ndim else 0 for tensor in tensors.values()}
    if len(lengths) != 1 or not min(lengths):
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise CalibrationError(
            f"--calibration {path}: every tensor needs the same first axis, samples; it has {shapes}."
        )
    count = min(samples, *lengths)
    return [{name: x[i : min(i + size, count)] for name, x in tensors.items()} for i in range(0, count, size)]


def tokenizer_of(folder: Path) -> Any | None:
    """The tokenizer of a model folder; None where it has none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def read_text(path: Path | None) -> str:
    """The text of a file; without one Python's own documentation."""
    if path is None:
        from pydoc_data.topics import topics

        return "\n".join(topics.values())
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ModelError(f"{path} is not a UTF-8 text file.") from None


def _text_ids(tokenizer: Any, text: str, size: int, length: int) -> torch.Tensor:
    """[size, length] token ids cut from running text, so that no batch is padding."""
    needed = size * length
    ids: list[int] = []
    for line in text.splitlines():
        ids += tokenizer(line, add_special_tokens=False)["input_ids"] if line.strip() else []
        if len(ids) >= needed:
            break
    if not ids:
        raise ModelError("the text is empty: there is nothing to measure on.")
    repeated = ids * (needed // len(ids) + 1)
    return torch.tensor(repeated[:needed]).view(size, length)
