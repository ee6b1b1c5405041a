"""What `test_distributed.py` runs in every one of several processes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
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
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import twofour
from twofour import ModelError, PatternError, UnsupportedError
from twofour.training import FixedMasks, keep_masks, masks_of
from twofour.training.masks.distributed import (
    anywhere,
    anywhere_each,
    full,
    layout,
    local,
    local_part,
    put_back,
    whole_of,
)

SAMPLES = 12
PATTERNS = ("2:4", "2:4t", "2:4x4")


class Conv1D(nn.Module):
    """As transformers has it: [in, out]."""

    def __init__(self, features: int, nf: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(features, nf) / features**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Places(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((-1, -2))


def dense(seed: int = 0) -> nn.Sequential:
    """Two and three processes cut 20 rows into 10 and 10, into 7, 7 and 6: groups of four lie in two shards."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(8, 20, 3),
        nn.Tanh(),
        Places(),
        Conv1D(20, 12),
        nn.GELU(),
        nn.Linear(12, 20),
        nn.Tanh(),
        nn.Linear(20, 5),
    ).double()


def pruned(pattern: str = "2:4", seed: int = 0) -> nn.Sequential:
    model = dense(seed)
    twofour.prune(model, pattern)
    return model


def sharded(model: nn.Sequential, **how: Any) -> nn.Sequential:
    """`model` itself: its layers one by one, and what is left."""
    for layer in list(model)[:6]:
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, **how)
    return fully_shard(model, **how)


def rank() -> int:
    return distributed.get_rank()


def processes() -> int:
    return distributed.get_world_size()


def mine() -> slice:
    """This process's samples of a batch."""
    size = SAMPLES // processes()
    return slice(rank() * size, (rank() + 1) * size)


def loss_of(model: nn.Module, step: int, samples: slice = slice(None)) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(SAMPLES, 8, 4, 4, generator=generator).double()
    y = torch.randn(SAMPLES, 5, generator=generator).double()
    return (model(x[samples]) - y[samples]).square().mean()


def train(model: nn.Module, optimizer: Optimizer, steps: range, samples: slice = slice(None)) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step, samples).backward()
        optimizer.step()


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), 0.02, weight_decay=0.1)


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.ndim > 1}


