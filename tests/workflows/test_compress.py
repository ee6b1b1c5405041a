"""compress and explain: what is replaced, what stays, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import nn

import twofour
from twofour import ModelError, SparseLinear
from twofour.workflows import timing

Build = Callable[[], nn.Sequential]


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what timing finds, so that decisions can be tested on any machine: speeds(dense_us, sparse_us, onednn_us)."""

    def fix(dense_us: float, sparse_us: float, onednn_us: float = 20) -> None:
        def paired(rivals: Mapping[str, Callable[[], object]], **_: object) -> dict[str, timing.Timing]:
            for function in rivals.values():
                function()
            found = {"dense": dense_us, "sparse": sparse_us, "onednn": onednn_us}
            return {name: timing.Timing(found[name], found[name], found[name], 1) for name in rivals}

        monkeypatch.setattr("twofour.workflows.comparison.paired", paired)

    return fix


def kinds(model: nn.Module) -> list[str]:
    return [type(layer).__name__ for layer in model.children()]


def test_faster_layers_are_replaced(mlp: Build, native: None, speeds: Callable[..., None]) -> None:
    model = mlp()
    twofour.prune(model)
    x = torch.randn(5, 64)
    expected = model(x)
    speeds(10, 5)
    report = twofour.compress(model, x)
    assert kinds(model) == ["SparseLinear", "GELU", "SparseLinear", "LayerNorm", "SparseLinear"]
    assert [row["speedup"] for row in report.rows] == [2, 2, 2]
    assert [row["tokens"] for row in report.rows] == ["5"] * 3
    torch.testing.assert_close(model(x), expected)


def test_the_report_has_the_strongest_dense_rival_too(mlp: Build, native: None, speeds: Callable[..., None]) -> None:
    model = mlp()
    twofour.prune(model)
    speeds(10, 5, 4)
    report = twofour.compress(model, torch.randn(5, 64))
    assert [row["against_best"] for row in report.rows] == [0.8] * 3
    assert "3 compressed layers beat torch's Linear but not oneDNN" in report.notes[0]


def test_slower_layers_stay_dense_and_the_reports_say_so(mlp: Build, native: None, speeds: Callable[..., None]) -> None:
    model = mlp()
    twofour.prune(model)
    layers = list(model)
    speeds(5, 10)
    report = twofour.compress(model, torch.randn(5, 64))
    assert list(model) == layers
    assert {row["action"] for row in report.rows} == {"dense"}
    assert all("would run at 0.50x of dense" in row["reason"] for row in report.rows)
    assert report.summary["kept dense because sparse would be slower"] == 3
    assert all("would run at 0.50x" in row["reason"] for row in twofour.explain(model).rows)


def test_a_compressed_layer_that_turns_out_slower_goes_back(mlp: Build, speeds: Callable[..., None]) -> None:
    model = mlp()
    twofour.prune(model)
    weight = model[0].weight.detach().clone()
    twofour.compress(model, force=True)
    speeds(5, 10)
    twofour.compress(model, torch.randn(5, 64))
    assert kinds(model) == ["Linear", "GELU", "Linear", "LayerNorm", "Linear"]
    assert torch.equal(model[0].weight, weight)


def test_real_timing_gives_numbers_and_the_better_choice(mlp: Build) -> None:
    model = mlp()
    twofour.prune(model)
    report = twofour.compress(model, torch.randn(3, 64))
    for row in report.rows:
        assert row["dense_us"] > 0
        assert (row["action"] == "compressed") == (row["speedup"] > 1)


