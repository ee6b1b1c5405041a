"""Channels of whole models: outputs stay, pruning keeps more, what must stay is named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import twofour
from twofour import ModelError, Report
from twofour.masks import magnitude, nm_mask
from twofour.nn.survey import survey
from twofour.workflows import permute as permute_verb
from twofour.workflows.norms import input_norms

QUICK = 100


def scrambled(model: nn.Module) -> nn.Module:
    """Random numbers in every parameter and buffer: a fresh norm has the same weight everywhere, and would hide faults."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and "inv_freq" not in name:
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "var" in name else torch.randn_like(tensor) * 0.3)
    return model.eval()


def outputs(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        found = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    found = getattr(found, "logits", getattr(found, "last_hidden_state", found))
    assert isinstance(found, Tensor)
    return found


def kept_magnitude(model: nn.Module) -> dict[str, float]:
    """The share of |w| that 2:4 keeps, by layer, counted apart from what `permute` says."""
    shares = {}
    for row in twofour.prune(model, dry_run=True).rows:
        if row["action"] == "skipped":
            continue
        name, _, last = str(row["layer"]).rpartition(".")
        owner = model.get_submodule(name) if last.endswith("_weight") else model.get_submodule(str(row["layer"]))
        weight = getattr(owner, last if last.endswith("_weight") else "weight")
        scores = magnitude(weight)
        mask = nm_mask(scores, "2:4", dim=0 if type(owner).__name__ == "Conv1D" else 1)
        shares[str(row["layer"])] = float(scores[mask].sum() / scores.sum())
    return shares


def check(model: nn.Module, inputs: Any, **options: Any) -> Report:
    """Permutes; outputs agree to rounding, every layer that gains keeps more, or its set does, and state fits again."""
    before, kept = outputs(model, inputs), kept_magnitude(model)
    names = {name: tensor.shape for name, tensor in model.state_dict().items()}
    report = twofour.permute(model, inputs, sweeps=QUICK, **options)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == names
    after, now = outputs(model, inputs), kept_magnitude(model)
    assert float((after - before).double().norm() / before.double().norm()) < 1e-5
    gaining = report.where(action="permuted")
    assert gaining
    for row in gaining:
        assert row["kept_after"] > row["kept_before"]
        if len(row["members"]) == 1:
            assert now[row["members"][0]] > kept[row["members"][0]]
    for row in report.where(action="left"):
        assert row["reason"]
    untouched = set(kept) - {name for row in gaining for name in row["members"]}
    assert all(now[name] == pytest.approx(kept[name], rel=1e-6) for name in untouched)
    return report


def set_of(report: Report, layer: str) -> Any:
    found = [row for row in report.rows if layer in row["members"]]
    assert len(found) == 1
    return found[0]


# ---- plain modules --------------------------------------------------------------------------------------------------


def test_a_perceptron_gains_between_its_layers(mlp: Callable[[], nn.Sequential]) -> None:
    model = scrambled(mlp())
    report = check(model, torch.randn(5, 64))
    assert set_of(report, "0")["reason"] == "input of the model"
    assert set_of(report, "2")["channels"] == 96
    assert set_of(report, "4")["action"] == "permuted"  # through the LayerNorm


def test_every_axis_with_the_channels_moves() -> None:
    model = scrambled(nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twofour.permute(model, torch.randn(3, 8), sweeps=QUICK)
    order = [int((before["3.weight"] == column[:, None]).all(0).nonzero()) for column in model[3].weight.T]
    assert order != list(range(16))
    for name in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
        assert torch.equal(model.state_dict()[name], before[name][order]), name
    assert torch.equal(model[3].bias, before["3.bias"])


class Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.reduce, self.norm1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.spatial, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.expand, self.norm3 = nn.Conv2d(width, channels, 1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.reduce(x)))
        y = torch.relu_(self.norm2(self.spatial(y)))
        return torch.relu(self.norm3(self.expand(y)) + x)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32)
        self.blocks = nn.Sequential(Bottleneck(32, 16), Bottleneck(32, 16))
        self.down, self.fc = nn.Conv2d(32, 64, 1, stride=2), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(functional.max_pool2d(torch.relu(self.norm(self.stem(x))), 2))
        return self.fc(functional.adaptive_avg_pool2d(self.down(x), 1).flatten(1))


