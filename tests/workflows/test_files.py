"""save and load of whole models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import twofour
from twofour import ModelError, SparseLinear, SparseMatrix, UnsupportedError
from twofour.format import file
from twofour.kernels import KERNELS
from twofour.solvers import Recipe

Build = Callable[[], nn.Sequential]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_rows_that_share_a_mask_need_not_be_neighbours(mlp: Build, path: Path) -> None:
    """prune with clusters -> check -> compress -> save -> load keeps the pattern and the bits."""
    model = mlp()
    twofour.prune(model, "2:4x4", calibration=torch.randn(200, 64), method=Recipe("wanda", cluster=True))
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert any((linear.weight != 0).unflatten(0, (-1, 4)).any(1).sum(1).max() > 32 for linear in linears)
    assert twofour.check(model, "2:4x4").summary["holds"]
    twofour.compress(model, pattern="2:4x4", force=True)
    twofour.save(model, path)
    fresh = mlp()
    twofour.load(fresh, path)
    x = torch.randn(9, 64)
    assert torch.equal(fresh(x), model(x))
    layers = [module for module in fresh.modules() if isinstance(module, SparseLinear)]
    assert [str(layer.pattern) for layer in layers] == ["2:4x4"] * len(linears)


@pytest.mark.of_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fresh_model_gives_the_same_bits(mlp: Build, path: Path, dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    twofour.prune(model)
    twofour.compress(model, force=True)
    twofour.save(model, path)
    x = torch.randn(9, 64).to(dtype)
    for fresh in (mlp(), mlp().to(torch.float64), copy.deepcopy(model)):
        report = twofour.load(fresh, path)
        assert torch.equal(fresh(x), model(x))
        assert len(report.rows) == 3
    with torch.device("meta"):
        empty = mlp()
    twofour.load(empty, path)
    assert torch.equal(empty(x), model(x))


@pytest.mark.of_cpu
def test_values_that_are_trained_are_stored_once_and_loaded(mlp: Build, path: Path) -> None:
    model = mlp()
    twofour.prune(model)
    twofour.compress(model, force=True)
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    twofour.save(model, path)
    constant = path.stat().st_size
    for layer in layers:
        layer.requires_grad_values()
    twofour.save(model, path)
    assert path.stat().st_size == constant
    x = torch.randn(9, 64)
    for fresh in (mlp(), copy.deepcopy(model)):
        for parameter in fresh.parameters():
            with torch.no_grad():
                parameter.zero_()
        twofour.load(fresh, path)
        assert torch.equal(fresh(x), model(x))
    assert all(layer.values.requires_grad for layer in fresh.modules() if isinstance(layer, SparseLinear))


def test_save_load_save_gives_the_same_bytes(mlp: Build, path: Path, tmp_path: Path) -> None:
    model = mlp()
    twofour.prune(model)
    twofour.compress(model, force=True, include=["0", "2"])
    twofour.save(model, path)
    fresh = mlp()
    twofour.load(fresh, path)
    again = tmp_path / "again.safetensors"
    twofour.save(fresh, again)
    assert path.read_bytes() == again.read_bytes()


def test_layers_that_run_dense_are_stored_compressed_and_run_dense_again(mlp: Build, path: Path) -> None:
    model = mlp()
    twofour.prune(model, exclude="4")
    twofour.compress(model, force=True, include="0")
    saved = twofour.save(model, path)
    assert [(row["weight"], row["run"]) for row in saved.rows] == [("0.weight", "sparse"), ("2.weight", "dense")]
    assert saved.summary["their bytes stored"] == saved.summary["their bytes dense"] * 68 // 128
    fresh = mlp()
    loaded = twofour.load(fresh, path)
    assert [type(layer).__name__ for layer in fresh] == ["SparseLinear", "GELU", "Linear", "LayerNorm", "Linear"]
    assert loaded.rows[1]["reason"] == "ran dense when it was saved"
    x = torch.randn(3, 64)
    assert torch.equal(fresh(x), model(x))


def test_a_16_bit_file_takes_at_most_57_percent_of_its_linears(path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(384, 384, bias=False) for _ in range(6))).to(torch.bfloat16)
    dense_bytes = sum(parameter.nbytes for parameter in model.parameters())
    twofour.prune(model)
    twofour.compress(model, force=True)
    twofour.save(model, path)
    assert path.stat().st_size <= 0.57 * dense_bytes


def test_a_plain_model_and_a_compressed_target(mlp: Build, path: Path) -> None:
    plain, target = mlp(), mlp()
    twofour.save(plain, path)
    twofour.prune(target)
    twofour.compress(target, force=True)
    twofour.load(target, path)
    x = torch.randn(3, 64)
    assert isinstance(target[0], nn.Linear)
    assert torch.equal(target(x), plain(x))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.again = self.first
        self.out = nn.Linear(8, 16, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor([2.0]))
        self.register_buffer("scratch", torch.tensor([3.0]), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.again(self.second(self.first(self.embed(ids)))) * self.scale)


def test_shared_weights_are_stored_once_and_shared_again(path: Path) -> None:
    model = Tied()
    twofour.prune(model)
    twofour.compress(model, force=True)
    twofour.save(model, path)
    assert path.stat().st_size < 4096
    fresh = Tied()
    with torch.no_grad():
        fresh.scale.fill_(7)
    twofour.load(fresh, path)
    ids = torch.arange(16)
    assert torch.equal(fresh(ids), model(ids))
    assert fresh.out.weight is fresh.embed.weight
    assert fresh.first is fresh.again
    assert fresh.first.values.data_ptr() == fresh.second.values.data_ptr()


def test_aliases_of_aliases_are_resolved(path: Path) -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    model = nn.ModuleDict({"a": first, "b": second, "c": second})
    twofour.prune(model)
    twofour.compress(model, force=True)
    twofour.save(model, path)
    fresh = nn.ModuleDict({"a": nn.Linear(8, 8), "b": (shared := nn.Linear(8, 8)), "c": shared})
    twofour.load(fresh, path)
    assert fresh["b"] is fresh["c"]
    assert torch.equal(fresh["c"].matrix.to_dense(), model["a"].matrix.to_dense())


def test_requires_grad_and_training_flags_survive(mlp: Build, path: Path) -> None:
    model = mlp()
    twofour.prune(model)
    twofour.save(model, path)
    fresh = mlp().eval()
    fresh[3].weight.requires_grad_(False)
    twofour.load(fresh, path)
    assert not fresh[3].weight.requires_grad
    assert fresh[3].bias.requires_grad
    assert not any(module.training for module in fresh.modules())


def test_what_does_not_fit_is_named_and_nothing_changes(mlp: Build, path: Path) -> None:
    model = mlp()
    twofour.prune(model)
    twofour.compress(model, force=True)
    twofour.save(model, path)
    other = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))
    before = other[0].weight.clone()
    with pytest.raises(
        ModelError, match=r"does not fit the model: not in the model: '3.bias', '3.weight', '4.bias' and 1 more"
    ):
        twofour.load(other, path)
    assert torch.equal(other[0].weight, before)
    report = twofour.load(other, path, strict=False)
    assert report.notes == ("unexpected: '3.bias', '3.weight', '4.bias' and 1 more",)
    assert isinstance(other[0], SparseLinear)
    wide = nn.Sequential(nn.Linear(64, 100), nn.GELU(), nn.Linear(96, 64), nn.LayerNorm(64), nn.Linear(64, 12))
    with pytest.raises(ModelError, match=r"'0.(bias|weight)' is \[96(, 64)?\] in .* and \[100(, 64)?\] in the model"):
        twofour.load(wide, path)
    more = nn.Sequential(*mlp(), nn.Linear(12, 4))
    with pytest.raises(ModelError, match=r"missing from the file: '5.bias', '5.weight'"):
        twofour.load(more, path)


def test_tensors_left_on_meta_are_refused(path: Path) -> None:
    model = Tied()
    twofour.save(model, path)
    with torch.device("meta"):
        fresh = Tied()
    with pytest.raises(ModelError, match=r"would stay on the meta device: 'scratch'.*Build the model on the CPU"):
        twofour.load(fresh, path)
    with pytest.raises(ModelError, match=r"'scale' is on the meta device: there is nothing to save yet"):
        twofour.save(fresh, path)


def test_extra_state_is_refused(path: Path) -> None:
    class Stateful(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"step": 1}

    with pytest.raises(UnsupportedError, match=r"'0' \(Stateful\) has extra state that is not a tensor"):
        twofour.save(nn.Sequential(Stateful(4, 4)), path)
    assert not path.exists()


def test_attention_projections_come_back_dense(path: Path) -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    twofour.prune(model)
    twofour.save(model, path)
    fresh = nn.Sequential(nn.MultiheadAttention(8, 2))
    twofour.load(fresh, path)
    x = torch.randn(3, 1, 8)
    assert torch.equal(fresh[0](x, x, x)[0], model[0](x, x, x)[0])


@pytest.mark.of_cpu
def test_loaded_values_are_mapped_not_read(path: Path) -> None:
    model = nn.Sequential(nn.Embedding(1000, 8), nn.Linear(8, 8))
    twofour.prune(model)
    twofour.save(model, path)
    fresh = nn.Sequential(nn.Embedding(1000, 8), nn.Linear(8, 8))
    twofour.load(fresh, path)
    assert str(path) in Path("/proc/self/maps").read_text(encoding="utf-8")
    with torch.no_grad():
        fresh[0].weight.add_(1)  # the mapping is private: the file must not change
    again = nn.Sequential(nn.Embedding(1000, 8), nn.Linear(8, 8))
    twofour.load(again, path)
    assert torch.equal(again[0].weight, model[0].weight)


def state(model: nn.Module) -> list[object]:
    return [*model.modules(), *model.parameters(), *model.buffers()]


def is_unchanged(model: nn.Module, before: list[object]) -> bool:
    after = state(model)
    return len(after) == len(before) and all(a is b for a, b in zip(after, before, strict=True))


def test_a_bare_layer_that_would_change_its_kind_is_refused_and_unchanged(path: Path) -> None:
    linear = nn.Linear(16, 16)
    twofour.prune(linear)
    sparse = SparseLinear.from_linear(linear)
    twofour.save(sparse, path)
    bare = nn.Linear(16, 16)
    before = state(bare)
    with pytest.raises(ModelError, match="a bare Linear cannot become a SparseLinear in place"):
        twofour.load(bare, path)
    assert is_unchanged(bare, before)
    twofour.load(sparse, path)
    for dense in (nn.Linear(16, 16), linear):  # stored dense, and stored compressed to run dense
        twofour.save(dense, path)
        before = state(sparse)
        with pytest.raises(ModelError, match="a bare SparseLinear cannot become dense in place"):
            twofour.load(sparse, path)
        assert is_unchanged(sparse, before)
        twofour.load(bare, path)
        assert torch.equal(bare.weight, dense.weight)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_matrices_of_8_bits_are_refused_for_layers_before_any_change(path: Path, dtype: torch.dtype) -> None:
    matrix = SparseMatrix.from_dense(torch.eye(8).to(dtype))
    file.write(path, {"1.weight": matrix}, {"0.weight": torch.ones(8, 8)})
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    before = state(model)
    with pytest.raises(ModelError, match=r"'1.weight' is stored as (int8|float8_e4m3fn) without scales.*load_matr"):
        twofour.load(model, path)
    assert is_unchanged(model, before)


def test_an_alias_of_a_part_is_refused(path: Path) -> None:
    file.write(path, {"0.weight": SparseMatrix.from_dense(torch.eye(8))}, aliases={"0.bias": "0.weight.values"})
    with pytest.raises(ModelError, match=r"'0.bias' stands for '0.weight.values' in .*, a part of a matrix"):
        twofour.load(nn.Sequential(nn.Linear(8, 8)), path)


def test_a_frozen_weight_that_runs_dense_stays_frozen(path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    twofour.prune(model)
    twofour.save(model, path)
    fresh = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    fresh[0].weight.requires_grad_(False)
    twofour.load(fresh, path)
    assert [layer.weight.requires_grad for layer in fresh] == [False, True]


def test_8_bit_weights_that_ran_dense_come_back(path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    twofour.prune(model)
    model[0].weight = nn.Parameter(model[0].weight.data.to(torch.float8_e4m3fn))
    twofour.save(model, path)
    fresh = nn.Sequential(nn.Linear(8, 8, bias=False))
    twofour.load(fresh, path)
    assert torch.equal(fresh[0].weight.float(), model[0].weight.float())


def test_layers_on_dense_onednn_come_back_on_it_where_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, require_onednn: Callable[[torch.dtype], None]
) -> None:
    require_onednn(torch.float32)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
    twofour.prune(model)
    matrices = [SparseMatrix.from_dense(layer.weight) for layer in model]
    packed = nn.Sequential(SparseLinear(matrices[0], model[0].bias, backend="onednn"), SparseLinear(matrices[1]))
    twofour.save(packed, tmp_path / "model.safetensors")
    fresh = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8, bias=False))
    report = twofour.load(fresh, tmp_path / "model.safetensors")
    assert fresh[0].backend == "onednn"
    assert not KERNELS[fresh[1].backend].dense
    assert report.rows[0]["kernel"] == "onednn (dense)"
    assert report.rows[0]["reason"] == "was faster than sparse where it was compressed"
    x = torch.randn(3, 16)
    assert torch.equal(fresh(x), packed(x))
    twofour.save(fresh, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    one = SparseLinear(SparseMatrix.from_dense(torch.zeros(16, 16)), torch.zeros(16))
    twofour.save(packed[0], tmp_path / "one.safetensors")
    twofour.load(one, tmp_path / "one.safetensors")
    assert one.backend == "onednn"

    monkeypatch.setattr("twofour.kernels.onednn.why_not", lambda dtype: "no oneDNN here")
    twofour.load(fresh, tmp_path / "model.safetensors")
    assert not KERNELS[fresh[0].backend].dense
    torch.testing.assert_close(fresh(x), packed(x))


@pytest.mark.parametrize("scaled", [False, True])
def test_a_dtype_that_no_layer_runs_is_named(tmp_path: Path, scaled: bool) -> None:
    matrix = SparseMatrix.from_dense(torch.randn(8, 16).to(torch.float8_e5m2), prune=True)
    path = tmp_path / "model.safetensors"
    notes = {"0.weight": {"scales": "0.weight.scales"}} if scaled else {}
    tensors = {"0.bias": torch.zeros(8), **({"0.weight.scales": torch.ones(8)} if scaled else {})}
    file.write(path, {"0.weight": matrix}, tensors, notes=notes)
    words = "'0.weight' is stored as float8_e5m2" + (", which no" if scaled else " without scales, which no layer runs")
    with pytest.raises(ModelError, match=words):
        twofour.load(nn.Sequential(nn.Linear(16, 8)), path)
