"""What torch.compile shall not follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def constant(function: Function) -> Function:
    """Called once while a program is traced, its answer taken for a constant: for questions about the machine.

    That is `torch.compiler.assume_constant_result`, which imports torch's compiler: a second, for every program.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
