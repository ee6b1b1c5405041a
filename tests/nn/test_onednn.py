"""The dense rival."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from twofour.nn import onednn

pytestmark = pytest.mark.of_cpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_the_rival_computes_what_the_linear_does(
    dtype: torch.dtype, bias: bool, require_onednn: Callable[[torch.dtype], None]
) -> None:
    require_onednn(dtype)
    linear = nn.Linear(48, 80, bias=bias)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randint(-4, 5, parameter.shape))
    model = nn.Sequential(linear.to(dtype))
    dense = copy.deepcopy(model)
    onednn.prepack(model, ["0"])
    assert isinstance(model[0], onednn.OneDnnLinear)
    for shape in [(1, 48), (7, 48), (2, 33, 48)]:
        x = torch.randint(-1, 2, shape).to(dtype)  # sums up to 196 are exact in bfloat16 too
        with torch.inference_mode():
            assert torch.equal(model(x), dense(x))
