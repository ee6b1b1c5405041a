"""Fixed masks: every optimizer, every way in which zeros could come back, and what must be refused."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

import twofour
from twofour import ModelError, PatternError
from twofour.masks import check_pattern
from twofour.training import FixedMasks, keep_masks, masks_of

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.01),
    "SGD, Nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD, foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.05, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1, foreach=False),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, 0.05, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, 0.05, fused=True),
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, 0.05, amsgrad=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.05),
    "Adagrad, fused": lambda p: torch.optim.Adagrad(p, 0.05, fused=True),
    "Adadelta": lambda p: torch.optim.Adadelta(p, 1.0),
    "Adamax": lambda p: torch.optim.Adamax(p, 0.05),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.05),
    "RAdam": lambda p: torch.optim.RAdam(p, 0.05),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, centered=True, momentum=0.9),
    "ASGD": lambda p: torch.optim.ASGD(p, 0.05),
    "Rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 0.05),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3),
}
OF_NO_ZEROS = ("Rprop", "Adamax")
"""What these remember of a weight without gradients is no zero: a step size, a smallest norm."""


def pruned(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))
    twofour.prune(model)
    return model


def loss_of(model: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(32, 16, generator=generator), torch.randint(0, 3, (32,), generator=generator)
    return nn.functional.cross_entropy(model(x), y)


def train(model: nn.Module, optimizer: Optimizer, steps: int = 4, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + steps):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        losses.append(float(optimizer.step(closure).detach()))  # type: ignore[arg-type]
    return losses


def weights(model: nn.Module) -> list[Tensor]:
    return [module.weight for module in model.modules() if isinstance(module, nn.Linear)]


def assert_kept(model: nn.Module, dropped: list[Tensor]) -> None:
    for weight, gone in zip(weights(model), dropped, strict=True):
        assert not bool(weight[gone].any())
        assert check_pattern(weight, "2:4").holds


def zeros_of(model: nn.Module) -> list[Tensor]:
    return [weight.detach() == 0 for weight in weights(model)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_zero_with_every_optimizer_and_the_rest_learns(name: str) -> None:
    model = pruned()
    dropped, before = zeros_of(model), [weight.detach().clone() for weight in weights(model)]
    optimizer = OPTIMIZERS[name](model.parameters())
    with keep_masks(model, optimizer) as masks:
        train(model, optimizer)
        assert_kept(model, dropped)
        for weight, old, gone in zip(weights(model), before, dropped, strict=True):
            assert float((weight != old)[~gone].float().mean()) > 0.6  # some gradients are zero behind the ReLU
            for value in optimizer.state[weight].values():
                if isinstance(value, Tensor) and value.shape == weight.shape and name not in OF_NO_ZEROS:
                    assert not bool(value[gone].any()), name
            assert weight.grad is not None
            assert not bool(weight.grad[gone].any())
        assert set(masks.masks) == {"0", "2", "4"}
    train(model, optimizer)  # removed: they come back
    assert any(bool(weight[gone].any()) for weight, gone in zip(weights(model), dropped, strict=True))


def test_kept_weights_train_as_if_the_dropped_ones_were_not_there() -> None:
    """The reference: a model whose forward multiplies by the mask, in plain torch."""

    class Masked(nn.Module):
        def __init__(self, model: nn.Sequential) -> None:
            super().__init__()
            self.model = copy.deepcopy(model)
            self.masks = [(weight != 0).float() for weight in weights(self.model)]

        def forward(self, x: Tensor) -> Tensor:
            first, second, third = (m for m in self.model if isinstance(m, nn.Linear))
            a, b, c = self.masks
            x = nn.functional.gelu(nn.functional.linear(x, first.weight * a, first.bias))
            x = nn.functional.relu(nn.functional.linear(x, second.weight * b, second.bias))
            return nn.functional.linear(x, third.weight * c, third.bias)

    model = pruned()
    reference = Masked(model)
    mine, theirs = (torch.optim.AdamW(m.parameters(), 0.01) for m in (model, reference))
    keep_masks(model, mine)
    assert train(model, mine, 8) == pytest.approx(train(reference, theirs, 8), rel=1e-5)
    for one, other in zip(weights(model), weights(reference.model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_what_an_optimizer_remembers_is_cleared_and_stays_so_after_loading_a_state() -> None:
    model = pruned()
    dropped = zeros_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    train(model, optimizer)  # dense: momentum everywhere
    stale = copy.deepcopy(optimizer.state_dict())
    with torch.no_grad():
        for weight, gone in zip(weights(model), dropped, strict=True):
            weight.masked_fill_(gone, 0.0)
    keep_masks(model, optimizer)
    for weight, gone in zip(weights(model), dropped, strict=True):
        assert not bool(optimizer.state[weight]["exp_avg"][gone].any())
    train(model, optimizer)
    optimizer.load_state_dict(stale)
    train(model, optimizer, 1)
    assert_kept(model, dropped)
    for weight, gone in zip(weights(model), dropped, strict=True):
        assert not bool(optimizer.state[weight]["exp_avg"][gone].any())
        assert not bool(optimizer.state[weight]["exp_avg_sq"][gone].any())


def test_an_optimizer_made_later_keeps_the_masks_too() -> None:
    model = pruned()
    dropped = zeros_of(model)
    keep_masks(model, torch.optim.SGD(model.parameters(), 0.1))
    train(model, torch.optim.AdamW(model.parameters(), 0.05))
    assert_kept(model, dropped)
    keep_masks(pruned(1))  # the handle is not held, and this one is of another model
    train(model, torch.optim.Adam(model.parameters(), 0.05))
    assert_kept(model, dropped)


def test_accumulation_clipping_and_scaling_see_kept_weights_only() -> None:
    model = pruned()
    dropped = zeros_of(model)
    keep_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        optimizer.zero_grad()
        for part in range(2):
            scaler.scale(loss_of(model, 2 * step + part)).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(
            not bool(w.grad[gone].any()) for w, gone in zip(weights(model), dropped, strict=True) if w.grad is not None
        )
        assert float(norm) > 0
        assert float(torch.stack([g.square().sum() for g in grads]).sum().sqrt()) <= 0.5001
        scaler.step(optimizer)
        scaler.update()
    assert_kept(model, dropped)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_no_numbers_leave_dropped_weights_zero(value: float) -> None:
    model = pruned()
    dropped = zeros_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    keep_masks(model, optimizer)
    (model(torch.full((4, 16), value)).sum()).backward()
    optimizer.step()
    for weight, gone in zip(weights(model), dropped, strict=True):
        assert bool((weight[gone] == 0).all())


def test_means_of_weights_are_masked_and_copies_are_free() -> None:
    model = pruned()
    dropped = zeros_of(model)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    keep_masks(model, optimizer)
    for step in range(3):
        train(model, optimizer, 1, step)
        averaged.update_parameters(model)
    assert_kept(averaged.module, dropped)
    other = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for free in (other, loaded):
        assert_kept(free, dropped)
        free.load_state_dict({key: torch.ones_like(value) for key, value in free.state_dict().items()})
        train(free, torch.optim.SGD(free.parameters(), 0.1), 1)
    assert_kept(model, dropped)


def test_a_resumed_run_ends_in_the_same_bits() -> None:
    def start() -> tuple[nn.Sequential, Optimizer, FixedMasks]:
        model = pruned()
        with torch.no_grad():
            weights(model)[0][0, :4] = torch.tensor([0.0, 0.0, 0.0, 0.5])  # two more zeros, one of them kept
        optimizer = torch.optim.AdamW(model.parameters(), 0.05)
        return model, optimizer, keep_masks(model, optimizer)

    model, optimizer, masks = start()
    train(model, optimizer, 3)
    with torch.no_grad():
        weights(model)[0][0, 0] = 0.0  # kept, and zero by chance
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), masks.state_dict()))
    train(model, optimizer, 3, first=3)
    again = pruned(7)
    keep_masks(again).remove()
    again.load_state_dict(saved[0])
    optimizer_again = torch.optim.AdamW(again.parameters(), 0.05)
    optimizer_again.load_state_dict(saved[1])
    masks_again = keep_masks(again, optimizer_again)
    masks_again.load_state_dict(saved[2])
    assert all(torch.equal(masks_again.masks[name], mask) for name, mask in masks.masks.items())
    train(again, optimizer_again, 3, first=3)
    for one, other in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_loading_other_zeros_is_refused_before_anything_is_loaded() -> None:
    model, other = pruned(), pruned(1)
    before = copy.deepcopy(model.state_dict())
    masks = keep_masks(model)
    with pytest.raises(PatternError, match=r"'0' is not zero at \d+ places that its mask drops, .* It was not loaded"):
        model.load_state_dict(other.state_dict())
    with pytest.raises(PatternError, match="'2' is not zero at"):
        model[2].load_state_dict(other[2].state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.load_state_dict(before)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**before, "0.weight": torch.ones(3, 3)})
    masks.remove()
    model.load_state_dict(other.state_dict())


def test_a_replaced_or_resized_weight_is_an_error_before_the_step() -> None:
    model = pruned()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    keep_masks(model, optimizer)
    loss_of(model, 0).backward()
    old, bias = model[0].weight, model[0].bias.detach().clone()
    model[0].weight = nn.Parameter(torch.randn(24, 16))
    for stepping in (optimizer, torch.optim.SGD(model.parameters(), 0.1)):
        with pytest.raises(ModelError, match=r"weight of '0' was replaced by another parameter after keep_masks"):
            stepping.step()
    assert torch.equal(model[0].bias, bias)
    model[0].weight = old
    optimizer.step()
    model[0].weight.data = torch.randn(24, 8)
    model[0].weight.grad = None
    with pytest.raises(ModelError, match=r"weight of '0' is \[24, 8\] now after keep_masks"):
        optimizer.step()


def test_a_replaced_module_is_an_error_with_any_optimizer_and_may_be_loaded() -> None:
    model = pruned()
    keep_masks(model, torch.optim.SGD(model.parameters(), 0.1))
    model[0] = nn.Linear(16, 24)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    loss_of(model, 0).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match="weight of '0' was replaced by another parameter"):
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.load_state_dict(before)
    train(pruned(3), torch.optim.SGD(pruned(3).parameters(), 0.1), 1)  # other models are no concern of theirs


def test_masks_are_kept_once_and_found_again() -> None:
    model = pruned()
    assert masks_of(model) is None
    masks = keep_masks(model)
    for same in (model, nn.Sequential(model)):
        assert masks_of(same) is masks
        with pytest.raises(ModelError, match=r"masks of this model are kept already, .*masks_of\(model\) finds them"):
            keep_masks(same)
    masks.remove()
    assert masks_of(model) is None
    with pytest.raises(ModelError, match="these masks were removed"):
        masks.adopt(torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ModelError, match="trains none"):
        keep_masks(model, torch.optim.SGD(pruned(1).parameters(), 0.1))
    assert masks_of(model) is None
    keep_masks(model)


def test_an_optimizer_with_other_hooks_loads_its_state() -> None:
    model = pruned()
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    keep_masks(model, optimizer)
    called = []
    optimizer.register_load_state_dict_post_hook(called.append)
    train(model, optimizer, 1)
    for _ in range(2):
        optimizer.load_state_dict(optimizer.state_dict())
    assert called == [optimizer, optimizer]


def test_tied_weights_are_guarded_under_every_name() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)))
    model[1].weight = model[0].weight
    twofour.prune(model)
    masks = keep_masks(model, include="*")
    assert next(row for row in masks.report.rows if row["layer"] == "1")["reason"] == "its weight is that of '0'"
    before = copy.deepcopy(model.state_dict())
    for key in ("0.weight", "1.weight", "2.1.weight"):
        with pytest.raises(PatternError, match="is not zero at"):
            model.load_state_dict({**before, key: torch.ones(16, 16)})
    with pytest.raises(PatternError):
        model[1].load_state_dict({"weight": torch.ones(16, 16), "bias": torch.ones(16)})
    with pytest.raises(PatternError):  # before the first layer of the part is loaded
        model[2].load_state_dict({**model[2].state_dict(), "0.bias": torch.ones(16), "1.weight": torch.ones(16, 16)})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_gradients_are_masked_as_they_arrive_also_beside_hooks_of_others() -> None:
    model = pruned()
    seen = []
    for weight in weights(model):
        weight.register_post_accumulate_grad_hook(seen.append)
    keep_masks(model)
    loss_of(model, 0).backward()
    assert len(seen) == 3
    assert all(w.grad is not None and not bool(w.grad[w == 0].any()) for w in weights(model))


def test_masks_may_be_kept_between_forward_and_backward() -> None:
    model = pruned()
    loss = loss_of(model, 0)
    keep_masks(model)
    loss.backward()
    assert all(w.grad is not None and not bool(w.grad[w == 0].any()) for w in weights(model))


def test_what_cannot_be_kept_is_told() -> None:
    dense = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with pytest.raises(ModelError, match=r"no weight of the model holds 2:4, .* twofour\.prune\(model, '2:4'\) first"):
        keep_masks(dense)
    twofour.prune(dense, include="0")
    with pytest.raises(PatternError, match=r"'1' 64 of 64 groups are not 2:4.*: prune it first, or leave it out"):
        keep_masks(dense, include=["0", "1"])
    with pytest.raises(ModelError, match=r"the SGD trains none of the 1 masked weights, such as '0'"):
        keep_masks(dense, torch.optim.SGD(dense[1].parameters(), 0.1))
    masks = keep_masks(dense, torch.optim.SGD(dense.parameters(), 0.1))
    assert [(row["layer"], row["action"]) for row in masks.report.rows] == [("0", "kept"), ("1", "left")]
    assert masks.report.summary["masks kept"] == "1 of 2"
    state = masks.state_dict()
    with pytest.raises(ModelError, match=r"the masks are 1:4, these here 2:4"):
        masks.load_state_dict({**state, "pattern": "1:4"})
    with pytest.raises(ModelError, match="masks for other layers: '0' is on one side only"):
        masks.load_state_dict({**state, "dropped": {}})
    with pytest.raises(ModelError, match=r"'0' is \[16, 16\], its mask \[4, 4\]"):
        masks.load_state_dict({**state, "shapes": {"0": [4, 4]}})
    with pytest.raises(PatternError, match="Load the weights that belong to the masks first"):
        masks.load_state_dict({**state, "dropped": {"0": torch.full_like(state["dropped"]["0"], 255)}})
    masks.load_state_dict(state)


def test_a_pruned_head_is_kept_and_a_layer_of_zeros_is_not_taken_for_pruned() -> None:
    """Zeros of a LoRA's second matrix are its beginning, not a mask."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("body", nn.Linear(16, 16))
    model.add_module("lm_head", nn.Linear(16, 8))
    model.add_module("lora_b", nn.Linear(8, 8))
    nn.init.zeros_(model.lora_b.weight)
    twofour.prune(model, include=["body", "lm_head"])
    masks = keep_masks(model)
    assert set(masks.masks) == {"body", "lm_head"}
    assert next(row for row in masks.report.rows if row["layer"] == "lora_b")["reason"].startswith("all zeros")