def assert_same(model: nn.Module, alone: nn.Module) -> None:
    for (name, weight), other in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(full(weight), other.detach(), rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def assert_zero(model: nn.Module, optimizer: Optimizer, masks: dict[str, Tensor]) -> None:
    """Weights, gradients and what the optimizer remembers of them are zero where `masks` are False."""
    found = weights(model)
    for name, mask in masks.items():
        weight = found[f"{name}.weight"]
        told = [weight, weight.grad, *optimizer.state[weight].values()]
        of_weight = [value for value in told if isinstance(value, Tensor) and value.shape == weight.shape]
        assert len(of_weight) >= 3, name
        for value in of_weight:
            assert not bool(full(value)[~mask].any()), name
            assert bool(full(value)[mask].any()), name


def assert_same_everywhere(told: object) -> None:
    others: list[object] = [None] * processes()
    distributed.all_gather_object(others, told)
    for other in others:
        assert other == told, others


@contextmanager
def refuses(kind: type[Exception], match: str) -> Iterator[None]:
    """As pytest.raises, and every process says the same."""
    with pytest.raises(kind, match=match) as raised:
        yield
    assert_same_everywhere(str(raised.value))


def helpers(_: Path) -> None:
    mesh = init_device_mesh("cpu", (processes(),))
    for shape in ((8, 12), (7, 5), (2, 3), (5, 4, 3, 3)):  # two rows leave nothing for a third process
        numbers = torch.arange(float(torch.Size(shape).numel())).view(shape)
        dropped = numbers % 3 == 0
        for placement in (Shard(0), Shard(1), Shard(len(shape) - 1), Replicate()):
            tensor = distribute_tensor(numbers, mesh, [placement])
            assert torch.equal(full(tensor), numbers)
            assert torch.equal(local_part(numbers, tensor), local(tensor))
            part = local_part(dropped, tensor)
            assert part.is_contiguous()
            assert part.untyped_storage().nbytes() == part.numel()
            assert torch.equal(whole_of(part, tensor), dropped)
            parameter = nn.Parameter(distribute_tensor(numbers.clone(), mesh, [placement]))
            assert not local(parameter).requires_grad
            local(parameter).zero_()
            assert not bool(full(parameter).any())
            assert layout(parameter) == layout(tensor) != layout(numbers)
    sums = DTensor.from_local(torch.ones(4, 4), mesh, [Partial()])
    assert torch.equal(full(sums), torch.full((4, 4), float(processes())))
    assert torch.equal(local_part(torch.eye(4), sums), torch.eye(4))
    two = init_device_mesh("cpu", (1, processes()))
    for placements in ([Shard(0), Shard(0)], [Shard(1), Shard(0)], [Replicate(), Shard(1)]):
        tensor = distribute_tensor(numbers, two, placements)
        assert torch.equal(local_part(dropped, tensor), local(tensor) % 3 == 0)
        assert torch.equal(whole_of(local(tensor), tensor), numbers)
    last = rank() == processes() - 1
    assert anywhere(last, tensor)
    assert not anywhere(False, tensor)
    assert anywhere(last, numbers) == last
    other = distribute_tensor(numbers, mesh, [Shard(0)])
    assert anywhere_each([last, False, last, rank() == 0], [tensor, tensor, numbers, other]) == [
        True,
        False,
        last,
        True,
    ]


def as_alone(_: Path) -> None:
    """Sharded models end as one process does that sees all samples: weights, masks, zeros, momenta."""
    for pattern in PATTERNS:
        for how in ({}, {"reshard_after_forward": False})[: 2 if pattern == "2:4" else 1]:
            alone = pruned(pattern)
            model = sharded(pruned(pattern), **how)
            one, other = adamw(alone), adamw(model)
            masks_alone, masks = keep_masks(alone, one, pattern), keep_masks(model, other, pattern)
            assert len(masks.masks) == (4 if pattern == "2:4" else 1)
            rows, rows_alone = masks.report.rows, masks_alone.report.rows
            assert [{**row, "kind": ""} for row in rows] == [{**row, "kind": ""} for row in rows_alone]
            for each in masks._kept:
                assert each.dropped.shape == local(each.weight).shape
            train(alone, one, range(5))
            train(model, other, range(5), mine())
            assert_same(model, alone)
            for name, mask in masks_alone.masks.items():
                assert torch.equal(masks.masks[name], mask)
            assert_zero(model, other, masks_alone.masks)
            assert masks_of(model) is masks
            masks.remove()
            train(model, other, range(1), mine())
            back = weights(model)
            assert all(bool(full(back[f"{n}.weight"])[~mask].any()) for n, mask in masks_alone.masks.items())


def momentum(_: Path) -> None:
    """What was remembered of weights before they were pruned is cleared, now and after loading a state."""
    alone, model = dense(), sharded(dense())
    one, other = adamw(alone), adamw(model)
    train(alone, one, range(2))
    train(model, other, range(2), mine())
    stale = copy.deepcopy(one.state_dict()), copy.deepcopy(get_optimizer_state_dict(model, other))
    twofour.prune(alone)
    with torch.no_grad():
        for weight, from_alone in zip(model.parameters(), alone.parameters(), strict=True):
            local(weight).copy_(local_part(from_alone, weight))
    masks_alone, masks = keep_masks(alone, one), keep_masks(model)
    masks.adopt(other)
    for name, weight in weights(model).items():
        mask = masks_alone.masks[name.removesuffix(".weight")]
        assert not bool(full(other.state[weight]["exp_avg"])[~mask].any())
        assert not bool(full(other.state[weight]["exp_avg_sq"])[~mask].any())
    train(alone, one, range(2, 5))
    train(model, other, range(2, 5), mine())
    assert_same(model, alone)
    one.load_state_dict(stale[0])
    set_optimizer_state_dict(model, other, stale[1])
    train(alone, one, range(5, 7))
    train(model, other, range(5, 7), mine())
    assert_same(model, alone)
    assert_zero(model, other, masks_alone.masks)


def accumulation(_: Path) -> None:
    """Gradients that are summed without the others, clipped, and then shared are those of kept weights only."""
    alone, model = pruned(), sharded(pruned())
    one, other = (torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (alone, model))
    masks = keep_masks(alone, one).masks
    keep_masks(model, other)
    for step in range(3):
        for optimizer in (one, other):
            optimizer.zero_grad()
        for part in range(2):
            model.set_requires_gradient_sync(part == 1)
            loss_of(alone, 2 * step + part).backward()
            loss_of(model, 2 * step + part, mine()).backward()
        for name, mask in masks.items():
            grad = weights(model)[f"{name}.weight"].grad
            assert grad is not None
            assert not bool(full(grad)[~mask].any())
        norms = [nn.utils.clip_grad_norm_(m.parameters(), 0.1) for m in (alone, model)]
        torch.testing.assert_close(full(norms[1]), norms[0], rtol=0, atol=1e-12)
        one.step()
        other.step()
    assert_same(model, alone)


def steps_in_backward(_: Path) -> None:
    """Optimizers of one parameter each, that step as soon as its gradient is there, while others are still whole."""

    def stepping(model: nn.Module) -> dict[nn.Parameter, Optimizer]:
        optimizers: dict[nn.Parameter, Optimizer] = {w: torch.optim.AdamW([w], 0.02) for w in model.parameters()}

        def step(weight: Tensor) -> None:
            optimizers[weight].step()  # type: ignore[index]
            optimizers[weight].zero_grad()  # type: ignore[index]

        for weight in optimizers:
            weight.register_post_accumulate_grad_hook(step)
        return optimizers

    for first in (False, True):
        alone, model = pruned(), pruned()
        fully_shard(model[5])  # it steps before the backward of '3', which needs its whole weight
        fully_shard(model)
        told = []
        for each in (alone, model):
            masks = None if first else keep_masks(each)
            stepping(each)
            told.append(masks or keep_masks(each))
        for step in range(3):
            loss_of(alone, step).backward()
            loss_of(model, step, mine()).backward()
        assert_same(model, alone)
        for name, mask in told[0].masks.items():
            assert torch.equal(full(weights(model)[f"{name}.weight"]) != 0, mask)


def states(_: Path) -> None:
    """Masks go into a state dict whole, and come back into any sharding; what does not fit is refused by all alike."""
    alone, model = pruned(), sharded(pruned())
    with torch.no_grad():  # two more zeros, one of them kept
        alone[5].weight[0, :4] = torch.tensor([0.0, 0.0, 0.0, 0.5])
        weight = model[5].weight
        local(weight).copy_(local_part(alone[5].weight, weight))
    state = keep_masks(alone).state_dict()
    masks = keep_masks(model)
    found = masks.state_dict()
    assert found["pattern"] == "2:4"
    assert found["shapes"] == state["shapes"] == {"0": [20, 8, 3, 3], "3": [20, 12], "5": [20, 12], "7": [5, 20]}
    assert all(torch.equal(bits, state["dropped"][name]) for name, bits in found["dropped"].items())
    assert_same_everywhere({name: bits.tolist() for name, bits in found["dropped"].items()})
    other = copy.deepcopy(state)
    assert masks.masks["5"][0, :4].tolist() == [True, False, False, True]
    other["dropped"]["5"][0] ^= 0b11  # another of the zeros is kept
    masks.load_state_dict(other)
    assert masks.masks["5"][0, :4].tolist() == [False, True, False, True]
    masks.load_state_dict(state)
    assert masks.masks["5"][0, :4].tolist() == [True, False, False, True]
    broken = copy.deepcopy(state)
    broken["dropped"]["5"][-1] = 255  # of the last process
    with refuses(
        PatternError, r"'5' is not zero at [24] places that its mask drops, the first at \[19, .*Load the weights"
    ):
        masks.load_state_dict(broken)
    with refuses(ModelError, r"'5' is \[20, 12\], its mask \[12, 20\]"):
        masks.load_state_dict({**state, "shapes": {**state["shapes"], "5": [12, 20]}})
    assert all(torch.equal(bits, state["dropped"][name]) for name, bits in masks.state_dict()["dropped"].items())
    with torch.no_grad():
        local(model[3].weight).fill_(1.0)  # as a merge would
    masks.apply()
    assert torch.equal(full(model[3].weight) != 0, masks.masks["3"])


def loading(_: Path) -> None:
    """Checkpoints with other zeros are refused by every process before any weight is changed; the right ones are loaded."""
    model, wrong = sharded(pruned()), pruned(seed=1)
    right = {key: value.clone() for key, value in pruned().state_dict().items()}
    masks = keep_masks(model)
    before = [full(weight).clone() for weight in model.parameters()]
    everything = StateDictOptions(full_state_dict=True)
    told = r"'0' is not zero at \d+ places that its mask drops, the first at \[.*It was not loaded\. For"
    with refuses(PatternError, told):
        set_model_state_dict(model, wrong.state_dict(), options=everything)
    last = {key: value.clone() for key, value in right.items()}
    last["5.weight"][-1] = 1.0  # of the last process only
    with refuses(PatternError, r"'5' is not zero at 6 places .*the first at \[19, "):
        set_model_state_dict(model, last, options=everything)
    shards = get_model_state_dict(sharded(pruned(seed=1)))
    assert all(isinstance(value, DTensor) for value in shards.values())
    with refuses(PatternError, told):
        set_model_state_dict(model, shards)
    columns = {**shards, "0.weight": shards["0.weight"].redistribute(placements=[Shard(1)])}
    with refuses(PatternError, told):
        model.load_state_dict(columns)
    with refuses(PatternError, r"'0' is not zero"):
        model[0].load_state_dict({key[2:]: value for key, value in shards.items() if key.startswith("0.")})
    for weight, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(full(weight), old)
    set_model_state_dict(model, dict(right), options=everything)  # it puts shards into what it is given
    set_model_state_dict(model, get_model_state_dict(sharded(pruned())))
    copies = distribute_tensor(right["0.weight"], model[0].weight.device_mesh, [Replicate()])
    model.load_state_dict({**get_model_state_dict(model), "0.weight": copies})
    from_first = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, dict(right) if rank() == 0 else {}, options=from_first)
    with refuses(PatternError, r"'0' is not zero at .* It is in the model already: .*broadcast_from_rank0\. Load"):
        set_model_state_dict(model, wrong.state_dict() if rank() == 0 else {}, options=from_first)
    masks.apply()  # zero again
    optimizer = adamw(model)
    train(model, optimizer, range(1), mine())
    assert_zero(model, optimizer, masks.masks)


