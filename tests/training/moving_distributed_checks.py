"""What `test_moving_distributed.py` runs in every one of several processes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tests.training.distributed_checks import (
    adamw,
    assert_same,
    assert_same_everywhere,
    dense,
    loss_of,
    mine,
    processes,
    rank,
    refuses,
    sharded,
    train,
    weights,
)
from tests.training.processes import main
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

import twofour
from twofour import ModelError, UnsupportedError
from twofour.training import MovingMasks, Phase, keep_masks
from twofour.training import move_masks as with_any_products
from twofour.training.masks.distributed import full, local, local_part

move_masks = partial(with_any_products, products="dense", include="*")
FST = Phase("fst", 4, decay=0.1, refresh=2)
SCHEDULES = {
    "2:4": (Phase("dense", 1), Phase("sr-ste", 3, decay=0.1), Phase("s-ste", 3), Phase("fixed")),
    "2:4t": (FST, Phase("s-ste", 2), Phase("dense", 1), Phase("fst", decay=0.1)),
}


def assert_masks(masks: MovingMasks, alone: MovingMasks) -> None:
    assert (masks.step, masks.phase, set(masks.masks)) == (alone.step, alone.phase, set(alone.masks))
    for name, mask in alone.masks.items():
        assert torch.equal(masks.masks[name], mask), name
    assert masks.flip_rate == alone.flip_rate
    assert masks.curve == alone.curve
    assert_same_everywhere([(name, mask.tolist()) for name, mask in masks.masks.items()])


def both(
    pattern: str, when: str, **how: Any
) -> tuple[nn.Sequential, Optimizer, MovingMasks, nn.Sequential, Optimizer, MovingMasks]:
    """One process alone, and as many as there are."""
    alone, model, schedule = dense(), dense(), SCHEDULES[pattern]
    one = adamw(alone)
    masks_alone = move_masks(alone, one, pattern, schedule)
    if when == "before":
        masks = move_masks(model, None, pattern, schedule)
        other = adamw(sharded(model, **how))
        masks.adopt(other)
    else:
        other = adamw(sharded(model, **how))
        masks = move_masks(model, other, pattern, schedule)
    return alone, one, masks_alone, model, other, masks


def as_alone(_: Path) -> None:
    """Sharded models go through all phases as one process does that sees all samples, whenever they are sharded."""
    for pattern, when, how in (
        ("2:4", "before", {}),
        ("2:4", "after", {"reshard_after_forward": False}),
        ("2:4t", "before", {"reshard_after_forward": False}),
        ("2:4t", "after", {}),
    ):
        alone, one, masks_alone, model, other, masks = both(pattern, when, **how)
        assert len(masks.report.rows) == 4
        for step in range(9):
            train(alone, one, range(step, step + 1))
            train(model, other, range(step, step + 1), mine())
            if step % 2:
                with torch.no_grad():
                    loss_of(model, 9, mine())  # whole weights stay where the sharded ones were
            if step % 3 == 2:
                assert_masks(masks, masks_alone)
            assert_same(model, alone)
        assert masks.curve
        masks_alone.finish()
        masks.finish()
        assert_same(model, alone)
        for (name, module), (_, other_module) in zip(model.named_modules(), alone.named_modules(), strict=True):
            kind, plain = type(module), type(other_module)
            assert kind in (plain, *(each for each in (kind,) if each.__mro__[2] is plain)), name
            assert "Projected" not in kind.__name__
            assert not hasattr(module, "sparsity")
        masks = move_masks(model, other, pattern, "sr-ste")  # as of any other model
        train(model, other, range(1), mine())
        masks.finish()
        keep_masks(model, None, pattern).remove()


def momentary(_: Path) -> None:
    """The handle may come to its end in every phase."""
    for pattern, schedule in SCHEDULES.items():
        for steps in range(8) if pattern == "2:4" else (3, 5):
            alone, one, masks_alone, model, other, masks = both(pattern, "after")
            assert masks.schedule.phases == schedule
            train(alone, one, range(steps))
            train(model, other, range(steps), mine())
            masks_alone.finish()
            masks.finish()
            assert_same(model, alone)


def steps_in_backward(_: Path) -> None:
    """Optimizers of one parameter each, that step as soon as its gradient is there, while others are still whole."""
    for when in ("before", "after"):
        alone, model = dense(), dense()
        schedule = (Phase("dense", 1), Phase("sr-ste", 2, decay=0.1), Phase("s-ste"))
        told = [move_masks(alone, None, "2:4", schedule)]
        if when == "before":
            told.append(move_masks(model, None, "2:4", schedule))
        fully_shard(model[5])  # it steps before the backward of '3', which needs its whole weight
        fully_shard(model)
        if when == "after":
            told.append(move_masks(model, None, "2:4", schedule))
        for each in (alone, model):
            in_backward(each)
        for step in range(5):
            loss_of(model, step, mine()).backward()  # before any other step tells of what is sharded now
            loss_of(alone, step).backward()
            assert_same(model, alone)
        assert_masks(told[1], told[0])


def in_backward(model: nn.Module) -> None:
    optimizers = {weight: SGD([weight], 0.1, momentum=0.9) for weight in model.parameters()}

    def step(weight: Tensor) -> None:
        optimizers[weight].step()  # type: ignore[index]
        optimizers[weight].zero_grad()  # type: ignore[index]

    for weight in optimizers:
        weight.register_post_accumulate_grad_hook(step)


def numbers(_: Path) -> None:
    """A gradient that is not finite in one process is refused by all, with the same words, before anything has changed."""
    for where in range(processes()):
        *_, model, other, masks = both("2:4t", "after")
        train(model, other, range(1), mine())
        before = [full(weight).clone() for weight in model.parameters()]
        loss_of(model, 1, mine()).backward()
        if rank() == where:
            local(model[5].weight.grad)[-1, -1] = float("nan")
        with refuses(ModelError, r"the gradient of '5' is not finite, .* Nothing has changed"):
            other.step()
        assert all(torch.equal(full(weight), old) for weight, old in zip(model.parameters(), before, strict=True))
        assert masks.step == 1
        other.zero_grad()
        train(model, other, range(1, 2), mine())
        masks.remove()


def in_step(_: Path) -> None:
    """DistributedDataParallel, inside, around, and over what each process had of its own: the run of one process."""
    for pattern, where in (("2:4", "outside"), ("2:4t", "inside"), ("2:4", "before"), ("2:4t", "before")):
        schedule = (Phase("s-ste", 2), *SCHEDULES[pattern])
        alone, inner = dense(), dense(rank() if where == "before" else 0)
        masks_alone = move_masks(alone, None, pattern, schedule)
        masks = move_masks(inner, None, pattern, schedule) if where == "before" else None
        if masks is not None:
            assert set(masks.masks) == set(masks_alone.masks)  # of weights that are to be replaced
            assert masks.curve == []
        model = DistributedDataParallel(inner)
        if masks is None:
            masks = move_masks(model if where == "outside" else inner, None, pattern, schedule)
        one, other = adamw(alone), adamw(model)
        for step in range(10):
            train(alone, one, range(step, step + 1))
            train(model, other, range(step, step + 1), mine())
        assert_same(inner, alone)
        assert_masks(masks, masks_alone)
        assert masks.state_dict()["scales"] == masks_alone.state_dict()["scales"]
        assert_same_everywhere([weight.tolist() for weight in inner.parameters()])
        masks.finish()
        masks_alone.finish()
        assert_same(inner, alone)


def policies(_: Path) -> None:
    """Of mixed precision, of offloaded shards and of replicas masks are the same everywhere, and hold at the end."""
    mesh = init_device_mesh("cpu", (processes(), 1), mesh_dim_names=("same", "shards"))
    for how in (
        {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
        {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        {"mesh": mesh},
    ):
        model = sharded(dense().float(), **how)
        optimizer = adamw(model)
        masks = move_masks(model, optimizer, "2:4", (FST, Phase("s-ste", 1), Phase("fixed")))
        model.double()  # other tensors within the same parameters
        train(model, optimizer, range(6), mine())
        assert_same_everywhere([mask.tolist() for mask in masks.masks.values()])
        for name, mask in masks.masks.items():
            assert not bool(full(weights(model)[f"{name}.weight"])[~mask].any())
        masks.finish()


def tensor_parallel(_: Path) -> None:
    """Weights that stay in parts while layers compute have no moving masks, and are told so at once."""
    mesh = init_device_mesh("cpu", (processes(),))
    model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 12)).double()
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    masks = move_masks(model, None, "2:4", "sr-ste")
    with refuses(
        UnsupportedError, "a ProjectedLinear computes with a weight that is spread over processes: .* keep_masks"
    ):
        model(torch.ones(4, 12).double())
    masks.remove()
    model(torch.ones(4, 12).double())


def flat_pieces(_: Path) -> None:
    """FullyShardedDataParallel has no place for masks."""
    for as_they_were in (True, False):
        model = dense()
        masks = move_masks(model, None, "2:4", "sr-ste")
        elder = FullyShardedDataParallel(model, use_orig_params=as_they_were, device_id=torch.device("cpu"))
        optimizer = adamw(elder)
        loss_of(elder, 0, mine()).backward()
        before = [weight.detach().clone() for weight in elder.parameters()]
        with pytest.raises(
            ModelError, match=r"the weight of '0' (is \[\d+\] now|was replaced|is no parameter of its own)"
        ):
            optimizer.step()
        assert all(torch.equal(weight, old) for weight, old in zip(elder.parameters(), before, strict=True))
        masks.remove()
        with refuses(UnsupportedError, r"'\(model\)' is a FullyShardedDataParallel"):
            move_masks(elder)


def saves(folder: Path) -> None:
    """Some steps of each schedule, a checkpoint, three more."""
    for pattern, at in cases():
        *_, model, optimizer, masks = both(pattern, "after")
        train(model, optimizer, range(at), mine())
        state = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
            "masks": masks.state_dict(),
        }
        assert_same_everywhere([(name, bits.tolist()) for name, bits in state["masks"]["masks"].items()])
        dcp.save(state, checkpoint_id=place(folder, pattern, at))
        train(model, optimizer, range(at, at + 3), mine())
        end = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        kept, curve = masks.masks, masks.curve
        if rank() == 0:
            torch.save((end, kept, curve), f"{place(folder, pattern, at)}.pt")


def cases() -> Iterator[tuple[str, int]]:
    """Masks that are about to be made anew and that are not, frozen scales, a fixed phase, none."""
    return iter((("2:4", 2), ("2:4", 5), ("2:4", 8), ("2:4t", 1), ("2:4t", 2), ("2:4t", 6)))


def place(folder: Path, pattern: str, at: int) -> Path:
    return folder / f"moving-{pattern.replace(':', '-')}-{at}"


def resumes(folder: Path) -> None:
    """Of checkpoints that another number of processes wrote."""
    for pattern, at in cases():
        model = dense(seed=5)
        resume(folder, model if processes() == 1 else sharded(model), pattern, at)


def resume(folder: Path, model: nn.Module, pattern: str, at: int) -> None:
    optimizer = adamw(model)
    masks = move_masks(model, optimizer, pattern, SCHEDULES[pattern])
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    told = {"masks": masks.state_dict()}
    dcp.load(state, checkpoint_id=place(folder, pattern, at))
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    dcp.load(told, checkpoint_id=place(folder, pattern, at))
    masks.load_state_dict(told["masks"])
    assert masks.step == at
    train(model, optimizer, range(at, at + 3), mine() if distributed.is_initialized() else slice(None))
    end, kept, curve = torch.load(f"{place(folder, pattern, at)}.pt")
    for name, weight in model.named_parameters():
        torch.testing.assert_close(full(weight), end[name], rtol=0, atol=1e-12)
    found = masks.masks
    assert set(found) == set(kept)
    assert all(torch.equal(found[name], mask) for name, mask in kept.items())
    assert masks.curve == curve


def loaded(_: Path) -> None:
    """Weights that are loaded into shards are seen by masks and scales; a state goes from one process to many and back."""
    alone, one, masks_alone, model, other, masks = both("2:4", "after")
    train(alone, one, range(2))
    train(model, other, range(2), mine())
    new = dense(seed=7)
    alone.load_state_dict(new.state_dict())
    set_model_state_dict(model, new.state_dict(), options=StateDictOptions(full_state_dict=True))
    train(alone, one, range(2, 5))
    train(model, other, range(2, 5), mine())
    assert_same(model, alone)
    assert_masks(masks, masks_alone)
    state = copy.deepcopy(masks_alone.state_dict())
    found = masks.state_dict()
    for key in ("step", "refreshed", "curve", "layers", "masked"):
        assert found[key] == state[key], key
    with torch.no_grad():
        for weight, from_alone in zip(model.parameters(), dense(seed=8).parameters(), strict=True):
            local(weight).copy_(local_part(from_alone.detach(), weight))
        for weight, from_alone in zip(alone.parameters(), dense(seed=8).parameters(), strict=True):
            weight.copy_(from_alone)
    masks.load_state_dict(state)
    masks_alone.load_state_dict(found)
    train(alone, one, range(5, 9))
    train(model, other, range(5, 9), mine())
    assert_same(model, alone)
    assert isinstance(weights(model)["0.weight"], DTensor)
    assert twofour.check(alone, include="*").summary["holds"]


CHECKS = {
    check.__name__: check
    for check in (
        as_alone,
        momentary,
        steps_in_backward,
        numbers,
        in_step,
        policies,
        tensor_parallel,
        flat_pieces,
        loaded,
        saves,
        resumes,
    )
}

if __name__ == "__main__":
    main(CHECKS)
