"""The dense row: what is special about it. All that every row must do is in test_linear.py and tests/nn."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable

import pytest
import torch

from twofour import SparseLinear, SparseMatrix, UnsupportedError, kernels
from twofour.kernels import KERNELS, LinearSpec, choose, onednn
from twofour.pattern import Pattern

pytestmark = pytest.mark.of_cpu


@pytest.fixture(autouse=True)
def _required(require_onednn: Callable[[torch.dtype], None]) -> None:
    require_onednn(torch.float32)


def matrix_of(out_features: int = 48, in_features: int = 64, pattern: str = "2:4") -> SparseMatrix:
    return SparseMatrix.from_dense(torch.randint(-4, 5, (out_features, in_features)).float(), pattern, prune=True)


def test_it_is_never_chosen_by_itself() -> None:
    for pattern in ("2:4", "4:8"):
        spec = LinearSpec.of(matrix_of(pattern=pattern))
        assert not choose(spec).kernel.dense
        assert "onednn" not in choose(spec).reason
        assert choose(spec, "onednn").kernel.dense


def test_it_says_why_not() -> None:
    cpu = torch.device("cpu")
    why_not = KERNELS["onednn"].why_not
    assert why_not(LinearSpec(8, 8, Pattern(), torch.float32, cpu)) is None
    assert why_not(LinearSpec(0, 8, Pattern(), torch.float32, cpu)) == "the weight is empty"
    assert why_not(LinearSpec(8, 8, Pattern(), torch.float32, torch.device("meta"))) == "the weight is on meta"
    assert onednn.why_not(torch.float64) == "oneDNN runs float32, float16 and bfloat16, not float64"
    with pytest.raises(UnsupportedError, match="backend 'onednn' cannot run this layer: the weight is on meta"):
        SparseLinear(matrix_of().to("meta"), backend="onednn")


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "3:4", "2:4x4", "2:4t"])
def test_it_runs_every_pattern(pattern: str) -> None:
    matrix = matrix_of(pattern=pattern)
    x = torch.randint(-4, 5, (7, 64)).float()
    assert torch.equal(kernels.linear(x, matrix, backend="onednn"), x @ matrix.to_dense().T)
    back = SparseLinear(matrix, backend="onednn").matrix
    assert torch.equal(back.values, matrix.values)
    assert torch.equal(back.metadata, matrix.metadata)


def test_a_bias_of_another_dtype_is_added_in_float32(require_onednn: Callable[[torch.dtype], None]) -> None:
    matrix = matrix_of().to(torch.bfloat16)
    require_onednn(torch.bfloat16)
    x, bias = torch.randint(-1, 2, (3, 64)).bfloat16(), torch.randint(-4, 5, (48,)).float()
    assert torch.equal(kernels.linear(x, matrix, bias, backend="onednn"), (x @ matrix.to_dense().T) + bias.bfloat16())


def test_the_weight_is_held_once_dense_and_the_layer_says_so() -> None:
    sparse = SparseLinear(matrix_of(64, 128), backend="onednn")
    dense = 64 * 128 * 4
    canonical_metadata = 64 * 128 // 8
    assert dense <= sparse.values.nbytes < 1.2 * dense
    assert canonical_metadata < sparse.metadata.nbytes < canonical_metadata + 1000
    assert sparse.nbytes == sparse.values.nbytes + sparse.metadata.nbytes
    assert "kernel=onednn" in repr(sparse)


def test_memory_goes_with_the_last_tensor_on_it() -> None:
    values, metadata = onednn.pack(matrix_of())
    address = values.data_ptr()
    owner = weakref.ref(onednn._owners[address])
    view = values.view(-1)[:]
    del values
    gc.collect()
    assert owner() is not None
    x = torch.ones(1, 64)
    assert onednn.linear(x, view, metadata, None, Pattern(), 48, 64).shape == (1, 48)
    del view
    gc.collect()
    assert owner() is None
    assert address not in onednn._owners


def test_copies_are_told_from_the_layout_they_copy() -> None:
    values, metadata = onednn.pack(matrix := matrix_of())
    x = torch.randint(-4, 5, (5, 64)).float()
    expected = x @ matrix.to_dense().T
    copied = values.clone()
    del values
    gc.collect()
    for _ in range(2):  # adopted, then found
        assert torch.equal(onednn.linear(x, copied, metadata, None, Pattern(), 48, 64), expected)
    foreign = metadata.clone()
    foreign[-700:] += 1
    with pytest.raises(UnsupportedError, match=r"laid out for another kind of processor.*backend='cpu'"):
        onednn.linear(x, copied.clone(), foreign, None, Pattern(), 48, 64)


def test_exported_programs_are_saved_and_loaded() -> None:
    sparse = SparseLinear(matrix_of(), torch.randn(48), backend="onednn")
    x = torch.randint(-4, 5, (5, 64)).float()
    expected = sparse(x)
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(sparse, (x,)), buffer)
    assert "linear_onednn" in str(torch.export.export(sparse, (x,)).graph)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    assert torch.equal(loaded(x), expected)
    assert torch.equal(loaded(x), expected)


def test_compiled_layers_find_the_layout_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_adopt", None)
    sparse = SparseLinear(matrix_of(), torch.randn(48), backend="onednn")
    x = torch.randint(-4, 5, (5, 64)).float()
    compiled = torch.compile(sparse, fullgraph=True)
    assert torch.equal(compiled(x), sparse(x))
    with torch.no_grad():
        assert torch.equal(compiled(x), sparse(x))


def test_conversions_stay_on_the_kernel_and_copies_have_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_adopt", None)
    sparse = SparseLinear(matrix_of(), backend="onednn")
    x = torch.randint(-4, 5, (5, 64)).float()
    twin = copy.deepcopy(sparse)
    assert twin.backend == "onednn"
    assert twin.values.data_ptr() != sparse.values.data_ptr()
    assert torch.equal(twin(x), sparse(x))
    assert sparse.to("meta").backend == "reference"
    buffer = io.BytesIO()
    torch.save(twin, buffer)
    assert len(buffer.getvalue()) < 48 * 64 * 4
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False).backend == "onednn"
    if onednn.why_not(torch.bfloat16) is None:
        assert copy.deepcopy(twin).bfloat16().backend == "onednn"
    assert torch.equal(twin.to_linear().weight, twin.matrix.to_dense())