def test_force_needs_no_timing(mlp: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twofour.workflows.comparison.paired", None)
    model = mlp()
    twofour.prune(model)
    report = twofour.compress(model, force=True)
    assert kinds(model).count("SparseLinear") == 3
    assert report.notes == ("force: every layer that can be was compressed, without timing",)


def test_dry_run_changes_nothing(mlp: Build) -> None:
    model = mlp()
    twofour.prune(model)
    report = twofour.compress(model, torch.randn(3, 64), dry_run=True)
    assert "SparseLinear" not in kinds(model)
    assert "dry run: nothing was changed" in report.notes


def test_a_layer_that_does_not_hold_the_pattern_stays(mlp: Build) -> None:
    model = mlp()
    twofour.prune(model, exclude="2")
    report = twofour.compress(model, force=True)
    assert kinds(model) == ["SparseLinear", "GELU", "Linear", "LayerNorm", "SparseLinear"]
    assert report.rows[1]["reason"].startswith("not 2:4 (15")
    assert report.rows[1]["reason"].endswith("groups): prune it first")


def test_nothing_to_compress_is_an_error_and_changes_nothing(mlp: Build) -> None:
    with pytest.raises(ModelError, match=r"no layer holds 2:4, so there is nothing to compress.*\n  Prune first"):
        twofour.compress(mlp())
    with pytest.raises(ModelError, match="no kernel for convolutions yet"):
        twofour.compress(nn.Sequential(nn.Conv2d(4, 4, 1)))


def test_token_counts_may_be_one_number(mlp: Build, speeds: Callable[..., None]) -> None:
    model = mlp()
    twofour.prune(model)
    speeds(10, 5)
    assert twofour.compress(model, tokens=64).rows[0]["tokens"] == "64"
    with pytest.raises(ModelError, match=r"tokens='64': pass whole numbers"):
        twofour.compress(model, tokens="64")  # type: ignore[arg-type]


def test_a_bare_linear_cannot_be_replaced_in_place() -> None:
    layer = nn.Linear(16, 16)
    twofour.prune(layer)
    with pytest.raises(ModelError, match=r"the model is this layer itself.*SparseLinear.from_linear\(layer\)"):
        twofour.compress(layer, force=True)
    with pytest.raises(ModelError, match="the model is this layer itself"):
        twofour.compress(SparseLinear.from_linear(layer), force=True)


def test_layers_sharing_a_weight_share_the_compressed_one() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    twofour.prune(model)
    x = torch.randn(2, 16)
    expected = model(x)
    twofour.compress(model, force=True)
    assert model[0].values is model[1].values
    assert model[0].bias is not model[1].bias
    torch.testing.assert_close(model(x), expected)


def test_a_module_used_twice_is_replaced_in_both_places() -> None:
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    twofour.prune(model)
    report = twofour.compress(model, force=True)
    assert len(report.rows) == 1
    assert model[0] is model[2]
    assert isinstance(model[0], SparseLinear)


def test_tokens_come_from_the_inputs(mlp: Build, speeds: Callable[..., None]) -> None:
    model = mlp()
    twofour.prune(model)
    speeds(10, 5)
    report = twofour.compress(model, [torch.randn(2, 3, 64), (torch.randn(4, 64),), {"input": torch.randn(6, 64)}])
    assert report.rows[0]["tokens"] == "4, 6"
    assert report.rows[0]["dense_us"] == 30


def test_layers_that_the_inputs_never_reach_are_measured_at_default_tokens(
    speeds: Callable[..., None],
) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = Half()
    twofour.prune(model)
    speeds(10, 5)
    report = twofour.compress(model, torch.randn(2, 8))
    assert [row["tokens"] for row in report.rows] == ["2", "1, 128"]
    assert report.notes == ("the inputs never reached unused: measured at (1, 128) tokens",)


def test_bad_inputs(mlp: Build) -> None:
    model = mlp()
    twofour.prune(model)
    with pytest.raises(ModelError, match="inputs is empty: pass at least one batch"):
        twofour.compress(model, [])
    with pytest.raises(ModelError, match="inputs holds a int: a batch is a tensor, a tuple or a dict"):
        twofour.compress(model, [3])
    with pytest.raises(ModelError, match="inputs is a str: pass a tensor"):
        twofour.compress(model, "hello")
    with pytest.raises(ModelError, match="inputs= and tokens= both say what to measure at"):
        twofour.compress(model, torch.randn(1, 64), tokens=[1])


def test_a_model_that_fails_half_way_is_left_as_it_was(mlp: Build) -> None:
    model = mlp()
    twofour.prune(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        twofour.compress(model, torch.randn(2, 63))
    assert "SparseLinear" not in kinds(model)
    assert not model[0]._forward_pre_hooks
    assert model.training


def test_explain_tells_the_kernel_and_the_way_on(mlp: Build, native: None) -> None:
    model = mlp()
    assert all(row["reason"] == "not 2:4: twofour.prune(model) first" for row in twofour.explain(model).rows)
    twofour.prune(model)
    assert all(row["reason"] == "holds 2:4: twofour.compress(model) tries it" for row in twofour.explain(model).rows)
    twofour.compress(model, force=True)
    report = twofour.explain(model)
    assert all(row["kernel"].startswith("cpu ") and not row["reason"] for row in report.rows)
    row = twofour.explain(model.half()).rows[0]
    assert row["kernel"] == "reference"
    assert row["reason"] == "cpu: float16 has no native kernel, only float32 and bfloat16"
    with pytest.raises(ModelError, match="nothing to explain"):
        twofour.explain(nn.ReLU())


def test_other_patterns_run_on_the_reference(mlp: Build) -> None:
    model = mlp()
    twofour.prune(model, "4:8")
    x = torch.randn(3, 64)
    expected = model(x)
    twofour.compress(model, pattern="4:8", force=True)
    torch.testing.assert_close(model(x), expected)
    assert "pattern 4:8 has no native kernel" in twofour.explain(model).rows[0]["reason"]


def test_tied_layers_that_go_back_to_dense_share_one_weight(speeds: Callable[..., None]) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    twofour.prune(model)
    twofour.compress(model, force=True)
    speeds(5, 10)
    twofour.compress(model, torch.randn(2, 16))
    assert kinds(model) == ["Linear", "Linear"]
    assert model[0].weight is model[1].weight
    assert model[0].bias is not model[1].bias


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"tokens": [0]}, "tokens=[0] has no tokens: measured at (1, 128) tokens"),
        ({"inputs": [torch.empty(0, 64)]}, "the inputs bring no tokens to 0, 2, 4: measured at (1, 128) tokens"),
    ],
)
def test_nothing_but_empty_batches_is_measured_at_default_tokens(
    mlp: Build, speeds: Callable[..., None], options: dict[str, object], note: str
) -> None:
    model = mlp()
    twofour.prune(model)
    speeds(10, 5)
    report = twofour.compress(model, **options)  # type: ignore[arg-type]
    assert [row["tokens"] for row in report.rows] == ["1, 128"] * 3
    assert note in report.notes
    with pytest.raises(ModelError, match=r"tokens=\[-1\]: a layer is measured at token counts from 1"):
        twofour.compress(model, tokens=[-1])


