"""twofour compress --weights"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from twofour import SparseMatrix, load_matrices
from twofour.cli.app import app


@pytest.mark.parametrize(("weights", "dtype"), [("int8", torch.int8), ("float8", torch.float8_e4m3fn)])
def test_weights_can_be_stored_in_8_bits(weights: str, dtype: torch.dtype, tmp_path: Path) -> None:
    weight = SparseMatrix.from_dense(torch.randn(64, 64), "2:4", prune=True).to_dense()
    save_file({"a.weight": weight, "a.bias": torch.zeros(64)}, tmp_path / "model.safetensors")
    arguments = ["compress", str(tmp_path / "model.safetensors"), str(tmp_path / "small.safetensors"), "--force"]
    wrong = CliRunner().invoke(app, [*arguments, "--weights", "int3"])
    assert wrong.exit_code != 0
    done = CliRunner().invoke(app, [*arguments, "--weights", weights])
    assert done.exit_code == 0, done.output
    assert weights in done.output
    matrices = load_matrices(tmp_path / "small.safetensors")
    assert matrices["a.weight"].dtype == dtype
