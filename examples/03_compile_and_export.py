"""A compressed model under torch.compile and torch.export: the sparse kernel is one node of the graph."""

import torch
from torch import nn

import twofour

model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).eval()
twofour.prune(model, "2:4")
twofour.compress(model, force=True)
x = torch.randn(32, 256)

with torch.no_grad():
    compiled = torch.compile(model, fullgraph=True)
    print("compiled, largest difference:", float((compiled(x) - model(x)).abs().max()))

    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("tokens")},))
    nodes = [node.name for node in program.graph.nodes if "linear" in node.name]
    print("exported, its linear nodes:", nodes)
    longer = torch.randn(77, 256)
    assert torch.equal(program.module()(longer), model(longer))
