"""Sparse from the first step: masks move while a network learns which of its weights to keep; a killed run goes on."""

import io

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import twofour
from twofour.training import move_masks

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(labels))
train, test = order[:1400], order[1400:]


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 12))


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        batch = train[torch.randint(len(train), (50,))]
        optimizer.zero_grad()
        functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()


def accuracy(model: nn.Module) -> float:
    with torch.no_grad():
        return float((model(images[test]).argmax(1) == labels[test]).float().mean())


dense = network()
fit(dense, torch.optim.AdamW(dense.parameters(), 1e-3), 500)
print(f"dense:                           {accuracy(dense):.1%}")

for pattern, schedule in (("2:4", "sr-ste"), ("2:4", "s-ste"), ("2:4t", "s-ste"), ("2:4t", "dense:50, fst:350, fixed")):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    with move_masks(model, optimizer, pattern, schedule) as masks:  # writes the sparse weights at its end
        fit(model, optimizer, 500)
    print(
        f"{pattern:<5}{schedule:<28}{accuracy(model):.1%}, at last {masks.flip_rate:.1e} of the masks changed in a step"
    )
    twofour.check(model, pattern)

# A run that is killed goes on to the same bits: model, optimizer, masks and torch's random state go into a checkpoint.
model = network()
optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
masks = move_masks(model, optimizer, "2:4", "s-ste:300, fixed", products="dense")
fit(model, optimizer, 200)
checkpoint = io.BytesIO()
torch.save((model.state_dict(), optimizer.state_dict(), masks.state_dict(), torch.get_rng_state()), checkpoint)
fit(model, optimizer, 200)
masks.finish()

again = network()
optimizer = torch.optim.AdamW(again.parameters(), 1e-3)
masks = move_masks(again, optimizer, "2:4", "s-ste:300, fixed", products="dense")
checkpoint.seek(0)
weights, moments, state, random = torch.load(checkpoint)
again.load_state_dict(weights)
optimizer.load_state_dict(moments)
masks.load_state_dict(state)
torch.set_rng_state(random)
fit(again, optimizer, 200)
print(masks.finish())
print(f"the same bits after the break:   {all(map(torch.equal, model.parameters(), again.parameters()))}")
