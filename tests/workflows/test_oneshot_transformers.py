"""Calibrated pruning of transformers' families, against a plain loop: one whole forward for every layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.on_device import DEVICE
from torch import Tensor, nn

import twofour
from twofour.nn import observe
from twofour.solvers import Hessian, Recipe, solve

transformers = pytest.importorskip("transformers", reason="needs transformers (twofour[transformers])")

Case = tuple[nn.Module, list[dict[str, Tensor]]]
_TEXT = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def _texts(lengths: list[list[int]], width: int = 9) -> list[dict[str, Tensor]]:
    """Batches of token ids, padded to `width`."""
    return [
        {
            "input_ids": torch.randint(0, 50, (len(batch), width)),
            "attention_mask": torch.tensor([[1] * n + [0] * (width - n) for n in batch]),
        }
        for batch in lengths
    ]


def bert() -> Case:
    return transformers.BertForMaskedLM(transformers.BertConfig(**_TEXT)), _texts([[9, 5], [7, 2], [9, 9]])


def llama() -> Case:
    config = transformers.LlamaConfig(**_TEXT, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config), _texts([[9, 9], [9, 4]])


def qwen2() -> Case:
    config = transformers.Qwen2Config(**_TEXT, num_key_value_heads=1)
    return transformers.Qwen2ForCausalLM(config), _texts([[9, 9], [9, 9]])


def gpt2() -> Case:
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    return transformers.GPT2LMHeadModel(config), _texts([[9, 6], [3, 9]])


def opt() -> Case:
    config = transformers.OPTConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64,
        max_position_embeddings=16, word_embed_proj_dim=32,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config), _texts([[9, 9], [9, 7]])


def vit() -> Case:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=4,
        num_channels=4,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config), [
        {"pixel_values": torch.randn(2, 4, 16, 16)} for _ in range(2)
    ]


def t5() -> Case:
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    batches = _texts([[9, 5], [4, 9]])
    for batch in batches:
        batch["decoder_input_ids"] = torch.randint(0, 50, (2, 6))
        batch["decoder_attention_mask"] = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    return transformers.T5ForConditionalGeneration(config), batches


FAMILIES: dict[str, Callable[[], Case]] = {
    "bert": bert, "llama": llama, "qwen2": qwen2, "gpt2": gpt2, "opt": opt, "vit": vit, "t5": t5,
}  # fmt: skip


def plainly(model: nn.Module, batches: list[dict[str, Tensor]], recipe: Recipe, names: list[str]) -> None:
    """Layer by layer in the order of the calls: a hook, a forward of the whole model for every batch, `solve`."""
    modules = {name: module for name, module in model.named_modules() if name in names}
    order: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: order.append(name)) for name, module in modules.items()
    ]
    with torch.no_grad():
        model(**batches[0])
        for hook in hooks:
            hook.remove()
        for name in order:
            module = modules[name]
            weight = module.weight.detach()
            matrix = observe.as_matrix(module, weight)
            hessian = Hessian(matrix.shape[1], DEVICE)
            for batch in batches:
                masks = [mask for key, mask in batch.items() if key.endswith("attention_mask")]

                def hook(_: Any, args: Any, masks: list[Tensor] = masks, hessian: Hessian = hessian) -> None:
                    (x,) = args
                    real = next((mask for mask in masks if x.ndim == 3 and mask.shape == x.shape[:2]), None)
                    hessian.add(next(observe.tokens(module, x if real is None else x[real.bool()])))  # noqa: B023

                handle = module.register_forward_pre_hook(hook)
                model(**batch)
                handle.remove()
            found = solve(matrix, hessian, "2:4", recipe)
            weight.copy_(observe.from_matrix(module, found.weight, weight.shape))


@pytest.mark.parametrize("parts", [True, False], ids=["parts", "whole blocks"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_pruned_as_a_plain_loop_would(family: str, parts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twofour.workflows.replay._FEWEST_FOR_PARTS", 1 if parts else 100)
    torch.manual_seed(0)
    model, batches = FAMILIES[family]()
    model = model.double().eval()
    batches = [{k: x.double() if x.is_floating_point() else x for k, x in batch.items()} for batch in batches]
    expected = copy.deepcopy(model)
    report = twofour.prune(model, calibration=batches, method="sparsegpt")
    assert not report.notes, "blocks should answer from memory"
    pruned = [row["layer"] for row in report.where(action="pruned")]
    plainly(expected, batches, Recipe("sparsegpt"), pruned)
    for (name, found), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-9, rtol=0, msg=name)
    skipped = [row["layer"] for row in report.where(action="skipped")]
    kinds = (nn.Linear, nn.Conv2d)
    linears = {
        name for name, module in model.named_modules() if isinstance(module, kinds) or type(module).__name__ == "Conv1D"
    }
    assert linears <= {*pruned, *skipped}
    assert len(pruned) >= 8
    assert twofour.check(model).summary["holds"]


def test_configurations_come_back() -> None:
    model, batches = llama()
    assert model.config.use_cache
    twofour.prune(model, calibration=batches, method="wanda")
    assert model.config.use_cache
    assert model(**batches[0]).past_key_values is not None


def test_experts_see_only_the_tokens_sent_to_them() -> None:
    """A mixture of experts: no group of layers shares an input, and some inputs reach an expert in later batches only."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(16, 2)
            self.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            chosen = (x[:, 0] > 0).long()
            y = torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                if bool((chosen == i).any()):
                    y[chosen == i] = expert(x[chosen == i])
            return y

    torch.manual_seed(0)
    first, second = torch.randn(20, 16), torch.randn(30, 16)
    first[:, 0] = first[:, 0].abs()  # the first batch knows only one expert
    model = Experts()
    report = twofour.prune(model, calibration=[first, second], include="experts.*", method="sparsegpt")
    tokens = {row["layer"]: row.get("tokens") for row in report.rows if row["action"] == "pruned"}
    positive = int((second[:, 0] > 0).sum())
    assert tokens == {"experts.1": 20 + positive, "experts.0": 30 - positive}
    assert all(row["error"] < row["error_masked"] for row in report.where(action="pruned"))