def test_a_residual_stream_is_one_set() -> None:
    report = check(scrambled(Residual()), torch.randn(2, 3, 14, 14))
    assert set_of(report, "blocks.0.reduce")["members"] == ["blocks.0.reduce", "blocks.1.reduce", "down"]
    assert set_of(report, "fc")["channels"] == 64
    assert not report.where(action="left")


class Concatenating(nn.Module):
    """A dense block, a depthwise convolution, groups of a GroupNorm, a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a, self.norm = nn.Conv2d(16, 8, 3, padding=1), nn.BatchNorm2d(24)
        self.b = nn.Conv2d(24, 8, 3, padding=1)
        self.depthwise, self.group_norm = nn.Conv2d(32, 32, 3, groups=32), nn.GroupNorm(4, 32)
        self.point = nn.Conv2d(32, 16, 1)
        self.grouped, self.last = nn.Conv2d(16, 16, 1, groups=2), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.cat([x, self.a(x)], 1)
        x = torch.cat([x, self.b(torch.relu(self.norm(x)))], 1)
        return self.last(self.grouped(torch.relu(self.point(self.group_norm(self.depthwise(x))))))


def test_concatenation_depthwise_and_norms_of_groups() -> None:
    report = check(scrambled(Concatenating()), torch.randn(2, 3, 10, 10))
    rows = [row for row in report.rows if "a" in row["members"]]
    assert [(row["blocks"], row["channels"]) for row in rows] == [(2, 16)]  # cut by the groups of the GroupNorm
    assert set_of(report, "last")["reason"] == "operator aten.conv2d at 'grouped'"


class ManyWays(nn.Module):
    """The same residual stream through other operators."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.table = nn.Parameter(torch.randn(1, 5, 16))
        self.scale = nn.Parameter(torch.randn(16, 1))
        self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) + self.table[:, : x.shape[1]]
        a, b = self.up(x).chunk(2, dim=-1)
        x = x + torch.einsum("bsd,de->bse", a * torch.sigmoid(b), self.scale * torch.eye(16))
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        x = torch.where(x > 0, x, 0.1 * x).transpose(1, 2).contiguous().permute(0, 2, 1)
        x = torch.stack([x, -x], 0).sum(0) + x
        x = functional.pad(x, (0, 0, 1, 0))[:, 1:]
        return self.last(x.reshape(-1, 16)).unflatten(0, (2, -1)).softmax(-1)


def test_other_operators_carry_channels_or_pin_them() -> None:
    model = scrambled(ManyWays())
    report = twofour.permute(model, torch.randn(2, 5, 4), sweeps=QUICK)  # compares by itself
    assert set_of(report, "last")["reason"]  # torch.eye is a constant: the stream is pinned by it
    assert set_of(report, "up")["reason"]


class Sorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(self.a(x).sort(-1).values)))


def test_an_operator_without_a_rule_pins_and_is_named() -> None:
    report = check(scrambled(Sorted()), torch.randn(3, 8))
    assert set_of(report, "b")["reason"] == "operator aten.sort"
    assert set_of(report, "c")["action"] == "permuted"


