"""One weight matrix: prune it, store it in 56 % of the bytes, multiply with it, save it."""

import tempfile
from pathlib import Path

import torch

import twofour

weight = torch.randn(1024, 1024, dtype=torch.bfloat16)
x = torch.randn(8, 1024, dtype=torch.bfloat16)

# A dense matrix is refused: nothing is dropped unless you ask for it.
try:
    twofour.SparseMatrix.from_dense(weight, "2:4")
except twofour.PatternError as error:
    print(error)

# Choose what survives, then compress. `prune=True` would do both.
mask = twofour.masks.nm_mask(twofour.masks.magnitude(weight), "2:4")
matrix = twofour.SparseMatrix.from_dense(weight, "2:4", mask=mask)
print(matrix, f"= {matrix.nbytes / weight.nbytes:.2%} of dense")

# y = x @ W.T on the best kernel of this machine; backend="reference" is the specification in plain torch.
y = twofour.kernels.linear(x, matrix)
reference = twofour.kernels.linear(x, matrix, backend="reference")
print("largest difference from the reference:", float((y - reference).abs().max()))

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "matrix.safetensors"
    twofour.save_matrices(path, matrix)
    assert torch.equal(twofour.load_matrices(path)["weight"].to_dense(), torch.where(mask, weight, 0))
    print("on disk:", path.stat().st_size, "bytes")
