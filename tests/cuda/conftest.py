"""What every test of the GPU's kernels begins with."""

from __future__ import annotations

import pytest

from twofour.kernels.cuda import products


@pytest.fixture(autouse=True)
def nothing_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are prepared for the GPU that a test pretends to have."""
    monkeypatch.setattr(products, "_prepared", {})
