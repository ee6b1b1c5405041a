"""twofour measure"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from ..errors import ModelError, TwofourError, UnsupportedError
from ..report import Column
from ..workflows import compress, measure
from ..workflows.inputs import Batch
from . import models
from .options import Dtype, Html, Json, Model, Threads, parse_counts, parse_dtype, require_page, set_threads, show

NAME = "measure"


def run(
    model: Model,
    against: Annotated[
        Path | None,
        typer.Option(help="The dense model to compare with; default: the same weights written out dense."),
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, one row each, as in 1,8.")] = "1,8",
    length: Annotated[int, typer.Option(min=1, help="Tokens in each sequence.")] = 64,
    text: Annotated[
        Path | None,
        typer.Option(help="A text file whose lines are the inputs; default: Python's own documentation."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each model per batch.")] = 21,
    dtype: Dtype = None,
    threads: Threads = None,
    json: Json = False,
    html: Html = None,
) -> None:
    """Time a compressed model against a dense one, in turns, and compare bytes and outputs.

    A folder's model is run whole, on text (or random pixels for a vision model). A .safetensors file has no model to
    run: each of its layers is timed alone, at the token counts that --batch and --length give.

    Example: twofour measure minilm-small --against all-MiniLM-L6-v2
    """
    require_page(html)
    sizes, wanted = parse_counts(batch, "--batch"), parse_dtype(dtype)
    set_threads(threads)
    if against is not None and against.is_dir() != model.is_dir():
        raise TwofourError(f"{model} and {against} are not of one kind: compare two folders, or leave out --against.")
    loaded = models.open_model(model, wanted)
    if not model.is_dir():
        if against is not None or text is not None:
            raise TwofourError(f"{model} is a file without a model to run: --against and --text need a folder.")
        found = compress(loaded, tokens=[size * length for size in sizes], dry_run=True, remeasure=True)
        timed = [row for row in found.rows if "speedup" in row]
        dense_us, sparse_us = (sum(row[key] for row in timed) for key in ("dense_us", "sparse_us"))
        summary = {"layers timed": len(timed), "speedup of their sum": dense_us / sparse_us}
        report = replace(found, verb="measure", summary=summary, notes=("each layer was timed alone",))
    else:
        dense = models.open_model(against, wanted) if against is not None else None
        inputs = [_inputs(model, loaded, size, length, text) for size in sizes]
        found = measure(loaded, inputs, against=dense, repeats=repeats)
        rows = tuple({**row, "batch": f"{size}x{length}"} for row, size in zip(found.rows, sizes, strict=True))
        columns = (Column("batch", "batch x length"), *found.columns[1:])
        report = replace(found, columns=columns, rows=rows)
    show(models.with_guess(report, model), json, html)


def _inputs(folder: Path, model: nn.Module, size: int, length: int, text: Path | None) -> Batch:
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
    tokenizer = _tokenizer(folder)
    if tokenizer is None:
        if text is not None:
            raise ModelError(f"{folder} has no tokenizer, so --text cannot be used.")
        ids = torch.randint(0, vocabulary, (size, length), generator=generator)
    else:
        ids = _text_ids(tokenizer, _read_text(text), size, length)
        if int(ids.max()) >= vocabulary:
            raise ModelError(f"{folder}: its tokenizer gives id {int(ids.max())}, its model has {vocabulary} words.")
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = ids
    return batch


def _tokenizer(folder: Path) -> Any | None:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _read_text(path: Path | None) -> str:
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