def test_gradients_that_arrive_by_other_ways_are_masked_before_the_step() -> None:
    """As those that a wrapper puts back after it has summed them over processes."""
    model = pruned()
    dropped = zeros_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    keep_masks(model, optimizer)
    for _ in range(2):
        for weight in weights(model):
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert_kept(model, dropped)
    for weight, gone in zip(weights(model), dropped, strict=True):
        assert not bool(optimizer.state[weight]["exp_avg"][gone].any())


def test_a_frozen_layer_is_kept_once_it_trains() -> None:
    model = pruned()
    dropped = zeros_of(model)
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    masks = keep_masks(model, optimizer)
    assert "frozen" in next(row for row in masks.report.rows if row["layer"] == "0")["reason"]
    train(model, optimizer, 2)
    model[0].weight.requires_grad_(True)
    train(model, optimizer, 3)
    assert_kept(model, dropped)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "2:4t", "2:4x2", "2:4x4"])
def test_patterns_and_layer_kinds(pattern: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(64, 32), nn.Linear(32, 8))
    twofour.prune(model, pattern)
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    masks = keep_masks(model, optimizer, pattern)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 8, 4, 4)).square().mean().backward()
        optimizer.step()
    assert twofour.check(model, pattern).summary["holds"]
    assert len(masks.masks) == (3 if "x" not in pattern and "t" not in pattern else 2)


def test_tied_weights_and_transformers_layers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=16)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    twofour.prune(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    masks = keep_masks(model, optimizer)
    assert masks.report.summary["masks kept"].startswith("8 of ")
    ids = torch.randint(0, 64, (2, 16))
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert twofour.check(model).summary["holds"]


def test_masks_go_with_their_model() -> None:
    model = pruned()
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    masks = keep_masks(model, optimizer)
    train(model, optimizer, 1)
    gone = weakref.ref(masks)
    del masks
    gc.collect()
    assert gone() is not None
    del model, optimizer
    gc.collect()
    assert gone() is None


def test_models_may_go_in_the_middle_of_a_step() -> None:
    """The garbage collector runs whenever it likes."""
    model = pruned()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    keep_masks(model, optimizer)
    others = [pruned(1), pruned(2)]
    for other in others:
        keep_masks(other)

    def collect(*_: Any) -> None:
        others.clear()
        gc.collect()

    optimizer.register_step_pre_hook(collect)
    dropped = zeros_of(model)
    train(model, optimizer, 2)
    assert_kept(model, dropped)
