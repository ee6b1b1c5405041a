"""Moving masks where they could go wrong in silence: other optimizers, other phases, other parameters, copies, and the end."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.training.test_moving import RULES, adam, batch, dense, sparse, train
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import SGD, Optimizer
from torch.utils.checkpoint import checkpoint

import twofour
from twofour import ModelError, PatternError
from twofour.masks import nm_mask, soft_threshold
from twofour.training import MovingMasks, Phase, Schedule, finish_copy, keep_masks
from twofour.training import move_masks as with_any_products

move_masks = partial(with_any_products, products="dense")
PHASES = (
    Phase("dense", 1),
    Phase("sr-ste", 3, decay=0.1),
    Phase("fst", 4, decay=0.1, refresh=2),
    Phase("fixed", 2),
    Phase("s-ste", 2),
    Phase("fixed"),
)


def best(weight: Tensor) -> Tensor:
    return nm_mask(weight.detach().abs(), "2:4")


def sgd(model: nn.Module, **options: Any) -> SGD:
    return SGD(model.parameters(), 0.1, momentum=0.9, **options)


def loss_of(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step, next(model.parameters()).dtype)
    return F.cross_entropy(model(x), y)


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


# ---- whatever steps --------------------------------------------------------------------------------------------------


class Inside(Optimizer):
    """As Lookahead and SAM have it: an optimizer that steps another."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


