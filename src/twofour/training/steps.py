"""What is told of the steps of every optimizer there is."""

from __future__ import annotations

import weakref
from functools import cache
from typing import Any, Protocol

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class Watcher(Protocol):
    """Is told before and after each step."""

    def _before(self, optimizer: Optimizer) -> None: ...

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


@cache
def _watch_all_steps() -> None:
    """Two hooks on every optimizer there is and will be. They stay: taken away by the garbage collector, in the middle of a
    step, they would change what torch is going through."""

    def before(optimizer: Optimizer, *_: Any) -> None:
        for watcher in list(_WATCHERS):
            watcher._before(optimizer)

    def after(optimizer: Optimizer, *_: Any) -> None:
        for watcher in list(_WATCHERS):
            watcher._after(optimizer)

    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)
