"""Layers of real models, and the one square that everybody measures."""

from __future__ import annotations

from typing import NamedTuple


class Layer(NamedTuple):
    """A Linear: y[tokens, out_features] = x[tokens, in_features] @ W.T."""

    name: str
    out_features: int
    in_features: int


SQUARE = Layer("square", 4096, 4096)  # and the query and output projections of Llama-3-8B
BIG = Layer("big square", 8192, 8192)

LAYERS = (
    SQUARE,
    Layer("MiniLM attention", 384, 384),
    Layer("MiniLM mlp up", 1536, 384),
    Layer("MiniLM mlp down", 384, 1536),
    Layer("BERT-base attention", 768, 768),
    Layer("BERT-base mlp up", 3072, 768),  # ViT-B has the shapes of BERT-base
    Layer("BERT-base mlp down", 768, 3072),
    Layer("Llama-3-8B key, value", 1024, 4096),
    Layer("Llama-3-8B mlp up", 14336, 4096),
    Layer("Llama-3-8B mlp down", 4096, 14336),
    BIG,
)

SMALLEST = Layer("smallest", 64, 64)

TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096)