class Derived(SGD):
    """Its `step` calls that of its base class, which tells of itself too."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class OneByOne:
    """An optimizer for each layer, in an order of its own."""

    def __init__(self, model: nn.Module, order: int) -> None:
        self.all = [sgd(layer) for layer in model if next(layer.parameters(), None) is not None][::order]  # type: ignore[attr-defined]

    def zero_grad(self) -> None:
        for optimizer in self.all:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self.all:
            optimizer.step()


class InBackward:
    """An optimizer for each parameter, that steps as soon as the gradient is there."""

    def __init__(self, model: nn.Module) -> None:
        self.all = {weight: SGD([weight], 0.1, momentum=0.9) for weight in model.parameters()}
        for weight in self.all:
            weight.register_post_accumulate_grad_hook(lambda weight: self.all[weight].step())  # type: ignore[index,return-value]

    def zero_grad(self) -> None:
        for optimizer in self.all.values():
            optimizer.zero_grad()

    def step(self) -> None:
        pass


class ByClosure:
    def __init__(self, model: nn.Module, by_name: bool) -> None:
        self.optimizer, self.model, self.by_name, self.steps = sgd(model), model, by_name, 0

    def zero_grad(self) -> None:
        pass

    def step(self) -> None:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = loss_of(self.model, self.steps)
            loss.backward()
            return loss

        _ = self.optimizer.step(closure=closure) if self.by_name else self.optimizer.step(closure)
        self.steps += 1


@pytest.mark.parametrize(
    "make",
    [
        lambda model: OneByOne(model, 1),
        lambda model: OneByOne(model, -1),
        InBackward,
        lambda model: ByClosure(model, True),
        lambda model: ByClosure(model, False),
        lambda model: Inside(sgd(model)),
        lambda model: (sgd(nn.Linear(1, 1)), Derived(model.parameters(), 0.1, momentum=0.9))[1],
    ],
    ids=["one by one", "backwards", "in backward", "closure=", "closure", "inside", "derived"],
)
def test_the_way_in_which_optimizers_step_changes_nothing(make: Callable[[nn.Module], Any]) -> None:
    model, other = dense(dtype=torch.float64), dense(dtype=torch.float64)
    one, masks = sgd(model), move_masks(model, None, "2:4", PHASES)
    two, others = make(other), move_masks(other, None, "2:4", PHASES)
    for step in range(14):
        train(model, one, 1, step)
        train(other, two, 1, step)
        assert masks.step == others.step == step + 1
        assert_same(model, other)
    assert [point for point in masks.curve if point["flip_rate"]]
    assert masks.flip_rate == others.flip_rate
    assert masks.curve == others.curve


def test_masks_of_several_optimizers_wait_for_their_refresh() -> None:
    model = dense()
    first, second = (SGD(layers.parameters(), 0.5) for layers in (model[0], model[2:]))
    masks = move_masks(model, first, "2:4", Phase("fst", refresh=3))
    before = {name: mask.clone() for name, mask in masks.masks.items()}
    for step in range(3):
        assert all(torch.equal(mask, before[name]) for name, mask in masks.masks.items())
        loss_of(model, step).backward()
        first.step()
        second.step()
    assert not torch.equal(masks.masks["0"], before["0"])
    assert torch.equal(masks.masks["2"], best(model[2].weight))


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_sees_the_decay_in_every_call_of_its_closure(search: str | None) -> None:
    model = dense(dtype=torch.float64)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, line_search_fn=search)
    masks = move_masks(model, optimizer, "2:4", Phase("sr-ste", decay=0.25))
    seen: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        if seen:
            found = seen[-1]
            assert torch.allclose(found[~kept], 0.25 * weights[-1][~kept], rtol=1e-12)
            assert not found[kept].any()
        loss = 0.0 * model(batch(0, torch.float64)[0]).square().mean()
        loss.backward()
        weights.append(model[0].weight.detach().clone())
        seen.append(model[0].weight.grad)
        return loss

    weights: list[Tensor] = []
    kept = masks.masks["0"]
    optimizer.step(closure)
    assert len(seen) > 1
    assert masks.step == 1
    assert search or (model[0].weight.detach().abs() < weights[0].abs())[~kept].all()


def test_a_closure_with_gradients_that_are_not_finite_stops_before_anything_changed() -> None:
    model = dense()
    optimizer = sgd(model)
    masks = move_masks(model, optimizer, "2:4", "sr-ste")
    before = copy.deepcopy(model.state_dict())

    def closure() -> Tensor:
        loss = loss_of(model, 0) * float("inf")
        loss.backward()
        return loss

    with pytest.raises(ModelError, match=r"the gradient of '0' is not finite"):
        optimizer.step(closure)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert masks.step == 0


def test_fixed_masks_hold_for_gradients_that_a_closure_brings() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    twofour.prune(model)
    optimizer = sgd(model)
    mask = keep_masks(model, optimizer).masks["0"]

    def closure() -> Tensor:
        model[0].weight.grad = torch.ones(8, 8)  # not by backward: DDP puts sums there
        return torch.zeros(())

    optimizer.step(closure)
    assert torch.equal(optimizer.state[model[0].weight]["momentum_buffer"] != 0, mask)


def test_a_gradient_decays_once_where_a_step_has_failed_and_is_made_again() -> None:
    class Failing(SGD):
        fails = True

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise KeyError
            return super().step(closure)

    found = []
    for fails in (False, True):
        model = dense(dtype=torch.float64)
        optimizer = Failing(model.parameters(), 0.1)
        move_masks(model, optimizer, "2:4", Phase("sr-ste", decay=0.3))
        loss_of(model, 0).backward()
        if fails:
            with pytest.raises(KeyError):
                optimizer.step()
        optimizer.fails = False
        optimizer.step()
        found.append(model)
    assert_same(*found)


def test_dropped_weights_decay_where_the_optimizer_ascends() -> None:
    model, plain = dense(dtype=torch.float64), dense(dtype=torch.float64)
    one, two = SGD(model.parameters(), 0.1, maximize=True), SGD(plain.parameters(), 0.1)
    for each, optimizer, sign in ((model, one, -1), (plain, two, 1)):
        move_masks(each, optimizer, "2:4", Phase("sr-ste", decay=0.3))
        (sign * loss_of(each, 0)).backward()
        optimizer.step()
    assert_same(model, plain)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_is_none(fused: bool) -> None:
    model = dense()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=fused)
    masks = move_masks(model, optimizer, "2:4", "dense:1, sr-ste:1, s-ste")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step, skipped in enumerate((True, False, True, False, True)):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if skipped:
            model[2].weight.grad[0, 0] = float("inf")
        before, count = model[0].weight.detach().clone(), masks.step
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(model[0].weight, before) == skipped
        assert masks.step == count + (not skipped)
    assert (masks.step, masks.phase.rule) == (2, "s-ste")


def test_a_new_optimizer_goes_on_counting_while_the_old_one_is_alive() -> None:
    model = dense()
    masks = move_masks(model, None, "2:4", "dense:2, s-ste")
    old = [adam(model) for _ in range(3)]
    for step, optimizer in enumerate(old):
        train(model, optimizer, 1, step)
        assert masks.step == step + 1
    assert masks.phase.rule == "s-ste"


def test_a_step_that_only_fills_an_optimizer_with_zeros_is_none() -> None:
    model = dense()
    masks = move_masks(model, None, "2:4", Phase("sr-ste", decay=0.1))
    optimizer = adam(model)
    get_optimizer_state_dict(model, optimizer)  # it makes a step, so that there is a state to load into
    assert optimizer.state
    assert masks.step == 0
    assert not optimizer.state[model[0].weight]["exp_avg"].any()
    for rate, step in ((0.0, 1), (0.1, 2)):  # a warm-up may begin with a learning rate of zero
        optimizer = torch.optim.AdamW(model.parameters(), rate)
        train(model, optimizer, 1)
        assert masks.step == step
        assert optimizer.state[model[0].weight]["exp_avg"].all()


def test_a_part_of_the_layers_may_be_trained() -> None:
    model = dense()
    masks = move_masks(model, None, "2:4", "dense:2, sr-ste:2, fixed")
    optimizer = SGD(model[2].parameters(), 0.1)
    for step in range(6):
        loss_of(model, step).backward()
        optimizer.step()
        rule = masks.phase.rule
        assert (masks.step, rule) == (step + 1, ["dense", "sr-ste", "sr-ste", "fixed", "fixed", "fixed"][step])
    assert torch.equal(model[2].weight != 0, masks.masks["2"])
    assert torch.equal(model[0].weight != 0, masks.masks["0"])


def test_frozen_and_trained_again() -> None:
    model = dense()
    optimizer = SGD(model.parameters(), 1.0)
    masks = move_masks(model, optimizer, "2:4", Phase("sr-ste", decay=0.01))
    train(model, optimizer, 2)
    model[0].weight.requires_grad_(False)
    before, mask = model[0].weight.detach().clone(), masks.masks["0"]
    train(model, optimizer, 2, 2)
    assert torch.equal(model[0].weight, before)
    assert torch.equal(masks.masks["0"], mask)
    assert masks.step == 4
    model[0].weight.requires_grad_(True)
    train(model, optimizer, 20, 4)
    assert masks.step == 24
    assert torch.equal(masks.masks["0"], best(model[0].weight))
    assert not torch.equal(masks.masks["0"], mask)


def test_several_models_do_not_meet_and_one_that_fails_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = [dense(seed) for seed in range(4)]
    all_masks = [move_masks(model, None, "2:4", "sr-ste") for model in models]
    train(models[1], adam(models[1]), 2)
    assert [masks.step for masks in all_masks] == [0, 2, 0, 0]
    both = SGD([*models[2].parameters(), *models[3].parameters(), *models[0].parameters()], 0.1)
    broken = all_masks[2]

    def refuse(*_: Any) -> None:
        raise KeyError("broken")

    monkeypatch.setattr(broken, "_settle", refuse)
    for model in (models[0], models[2], models[3]):
        loss_of(model, 0).backward()
    with pytest.raises(KeyError, match="broken"):
        both.step()
    assert [masks.step for masks in all_masks] == [1, 2, 1, 1]
    assert torch.equal(all_masks[3].masks["0"], best(models[3][0].weight))
    assert torch.equal(all_masks[0].masks["0"], best(models[0][0].weight))


def test_what_is_no_optimizer_of_torch() -> None:
    model = dense()

    class Own:
        param_groups = ({"params": list(model.parameters())},)

    with pytest.raises(ModelError, match=r"a Own is no torch.optim.Optimizer: nobody is told of its steps"):
        move_masks(model, Own())  # type: ignore[arg-type]
    assert type(model[0]) is nn.Linear


# ---- what reads the weight -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("rule", RULES)
def test_transformer_layers_evaluate_with_sparse_weights(rule: str) -> None:
    torch.manual_seed(0)
    inner = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(inner, 2)
    masks = move_masks(model, None, "2:4", rule)
    x, padding = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    wanted = model(x).detach(), model(x, src_key_padding_mask=padding).detach()
    model.eval()
    average = copy.deepcopy(model)
    with torch.no_grad():  # torch has one operator for a whole layer then, which reads the weights of its parts
        for each in (model, average):
            assert torch.allclose(each(x), wanted[0], atol=1e-5)
            assert torch.allclose(each(x, src_key_padding_mask=padding)[~padding], wanted[1][~padding], atol=1e-5)
        masks.finish()
        finish_copy(average)
        assert torch.allclose(model(x), wanted[0], atol=1e-5)
        assert torch.equal(average(x), model(x))
    assert not any(module._forward_pre_hooks for each in (model, average) for module in each.modules())


def test_a_model_that_reads_a_weight_past_its_layer_is_told() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.linear(x, self.qkv.weight, self.qkv.bias))  # type: ignore[no-any-return]

    model = Fused()
    optimizer = sgd(model)
    before = model.out.weight.detach().clone()
    masks = move_masks(model, optimizer, "2:4", "sr-ste")
    model(torch.ones(2, 8)).sum().backward()
    with pytest.raises(
        ModelError, match=r"weight of 'qkv' has a gradient, but the layer was not called .* by exclude="
    ):
        optimizer.step()
    assert torch.equal(model.out.weight, before)
    masks.remove()
    move_masks(model, optimizer, "2:4", "sr-ste", exclude="qkv")
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_checkpointed_activations_are_made_again_with_the_same_weights(rule: str, reentrant: bool) -> None:
    model, plain = dense(dtype=torch.float64), dense(dtype=torch.float64)
    one, two = (torch.optim.AdamW(each.parameters(), 0.05) for each in (model, plain))
    for each in (model, plain):
        move_masks(each, None, "2:4", Phase(rule, refresh=2))  # type: ignore[arg-type]
        each.load_state_dict(dense(3, torch.float64).state_dict())
    for step in range(4):
        x, y = batch(step, torch.float64)
        x.requires_grad_()
        found = checkpoint(model[2:], checkpoint(model[:2], x, use_reentrant=reentrant), use_reentrant=reentrant)
        for loss, optimizer in ((F.cross_entropy(found, y), one), (F.cross_entropy(plain(x), y), two)):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert_same(model, plain)


@pytest.mark.parametrize("rule", RULES)
def test_an_evaluation_may_come_first_and_changes_nothing(rule: str) -> None:
    found = []
    for how in (None, torch.no_grad, torch.inference_mode):
        model = dense()
        optimizer = adam(model)
        masks = move_masks(model, optimizer, "2:4", Phase(rule, refresh=2))  # type: ignore[arg-type]
        for each in masks._moved:
            each.sparsity.mask, each.sparsity.stale = None, True  # as fully_shard leaves it
        for step in range(4):
            if how is not None:
                model.eval()
                with how():
                    model(batch(9)[0])
                model.train()
            train(model, optimizer, 1, step)
        found.append(model)
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


def test_estimates_have_no_second_derivative() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    move_masks(model, None, "2:4", Phase("fst", mvue=True))
    x = torch.randn(4, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_kinds_of_layers_that_derive_from_others() -> None:
    class Wide(nn.Conv2d):
        pass

    class Standardized(nn.Conv2d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(input, weight - weight.mean(), bias)

    class Conv1D(nn.Module):
        """As transformers has it, without a bias."""

        def __init__(self, nf: int, features: int) -> None:
            super().__init__()
            self.nf, self.weight = nf, nn.Parameter(torch.randn(features, nf))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    class Doubled(Conv1D):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.ModuleDict(
        {"wide": Wide(8, 4, 3), "standardized": Standardized(8, 4, 3), "own": Conv1D(4, 8), "doubled": Doubled(4, 8)}
    )
    masks = move_masks(model, pattern="2:4", schedule="sr-ste")
    why = {row["layer"]: row.get("reason", row["action"]) for row in masks.report.rows}
    assert why == {
        "wide": "moved",
        "standardized": "Standardized does not compute what a Linear or convolution does",
        "own": "moved",
        "doubled": "Doubled does not compute what a Linear or convolution does",
    }
    x = torch.randn(2, 8)
    wanted = x @ torch.where(masks.masks["own"], model["own"].weight, 0.0)
    assert torch.equal(model["own"](x), wanted)
    masks.finish()
    assert [type(layer) for layer in model.values()] == [Wide, Standardized, Conv1D, Doubled]


# ---- phases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "2:4t"])
@pytest.mark.parametrize("rule", ["dense", *RULES])
def test_a_fixed_phase_begins_with_what_finish_would_write(rule: str, pattern: str) -> None:
    found = []
    for schedule in (rule, f"{rule}:3, fixed"):
        model = dense()
        optimizer = SGD(model.parameters(), 0.5)
        masks = move_masks(model, optimizer, pattern, Schedule.parse(schedule).with_options(refresh=2))
        train(model, optimizer, 3)
        if schedule == rule and rule != "dense":
            masks.finish()
        elif schedule == rule:
            masks.remove()
            twofour.prune(model, pattern, include="*")
        else:
            assert all(
                torch.equal(model[int(n)].weight != 0, mask) or rule == "s-ste" for n, mask in masks.masks.items()
            )
        found.append(model)
    assert_same(*found)


def test_flips_between_phases_are_those_of_as_many_steps() -> None:
    model = dense()
    optimizer = SGD(model.parameters(), 0.5)
    masks = move_masks(model, optimizer, "2:4", (Phase("fst", 4, refresh=100, decay=0.0), Phase("sr-ste")))
    before = masks.masks["0"].clone(), masks.masks["2"].clone(), masks.masks["4"].clone()
    train(model, optimizer, 4)
    flips = sum(int((old != new).sum()) for old, new in zip(before, masks.masks.values(), strict=True))
    assert flips
    assert masks.flip_rate == pytest.approx(flips / sum(old.numel() for old in before) / 4)
    assert [point["step"] for point in masks.curve] == [4]


@pytest.mark.parametrize("until", range(0, 14, 2))
def test_the_end_may_come_in_every_phase(until: int) -> None:
    model = dense()
    optimizer = sgd(model)
    masks = move_masks(model, optimizer, "2:4", PHASES)
    train(model, optimizer, until)
    rule, seen = masks.phase.rule, model(batch(0)[0])
    masks.finish()
    assert torch.equal(model(batch(0)[0]), seen)
    assert rule == "dense" or twofour.check(model, include="*").summary["holds"]
    weight = model[0].weight.detach().clone()
    train(model, optimizer, 2, until)
    assert (model[0].weight[weight == 0] != 0).any() or rule == "dense"
    with move_masks(model):
        pass  # it is as any other model
    for use in (masks.refresh, lambda: masks.load_state_dict({}), lambda: masks.adopt(optimizer)):
        with pytest.raises(ModelError, match="these masks were finished or removed"):
            use()


@pytest.mark.parametrize("here", [0, 2, 6, 9, 11, 13])
@pytest.mark.parametrize("there", [0, 2, 6, 9, 11, 13])
def test_a_handle_takes_up_a_state_of_any_phase_in_any_phase(here: int, there: int) -> None:
    def start() -> tuple[nn.Sequential, SGD, MovingMasks]:
        model = dense()
        optimizer = sgd(model)
        return model, optimizer, move_masks(model, optimizer, "2:4", PHASES)

    model, optimizer, masks = start()
    train(model, optimizer, there)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), masks.state_dict()], file)
    train(model, optimizer, 3, there)

    other, second, again = start()
    train(other, second, here, 50)
    file.seek(0)
    weights, state, of_masks = torch.load(file, weights_only=True)
    with torch.no_grad():  # by no way that anyone is told of, as torch.distributed.checkpoint loads
        for name, weight in other.named_parameters():
            weight.copy_(weights[name])
    second.load_state_dict(state)
    again.load_state_dict(of_masks)
    assert_same(other, dense_with(weights))
    train(other, second, 3, there)
    assert_same(model, other)
    assert again.curve == masks.curve
    assert all(torch.equal(mask, again.masks[name]) for name, mask in masks.masks.items())
    again.finish()
    masks.finish()
    assert_same(model, other)


def dense_with(weights: dict[str, Tensor]) -> nn.Sequential:
    model = dense()
    model.load_state_dict(weights)
    return model


def test_states_look_the_same_at_every_step() -> None:
    model = dense()
    optimizer = sgd(model)
    masks = move_masks(model, optimizer, "2:4", PHASES)
    shapes = []
    for step in range(14):
        state = masks.state_dict()
        shapes.append((list(state), {name: bits.shape for name, bits in state["masks"].items()}, list(state["scales"])))
        train(model, optimizer, 1, step)
    assert all(shape == shapes[0] for shape in shapes)


def test_a_state_of_a_fixed_phase_wants_the_weights_that_belong_to_it() -> None:
    model = dense()
    optimizer = sgd(model)
    masks = move_masks(model, optimizer, "2:4", PHASES)
    train(model, optimizer, 9)
    state = masks.state_dict()
    other = dense()
    again = move_masks(other, None, "2:4", PHASES)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(PatternError, match="'0' is not zero at .* Load the weights that belong to the masks first"):
        again.load_state_dict(state)
    assert (again.step, again.phase.rule) == (0, "dense")
    train(other, sgd(other), 2)
    assert (again.step, again.phase.rule) == (2, "sr-ste")
    assert all(before[name].shape == weight.shape for name, weight in other.state_dict().items())


# ---- other weights and other parameters ------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_weights_that_are_loaded_into_a_part_are_seen(rule: str, assign: bool) -> None:
    model, other = dense(), dense(seed=5)
    masks = move_masks(model, None, "2:4", Phase(rule, refresh=100))  # type: ignore[arg-type]
    for i in (0, 2, 4):
        model[i].load_state_dict(other[i].state_dict(), assign=assign)
    fresh = move_masks(other, None, "2:4", Phase(rule))  # type: ignore[arg-type]
    assert masks.state_dict()["scales"] == fresh.state_dict()["scales"]  # of the weights that training begins with
    x, _ = batch(0)
    assert torch.equal(model(x), other(x))
    optimizer = adam(model)
    train(model, optimizer, 2)
    assert masks.step == 2
    scale = masks.state_dict()["scales"]["0"]
    model.load_state_dict(dense(seed=7).state_dict())
    assert masks.state_dict()["scales"]["0"] == scale  # frozen since
    assert not any(point["flip_rate"] > 0.4 for point in masks.curve)


def test_packed_weights_are_forgotten_with_the_weights() -> None:
    model, other = dense(), dense(seed=5)
    masks = with_any_products(model, None, "2:4", "s-ste", products="sparse")
    wanted = with_any_products(other, None, "2:4", "s-ste", products="sparse")
    x, _ = batch(0)
    model(x)
    for weight, new in zip(model.parameters(), other.parameters(), strict=True):
        weight.data.copy_(new)  # no version tells of it
    masks.refresh()
    assert masks.state_dict()["scales"] == wanted.state_dict()["scales"]
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_in_the_middle(rule: str, dtype: torch.dtype) -> None:
    model = dense()
    masks = move_masks(model, None, "2:4", Phase(rule, refresh=3))  # type: ignore[arg-type]
    train(model, SGD(model.parameters(), 0.1), 2)
    model.to(dtype)
    kept = masks.masks["0"].clone()
    x = batch(0, dtype)[0]
    assert model(x).dtype == dtype
    train(model, SGD(model.parameters(), 0.1), 2, 2)
    assert masks.step == 4
    assert torch.equal(masks.masks["0"], kept) or rule == "s-ste" or masks.curve
    seen = model(x)
    masks.finish()
    assert model[0].weight.dtype == dtype
    assert torch.equal(model(x), seen)
    assert twofour.check(model, include="*").summary["holds"]


def test_a_parameter_that_was_replaced_is_told_of_and_taken_up() -> None:
    model = dense()
    masks = move_masks(model, sgd(model), "2:4", Phase("fst", decay=0.5))
    torch.manual_seed(1)
    model[2].weight = nn.Parameter(torch.randn(16, 24))
    optimizer = sgd(model)
    loss_of(model, 0).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=r"the weight of '2' was replaced by another parameter, .* call refresh\(\)"):
        optimizer.step()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    masks.refresh()
    assert torch.equal(masks.masks["2"], best(model[2].weight))
    train(model, optimizer, 1)
    assert masks.step == 1


def test_weights_that_are_tied_and_untied_are_told_of() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    masks = move_masks(model, None, "2:4", Phase("sr-ste", decay=0.5))
    model[2].weight = model[0].weight
    model(torch.ones(2, 8)).sum().backward()
    optimizer = sgd(model)
    before = model[0].weight.detach().clone()
    with pytest.raises(ModelError, match=r"the weight of '2' was replaced by another"):
        optimizer.step()
    masks.refresh()
    with pytest.raises(ModelError, match=r"the weight of '0' has become that of '2', .* tied or untied"):
        optimizer.step()
    assert torch.equal(model[0].weight, before)
    masks.remove()
    masks = move_masks(model, optimizer, "2:4", "sr-ste")
    assert len(masks.masks) == 2
    optimizer.zero_grad()
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    with pytest.raises(ModelError, match=r"the weight of '2' is no longer that of '0'"):
        sgd(model).step()


def test_layers_that_are_gone_or_compute_their_weight_are_told_of() -> None:
    model = dense()
    move_masks(model, None, "2:4", "sr-ste")
    model[2] = nn.Linear(24, 16)
    with pytest.raises(ModelError, match=r"the layer '2' is not in the model any more"):
        sgd(model).step()
    sgd(dense()).step()  # of another model
    model = dense()
    move_masks(model, None, "2:4", "sr-ste")
    nn.utils.parametrizations.weight_norm(model[2])
    with pytest.raises(ModelError, match=r"the weight of '2' is no parameter of its own any more"):
        sgd(model).step()
    model = dense()
    masks = move_masks(model, None, "2:4", "sr-ste")
    wrapped = nn.Sequential(model[2])
    model[2] = wrapped  # it is still there, under another name
    train(model, sgd(model), 1)
    assert masks.step == 1


# ---- copies ----------------------------------------------------------------------------------------------------------


def test_a_copy_from_an_earlier_phase_is_finished_by_the_rule_that_is_named() -> None:
    model = dense()
    optimizer = sgd(model)
    masks = move_masks(model, optimizer, "2:4", "dense:2, s-ste:2, fixed")
    early = copy.deepcopy(model)
    train(model, optimizer, 3)
    scales = masks.state_dict()["scales"]
    weight = early[0].weight.detach().clone()
    with pytest.raises(ModelError, match=r"made in a phase 'dense', and the model is in 's-ste' now.*rule='s-ste'\)"):
        finish_copy(early)
    with pytest.raises(ModelError, match=r"rule='fixed', and the model that was copied is in no fixed phase"):
        finish_copy(early, rule="fixed")
    again, other, snapshot = copy.deepcopy(early), copy.deepcopy(early), copy.deepcopy(model)
    finish_copy(early, rule="s-ste")
    assert torch.equal(early[0].weight, soft_threshold(weight, "2:4", scale=scales["0"]))
    assert torch.equal(finish_copy(again, rule="dense")[0].weight, weight)  # type: ignore[index]
    train(model, optimizer, 2, 3)
    kept, late = masks.masks["0"].clone(), snapshot[0].weight.detach().clone()
    masks.finish()
    with pytest.raises(ModelError, match=r"made in a phase 's-ste', and the model is in 'fixed' now"):
        finish_copy(snapshot)
    finish_copy(snapshot, rule="s-ste")
    assert torch.equal(snapshot[0].weight, soft_threshold(late, "2:4", scale=scales["0"]))
    finish_copy(other, rule="fixed")
    assert torch.equal(other[0].weight, torch.where(kept, weight, 0.0))
    assert twofour.check(other, include="*").summary["holds"]


def test_copies_are_no_models_to_move_masks_of() -> None:
    model = dense()
    before = copy.deepcopy(model)
    move_masks(model, None, "2:4", "sr-ste")
    with pytest.raises(ModelError, match=r"this model is a copy of one whose masks are moved: finish_copy"):
        move_masks(copy.deepcopy(model))
    with pytest.raises(ModelError, match="no layer of this model is under move_masks: it was copied before"):
        finish_copy(before)


def test_pickled_models_are_copies_whatever_their_classes() -> None:
    model = nn.Sequential(Own(8, 8), nn.Conv2d(8, 8, 1))
    masks = move_masks(model, None, "2:4", "s-ste")
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again[0](torch.ones(8)), model[0](torch.ones(8)))
    with torch.no_grad():
        again[0].weight.copy_(torch.arange(64.0).view(8, 8))
    wanted = sparse(again[0].weight.detach(), "s-ste", "2:4", masks.state_dict()["scales"]["0"])
    finish_copy(again)
    assert [type(layer) for layer in again] == [Own, nn.Conv2d]
    assert torch.equal(again[0].weight, wanted)


class Own(nn.Linear):
    pass


# ---- what is dropped is freed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 2, 6, 9])
@pytest.mark.parametrize("finish", [False, True])
def test_a_model_that_is_dropped_is_freed(steps: int, finish: bool) -> None:
    model = dense()
    optimizer = sgd(model)
    masks = move_masks(model, optimizer, "2:4", PHASES)
    train(model, optimizer, steps)
    average = copy.deepcopy(model)
    if finish:
        masks.finish()
    gone = [weakref.ref(each) for each in (model, model[0], model[0].weight, masks)]
    del model, masks
    optimizer.param_groups.clear()
    optimizer.state.clear()
    gc.collect()
    assert [each() for each in gone] == [None] * 4
    average(batch(0)[0])


def test_a_model_without_a_handle_goes_on_and_so_do_layers_without_their_model() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    move_masks(nn.ModuleList([first, second]), None, "2:4", "s-ste:1, fixed")
    gc.collect()
    optimizer = SGD([*first.parameters(), *second.parameters()], 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        second(first(torch.randn(4, 8))).square().mean().backward()
        optimizer.step()
    assert twofour.check(nn.ModuleList([first, second])).summary["holds"]
    assert (first.weight == 0).sum() >= 32
