"""A whole model: prune, check, compress where it pays, measure, save, load."""

import copy
import tempfile
from pathlib import Path

import torch
from torch import nn

import twofour

dense = nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768), nn.LayerNorm(768)).eval()
model = copy.deepcopy(dense)
inputs = [torch.randn(1, 768), torch.randn(128, 768)]

print(twofour.prune(model, "2:4"))
twofour.check(model, "2:4")  # raises PatternError, naming the first bad layer and place, if a layer does not hold it

# Each layer is timed against the dense one at the sizes that `inputs` bring; a layer that would be slower stays dense.
print(twofour.compress(model, inputs))
print(twofour.explain(model))
print(twofour.measure(model, inputs, against=dense))

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "model.safetensors"
    twofour.save(model, path)
    fresh = copy.deepcopy(dense)
    twofour.load(fresh, path)
    assert torch.equal(fresh(inputs[1]), model(inputs[1]))
    print("same outputs, bit for bit, from", path.stat().st_size, "bytes")