def sharded_later(_: Path) -> None:
    """Masks that were kept before `fully_shard` would be those of weights that are no more."""
    model = pruned()
    masks = keep_masks(model, torch.optim.SGD(model.parameters(), 0.1))
    sharded(model)
    optimizer = adamw(model)
    loss_of(model, 0, mine()).backward()
    before = [full(weight).clone() for weight in model.parameters()]
    with refuses(
        ModelError,
        r"weight of '0' was sharded anew, as by fully_shard, after keep_masks.*keep_masks\(.*\) again, after fully_shard\. N",
    ):
        optimizer.step()
    assert all(torch.equal(full(weight), old) for weight, old in zip(model.parameters(), before, strict=True))
    masks.remove()
    masks = keep_masks(model, optimizer)
    optimizer.step()
    assert_zero(model, optimizer, masks.masks)
    model = pruned()
    keep_masks(model)
    optimizer = adamw(fully_shard(model))
    loss_of(model, 0, mine()).backward()
    with torch.no_grad():
        loss_of(model, 0, mine())  # whole weights are where the sharded ones were
    with refuses(ModelError, "weight of '0' was sharded anew"):
        optimizer.step()


def flat_pieces(_: Path) -> None:
    """FullyShardedDataParallel has no place for masks, whenever they are kept."""
    for as_they_were in (True, False):
        model = pruned()
        masks = keep_masks(model)
        elder = FullyShardedDataParallel(model, use_orig_params=as_they_were, device_id=torch.device("cpu"))
        optimizer = adamw(elder)
        loss_of(elder, 0, mine()).backward()
        before = [weight.detach().clone() for weight in elder.parameters()]
        with pytest.raises(ModelError, match=r"weight of '0' (is \[\d+\] now|was replaced by another parameter) after"):
            optimizer.step()
        assert all(torch.equal(weight, old) for weight, old in zip(elder.parameters(), before, strict=True))
        masks.remove()
        for outer, name in ((elder, r"\(model\)"), (nn.Sequential(elder), "0")):
            with refuses(
                UnsupportedError, f"'{name}' is a FullyShardedDataParallel, .*Use .*fully_shard, and keep_masks after"
            ):
                keep_masks(outer)