def test_a_weight_shared_with_a_layer_that_stays_dense_stays_dense() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Linear(16, 16), Scaled(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    twofour.prune(model)
    rows = twofour.compress(model, force=True).rows
    assert [row["action"] for row in rows] == ["dense", "dense", "compressed"]
    assert rows[0]["reason"] == "weight is shared with '1' (Scaled), which stays dense"
    assert model[0].weight is model[1].weight


def test_two_parameters_on_one_memory_become_one_compressed_weight() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = nn.Parameter(model[0].weight.data)
    twofour.prune(model)
    twofour.compress(model, force=True)
    assert model[0].values is model[1].values


def test_prune_first_is_said_only_where_it_helps() -> None:
    layer = nn.Linear(16, 16)
    twofour.prune(layer)
    attention = nn.Sequential(nn.MultiheadAttention(8, 2))
    twofour.prune(attention)
    for model in (layer, attention, nn.ReLU()):
        with pytest.raises(ModelError, match="^there is nothing to compress: ") as caught:
            twofour.compress(model, force=True)
        assert "Prune first" not in str(caught.value)


def test_timing_leaves_the_random_numbers_alone(mlp: Build, speeds: Callable[..., None]) -> None:
    model = mlp()
    twofour.prune(model)
    speeds(10, 5)
    before = torch.get_rng_state()
    twofour.compress(model, tokens=[3])
    assert torch.equal(torch.get_rng_state(), before)
