"""Moving masks: what the forward pass sees, what learns, how phases follow, and that a killed run goes on as if it were not."""

from __future__ import annotations

import copy
import io
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.on_device import DEVICE
from torch import Tensor, nn

import twofour
from twofour import ModelError, PatternError
from twofour.errors import TwofourError
from twofour.masks import nm_mask, soft_threshold
from twofour.training import MovingMasks, Phase, Schedule, finish_copy, keep_masks
from twofour.training import move_masks as with_any_products

move_masks = partial(with_any_products, products="dense")  # of the same bits as torch's own
RULES = ("sr-ste", "fst", "s-ste")


def dense(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)


def batch(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(32, 16, generator=generator).to(dtype), torch.randint(0, 4, (32,), generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        x, y = batch(step, next(model.parameters()).dtype)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def adam(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)


def sparse(weight: Tensor, rule: str, pattern: str, scale: float = 1.0) -> Tensor:
    if rule == "s-ste":
        return soft_threshold(weight, pattern, scale=scale)
    return torch.where(nm_mask(weight.abs(), pattern), weight, 0.0)


# ---- what the forward pass sees ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "2:4t", "2:4x4"])
@pytest.mark.parametrize("rule", RULES)
def test_forward_sees_the_sparse_weight_and_all_of_it_learns(rule: str, pattern: str) -> None:
    model, plain = dense(), dense()
    masks = move_masks(model, None, pattern, rule)
    x, y = batch(0)
    with torch.no_grad():
        for layer, name in ((plain[0], "0"), (plain[2], "2"), (plain[4], "4")):
            scale = masks.state_dict()["scales"][name]
            layer.weight.copy_(sparse(layer.weight, rule, pattern, 1.0 if scale is None else scale))
            assert (layer.weight == 0).float().mean() >= 0.5
    assert torch.equal(model(x), plain(x))
    F.cross_entropy(model(x), y).backward()
    F.cross_entropy(plain(x), y).backward()
    for own, other, name in zip(model[::2], plain[::2], ("0", "2", "4"), strict=True):
        scale = masks.state_dict()["scales"][name] or 1.0
        assert torch.allclose(own.weight.grad, other.weight.grad * scale, rtol=1e-6, atol=0)
        assert (own.weight.grad[other.weight == 0] != 0).any()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(model.state_dict()["0.weight"], dense().state_dict()["0.weight"])
    masks.remove()


def test_the_scale_of_s_ste_is_frozen_and_nearest_to_the_weight() -> None:
    model = dense(dtype=torch.float64)
    weight = model[0].weight.detach().clone()
    masks = move_masks(model, pattern="2:4", schedule="s-ste")
    scale = masks.state_dict()["scales"]["0"]
    soft = soft_threshold(weight, "2:4")
    best = min((float((weight - soft * (scale + shift)).square().sum()), shift) for shift in (-1e-3, 0.0, 1e-3))
    assert best[1] == 0.0
    train(model, adam(model), 3)
    assert masks.state_dict()["scales"]["0"] == scale


@pytest.mark.parametrize("rule", RULES)
def test_finish_writes_what_forward_saw(rule: str) -> None:
    model = dense()
    optimizer = adam(model)
    masks = move_masks(model, optimizer, "2:4", rule)
    train(model, optimizer, 5)
    x, _ = batch(9)
    seen = model(x).detach()
    kept = masks.masks
    report = masks.finish()
    assert [type(layer) for layer in model[::2]] == [nn.Linear] * 3
    assert torch.equal(model(x), seen)
    assert twofour.check(model, include="*").summary["holds"]
    assert all(not (model[int(name)].weight[~mask] != 0).any() for name, mask in kept.items())
    assert report.summary["step"] == 5
    assert report.verb == "move_masks"
    before = model[0].weight.detach().clone()
    train(model, optimizer, 1)
    assert not torch.equal(model[0].weight, before)
    masks.finish()  # twice is nothing


def test_remove_and_errors_leave_the_weights_that_learn() -> None:
    model = dense()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(KeyError), move_masks(model):
        raise KeyError
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert type(model[0]) is nn.Linear
    assert not hasattr(model[0], "sparsity")
    with move_masks(model, pattern="2:4"):
        pass
    assert twofour.check(model, include="*").summary["holds"]


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_convolutions_along_input_channels(kind: Any) -> None:
    torch.manual_seed(0)
    layer = kind(8, 4, 3, padding=1)
    plain = copy.deepcopy(layer)
    x = torch.randn(2, 8, *[5] * (layer.weight.ndim - 2))
    masks = move_masks(layer, None, "2:4", "sr-ste")
    rows = plain.weight.detach().movedim(1, -1)
    with torch.no_grad():
        plain.weight.copy_(torch.where(nm_mask(rows.abs(), "2:4"), rows, 0.0).movedim(-1, 1))
    assert torch.equal(layer(x), plain(x))
    masks.finish()
    assert type(layer) is kind
    assert twofour.check(layer).summary["holds"]


def test_transformers_conv1d_and_a_subclass_of_linear() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D

    class Own(nn.Linear):
        pass

    torch.manual_seed(0)
    model = nn.Sequential(conv1d(12, 8), Own(12, 8))
    x = torch.randn(3, 8)
    masks = move_masks(model, None, "2:4", Phase("fst", mvue=True))
    model(x).square().sum().backward()
    assert (model[0].weight.grad != 0).any()
    masks.finish()
    assert [type(layer) for layer in model] == [conv1d, Own]
    assert twofour.check(model).summary["holds"]


def test_what_is_left_and_why() -> None:
    class Different(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    model = nn.ModuleDict(
        {
            "inside": nn.Linear(8, 8),
            "frozen": nn.Linear(8, 8).requires_grad_(False),
            "odd": nn.Linear(6, 8),
            "own": Different(8, 8),
            "attention": nn.MultiheadAttention(8, 2),
            "head": nn.Linear(8, 4),
            "out": nn.Linear(8, 8),
        }
    )
    model["tied"] = nn.Linear(8, 8)
    model["tied"].weight = model["inside"].weight
    masks = move_masks(model, pattern="2:4", exclude="out")
    why = {row["layer"]: row.get("reason", row["action"]) for row in masks.report.rows}
    assert why["inside"] == "moved"
    assert why["frozen"] == "frozen"
    assert why["odd"] == "in_features 6 is not a multiple of 4"
    assert why["own"] == "Different does not compute what a Linear or convolution does"
    assert "MultiheadAttention" in why["attention.in_proj_weight"]
    assert "MultiheadAttention" in why["attention.out_proj"]
    assert why["head"].startswith("output head")
    assert why["out"] == "excluded"
    assert why["tied"] == "its weight is that of 'inside'"
    x = torch.randn(2, 8)
    assert torch.allclose(model["tied"](x) - model["tied"].bias, model["inside"](x) - model["inside"].bias, atol=1e-6)
    masks.finish()
    assert twofour.check(model, include=["inside", "tied"]).summary["holds"]


# ---- decay, refresh, flip rate -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["sr-ste", "fst"])
def test_dropped_weights_decay_before_the_optimizer_sees_their_gradient(rule: str) -> None:
    model, plain = dense(dtype=torch.float64), dense(dtype=torch.float64)
    masks = move_masks(model, None, "2:4", Phase(rule, decay=0.3))  # type: ignore[arg-type]
    kept = masks.masks["0"]
    x, y = batch(0, torch.float64)
    F.cross_entropy(model(x), y).backward()
    gradient, weight = model[0].weight.grad.clone(), plain[0].weight.detach()
    torch.optim.SGD(model.parameters(), 0.1).step()
    wanted = weight - 0.1 * (gradient + 0.3 * torch.where(kept, 0.0, weight))  # SR-STE, equation 9
    assert torch.allclose(model[0].weight, wanted, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("fused", [False, True])
def test_decay_does_not_depend_on_scaling_and_accumulation(fused: bool) -> None:
    found = []
    for scaled in (False, True):
        model = dense()
        optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=fused)
        move_masks(model, optimizer, "2:4", Phase("sr-ste", decay=0.1))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for step in range(3):
            x, y = batch(step)
            for part in range(2 if scaled else 1):
                rows = slice(16 * part, 16 * part + 16) if scaled else slice(None)
                loss = F.cross_entropy(model(x[rows]), y[rows]) / (2 if scaled else 1)
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found.append(model[0].weight.detach().clone())
    assert torch.allclose(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_masks_are_refreshed_every_so_many_steps_and_flips_are_counted() -> None:
    model = dense()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    masks = move_masks(model, optimizer, "2:4", Phase("fst", refresh=3, decay=0.0))
    seen = []
    for step in range(7):
        seen.append({name: mask.clone() for name, mask in masks.masks.items()})
        train(model, optimizer, 1, step)
    assert all(torch.equal(seen[0][name], seen[2][name]) for name in seen[0])
    assert any(not torch.equal(seen[2][name], seen[3][name]) for name in seen[0])
    assert masks.flip_rate is not None
    assert [point["step"] for point in masks.curve] == [3, 6]
    places = sum(mask.numel() for mask in seen[0].values())
    flips = sum(int((seen[2][name] != seen[3][name]).sum()) for name in seen[0])
    assert masks.curve[0]["flip_rate"] == pytest.approx(flips / places / 3)
    assert masks.curve[0]["rule"] == "fst"


def test_a_larger_decay_flips_less() -> None:
    rates = []
    for decay in (0.0, 0.3):
        model = dense()
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        masks = move_masks(model, optimizer, "2:4", Phase("sr-ste", decay=decay))
        train(model, optimizer, 60)
        _ = masks.flip_rate
        rates.append(sum(point["flip_rate"] for point in masks.curve[30:]))
    assert rates[1] < 0.5 * rates[0]


def test_other_ways_to_change_weights_are_seen() -> None:
    model = dense()
    move_masks(model, pattern="2:4", schedule=Phase("fst"))
    other = dense(seed=5)
    model.load_state_dict(other.state_dict())
    x, _ = batch(0)
    with torch.no_grad():
        for layer in other[::2]:
            layer.weight.copy_(sparse(layer.weight, "fst", "2:4"))
    assert torch.equal(model(x), other(x))


def test_several_optimizers_make_one_step() -> None:
    model = dense()
    first, second = (torch.optim.SGD(layer.parameters(), 0.1) for layer in (model[0], model[2:]))
    masks = move_masks(model, first, "2:4", "sr-ste")
    for step in range(3):
        x, y = batch(step)
        F.cross_entropy(model(x), y).backward()
        first.step()
        second.step()
        assert masks.step == step + 1
        assert torch.equal(masks.masks["2"], nm_mask(model[2].weight.detach().abs(), "2:4"))


# ---- phases --------------------------------------------------------------------------------------------------------


def test_phases_follow_each_other() -> None:
    model, plain = dense(), dense()
    optimizer, other = adam(model), adam(plain)
    masks = move_masks(model, optimizer, "2:4", "dense:2, s-ste:2, sr-ste:2, fixed:2, dense")
    train(model, optimizer, 2)
    train(plain, other, 2)
    assert torch.equal(model[0].weight, plain[0].weight)
    rules = []
    for step in range(2, 10):
        rules.append(masks.phase.rule)
        if masks.phase.rule == "fixed":
            assert twofour.check(model, include="*").summary["holds"]
            assert {name: int(mask.sum()) for name, mask in masks.masks.items()} == {"0": 192, "2": 192, "4": 32}
        train(model, optimizer, 1, step)
    assert rules == ["s-ste", "s-ste", "sr-ste", "sr-ste", "fixed", "fixed", "dense", "dense"]
    assert masks.masks == {}
    masks.finish()
    assert (model[0].weight != 0).all()


def test_a_fixed_phase_keeps_zeros_through_momentum() -> None:
    model = dense()
    optimizer = adam(model)
    with move_masks(model, optimizer, "2:4", "s-ste:3, fixed") as masks:
        train(model, optimizer, 3)
        kept = {name: mask.clone() for name, mask in masks.masks.items()}
        train(model, optimizer, 3, 3)
        assert all(torch.equal(mask, kept[name]) for name, mask in masks.masks.items())
        assert (model[0].weight[~kept["0"]] == 0).all()
        assert (optimizer.state[model[0].weight]["exp_avg"][~kept["0"]] == 0).all()
    assert twofour.check(model, include="*").summary["holds"]


@pytest.mark.parametrize("rule", RULES)
def test_what_is_trained_learns(rule: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    y = (x @ torch.randn(16, 4)).argmax(1)
    losses = {}
    for name in ("dense", rule):
        model = dense()
        optimizer = adam(model)
        masks = move_masks(model, optimizer, "2:4", name) if name != "dense" else None
        for _ in range(150):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        if masks is not None:
            masks.finish()
        losses[name] = float(F.cross_entropy(model(x), y).detach())
    assert losses[rule] < 0.35
    assert losses["dense"] < losses[rule] + 0.05


# ---- estimates of gradients ----------------------------------------------------------------------------------------


def test_mvue_gives_the_weight_gradient_on_average() -> None:
    model = dense(dtype=torch.float64)
    move_masks(model, None, "2:4t", Phase("fst", mvue=True))
    x, y = batch(0, torch.float64)
    x = x[:30]  # not a multiple of four tokens
    torch.manual_seed(0)
    gradients = []
    for _ in range(400):
        model.zero_grad()
        F.cross_entropy(model(x), y[:30]).backward()
        gradients.append(model[0].weight.grad.clone())
        bias = model[0].bias.grad.clone()
    exact = dense(dtype=torch.float64)
    move_masks(exact, None, "2:4t", Phase("fst"))
    F.cross_entropy(exact(x), y[:30]).backward()
    found = torch.stack(gradients)
    error = found.std(0) / 400**0.5
    assert ((found.mean(0) - exact[0].weight.grad).abs() < 5 * error + 1e-12).all()
    assert float(error.max()) > 0
    assert torch.allclose(bias, exact[0].bias.grad)


def test_mvue_under_autocast() -> None:
    model = dense()
    move_masks(model, None, "2:4t", Phase("s-ste", mvue=True))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = model(batch(0)[0])
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert model[0].weight.grad.dtype == torch.float32
    assert model[0].weight.grad.isfinite().all()
    assert model[0](torch.ones(0, 16)).shape == (0, 24)


# ---- resume, copies, compile ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["s-ste", "dense:3, fst:4, fixed:3, dense", "sr-ste:6, s-ste:2, fixed"])
@pytest.mark.parametrize("at", [2, 5, 8])
def test_a_killed_run_resumes_to_the_same_bits(schedule: str, at: int) -> None:
    phases = Schedule.parse(schedule).with_options(mvue=True, refresh=2)

    def start() -> tuple[nn.Module, torch.optim.AdamW, MovingMasks]:
        model = dense()
        optimizer = adam(model)
        return model, optimizer, move_masks(model, optimizer, "2:4", phases)

    torch.manual_seed(1)
    model, optimizer, masks = start()
    train(model, optimizer, at)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), masks.state_dict(), torch.get_rng_state()], file)
    train(model, optimizer, 12 - at, at)

    file.seek(0)
    other, second, again = start()
    train(other, second, 1, 77)  # something else meanwhile
    other, second, again = start()
    weights, state, of_masks, random = torch.load(file, weights_only=True)
    other.load_state_dict(weights)
    second.load_state_dict(state)
    again.load_state_dict(of_masks)
    torch.set_rng_state(random)
    assert again.step == at
    train(other, second, 12 - at, at)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert again.flip_rate == masks.flip_rate
    assert again.curve == masks.curve


@pytest.mark.parametrize("rule", RULES)
def test_a_copy_follows_its_own_weights(rule: str) -> None:
    model = dense()
    optimizer = adam(model)
    masks = move_masks(model, optimizer, "2:4", Phase(rule, refresh=100))  # type: ignore[arg-type]
    average = torch.optim.swa_utils.AveragedModel(model)
    for step in range(4):
        train(model, optimizer, 1, step)
        average.update_parameters(model)
    scale = masks.state_dict()["scales"]["0"] or 1.0
    own = average.module[0].weight.detach().clone()
    wanted = sparse(own, rule, "2:4", scale)
    finish_copy(average)
    assert torch.equal(average.module[0].weight, wanted)
    assert twofour.check(average.module, include="*").summary["holds"]
    assert type(average.module[0]) is nn.Linear
    assert type(model[0]) is not nn.Linear
    with pytest.raises(ModelError, match="the model that trains, not a copy: call finish"):
        finish_copy(model)
    masks.remove()


def test_whole_models_can_be_pickled() -> None:
    model = dense()
    masks = move_masks(model, None, "2:4", "s-ste")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    x, _ = batch(0)
    assert torch.equal(again(x), model(x))
    masks.remove()


@pytest.mark.parametrize("rule", RULES)
def test_compiled_models_see_new_masks(rule: str) -> None:
    model, plain = dense(), dense()
    optimizer, other = (torch.optim.SGD(m.parameters(), 0.5) for m in (model, plain))
    for m in (model, plain):
        move_masks(m, None, "2:4", rule)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for step in range(4):
        x, y = batch(step)
        for run, stepper in ((compiled, optimizer), (plain, other)):
            stepper.zero_grad()
            F.cross_entropy(run(x), y).backward()
            stepper.step()
    assert torch.allclose(model[0].weight, plain[0].weight, atol=1e-6)


# ---- what it refuses -----------------------------------------------------------------------------------------------


def test_not_finite_gradients_stop_before_anything_changed() -> None:
    model = dense()
    optimizer = adam(model)
    masks = move_masks(model, optimizer, "2:4", "sr-ste")
    train(model, optimizer, 2)
    before, kept = copy.deepcopy(model.state_dict()), masks.masks["0"].clone()
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    model[2].weight.grad[0, 0] = float("nan")
    with pytest.raises(
        ModelError, match=r"gradient of '2' is not finite, and masks would follow it.*Nothing has changed"
    ):
        optimizer.step()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert torch.equal(masks.masks["0"], kept)
    assert masks.step == 2


def test_a_scaler_may_skip_steps() -> None:
    model = dense()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=True)
    masks = move_masks(model, optimizer, "2:4", "sr-ste")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(F.cross_entropy(model(batch(0)[0]), batch(0)[1])).backward()
    model[2].weight.grad[0, 0] = float("inf")
    before = model[0].weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(model[0].weight, before)
    assert masks.masks["0"].any()


def test_replaced_layers_and_resized_weights() -> None:
    model = dense()
    optimizer = adam(model)
    move_masks(model, optimizer, "2:4", "sr-ste")
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    model[2].weight.data = torch.zeros(16, 28)
    with pytest.raises(ModelError, match=r"the weight of '2' is \[16, 28\] now, its mask \[16, 24\]"):
        optimizer.step()


def test_other_optimizers_models_and_masks() -> None:
    model = dense()
    other = torch.optim.SGD(dense().parameters(), 0.1)
    with pytest.raises(ModelError, match=r"the SGD trains none of the 3 weights that are made sparse, such as '0'"):
        move_masks(model, other)
    assert type(model[0]) is nn.Linear
    masks = move_masks(model)
    with pytest.raises(ModelError, match="kept or moved already"):
        move_masks(model)
    with pytest.raises(ModelError, match="moved already"):
        keep_masks(model)
    masks.remove()
    with pytest.raises(ModelError, match="finished or removed"):
        masks.adopt(other)
    with pytest.raises(ModelError, match="no layer of the model can be made 2:4"):
        move_masks(nn.Linear(6, 6))
    with pytest.raises(PatternError, match=r"'s-ste' with 8:16t: of transposable patterns it knows 2:4t alone"):
        move_masks(nn.Linear(16, 16), pattern="8:16t")
    twofour.prune(model)
    with keep_masks(model), pytest.raises(ModelError, match="kept or moved already"):
        move_masks(model)
    with pytest.raises(ModelError, match="matches no layer"):
        move_masks(model, include="nothing")


def test_checkpoints_of_something_else() -> None:
    state = move_masks(dense(), pattern="2:4", schedule="sr-ste").state_dict()
    with pytest.raises(ModelError, match=r"the checkpoint has the pattern '2:4', these masks '2:4t'"):
        move_masks(dense(), pattern="2:4t", schedule="sr-ste").load_state_dict(state)
    with pytest.raises(ModelError, match=r"the checkpoint has the schedule 'sr-ste', these masks 's-ste'"):
        move_masks(dense(), pattern="2:4", schedule="s-ste").load_state_dict(state)
    model = dense()
    with pytest.raises(ModelError, match="the checkpoint is of other layers: '4' is on one side only"):
        move_masks(model[:3], pattern="2:4", schedule="sr-ste").load_state_dict(state)
    larger = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 4))
    with pytest.raises(ModelError, match=r"'2' has another shape in the checkpoint"):
        move_masks(larger, pattern="2:4", schedule="sr-ste").load_state_dict(state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Phase("magic"), "'magic' is no rule of sparse training: they are dense, fixed, sr-ste, fst, s-ste"),  # type: ignore[arg-type]
        (lambda: Phase("s-ste", 0), "a phase of 0 steps"),
        (lambda: Phase("s-ste", decay=0.1), "decay=0.1 with 's-ste': only sr-ste and fst have one"),
        (lambda: Phase("fst", decay=-1.0), "decay=-1.0: it must be a number of at least 0"),
        (lambda: Phase("fst", refresh=0), "refresh=0: give a number of steps above 0"),
        (lambda: Phase("dense", mvue=True), "mvue with 'dense': only sr-ste, fst, s-ste estimate gradients"),
        (lambda: Schedule(()), "a schedule of no phases"),
        (lambda: Schedule.parse("fst, dense"), "phase 'fst' has no number of steps and others come after it"),
        (lambda: Schedule.parse("fixed"), "the first phase is 'fixed', and there is no mask yet"),
        (lambda: Schedule.parse("fst:80%, dense"), "has shares: say of how many steps"),
        (lambda: Schedule.parse("fst:1e999%, dense", steps=10), "'fst:1e999%' in the schedule"),
        (lambda: Schedule.parse("fst:-5%, dense", steps=10), "'fst:-5%' in the schedule"),
        (lambda: Schedule.parse("fst:5%, dense", steps=0), "'fst:5%' in the schedule"),
        (
            lambda: Schedule.parse("dense:50%, fst:60%, dense", steps=10),
            "add up to 110%: the last of it would not come",
        ),
        (lambda: Schedule.parse(["fst:5", "dense"]), "'fst:5' in a schedule: give phases, .* or one text of them all"),  # type: ignore[list-item]
        (lambda: Schedule.parse(None), "None in a schedule: give phases"),  # type: ignore[arg-type]
        (lambda: Schedule.parse("fst:many, dense"), "'fst:many' in the schedule .* write rule:steps or rule:share%"),
    ],
)
def test_schedules_that_are_none(make: Any, message: str) -> None:
    with pytest.raises(TwofourError, match=message):
        make()
