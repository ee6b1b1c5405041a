"""The verbs on small transformers models built from a config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import twofour
from twofour import SparseLinear

transformers = pytest.importorskip("transformers", reason="needs transformers (twofour[transformers])")


def bert() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    return transformers.BertForMaskedLM(config), {"input_ids": torch.randint(0, 50, (2, 7)), "attention_mask": mask}


def llama(tie: bool = False) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        tie_word_embeddings=tie,
    )
    return transformers.LlamaForCausalLM(config), {"input_ids": torch.randint(0, 48, (2, 9))}


def vit() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_labels=5,
    )
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 16, 16)}


def t5() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    config = transformers.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    ids = torch.randint(0, 50, (2, 6))
    return transformers.T5ForConditionalGeneration(config), {"input_ids": ids, "decoder_input_ids": ids}


def gpt2() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    return transformers.GPT2LMHeadModel(config), {"input_ids": torch.randint(0, 50, (2, 6))}


FAMILIES: dict[str, Callable[[], tuple[nn.Module, dict[str, torch.Tensor]]]] = {
    "bert": bert,
    "llama": llama,
    "llama-tied": lambda: llama(tie=True),
    "vit": vit,
    "t5": t5,
}


def logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        output: Any = model(**inputs)
    assert isinstance(output.logits, torch.Tensor)
    return output.logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prune_compress_save_load_run(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, inputs = FAMILIES[family]()
    model = model.to(dtype).eval()
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    report = twofour.prune(model)
    assert twofour.check(model).summary["holds"]
    pruned = logits(model, inputs)
    twofour.compress(model, inputs, force=True)
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert len(layers) == len(report.where(action="pruned"))
    compressed = logits(model, inputs)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(compressed, pruned, atol=tolerance, rtol=tolerance)
    twofour.save(model, tmp_path / "model.safetensors")
    fresh = FAMILIES[family]()[0].to(dtype).eval()
    twofour.load(fresh, tmp_path / "model.safetensors")
    assert torch.equal(logits(fresh, inputs), compressed)
    measured = twofour.measure(model, inputs, repeats=3)
    assert measured.summary["largest relative error"] < tolerance
    assert measured.summary["sparse bytes"] < measured.summary["dense bytes"]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("bert", {"cls.predictions.decoder": "output head", "bert.embeddings.word_embeddings": "embedding"}),
        ("llama", {"lm_head": "output head", "model.embed_tokens": "embedding"}),
        ("vit", {"classifier": "output head"}),
        ("t5", {"lm_head": "output head", "shared": "embedding"}),
    ],
)
def test_what_is_left_alone_has_a_reason(family: str, expected: dict[str, str]) -> None:
    model, _ = FAMILIES[family]()
    rows = {row["layer"]: row for row in twofour.prune(model).rows}
    for name, reason in expected.items():
        assert rows[name]["action"] == "skipped"
        assert rows[name]["reason"].startswith(reason)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linears <= set(rows)


def test_patch_embedding_of_three_channels_says_why() -> None:
    model, _ = vit()
    rows = twofour.prune(model).where(kind="Conv2d")
    assert [row["reason"] for row in rows] == ["input channels 3 is not a multiple of 4"]


def test_gpt2_conv1d_is_pruned_along_its_inputs_and_refused_for_compression() -> None:
    model, inputs = gpt2()
    twofour.prune(model)
    weight = model.transformer.h[0].attn.c_attn.weight
    assert bool(((weight.T.reshape(-1, 4) != 0).sum(1) == 2).all())
    logits(model, inputs)
    with pytest.raises(twofour.ModelError, match=r"Conv1D holds its weight as \[in, out\]"):
        twofour.compress(model)


def test_compile_of_a_compressed_encoder_has_no_graph_break() -> None:
    model, _inputs = bert()
    model.eval()
    twofour.prune(model)
    twofour.compress(model, force=True)
    encoder = model.bert.encoder.layer[0].intermediate
    x = torch.randn(2, 7, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(encoder, fullgraph=True)(x), encoder(x))


@pytest.mark.parametrize("pattern", ["2:4t", "2:4x4"])
def test_gpt2_conv1d_has_no_shared_patterns(pattern: str) -> None:
    model, _ = gpt2()
    with pytest.raises(twofour.ModelError, match=rf"{pattern} is for weights \[out_features, in_features\]"):
        twofour.prune(model, pattern)
