"""A small GPT and the text it reads: characters in, the next character out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """How large a model, and how it is trained."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    context: int = 64
    batch: int = 8
    learning_rate: float = 1e-3
    bf16: bool = False
    """Products in bfloat16, by autocast."""


SIZES = {
    "small": Size(width=256, bf16=True),
    "tiny": Size(),
    "gpt2": Size(layers=12, width=768, heads=12, context=512, batch=32, learning_rate=6e-4, bf16=True),
    "smallest": Size(layers=1, width=32, heads=2, context=16, batch=8),
}


class Block(nn.Module):
    """Attention and a feed-forward network, each after a norm."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.norm1, self.norm2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.qkv, self.out = nn.Linear(size.width, 3 * size.width), nn.Linear(size.width, size.width)
        self.up, self.down = nn.Linear(size.width, 4 * size.width), nn.Linear(4 * size.width, size.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            part.view(batch, tokens, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).split(width, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """Embeddings, blocks, a head; weights begin as GPT-2's."""

    def __init__(self, size: Size, letters: int) -> None:
        super().__init__()
        self.bf16 = size.bf16
        self.letters, self.places = nn.Embedding(letters, size.width), nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, letters, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                late = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * size.layers) if late else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, letters: Tensor) -> Tensor:
        x = self.letters(letters) + self.places.weight[: letters.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Text:
    """The letters of a file: the first nine tenths to train on, the rest to judge by."""

    def __init__(self, path: Path | None, context: int, device: str) -> None:
        text = path.read_text(encoding="utf-8") if path else _python_reference()
        self.alphabet = sorted(set(text))
        codes = {letter: code for code, letter in enumerate(self.alphabet)}
        data = torch.tensor([codes[letter] for letter in text], device=device)
        self.context = context
        cut = len(data) * 9 // 10
        self.train, rest = data[:cut], data[cut:]
        whole = (len(rest) - 1) // context * context
        self.inputs, self.targets = rest[:whole].view(-1, context), rest[1 : whole + 1].view(-1, context)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random pieces of the training part, and what comes after each letter."""
        starts = torch.randint(len(self.train) - self.context - 1, (size, 1), generator=generator).to(self.train.device)
        places = starts + torch.arange(self.context, device=self.train.device)
        return self.train[places], self.train[places + 1]


def loss_of(model: GPT, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats for a letter."""
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=model.bf16):
        logits = model(inputs)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def validation_loss(model: GPT, text: Text, at_most: int | None = None) -> float:
    """Over all of the part to judge by, or its first `at_most` pieces."""
    model.eval()
    inputs, targets = text.inputs[:at_most], text.targets[:at_most]
    sums = [float(loss_of(model, x, y)) * len(x) for x, y in zip(inputs.split(64), targets.split(64), strict=True)]
    model.train()
    return sum(sums) / len(inputs)


def optimizer_of(model: nn.Module, size: Size) -> torch.optim.AdamW:
    """AdamW; matrices decay, biases and norms do not."""
    matrices = [weight for weight in model.parameters() if weight.ndim >= 2]
    others = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=size.learning_rate, betas=(0.9, 0.99))


def learning_rate(step: int, steps: int, top: float) -> float:
    """Linear for a twentieth, then a cosine down to a tenth."""
    warm = max(1, steps // 20)
    if step < warm:
        return top * (step + 1) / warm
    along = (step - warm) / max(1, steps - warm)
    return top * (0.1 + 0.45 * (1 + math.cos(math.pi * along)))


def _python_reference() -> str:
    from pydoc_data import topics

    return "\n".join(topics.topics[name] for name in sorted(topics.topics))
