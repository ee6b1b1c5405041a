"""Train, prune, train again with what was dropped held at zero: the accuracy of the dense model comes back."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import twofour

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(labels))
train, test = order[:1400], order[1400:]

model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def fit(optimizer: torch.optim.Optimizer, epochs: int = 20) -> None:
    for _ in range(epochs):
        for batch in train[torch.randperm(len(train))].split(50):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


def accuracy() -> float:
    with torch.no_grad():
        return float((model(images[test]).argmax(1) == labels[test]).float().mean())


fit(torch.optim.AdamW(model.parameters(), 1e-3))
print(f"dense:                {accuracy():.1%}")

twofour.prune(model, "1:4")  # three of four weights, so that there is something to recover
print(f"1:4, by magnitude:    {accuracy():.1%}")

# The same training again. Zeros stay zero with any torch optimizer; `masks.state_dict()` goes into your checkpoints.
optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
with twofour.training.keep_masks(model, optimizer, "1:4") as masks:
    print(masks.report)
    fit(optimizer)
print(f"1:4, trained again:   {accuracy():.1%}")

twofour.check(model, "1:4")  # raises if a weight had come back