class Flattened(nn.Module):
    """[N, C, 2, 2] -> [N, 4 C]: neighbours are pixels, channels may not move."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(4, 8, 3), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).flatten(1))


def test_flattened_pixels_pin_their_channels() -> None:
    report = twofour.permute(Flattened().eval(), torch.randn(2, 4, 4, 4), sweeps=QUICK)
    assert not report.where(action="permuted")
    assert report.summary["relative error"] == 0.0


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        return self.c(functional.linear(torch.relu(self.b(x)), self.b.weight))


def test_a_weight_used_twice_moves_once() -> None:
    """Its rows feed its own columns: one set of channels."""
    report = check(scrambled(Tied()), torch.randn(3, 8))
    assert set_of(report, "b")["members"] == ["b", "c"]


def test_tensors_that_share_some_memory_stay() -> None:
    model = scrambled(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)))
    flat = torch.randn(16 * 8 + 8)
    model[0].weight = nn.Parameter(flat[: 16 * 8].view(16, 8))
    model[2].bias = nn.Parameter(flat[16 * 8 - 4 : 16 * 8 + 4])
    report = twofour.permute(model, torch.randn(3, 8), sweeps=QUICK)
    assert "memory is shared with" in set_of(report, "2")["reason"]


def test_attention_of_torch_moves_features_inside_their_head() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = scrambled(nn.Sequential(nn.Linear(8, 32), layer, nn.Linear(32, 4)))
    report = check(model, torch.randn(2, 5, 8))
    assert set_of(report, "1.self_attn.out_proj")["blocks"] == 4
    # One after the other, each stream: what enters the layer, what its norms put out.
    assert set_of(report, "1.linear1")["members"] == ["1.self_attn.in_proj_weight", "1.linear1", "2"]


# ---- transformers ---------------------------------------------------------------------------------------------------


def families() -> dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]]:
    transformers = pytest.importorskip("transformers", reason="needs transformers (twofour[transformers])")
    ids = torch.randint(3, 48, (2, 7))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    common = {"vocab_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}

    def bert() -> tuple[nn.Module, dict[str, Tensor]]:
        model = transformers.BertForMaskedLM(transformers.BertConfig(**common, intermediate_size=64))
        return model, {"input_ids": ids, "attention_mask": mask}

    def llama(**more: Any) -> tuple[nn.Module, dict[str, Tensor]]:
        config = transformers.LlamaConfig(**common, num_key_value_heads=2, intermediate_size=64, **more)
        return transformers.LlamaForCausalLM(config), {"input_ids": ids}

    def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
        config = transformers.GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=16, eos_token_id=1)
        config.bos_token_id = 1
        return transformers.GPT2LMHeadModel(config), {"input_ids": ids}

    def opt() -> tuple[nn.Module, dict[str, Tensor]]:
        config = transformers.OPTConfig(**common, ffn_dim=64, max_position_embeddings=32, word_embed_proj_dim=32)
        return transformers.OPTForCausalLM(config), {"input_ids": ids, "attention_mask": mask}

    def vit() -> tuple[nn.Module, dict[str, Tensor]]:
        config = transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=16,
            patch_size=4,
        )
        return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 16, 16)}

    def t5() -> tuple[nn.Module, dict[str, Tensor]]:
        config = transformers.T5Config(vocab_size=48, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        return transformers.T5ForConditionalGeneration(config), {"input_ids": ids, "decoder_input_ids": ids}

    return {
        "bert": bert,
        "llama": llama,
        "llama-tied": lambda: llama(tie_word_embeddings=True),
        "llama-eager": lambda: llama(attn_implementation="eager"),
        "gpt2": gpt2,
        "opt": opt,
        "vit": vit,
        "t5": t5,
    }


STREAMS = {
    "bert": ("bert.encoder.layer.1.intermediate.dense", 9),  # with the head's transform
    "llama": ("model.layers.0.mlp.up_proj", 10),
    "llama-tied": ("model.layers.0.mlp.up_proj", 10),
    "llama-eager": ("model.layers.0.mlp.up_proj", 10),
    "gpt2": ("transformer.h.1.mlp.c_fc", 4),
    "opt": ("model.decoder.layers.1.fc1", 8),
    "vit": ("vit.layers.1.mlp.fc1", 8),
    "t5": ("encoder.block.0.layer.1.DenseReluDense.wi", 22),
}
HEADS = {
    "bert": ("bert.encoder.layer.0.attention.output.dense", 4),
    "llama": ("model.layers.0.self_attn.o_proj", 2),  # four heads of queries, two of values
    "llama-tied": ("model.layers.1.self_attn.o_proj", 2),
    "llama-eager": ("model.layers.1.self_attn.o_proj", 2),
    "gpt2": ("transformer.h.0.attn.c_proj", 4),
    "opt": ("model.decoder.layers.0.self_attn.out_proj", 4),
    "vit": ("vit.layers.0.attention.o_proj", 4),
    "t5": ("decoder.block.1.layer.1.EncDecAttention.o", 4),
}


@pytest.mark.parametrize("family", STREAMS)
def test_transformers_gain_everywhere_and_compute_the_same(family: str) -> None:
    model, inputs = families()[family]()
    report = check(scrambled(model), inputs)
    stream, readers = STREAMS[family]
    row = set_of(report, stream)
    assert len(row["members"]) == readers
    if family == "t5":  # the last hidden state of the encoder is an output, and the embedding is shared
        assert (row["action"], row["reason"]) == ("left", "output of the model")
    else:
        assert row["action"] == "permuted"
    heads, blocks = HEADS[family]
    assert set_of(report, heads)["blocks"] == blocks
    assert set_of(report, heads)["action"] == "permuted"
    if family.startswith("llama"):  # what permute never ran, and what pruning does afterwards
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert tied == (family == "llama-tied")


def test_generation_with_a_cache_stays() -> None:
    model, inputs = families()["llama"]()
    scrambled(model)

    def generate() -> Tensor:
        found: Any = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert isinstance(found, Tensor)
        return found

    before = generate()
    twofour.permute(model, inputs, sweeps=QUICK)
    assert torch.equal(generate(), before)


def test_several_batches_and_half_precision() -> None:
    model, inputs = families()["llama"]()
    scrambled(model).to(torch.bfloat16)
    report = twofour.permute(model, [inputs, {"input_ids": inputs["input_ids"][:1, :3]}], sweeps=QUICK)
    assert report.where(action="permuted")
    assert report.summary["relative error"] < 5e-2


@pytest.mark.slow
def test_minilm(minilm_folder: Any, native: None) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(minilm_folder).eval()
    inputs = {"input_ids": torch.randint(1000, 2000, (2, 16)), "attention_mask": torch.ones(2, 16, dtype=torch.long)}
    report = check(model, inputs, exclude="pooler*")
    assert len(report.where(action="permuted")) == 12
    assert report.summary["kept after"] > report.summary["kept before"] + 0.003


# ---- the verb -------------------------------------------------------------------------------------------------------


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_dry_run_changes_nothing_and_says_what_would_be(mlp: Callable[[], nn.Sequential]) -> None:
    model = mlp()
    before = state(model)
    dry = twofour.permute(model, torch.randn(2, 64), sweeps=QUICK, dry_run=True)
    assert same(before, state(model))
    assert "dry run: nothing was changed" in dry.notes
    real = twofour.permute(model, torch.randn(2, 64), sweeps=QUICK)
    assert not same(before, state(model))
    assert [row["kept_after"] for row in dry.rows] == [row["kept_after"] for row in real.rows]


class Hidden(nn.Module):
    """Looks at channel 3 in eager mode alone, where the graph does not show it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        if not torch.compiler.is_exporting():
            x = x * (torch.arange(32) < 16)
        return self.b(x)


