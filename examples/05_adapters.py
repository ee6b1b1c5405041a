"""A 2:4 model learns another task by low-rank companions, which then go into its weights: the zeros stay zero."""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import twofour
from twofour.training import adapter_parameters, adapter_state_dict, add_adapters, merge_adapters

torch.manual_seed(0)
digits = load_digits()
upright = torch.tensor(digits.images, dtype=torch.float32) / 16
turned = torch.rot90(upright, 1, (1, 2))
labels = torch.tensor(digits.target)
order = torch.randperm(len(labels))
train, test = order[:1400], order[1400:]

model = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def fit(model: nn.Module, images: torch.Tensor, parameters: list[nn.Parameter], epochs: int) -> None:
    optimizer = torch.optim.AdamW(parameters, 2e-3)
    for _ in range(epochs):
        for batch in train[torch.randperm(len(train))].split(50):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


def accuracy(model: nn.Module, images: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(images[test]).argmax(1) == labels[test]).float().mean())


fit(model, upright, list(model.parameters()), epochs=10)
twofour.prune(model, "2:4")
print(f"2:4, upright digits:             {accuracy(model, upright):.1%}")
print(f"2:4, digits that were turned:    {accuracy(model, turned):.1%}")

# Companions of rank 16; everything else is frozen. They are masked: they change no weight that is zero.
masked = copy.deepcopy(model)
print(add_adapters(masked, rank=16))
fit(masked, turned, adapter_parameters(masked), epochs=10)
print(f"masked companions, trained:      {accuracy(masked, turned):.1%}")
print(f"what a task takes on disk:       {sum(x.nbytes for x in adapter_state_dict(masked).values())} bytes")

print(merge_adapters(masked))
print(f"merged:                          {accuracy(masked, turned):.1%}")
twofour.check(masked, "2:4")  # raises if a zero had been filled

# Companions that were not masked learn a little more, and are for staying beside the weights. A merge loses what they have
# at the zeros, and says how much; with inputs, the weights that stay make up for most of it.
beside = copy.deepcopy(model)
add_adapters(beside, rank=16, masked=False)
fit(beside, turned, adapter_parameters(beside), epochs=10)
print(f"companions that stay, trained:   {accuracy(beside, turned):.1%}")
for calibration in (None, turned[train]):
    merged = copy.deepcopy(beside)
    report = merge_adapters(merged, calibration=calibration)
    print(
        f"merged, {report.summary['method']}:{' ' * (24 - len(report.summary['method']))}{accuracy(merged, turned):.1%}"
    )
    twofour.check(merged, "2:4")
print(report)
