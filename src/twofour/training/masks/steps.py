"""What is told of the steps of every optimizer there is."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .distributed import anywhere_each, local


class Watcher(Protocol):
    """Is told before and after each step, and in between whenever gradients are there: once, or after each call of a closure.

    Optimizers may step within the step of another (SAM, Lookahead), or be told of twice (a `step` that calls that of its base
    class).
    """

    def _before(self, optimizer: Optimizer) -> None: ...

    def _with_gradients(self, optimizer: Optimizer) -> None: ...

    def _after(self, optimizer: Optimizer) -> None: ...


_WATCHERS: weakref.WeakSet[Watcher] = weakref.WeakSet()
"""Of models that are alive: whoever steps must not keep them so."""


def watch(watcher: Watcher) -> None:
    """From here on `watcher` is told of all steps, for as long as something else keeps it alive."""
    _watch_all_steps()
    _WATCHERS.add(watcher)


def unwatch(watcher: Watcher) -> None:
    """No more of it."""
    _WATCHERS.discard(watcher)


def is_rehearsal(optimizer: Optimizer) -> bool:
    """True for the step that `torch.distributed.checkpoint` makes so that there is a state to load into: of an optimizer that
    remembers nothing, with gradients and learning rates of zero. A collective where they are sharded."""
    if optimizer.state or any(bool(group.get("lr", 1) != 0) for group in optimizer.param_groups):
        return False
    weights: list[Tensor] = [weight for group in optimizer.param_groups for weight in group["params"]]
    moving = [weight.grad is not None and bool(local(weight.grad).any()) for weight in weights]
    return not any(anywhere_each(moving, weights)) and any(weight.grad is not None for weight in weights)


@cache
def _watch_all_steps() -> None:
    """Two hooks on every optimizer there is and will be. They stay: taken away by the garbage collector, in the middle of a
    step, they would change what torch is going through."""

    def before(
        optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        for watcher in list(_WATCHERS):
            watcher._before(optimizer)
        if callable(closure := kwargs.get("closure")):
            return args, {**kwargs, "closure": _telling(closure, optimizer)}
        if len(args) > 1 and callable(args[1]):  # the first is the optimizer
            return (args[0], _telling(args[1], optimizer), *args[2:]), kwargs
        for watcher in list(_WATCHERS):
            watcher._with_gradients(optimizer)
        return None

    def after(optimizer: Optimizer, *_: Any) -> None:
        failed: BaseException | None = None
        for watcher in list(_WATCHERS):
            try:
                watcher._after(optimizer)
            except Exception as error:  # the step has been made: the others must be told of it
                failed = failed or error
        if failed is not None:
            raise failed

    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)


def _telling(closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
    """`closure`, after whose calls watchers are told of the gradients that it has made."""

    def told() -> Any:
        loss = closure()
        for watcher in list(_WATCHERS):
            watcher._with_gradients(optimizer)
        return loss

    return told