def between(_: Path) -> None:
    """After a forward without backward whole weights stand where the sharded ones were: no other parameters, no gap."""
    for first in (True, False):
        model = sharded(pruned(), reshard_after_forward=False)
        optimizer = adamw(model)
        before = get_model_state_dict(model)
        wrong = get_model_state_dict(sharded(pruned(seed=1)))
        masks = keep_masks(model, optimizer) if first else None
        look(model)
        masks = masks or keep_masks(model, optimizer)
        assert all(isinstance(each.weight, DTensor) for each in masks._kept)
        look(model)
        with refuses(PatternError, "'7' is not zero"):
            model[7].load_state_dict({key[2:]: value for key, value in wrong.items() if key.startswith("7.")})
        look(model)
        model.load_state_dict(before)
        loss_of(model, 0, mine()).backward()
        look(model)
        optimizer.step()
        put_back(model)
        assert_zero(model, optimizer, masks.masks)


def look(model: nn.Sequential) -> None:
    with torch.no_grad():
        loss_of(model, 0, mine())
    assert not isinstance(model[7].weight, DTensor)


def in_step(_: Path) -> None:
    """DistributedDataParallel: the run of one process, the same bits in all, names without its prefix."""
    wrappers: tuple[Callable[[nn.Module], DistributedDataParallel], ...] = (
        DistributedDataParallel,
        lambda m: DistributedDataParallel(m, gradient_as_bucket_view=True, bucket_cap_mb=0.001),
        lambda m: DistributedDataParallel(m, static_graph=True),
    )
    for wrapper, where in zip(wrappers, ("outside", "inside", "before"), strict=True):
        alone, inner = pruned(), pruned()
        masks = keep_masks(inner) if where == "before" else None
        model = wrapper(inner)
        one, other = adamw(alone), adamw(model)
        masks_alone = keep_masks(alone, one)
        masks = masks or keep_masks(model if where == "outside" else inner, other)
        assert masks_of(model) is masks_of(model.module) is masks
        assert set(masks.masks) == set(masks_alone.masks)
        for step in range(4):
            one.zero_grad()
            other.zero_grad()
            loss_of(alone, 2 * step).backward()
            loss_of(alone, 2 * step + 1).backward()
            with nullcontext() if model.static_graph else model.no_sync():
                loss_of(model, 2 * step, mine()).backward()
            loss_of(model, 2 * step + 1, mine()).backward()
            for name, mask in masks.masks.items():
                grad = weights(model.module)[f"{name}.weight"].grad
                assert grad is not None
                assert not bool(grad[~mask].any())
            one.step()
            other.step()
        assert_same(model.module, alone)
        assert_zero(model.module, other, masks.masks)
        assert_same_everywhere([w.tolist() for p in model.parameters() for w in (p.detach(), p.grad) if w is not None])
        with refuses(PatternError, "'0' is not zero .* It was not loaded"):
            model.load_state_dict({f"module.{key}": value for key, value in pruned(seed=1).state_dict().items()})
        model.load_state_dict({f"module.{key}": value for key, value in alone.state_dict().items()})


