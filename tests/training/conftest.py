"""What every test of this room starts from."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """torch.compile gives up a function that it has compiled eight times, also for models of other tests."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
