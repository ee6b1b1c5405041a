"""compress and explain: what is replaced, what stays, and why."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

import twofour
from twofour import CalibrationError, ModelError, SparseLinear
from twofour.kernels import KERNELS
from twofour.kernels.choices import Store
from twofour.workflows import timing

Build = Callable[[], nn.Sequential]


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what timing finds, so that decisions can be tested on any machine: speeds(dense_us, sparse_us, onednn_us)."""

    def fix(dense_us: float, sparse_us: float, onednn_us: float = 20) -> None:
        def paired(rivals: Mapping[str, Callable[[], object]], **_: object) -> dict[str, timing.Timing]:
            for function in rivals.values():
                function()
            found = {"dense": dense_us, "sparse": sparse_us, "onednn": onednn_us, "packed": onednn_us}
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
    assert report.notes == ()
    torch.testing.assert_close(model(x), expected)


def test_sums_of_times_are_told_as_sums(mlp: Build, native: None, speeds: Callable[..., None]) -> None:
    model = mlp()
    twofour.prune(model)
    speeds(10, 5)
    x = torch.randn(5, 64)
    for given, calls, words in (
        ({"inputs": [x, x, x]}, 3, ", those with all 3 batches"),
        ({"inputs": [x]}, 1, None),
        ({"tokens": [4, 5]}, 2, ", one at each number of tokens"),
        ({}, 2, ", one at each number of tokens"),
        ({"tokens": 5}, 1, None),
    ):
        report = twofour.compress(model, **given, dry_run=True, remeasure=True)
        assert report.rows[0]["dense_us"] == pytest.approx(10 * calls)
        told = [note for note in report.notes if "sums" in note]
        assert told == ([] if words is None else [f"times are sums over all calls of a layer{words}"])


@pytest.mark.parametrize(
    ("dense_us", "sparse_us", "onednn_us", "action"),
    [
        (10, 5, 4, "packed"),
        (10, 5, 4.9, "compressed"),  # 0.98x of oneDNN, in half the bytes
        (10, 5, 4.8, "packed"),
        (4, 5, 3, "packed"),
        (4, 4.05, 6, "dense"),  # never slower than before
        (4, 5, 3.95, "dense"),  # 1 % does not pay for more bytes
        (4, 3.9, 9, "compressed"),
    ],
)
def test_the_fastest_of_three_kernels_runs(
    mlp: Build,
    native: None,
    speeds: Callable[..., None],
    dense_us: float,
    sparse_us: float,
    onednn_us: float,
    action: str,
) -> None:
    model = mlp()
    twofour.prune(model)
    x = torch.randn(5, 64)
    expected = model(x)
    speeds(dense_us, sparse_us, onednn_us)
    report = twofour.compress(model, x)
    times = {"compressed": sparse_us, "packed": onednn_us, "dense": dense_us}
    assert {row["action"] for row in report.rows} == {action}
    assert report.rows[0]["gain"] == dense_us / times[action]
    assert times[action] <= min(times.values()) / 0.97
    assert kinds(model)[0] == ("Linear" if action == "dense" else "SparseLinear")
    if action != "dense":
        assert model[0].backend == ("onednn" if action == "packed" else "cpu")
        assert report.rows[0]["bytes"] == model[0].nbytes
    torch.testing.assert_close(model(x), expected)


