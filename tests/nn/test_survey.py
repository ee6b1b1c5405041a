"""The survey finds every layer and gives a reason for each it leaves."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import twofour
from twofour import ModelError, SparseLinear
from twofour.nn.survey import survey
from twofour.pattern import Pattern


def reasons(model: nn.Module, **kwargs: object) -> dict[str, str | None]:
    return {layer.name: layer.skip for layer in survey(model, Pattern(), **kwargs)}  # type: ignore[arg-type]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.body = nn.Linear(8, 8)
        self.out = nn.Linear(8, 16, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.body(self.embed(ids)))


def test_every_layer_kind_is_listed_with_its_reason() -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.zeros(4, 4))

    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(8, 8),
            "linear": nn.Linear(8, 8),
            "odd": nn.Linear(7, 8),
            "norm": nn.LayerNorm(8),
            "conv": nn.Conv2d(4, 8, 3),
            "stem": nn.Conv2d(3, 8, 3),
            "depthwise": nn.Conv2d(8, 8, 3, groups=8),
            "transposed": nn.ConvTranspose2d(4, 8, 3),
            "conv1d": nn.Conv1d(8, 8, 1),
            "conv3d": nn.Conv3d(8, 8, 1),
            "strange": Strange(),
            "lm_head": nn.Linear(8, 8),
            "integer": nn.Linear(8, 8),
            "bilinear": nn.Bilinear(4, 4, 4),
            "parametrized": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
            "lazy": nn.LazyLinear(8),
            "empty": nn.Linear(8, 8),
        }
    )
    model["integer"].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    model["empty"].weight = nn.Parameter(torch.zeros(0, 8))
    found = reasons(model)
    assert found.pop("linear") is None
    assert found.pop("conv") is None
    assert found.pop("conv1d") is None
    assert found.pop("conv3d") is None
    assert "norm" not in found
    expected = {
        "embedding": "embedding",
        "odd": "in_features 7 is not a multiple of 4",
        "stem": "input channels 3 is not a multiple of 4",
        "depthwise": "grouped convolution (groups=8)",
        "transposed": "transposed convolution",
        "strange.matrix": "Strange is not a Linear or convolution",
        "lm_head": "output head (name it in include= to prune it)",
        "integer": "weight is int8, not floating point",
        "bilinear": "Bilinear is not a Linear or convolution",
        "parametrized": "its weight is parametrized (computed from others)",
        "lazy": "lazy: run the model once before",
        "empty": "weight is empty",
    }
    for name, reason in expected.items():
        assert found.pop(name) == reason
    assert set(found) <= {
        "parametrized.parametrizations.weight.original0",
        "parametrized.parametrizations.weight.original1",
    }


def test_meta_weights_are_named() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    assert reasons(model) == {"0": "weight is on the meta device: load it first"}
    with pytest.raises(ModelError, match=r"nothing to prune: all 1 layers are skipped \(weight is on the meta device"):
        twofour.prune(model)


def test_weights_shared_with_an_embedding_are_left() -> None:
    model = Tied()
    found = reasons(model)
    assert found["out"] == "weight is shared with 'embed' (Embedding), which is left as it is"
    before = model.embed.weight.clone()
    twofour.prune(model)
    assert torch.equal(model.embed.weight, before)


def test_weights_shared_with_an_excluded_layer_are_left() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    found = reasons(model, exclude="0")
    assert found == {"0": "excluded", "1": "weight is shared with '0' (Linear), which is left as it is", "2": None}


def test_include_and_exclude_are_wildcards_and_must_match() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    assert reasons(model, include="1.*") == {"0": "not included", "1.0": None, "1.1": None}
    assert reasons(model, include=["1.*"], exclude=["*.1"]) == {"0": "not included", "1.0": None, "1.1": "excluded"}
    with pytest.raises(ModelError, match=r"exclude='decoder\.\*' matches no layer\. The layers are called '0', '1\.0'"):
        survey(model, Pattern(), None, ["decoder.*"])


def test_an_included_head_is_worked_on() -> None:
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "lm_head": nn.Linear(8, 8)})
    assert reasons(model, include=["*"])["lm_head"] is None


def test_a_module_under_two_names_is_one_layer() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": shared})
    (layer,) = survey(model, Pattern())
    assert layer.names == ("a", "b")
    assert reasons(model, exclude="b") == {"a": "excluded"}


def test_not_a_model() -> None:
    with pytest.raises(ModelError, match=r"a dict is not a model: pass a torch.nn.Module"):
        twofour.prune({"weight": torch.zeros(4, 4)})  # type: ignore[arg-type]


def test_attention_is_pruned_and_refused_for_compression() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "other": nn.Linear(8, 8)})
    report = twofour.prune(model)
    assert {row["layer"]: row["action"] for row in report.rows} == {
        "attention.in_proj_weight": "pruned",
        "attention.out_proj": "pruned",
        "other": "pruned",
    }
    rows = {row["layer"]: row for row in twofour.compress(model, force=True).rows}
    assert "reads its packed projection itself" in rows["attention.in_proj_weight"]["reason"]
    assert "'attention' reads its weight without calling it" in rows["attention.out_proj"]["reason"]
    assert rows["other"]["action"] == "compressed"
    x = torch.randn(3, 1, 8)
    model["attention"](x, x, x)


def test_subclass_with_its_own_forward_is_pruned_but_stays() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    class Plain(nn.Linear):
        pass

    model = nn.Sequential(Scaled(8, 8), Plain(8, 8))
    twofour.prune(model)
    report = twofour.compress(model, force=True)
    assert isinstance(model[0], Scaled)
    assert isinstance(model[1], SparseLinear)
    assert report.rows[0]["reason"] == "Scaled overrides Linear.forward"


def hooked(name: str) -> nn.Linear:
    layer = nn.Linear(8, 8)
    if name == "weight_norm":
        nn.utils.weight_norm(layer)
    elif name == "spectral_norm":
        nn.utils.spectral_norm(layer)
    else:
        torch_prune.l1_unstructured(layer, "weight", 0.3)
    return layer


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "l1_unstructured"])
def test_weights_that_a_legacy_hook_recomputes_are_left(name: str) -> None:
    model = nn.ModuleDict({"hooked": hooked(name), "plain": nn.Linear(8, 8)})
    found = reasons(model)
    assert found["plain"] is None
    assert str(found["hooked"]).startswith("its weight is recomputed by a hook: call torch.nn.utils.remove_weight_norm")
    assert "torch.nn.utils.prune.remove first" in str(found["hooked"])
    twofour.prune(model)
    assert twofour.compress(model, force=True).rows[0]["action"] == "skipped"
    model["hooked"](torch.randn(2, 8))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_computed_weights_of_convolutions_are_left_too() -> None:
    model = nn.Sequential(
        nn.utils.weight_norm(nn.Conv1d(4, 4, 1)), nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 1))
    )
    found = reasons(model)
    assert str(found["0"]).startswith("its weight is recomputed by a hook")
    assert found["1"] == "its weight is parametrized (computed from others)"


def test_what_is_inside_an_output_head_is_head_too() -> None:
    head = nn.ModuleDict({"dense": nn.Linear(8, 8), "out_proj": nn.Linear(8, 2)})
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "classifier": head})
    found = reasons(model)
    assert found["body"] is None
    assert found["classifier.dense"] == found["classifier.out_proj"] == "output head (name it in include= to prune it)"
    assert reasons(model, include="classifier.dense")["classifier.dense"] is None


def test_memory_shared_through_another_parameter_object_is_seen() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 8), "out": nn.Linear(8, 8), "part": nn.Linear(8, 4)})
    model["out"].weight = nn.Parameter(model["embed"].weight.data)
    model["part"].weight = nn.Parameter(model["embed"].weight.data[4:])
    found = reasons(model)
    expected = "weight is shared with 'embed' (Embedding), which is left as it is"
    assert found["out"] == found["part"] == expected


def test_parameters_cut_from_one_buffer_are_not_shared() -> None:
    flat = torch.randn(128)
    model = nn.ModuleDict({"embed": nn.Embedding(8, 8), "out": nn.Linear(8, 8)})
    model["embed"].weight = nn.Parameter(flat[:64].view(8, 8))
    model["out"].weight = nn.Parameter(flat[64:].view(8, 8))
    assert reasons(model)["out"] is None