def out_of_step(_: Path) -> None:
    """Processes with different masks are told so, before their weights come apart."""
    model = pruned(seed=rank())
    keep_masks(model)  # each its own masks, and then the weights of the first
    outer = DistributedDataParallel(model)
    optimizer = adamw(outer)
    loss_of(outer, 0, mine()).backward()
    if rank() == 0:
        optimizer.step()
    else:
        with pytest.raises(
            PatternError, match="'0' is not zero at .* It was changed after keep_masks, as by DistributedData"
        ):
            optimizer.step()
    told = "processes that train the same weights have different masks"
    outer = DistributedDataParallel(dense())
    twofour.prune(outer.module, include="0" if rank() else "5")
    with refuses(ModelError, told):
        keep_masks(outer)
    assert masks_of(outer) is None
    mesh = init_device_mesh("cpu", (processes(), 1), mesh_dim_names=("same", "shards"))
    with refuses(ModelError, told):
        keep_masks(sharded(pruned(seed=rank()), mesh=mesh))
    alone, model = pruned(), sharded(pruned(), mesh=mesh)
    one, other = adamw(alone), adamw(model)
    keep_masks(alone, one)
    keep_masks(model, other)
    train(alone, one, range(3))
    train(model, other, range(3), mine())
    assert_same(model, alone)