def test_layers_on_dense_onednn_are_told_and_can_train_their_inputs(
    mlp: Build, native: None, speeds: Callable[..., None]
) -> None:
    model = mlp()
    twofour.prune(model)
    weight = model[0].weight.detach().clone()
    speeds(10, 5, 4)
    report = twofour.compress(model, tokens=[7])
    assert report.summary["layers compressed"] == "0 of 3"
    assert report.summary["on dense oneDNN, because sparse would be slower"] == 3
    assert report.summary["weight bytes of those on oneDNN, after"] == sum(model[i].nbytes for i in (0, 2, 4))
    assert all(row["kernel"] == "onednn (dense)" for row in report.rows)
    assert all(row["reason"].endswith("would run at 0.80x of oneDNN") for row in report.rows)
    explained = twofour.explain(model)
    assert explained.rows[0]["reason"] == report.rows[0]["reason"]
    assert explained.summary == {"layers on a sparse kernel": "0 of 3", "layers on dense oneDNN": "3 of 3"}
    x = torch.randn(3, 64, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    assert model[0].bias.grad is not None
    layer = model[0]
    twofour.compress(model, tokens=[7])
    assert model[0] is layer
    speeds(10, 5, 8)
    twofour.compress(model, tokens=[7], remeasure=True)
    assert model[0].backend == "cpu"
    speeds(10, 20, 15)
    twofour.compress(model, tokens=[7], remeasure=True)
    assert torch.equal(model[0].weight, weight)


def test_tied_layers_share_one_packed_weight(native: None, speeds: Callable[..., None]) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    twofour.prune(model)
    x = torch.randn(2, 16)
    expected = model(x)
    for onednn_us, backend in ((4, "onednn"), (9, "cpu"), (4, "onednn")):
        speeds(10, 5, onednn_us)
        twofour.compress(model, tokens=[3], remeasure=True)
        assert (model[0].backend, model[1].backend) == (backend, backend)
        assert model[0].values is model[1].values
        assert model[0].bias is not model[1].bias
        torch.testing.assert_close(model(x), expected)


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
        assert (row["action"] == "dense") == (row["gain"] == 1)
        assert row["gain"] >= 1


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
    with pytest.raises(ModelError) as caught:
        twofour.compress(mlp(), pattern="1:4")
    assert str(caught.value) == (
        "no layer holds 1:4, so there is nothing to compress: '0' is not 1:4 (1536 of 1536 groups), nor are 2 more layers.\n"
        "  Prune first: twofour.prune(model, '1:4')."
    )
    with pytest.raises(ModelError, match="no kernel for convolutions yet"):
        twofour.compress(nn.Sequential(nn.Conv2d(4, 4, 1)))


def test_dtypes_that_cannot_be_stored_are_told_what_helps_and_it_does(mlp: Build) -> None:
    model = mlp().double()
    twofour.prune(model)
    with pytest.raises(
        ModelError, match=r"weights of float64 cannot be stored .*; convert the model first, as model\.float"
    ):
        twofour.compress(model, force=True)
    twofour.compress(model.float(), force=True)
    assert kinds(model)[0] == "SparseLinear"


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (
            torch.randn(4, 100),
            r"mat1 and mat2 shapes .*\. It got \[4, 100\] float32 on cpu; the weights are float32 on cpu\. Pass",
        ),
        (torch.randn(4, 64).half(), r"It got \[4, 64\] float16 on cpu; the weights are float32 on cpu\. Pass"),
        ((torch.randn(4, 64), torch.zeros(2)), r"TypeError: .*It got \[4, 64\] float32 on cpu, \[2\] float32 on cpu;"),
    ],
)
@pytest.mark.parametrize("verb", ["compress", "measure", "permute", "sensitivity", "prune"])
def test_inputs_that_do_not_fit_are_told_what_does(mlp: Build, verb: str, x: object, words: str) -> None:
    """By one text for all verbs; nothing is changed."""
    model = mlp()
    if verb == "compress":
        twofour.prune(model)
    before = copy.deepcopy(model.state_dict())
    if verb == "prune":
        with pytest.raises(CalibrationError, match=f"^the model fails on the calibration inputs: .*{words}"):
            twofour.prune(model, calibration=[x])
    else:
        with pytest.raises(ModelError, match=f"^the model fails on the inputs: .*{words}"):
            getattr(twofour, verb)(model, x)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.training


def test_inputs_that_do_not_fit_leave_what_is_fused(mlp: Build) -> None:
    model = mlp()
    twofour.prune(model)
    twofour.compress(model, force=True)
    assert twofour.fuse(model).summary
    fused = kinds(model)
    assert "FusedActivation" in fused
    with pytest.raises(ModelError, match="the model fails on the inputs: ShapeError: x is"):
        twofour.compress(model, torch.randn(4, 100))
    assert kinds(model) == fused


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
    assert report.notes == (
        "the inputs never reached unused: measured at (1, 128) tokens",
        "times are sums over all calls of a layer",
    )


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
    with pytest.raises(ModelError, match="shapes cannot be multiplied"):
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


@pytest.mark.of_cpu
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


@pytest.mark.of_cpu
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


