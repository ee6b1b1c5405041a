"""What every test of the GPU's kernels begins with."""

from __future__ import annotations

import pytest

from twofour import native
from twofour.kernels.cuda import products, resources


@pytest.fixture(autouse=True)
def fast_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's twin of what makes results on a GPU, which is as strict."""
    monkeypatch.setattr(resources, "_EMPTY", native.fast_empty_strided("cpu"))
    monkeypatch.setattr(resources, "_is_current", lambda device: device.type == "cpu")


@pytest.fixture(autouse=True)
def nothing_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are prepared for the GPU that a test pretends to have."""
    monkeypatch.setattr(products, "_prepared", {})
