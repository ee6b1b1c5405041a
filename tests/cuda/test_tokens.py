"""Inputs as int8, on an emulated GPU: the bits of the specification."""

from __future__ import annotations

import pytest
import torch
from tests.cuda.products import launched

from twofour import ShapeError, UnsupportedError
from twofour.kernels import reference
from twofour.kernels.cuda import tokens

__all__ = ["launched"]


def hostile(columns: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(12, columns) * 2.0 ** torch.randint(-12, 12, (12, 1))
    x[0] = 0
    x[1] = -0.0
    x[2, -1] = float("nan")
    x[3, 0] = -float("inf")
    x[4] = 2.0**-119
    x[5] = 2.0**-120
    x[6] = 127.0
    x[6, ::2] = torch.arange(len(x[6, ::2])) % 127 + 0.5  # ties
    x[7] = -(2.0**15)
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [1, 16, 100, 1111])
def test_tokens_are_quantized_as_the_reference_does(columns: int, dtype: torch.dtype, launched: list[str]) -> None:
    whole = hostile(columns + 3, dtype)
    for x in (whole[:, 3:], whole[:, :columns].contiguous(), whole[:, :columns].T.contiguous().T):
        q, scales = tokens.quantize(x)
        wanted, wanted_scales = reference.quantize_tokens(x)
        assert torch.equal(q, wanted)
        assert torch.equal(scales.view(torch.int32), wanted_scales.view(torch.int32))
        assert q.data_ptr() % 16 == 0
        assert q.stride(0) % 16 == 0
    assert len(launched) == 3


def test_nothing_is_launched_for_no_tokens(launched: list[str]) -> None:
    q, scales = tokens.quantize(torch.empty(0, 64))
    assert q.shape == (0, 64)
    assert scales.shape == (0,)
    assert launched == []


def test_what_it_refuses(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ShapeError, match=r"x is \[2, 3, 4\]: it must be \[tokens, columns\]"):
        tokens.quantize(torch.zeros(2, 3, 4))
    with pytest.raises(UnsupportedError, match="float64 is not quantized by a GPU kernel: float32, bfloat16, float16"):
        tokens.quantize(torch.zeros(2, 3).double())
    monkeypatch.undo()
    with pytest.raises(UnsupportedError, match="x is on cpu: put it on a GPU, or take reference.quantize_tokens"):
        tokens.quantize(torch.zeros(2, 3))