def test_the_second_time_nothing_is_timed(
    mlp: Build, native: None, speeds: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds(10, 5)
    model = mlp()
    twofour.prune(model)
    first = twofour.compress(model, tokens=[1, 100])
    monkeypatch.setattr("twofour.workflows.comparison.paired", None)
    model = mlp()
    twofour.prune(model)
    second = twofour.compress(model, tokens=[1, 100])
    assert [row["action"] for row in second.rows] == ["compressed"] * 3
    assert [row["sparse_us"] for row in second.rows] == [row["sparse_us"] for row in first.rows]
    assert {row["measured"] for row in first.rows} == {"now"}
    assert second.rows[0]["measured"].startswith("20")
    assert second.notes[-1].startswith("6 of 6 timings were made before, from 20")
    assert "remeasure=True times again" in second.notes[-1]
    with pytest.raises(TypeError, match="not callable"):
        twofour.compress(model, tokens=[1, 100], remeasure=True)
    with pytest.raises(TypeError, match="not callable"):
        twofour.compress(model, tokens=[2])


def test_other_threads_are_timed_anew(mlp: Build, speeds: Callable[..., None]) -> None:
    speeds(10, 5)
    model = mlp()
    twofour.prune(model)
    twofour.compress(model, tokens=[1], dry_run=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert twofour.compress(model, tokens=[1], dry_run=True).rows[0]["measured"] == "now"
    finally:
        torch.set_num_threads(threads)
    assert twofour.compress(model, tokens=[1], dry_run=True).rows[0]["measured"] != "now"


def test_disturbed_timings_are_noted_and_not_kept(mlp: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[int] = []

    def paired(rivals: Mapping[str, Callable[[], object]], **_: object) -> dict[str, timing.Timing]:
        rounds.append(1)
        low = 5.0 + len(rounds)
        return {name: timing.Timing(2 * low, low, 3 * low, 15) for name in rivals}

    monkeypatch.setattr("twofour.workflows.comparison.paired", paired)
    model = nn.Sequential(nn.Linear(8, 8))
    twofour.prune(model)
    report = twofour.compress(model, tokens=[1])
    assert len(rounds) == 3
    assert report.rows[0]["dense_us"] == 6  # the least disturbed
    assert "other programs disturbed the timing of 0: the choice may be wrong" in report.notes[0]
    assert not Store.open().entries


def test_an_unwritable_or_damaged_cache_is_a_note(
    mlp: Build, speeds: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    speeds(10, 5)
    model = mlp()
    twofour.prune(model)
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    monkeypatch.setenv("TWOFOUR_CACHE", str(blocked))
    report = twofour.compress(model, tokens=[1], dry_run=True)
    assert any(note.startswith(f"choices cannot be kept in {blocked}") for note in report.notes)
    monkeypatch.setenv("TWOFOUR_CACHE", str(tmp_path))
    twofour.compress(model, tokens=[1], dry_run=True)
    file = Store.open().file
    assert file is not None
    file.write_text("{")
    report = twofour.compress(model, tokens=[1], dry_run=True)
    assert any("cannot be read (it is not JSON): its choices are measured again" in note for note in report.notes)
    assert twofour.compress(model, tokens=[1], dry_run=True).rows[0]["measured"] != "now"


def test_explain_shows_every_kernel_with_its_time(mlp: Build, native: None, speeds: Callable[..., None]) -> None:
    model = mlp()
    assert twofour.explain(model, kernels=True).notes == (
        "nothing was measured here yet: twofour.compress(model) does",
    )
    twofour.prune(model)
    speeds(10, 5, 8)
    twofour.compress(model, tokens=[1, 100])
    report = twofour.explain(model, kernels=True)
    rows = report.where(layer="0")
    assert [row["kernel"] for row in rows] == [KERNELS["cpu"].label(), "reference", "onednn (dense)", "dense (torch)"]
    assert [row["chosen"] for row in rows] == ["yes", "", "", ""]
    assert [row["times"] for row in rows] == ["1: 5.0, 104: 5.0", "", "1: 8.0, 104: 8.0", "1: 10.0, 104: 10.0"]
    assert [row["reason"] for row in rows] == [
        "",
        "writes the weight out dense at each call",
        "0.62x of the chosen",
        "0.50x of the chosen",
    ]
    again = mlp()
    twofour.prune(again)
    assert [row["us"] for row in twofour.explain(again, kernels=True).where(layer="0")] == [row["us"] for row in rows]
    reasons = [row["reason"] for row in twofour.explain(model.half(), kernels=True).where(layer="0")]
    assert reasons[0] == "float16 has no native kernel, only float32 and bfloat16"
    assert reasons[3] == "not measured here"
    mixed = nn.Sequential(nn.Conv2d(4, 4, 1))
    assert [row["reason"] for row in twofour.explain(mixed, kernels=True).rows] == ["no kernel for convolutions yet"]


def test_what_would_run_decides_and_the_bare_rival_is_shown(
    mlp: Build, native: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    us = {"dense": 9.0, "onednn": 4.0, "packed": 6.0, "sparse": 5.0}

    def paired(rivals: Mapping[str, Callable[[], object]], **_: object) -> dict[str, timing.Timing]:
        assert set(rivals) == set(us)
        return {name: timing.Timing(us[name], us[name], us[name], 15) for name in rivals}

    monkeypatch.setattr("twofour.workflows.comparison.paired", paired)
    model = mlp()
    twofour.prune(model)
    row = twofour.compress(model, tokens=[1]).rows[0]
    assert (row["action"], row["onednn_us"], row["against_best"], row["gain"]) == ("compressed", 4.0, 0.8, 1.8)


def test_bfloat16_weights_in_a_float32_model(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
    again = copy.deepcopy(model)
    twofour.prune(model)
    x = torch.randn(7, 32)
    before = model(x)
    report = twofour.compress(model, weights="bfloat16", force=True)
    assert all(0 < row["weight_error"] < 2**-8 for row in report.where(action="compressed"))
    layer = model[0]
    assert isinstance(layer, SparseLinear)
    assert layer.values.dtype == torch.bfloat16
    assert model(x).dtype == torch.float32
    torch.testing.assert_close(model(x), before, rtol=2e-2, atol=2e-2)
    twofour.save(model, tmp_path / "mixed.safetensors")
    twofour.load(again, tmp_path / "mixed.safetensors")
    assert torch.equal(again(x), model(x))
    with pytest.raises(ModelError, match="weights='int4': it is 'int8', 'float8' or 'bfloat16'. Leave it out"):
        twofour.compress(again, weights="int4")  # type: ignore[arg-type]