def policies(_: Path) -> None:
    """Of mixed precision and of offloaded shards the zeros are the same."""
    for how in (
        {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
        {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        {"reshard_after_forward": False, "mp_policy": MixedPrecisionPolicy(torch.float32)},
    ):
        model = sharded(pruned().float(), **how)
        optimizer = adamw(model)
        masks = keep_masks(model, optimizer)
        model.double()  # other tensors within the same parameters
        train(model, optimizer, range(3), mine())
        assert_zero(model, optimizer, masks.masks)


def tensor_parallel(_: Path) -> None:
    """Weights that are cut along their inputs, through groups of four."""
    mesh = init_device_mesh("cpu", (processes(),))
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12)).double()
    twofour.prune(alone)
    model = parallelize_module(copy.deepcopy(alone), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    assert model[2].weight.placements == (Shard(1),)
    one, other = adamw(alone), adamw(model)
    masks_alone, masks = keep_masks(alone, one), keep_masks(model, other)
    for step in range(3):
        x = torch.randn(4, 12, generator=torch.Generator().manual_seed(step)).double()
        for each, optimizer in ((alone, one), (model, other)):
            optimizer.zero_grad()
            each(x).square().mean().backward()
            optimizer.step()
    assert_same(model, alone)
    assert all(torch.equal(masks.masks[name], mask) for name, mask in masks_alone.masks.items())


def other_layouts(_: Path) -> None:
    """Gradients and optimizers' states that lie otherwise than the weight are masked where they lie."""
    mesh = init_device_mesh("cpu", (processes(),))
    model = nn.Sequential(nn.Linear(12, 20, bias=False))
    twofour.prune(model)
    gone = model[0].weight.detach() == 0
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Shard(0)]))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    masks = keep_masks(model, optimizer)
    each = masks.named("0")
    ones = torch.ones(20, 12)
    kinds = {
        "columns": distribute_tensor(ones, mesh, [Shard(1)]),
        "copies": distribute_tensor(ones, mesh, [Replicate()]),
        "sums": DTensor.from_local(ones.clone(), mesh, [Partial()]),
        "part": torch.ones_like(local(model[0].weight)),
        "whole": ones.clone(),
    }
    each.clear(kinds)
    for name, value in kinds.items():
        mask = each.dropped if name == "part" else gone
        assert torch.equal(full(value) == 0, mask), name
    model[0].weight.grad = distribute_tensor(ones, mesh, [Shard(0)])
    optimizer.step()
    assert torch.equal(full(model[0].weight) == 0, gone)


def saves(folder: Path) -> None:
    """Three steps, a checkpoint, three more."""
    model = sharded(pruned())
    optimizer = adamw(model)
    masks = keep_masks(model, optimizer)
    train(model, optimizer, range(3), mine())
    with torch.no_grad():  # kept, and zero by chance
        first = masks.masks["5"][0].nonzero()[0, 0]
        if rank() == 0:
            local(model[5].weight)[0, first] = 0.0
    dcp.save(checkpoint(model, optimizer, masks), checkpoint_id=folder / "checkpoint")
    train(model, optimizer, range(3, 6), mine())
    end = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    told = masks.state_dict()
    if rank() == 0:
        torch.save((end, told), folder / "end.pt")


def checkpoint(model: nn.Module, optimizer: Optimizer, masks: FixedMasks) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "masks": masks.state_dict(),
    }


def resumes(folder: Path) -> None:
    """Of a checkpoint that another number of processes wrote."""
    model = dense(seed=5)
    resume(folder, model if processes() == 1 else sharded(model))


def resume(folder: Path, model: nn.Module) -> None:
    optimizer = adamw(model)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    masks = keep_masks(model)  # not of the optimizer: what it remembers of a weight that is zero by chance stays
    told = {"masks": masks.state_dict()}
    dcp.load(told, checkpoint_id=folder / "checkpoint")
    masks.load_state_dict(told["masks"])
    masks.adopt(optimizer)
    train(model, optimizer, range(3, 6), mine() if distributed.is_initialized() else slice(None))
    end, end_masks = torch.load(folder / "end.pt")
    for name, weight in model.named_parameters():
        torch.testing.assert_close(full(weight), end[name], rtol=0, atol=1e-12)
    found = masks.state_dict()["dropped"]
    assert all(torch.equal(found[name], bits) for name, bits in end_masks["dropped"].items())
    assert_zero(model, optimizer, masks.masks)


def fails(_: Path) -> None:
    """In one process, while the others wait for it."""
    if rank() == 1:
        _ = 1 // (rank() - 1)
    distributed.barrier()


CHECKS = {
    check.__name__: check
    for check in (
        helpers,
        as_alone,
        momentum,
        accumulation,
        steps_in_backward,
        states,
        loading,
        sharded_later,
        flat_pieces,
        between,
        in_step,
        out_of_step,
        policies,
        tensor_parallel,
        other_layouts,
        saves,
        resumes,
        fails,
    )
}

if __name__ == "__main__":
    main(CHECKS)