def test_outputs_that_differ_put_everything_back() -> None:
    model = scrambled(Hidden())
    before = state(model)
    with pytest.raises(
        ModelError, match=r"output 0 differs by .* more than 1e-04 for float32.*Everything was put back"
    ):
        twofour.permute(model, torch.randn(4, 8), sweeps=QUICK)
    assert same(before, state(model))


def test_an_interrupt_puts_everything_back(mlp: Callable[[], nn.Sequential], monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    before = state(model)

    def interrupt(*_: Any) -> float:
        raise KeyboardInterrupt

    import importlib

    monkeypatch.setattr(importlib.import_module("twofour.workflows.permute"), "_compare", interrupt)
    with pytest.raises(KeyboardInterrupt):
        twofour.permute(model, torch.randn(2, 64), sweeps=QUICK)
    assert same(before, state(model))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else x


def test_a_model_that_cannot_be_exported_says_so() -> None:
    with pytest.raises(ModelError, match=r"torch.export cannot read Branching: .*\n.*Nothing was changed"):
        twofour.permute(Branching(), torch.randn(2, 8))


def test_modes_and_fast_paths_come_back(mlp: Callable[[], nn.Sequential]) -> None:
    model = mlp().train()
    model[1].eval()
    twofour.permute(model, torch.randn(2, 64), sweeps=QUICK)
    assert [module.training for module in model] == [True, False, True, True, True]
    assert torch.backends.mha.get_fastpath_enabled()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_is_pruned_afterwards_keeps_what_the_report_says(mlp: Callable[[], nn.Sequential]) -> None:
    model = mlp()
    report = twofour.permute(model, torch.randn(2, 64), sweeps=QUICK)
    total, kept = 0.0, 0.0
    for index in (0, 2, 4):
        total += float(model[index].weight.detach().double().abs().sum())
    twofour.prune(model)
    for index in (0, 2, 4):
        kept += float(model[index].weight.detach().double().abs().sum())
    assert report.summary["kept after"] == pytest.approx(kept / total)


@pytest.mark.parametrize("pattern", ["1:4", "4:8", "2:4x4", "2:4t"])
def test_other_patterns(mlp: Callable[[], nn.Sequential], pattern: str) -> None:
    report = twofour.permute(mlp(), torch.randn(2, 64), pattern, sweeps=50)
    assert report.where(action="permuted")
    assert report.summary["kept after"] > report.summary["kept before"]


def test_scores_by_input_norms_and_by_a_function(mlp: Callable[[], nn.Sequential]) -> None:
    norms = {"0": torch.rand(64), "2": torch.rand(96), "4": torch.rand(64)}
    by_norms = twofour.permute(mlp(), torch.randn(2, 64), scores=norms, sweeps=QUICK)
    by_function = twofour.permute(
        mlp(), torch.randn(2, 64), scores=lambda name, weight: weight.abs() * norms[name], sweeps=QUICK
    )
    assert [row["kept_after"] for row in by_norms.rows] == [row["kept_after"] for row in by_function.rows]
    with pytest.raises(ModelError, match="no input norms for '2'"):
        twofour.permute(mlp(), torch.randn(2, 64), scores={"0": torch.rand(64)})
    with pytest.raises(ModelError, match=r"scores=\['0'\] is \[63\]: the weight reads 64"):
        twofour.permute(mlp(), torch.randn(2, 64), scores={**norms, "0": torch.rand(63)})
    with pytest.raises(ModelError, match=r"scores= gave \[64\] for '0'"):
        twofour.permute(mlp(), torch.randn(2, 64), scores=lambda name, weight: weight[0])


def test_weights_that_are_not_finite_are_named(mlp: Callable[[], nn.Sequential]) -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    before = state(model)
    with pytest.raises(ModelError, match="scores of '2' are NaN"):
        twofour.permute(model, torch.randn(2, 64), sweeps=QUICK)
    assert torch.equal(model[0].weight, before["0.weight"])


def test_include_and_exclude_choose_who_gains(mlp: Callable[[], nn.Sequential]) -> None:
    report = twofour.permute(mlp(), torch.randn(2, 64), exclude="2", sweeps=QUICK)
    assert [row["members"] for row in report.where(action="permuted")] == [["4"]]
    with pytest.raises(ModelError, match="matches no layer"):
        twofour.permute(mlp(), torch.randn(2, 64), include="nothing")
    with pytest.raises(ModelError, match="nothing to permute for"):
        twofour.permute(nn.Linear(7, 8), torch.randn(2, 7))


def test_a_limit_of_time_is_divided(mlp: Callable[[], nn.Sequential]) -> None:
    import time

    start = time.perf_counter()
    report = twofour.permute(mlp(), torch.randn(2, 64), sweeps=10**7, seconds=0.5)
    assert time.perf_counter() - start < 20
    assert report.where(action="permuted")


def test_compressed_models_are_refused(mlp: Callable[[], nn.Sequential]) -> None:
    model = mlp()
    twofour.prune(model)
    twofour.compress(model, force=True)
    with pytest.raises(ModelError, match="nothing to permute for"):
        twofour.permute(model, torch.randn(2, 64))


def test_tensors_outside_the_call_are_counted() -> None:
    class Extra(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.other = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    report = twofour.permute(Extra(), torch.randn(2, 8), sweeps=QUICK)
    assert any("2 tensors take no part in this call" in note and "other.weight" in note for note in report.notes)


def test_the_report_prints(mlp: Callable[[], nn.Sequential]) -> None:
    report = twofour.permute(mlp(), torch.randn(2, 64), sweeps=QUICK)
    assert "permuted" in str(report)
    assert "input of the model" in str(report)
    assert permute_verb.__doc__


def test_scores_measured_on_the_inputs() -> None:
    """Channels that are nearly always zero count for nothing; the norms are those of the real inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    x = [torch.randn(5, 8), torch.randn(7, 8)]
    layers = [layer for layer in survey(model, twofour.Pattern()) if layer.skip is None]
    norms = input_norms(model, layers, x)
    hidden = torch.relu(model[0](torch.cat(x)))
    torch.testing.assert_close(
        norms["2"], hidden.double().square().mean(0).sqrt(), check_dtype=False, rtol=1e-5, atol=0
    )
    wanted = copy.deepcopy(model)
    twofour.permute(wanted, x, scores=lambda name, w: w.abs().square() * norms[name].square().float())
    twofour.permute(model, x, scores="inputs")
    for found, expected in zip(model.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(found, expected)
    with pytest.raises(twofour.UnsupportedError, match="scores='output': it is None, 'inputs', a mapping"):
        twofour.permute(model, x, scores="output")  # type: ignore[arg-type]
