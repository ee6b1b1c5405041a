"""Tensors that are spread over processes (DTensor): the whole, this process's part, and what all of them agree on.

The only file that knows DTensor, `fully_shard` and its elders. It imports none of them: a tensor can be spread only where
that has happened already.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ...errors import UnsupportedError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor, the same on every process; any other tensor as it is. Free of gradients.

    A collective of the processes that hold parts of it: call it on all of them, in the same order. A part that was offloaded
    to the CPU is sent from the device of its mesh, and the whole is there.

    Cost: one gather of the tensor.

    >>> full(torch.ones(2))
    tensor([1., 1.])
    """
    spread = _spread(tensor)
    return tensor.detach() if spread is None else _gathered(local(spread), spread, spread.placements)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, free of gradients and in the same memory; any other tensor itself.

    >>> local(torch.ones(2))
    tensor([1., 1.])
    """
    spread = _spread(tensor)
    if spread is None:
        return tensor
    with torch.no_grad():
        part = spread.to_local()
    wait = getattr(part, "wait", None)  # a collective that is under way
    return cast(Tensor, wait() if callable(wait) else part).detach()


def local_part(whole: Tensor, like: Tensor) -> Tensor:
    """What of `whole` lies where this process's part of `like` does; `whole` itself where `like` is not spread.

    Shards may be uneven, empty, and cut groups; sums that are still to be made (Partial) have parts as large as the whole.

    Args:
        whole: shape of `like`, any dtype, the same on every process.
        like: a DTensor or any other tensor.
    Returns:
        dtype of `whole`, shape of `local(like)`, in memory of its own, on the device of the mesh; nothing is sent.

    >>> local_part(torch.eye(2), like=torch.ones(2, 2))
    tensor([[1., 0.],
            [0., 1.]])
    """
    spread = _spread(like)
    if spread is None:
        return whole
    there = _made(whole.detach(), spread, [_replicate()] * spread.device_mesh.ndim)
    part = there.redistribute(placements=_settled(spread)).to_local()
    return part.clone() if part.numel() < whole.numel() and _shares(part, whole) else part.contiguous()


def whole_of(part: Tensor, like: Tensor) -> Tensor:
    """The way back from `local_part`: the whole of which every process holds the `part` where its part of `like` is.

    A collective as `full` is.

    Args:
        part: shape of `local(like)`, any dtype.
    Returns:
        dtype of `part`, shape of `like`.
    """
    spread = _spread(like)
    return part if spread is None else _gathered(part, spread, _settled(spread))


def anywhere(flag: bool, like: Tensor) -> bool:
    """True on every process that holds a part of `like` where `flag` is True on one of them; a collective as `full` is."""
    return anywhere_each([flag], [like])[0]


def anywhere_each(flags: Sequence[bool], like: Sequence[Tensor]) -> list[bool]:
    """`anywhere` of each flag with its tensor, by one collective for all tensors of the same mesh."""
    found = list(flags)
    of_mesh: dict[DeviceMesh, list[int]] = {}
    for i, tensor in enumerate(like):
        if (spread := _spread(tensor)) is not None:
            of_mesh.setdefault(spread.device_mesh, []).append(i)
    for mesh, places in of_mesh.items():
        told = torch.tensor([int(flags[i]) for i in places], device=mesh.device_type)
        for axis in range(mesh.ndim):
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, mesh.get_group(axis))
        for i, flag in zip(places, told.tolist(), strict=True):
            found[i] = bool(flag)
    return found


def layout(tensor: Tensor) -> Hashable:
    """Equal for tensors whose parts, if of the same shape, lie in the same places; None where a tensor is not spread."""
    spread = _spread(tensor)
    return None if spread is None else (spread.device_mesh, tuple(spread.placements))


def several_processes() -> bool:
    """True in one of many processes that work together."""
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, or the model itself, its sharded parameters in their places.

    Raises:
        UnsupportedError: FullyShardedDataParallel, which cuts weights into flat pieces that know no groups.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = cast(nn.Module, model.module)
    elder = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    for name, module in model.named_modules():
        if elder is not None and isinstance(module, elder):
            raise UnsupportedError(
                f"'{name or '(model)'}' is a FullyShardedDataParallel, which cuts weights into flat pieces: masks need"
                " weights with axes. Use torch.distributed.fsdp.fully_shard, and keep_masks after it."
            )
    put_back(model)
    return model


def is_sharded(model: nn.Module) -> bool:
    """True where `fully_shard` was called on the model or a part of it."""
    return next(_sharded_modules(model), None) is not None


def put_back(model: nn.Module) -> None:
    """Puts sharded parameters where `fully_shard` has put whole ones for the time of a forward.

    They stay there after a forward without backward; what optimizers train are the sharded ones.
    """
    for module in _sharded_modules(model):
        module.reshard()


def replicas(model: nn.Module, weights: Iterable[Tensor]) -> list[ProcessGroup]:
    """The groups of processes that ought to hold the same: those of DistributedDataParallel, and those that hold the same
    shards of a DTensor."""
    groups: dict[int, ProcessGroup] = {}
    if isinstance(model, nn.parallel.DistributedDataParallel):
        groups[id(model.process_group)] = model.process_group
    for spread in (found for weight in weights if (found := _spread(weight)) is not None):
        for axis, placement in enumerate(spread.placements):
            if placement.is_replicate():
                group = spread.device_mesh.get_group(axis)
                groups[id(group)] = group
    return list(groups.values())


def are_same(digest: bytes, groups: Iterable[ProcessGroup]) -> bool:
    """True where all processes of each group have the same digest; a collective of them."""
    same = True
    for group in groups:
        told: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(told, digest, group)
        same &= all(other == digest for other in told)
    return same


def _sharded_modules(model: nn.Module) -> Iterator[Any]:
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return iter(()) if kind is None else (module for module in model.modules() if isinstance(module, kind))


def _spread(tensor: Tensor) -> DTensor | None:
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return cast("DTensor", tensor) if kind is not None and isinstance(tensor, kind) else None


def _made(part: Tensor, like: DTensor, placements: Iterable[Any]) -> DTensor:
    return type(like).from_local(
        part, like.device_mesh, tuple(placements), run_check=False, shape=like.shape, stride=like.stride()
    )


def _gathered(part: Tensor, like: DTensor, placements: Iterable[Any]) -> Tensor:
    sent = (
        part.detach().view(torch.uint8) if part.dtype == torch.bool else part.detach()
    )  # not every backend sends bool
    with torch.no_grad():
        found = _made(sent, like, placements).full_tensor()
    return found.view(torch.bool) if part.dtype == torch.bool else found


def _settled(like: DTensor) -> list[Any]:
    """Placements of `like`, whole where sums are still to be made."""
    return [_replicate() if placement.is_partial() else placement for placement in like.placements]


def _replicate() -> Any:
    return sys.modules["torch.distributed.tensor"].Replicate()


def _shares(part: Tensor, whole: Tensor) -> bool:
    return part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
