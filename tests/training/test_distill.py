"""Distillation: every loss against its formula, what is compared, what is refused, and runs that end, fail and go on."""

from __future__ import annotations

import copy
import math
import pickle
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.on_device import DEVICE
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as rerun
from torch.utils.data import DataLoader, TensorDataset

import twofour
from twofour import ModelError, PatternError, ShapeError, TrainingError, TwofourError, UnsupportedError
from twofour.training import (
    Distillation,
    Modules,
    Outputs,
    cosine_loss,
    distill,
    keep_masks,
    kl_loss,
    masks_of,
    mse_loss,
    relative_loss,
)
from twofour.training.runs.budget import Budget


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """For tiny models more are slower, and sums have the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Block(nn.Module):
    """A residual block that knows of a dropout and a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.dropout(self.down(nn.functional.gelu(self.up(self.norm(x)))))
        return out


class Net(nn.Module):
    """[batch, tokens, 16] -> a dict, as encoders return one."""

    def __init__(self, blocks: int = 3, width: int = 16, seed: int = 0, rerun: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.unused = nn.Linear(width, width)
        self.rerun = rerun

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        hidden = [x]
        for block in self.blocks:
            x = block(x) if self.rerun is None else rerun(block, x, use_reentrant=self.rerun)
            hidden.append(x)
        return {"last_hidden_state": x, "hidden_states": tuple(hidden), "pooled": x.mean(1), "ids": x.argmax(-1)}  # type: ignore[dict-item]


def pair(**options: Any) -> tuple[Net, Net]:
    """A pruned model and the dense one, in eval mode."""
    model = Net(**options).eval()
    dense = copy.deepcopy(model)
    twofour.prune(model, include="blocks.*")
    return model, dense


def inputs(count: int = 8, seed: int = 1) -> list[dict[str, Tensor]]:
    """Batches of 4 sequences of up to 6 tokens."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        mask = torch.arange(6) < torch.randint(2, 7, (4, 1), generator=generator)
        found.append({"x": torch.randn(4, 6, 16, generator=generator), "attention_mask": mask})
    return found


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def hooks(*models: nn.Module) -> int:
    return sum(len(module._forward_hooks) for model in models for module in model.modules())


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# --- losses


def numbers(dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    one, other = (torch.randn(*shape, generator=generator) * 3 for _ in range(2))
    return one.to(dtype), other.to(dtype)


def kl64(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    p, q = ((x / temperature).exp() / (x / temperature).exp().sum(-1, keepdim=True) for x in (t, s))
    return temperature**2 * (p * (p / q).log()).sum(-1)


FORMULAS: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "kl": (kl_loss, lambda s, t: kl64(s, t, 1.0)),
    "kl, T 3": (partial(kl_loss, temperature=3.0), lambda s, t: kl64(s, t, 3.0)),
    "relative": (relative_loss, lambda s, t: ((s - t) ** 2).sum(-1) / (t**2).sum(-1)),
    "cosine": (cosine_loss, lambda s, t: 1 - (s * t).sum(-1) / ((s**2).sum(-1) * (t**2).sum(-1)).sqrt()),
    "mse": (mse_loss, lambda s, t: ((s - t) ** 2).mean(-1)),
}


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMULAS)
def test_losses_are_their_formulas(name: str, dtype: torch.dtype, masked: bool) -> None:
    loss, formula = FORMULAS[name]
    student, teacher = numbers(dtype, 3, 5, 8)
    mask = torch.tensor([5, 1, 3])[:, None] > torch.arange(5) if masked else torch.ones(3, 5, dtype=torch.bool)
    each = formula(student.double(), teacher.double())
    wanted = each[mask].mean()
    student.requires_grad_()
    found = loss(student, teacher, mask if masked else None)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=0)
    found.backward()
    assert student.grad is not None
    assert not bool(student.grad[~mask].any())
    assert bool(student.grad[mask].any(-1).all())
    torch.testing.assert_close(
        loss(student, teacher.mT.contiguous().mT, mask.long() if masked else None), found, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("name", FORMULAS)
def test_padding_has_no_gradient_even_where_it_is_nan(name: str) -> None:
    loss, _ = FORMULAS[name]
    student, teacher = numbers(torch.float32, 2, 4, 8)
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    wanted = loss(student, teacher, mask)
    student[~mask], teacher[~mask] = math.nan, math.inf
    student.requires_grad_()
    found = loss(student, teacher, mask)
    assert torch.equal(found, wanted)
    found.backward()
    assert student.grad is not None
    assert not bool(student.grad[~mask].any())
    assert bool(student.grad.isfinite().all())


@pytest.mark.parametrize("name", FORMULAS)
def test_nan_that_is_real_is_seen(name: str) -> None:
    loss, _ = FORMULAS[name]
    for which in range(2):
        both = numbers(torch.float32, 2, 4, 8)
        both[which][1, 2, 3] = math.nan
        assert bool(loss(*both).isnan())


def test_the_gradient_of_kl_keeps_its_size_at_any_temperature() -> None:
    """d/ds of T² KL is T (softmax(s/T) − softmax(t/T)): that of the classes' differences in the limit."""
    student, teacher = numbers(torch.float64, 6, 8)
    norms = []
    for temperature in (50.0, 100.0):
        leaf = student.clone().requires_grad_()
        kl_loss(leaf, teacher, temperature=temperature).backward()
        assert leaf.grad is not None
        wanted = temperature * ((student / temperature).softmax(-1) - (teacher / temperature).softmax(-1)) / 6
        torch.testing.assert_close(leaf.grad, wanted)
        norms.append(float(leaf.grad.norm()))
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


def test_classes_that_are_ruled_out_add_nothing() -> None:
    student, teacher = numbers(torch.float32, 4, 6)
    wanted = kl_loss(student[:, :4], teacher[:, :4])
    for out in (student, teacher):
        out[:, 4:] = -math.inf
    student.requires_grad_()
    found = kl_loss(student, teacher)
    torch.testing.assert_close(found, wanted)
    found.backward()
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())
    assert float(kl_loss(numbers(torch.float32, 4, 6)[0], teacher)) < math.inf
    assert (
        float(kl_loss(teacher, numbers(torch.float32, 4, 6)[0])) == math.inf
    )  # what the teacher holds possible is not


def test_axes_of_tokens_and_zeros_of_the_teacher() -> None:
    student, teacher = numbers(torch.float64, 2, 3, 4, 5)
    each = ((student - teacher) ** 2).sum((1, 2, 3)) / (teacher**2).sum((1, 2, 3))
    torch.testing.assert_close(relative_loss(student, teacher, dim=(1, 2, 3)), each.mean())
    mask = torch.tensor([True, False])
    torch.testing.assert_close(relative_loss(student, teacher, mask, dim=(1, 2, 3)), each[0])
    classes_last = [x.movedim(1, -1) for x in (student, teacher)]
    torch.testing.assert_close(kl_loss(student, teacher, dim=1), kl_loss(*classes_last))
    teacher[1] = 0
    wanted = torch.stack([each[0], (student[1] ** 2).sum() / ((teacher[0] ** 2).sum() / 2)]).mean()
    torch.testing.assert_close(relative_loss(student, teacher, dim=(1, 2, 3)), wanted)
    assert float(relative_loss(student, torch.zeros_like(student))) == pytest.approx(float((student**2).sum(-1).mean()))
    assert float(cosine_loss(student, torch.zeros_like(student))) == 1


def test_losses_refuse_what_does_not_fit() -> None:
    student, teacher = numbers(torch.float32, 3, 5, 8)
    with pytest.raises(
        ShapeError, match=r"student's tensor is \[3, 5, 8\], the teacher's \[3, 4, 8\]: only tensors of one"
    ):
        mse_loss(student, teacher[:, :4])
    with pytest.raises(ShapeError, match=r"the mask is \[3, 4\] for \[3, 5\] tokens"):
        mse_loss(student, teacher, torch.ones(3, 4))
    with pytest.raises(ShapeError, match=r"the mask leaves none of 15 tokens, and of nothing there is no mean"):
        kl_loss(student, teacher, torch.zeros(3, 5))
    with pytest.raises(ShapeError, match=r"the tensors are empty"):
        relative_loss(student[:0], teacher[:0])
    with pytest.raises(ShapeError, match=r"temperature=0: it divides the logits"):
        kl_loss(student, teacher, temperature=0)
    with pytest.raises(ShapeError, match=r"a tensor of \[\] has no tokens along dim=-1"):
        mse_loss(student[0, 0, 0], teacher[0, 0, 0])


# --- what is compared


def test_by_default_blocks_and_the_last_hidden_state_without_padding() -> None:
    model, dense = pair()
    with Distillation(model, dense) as distillation:
        for batch in inputs(3):
            loss, parts = distillation.loss(batch)
            mask = batch["attention_mask"]
            with torch.no_grad():
                mine, theirs = model(**batch)["hidden_states"], dense(**batch)["hidden_states"]
            each = [
                float((((s - t) ** 2).sum(-1) / (t**2).sum(-1))[mask].mean()) for s, t in zip(mine, theirs, strict=True)
            ]
            assert float(parts["blocks"]) == pytest.approx(sum(each[1:]) / 3, rel=1e-5)
            assert float(parts["last_hidden_state"]) == pytest.approx(each[-1], rel=1e-5)
            assert float(loss.detach()) == pytest.approx(sum(each[1:]) / 3 + each[-1], rel=1e-5)
    assert distillation.labels == ["blocks", "last_hidden_state"]


def test_terms_by_output_by_module_and_by_any_function() -> None:
    model, dense = pair()
    batch = inputs(1)[0]
    with torch.no_grad():
        mine, theirs = model(**batch), dense(**batch)

    def worst(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        return (student - teacher)[mask].abs().max()

    terms = [
        Outputs("hidden_states"),
        Outputs("hidden_states.1", "mse", weight=2.0),
        Outputs("pooled", "cosine"),
        Modules("blocks.[12]", worst, weight=0.5),
        Modules(["blocks.0.up", "blocks.0.down"], "mse", mask=None, label="inside"),
        Outputs("last_hidden_state", "relative", mask=lambda batch: batch["x"][..., 0] > 0),
        Modules("blocks.[12]", worst),
    ]
    loss, parts = Distillation(model, dense, terms).loss(batch)
    assert list(parts) == [
        "hidden_states", "hidden_states.1", "pooled", "blocks.[12]", "inside", "last_hidden_state", "blocks.[12] 2",
    ]  # fmt: skip
    weights_of = [1, 2, 1, 0.5, 1, 1, 1]
    total = sum(weight * float(part) for weight, part in zip(weights_of, parts.values(), strict=True))
    assert float(loss.detach()) == pytest.approx(total, rel=1e-5)
    mask = batch["attention_mask"]
    hidden = list(zip(mine["hidden_states"], theirs["hidden_states"], strict=True))
    assert float(parts["hidden_states"]) == pytest.approx(
        sum(float(relative_loss(s, t, mask)) for s, t in hidden) / 4, rel=1e-5
    )
    assert float(parts["hidden_states.1"]) == pytest.approx(float(mse_loss(*hidden[1], mask)), rel=1e-5)
    assert float(parts["pooled"]) == pytest.approx(float(cosine_loss(mine["pooled"], theirs["pooled"])), rel=1e-4)
    assert float(parts["blocks.[12]"]) == pytest.approx(
        sum(float(worst(*pair, mask)) for pair in hidden[2:]) / 2, rel=1e-5
    )
    assert float(parts["last_hidden_state"]) == pytest.approx(
        float(relative_loss(*hidden[-1], batch["x"][..., 0] > 0)), rel=1e-5
    )


def test_a_student_that_is_its_teacher_has_no_loss() -> None:
    """Also where attention has a fast path in eval mode, and batches are given by place."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    for model in (Net(), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)):
        distillation = Distillation(model.eval())
        assert distillation.evaluate([(batch["x"],) for batch in inputs(2)]) == 0.0
        assert float(distillation.loss(inputs(1)[0]["x"])[0].detach()) == 0.0


def test_masks_of_batches_by_place_and_nested_and_with_tokens_in_a_row() -> None:
    class Flat(Net):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Any:
            return super().forward(x)["last_hidden_state"].flatten(0, 1)

    class Nested(Net):
        def forward(self, features: dict[str, Tensor]) -> Any:  # type: ignore[override]
            features["seen"] = features["x"]  # as sentence-transformers do
            return super().forward(features["x"])

    batch = inputs(1)[0]
    mask = batch["attention_mask"]
    for kind, arguments in (
        (Net, tuple(batch.values())),
        (Net, list(batch.values())),
        (Flat, batch),
        (Nested, (batch,)),
    ):
        model = kind()
        distillation = Distillation(model.eval())
        twofour.prune(model, include="blocks.*")
        found = distillation.loss(arguments)[0]
        hidden = [Net.forward(one, batch["x"])["hidden_states"] for one in (model, distillation.teacher)]
        each = [relative_loss(s, t, mask) for s, t in list(zip(*hidden, strict=True))[1:]]
        torch.testing.assert_close(found, sum(each) / 3 + each[-1])
    assert set(batch) == {"x", "attention_mask"}


def test_the_kind_of_output_decides() -> None:
    class Heads(Net):
        def __init__(self, shape: tuple[int, ...], key: str) -> None:
            super().__init__(blocks=1)  # one block is no chain
            self.shape, self.key = shape, key

        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            y = self.blocks[0](x).flatten()[: math.prod(self.shape)].reshape(self.shape)
            return {self.key: y} if self.key else y

    x = torch.randn(4, 8, 16)
    cases: list[tuple[tuple[int, ...], str, Callable[..., Tensor]]] = [
        ((4, 8), "logits", kl_loss),
        ((4, 3, 8), "prediction_logits", kl_loss),
        ((2, 3, 4, 4), "logits", partial(kl_loss, dim=1)),
        ((4, 1), "logits", mse_loss),
        ((4, 8), "sentence_embedding", relative_loss),
        ((4, 8), "", relative_loss),
        ((4, 8, 4), "", relative_loss),
        ((2, 3, 4, 4), "", partial(relative_loss, dim=(1, 2, 3))),
        ((4, 1), "", mse_loss),
        ((4,), "", lambda s, t: mse_loss(s[:, None], t[:, None])),
    ]
    for shape, key, loss in cases:
        model = Heads(shape, key)
        distillation = Distillation(model.eval())
        twofour.prune(model, include="blocks.*")
        found, parts = distillation.loss(x)
        assert list(parts) == [key or "output"]
        outputs = [one(x)[key] if key else one(x) for one in (model, distillation.teacher)]
        torch.testing.assert_close(found, loss(*outputs))


def test_modules_that_are_shared_and_called_twice_count_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            once = self.layer(x)
            out: Tensor = self.layer(once)
            return once + out

    model = Twice()
    distillation = Distillation(model, terms=Modules("layer", "mse"))
    twofour.prune(model)
    x = torch.randn(3, 16)
    once = [one.layer(x) for one in (model, distillation.teacher)]
    twice = [one.layer(y) for one, y in zip((model, distillation.teacher), once, strict=True)]
    torch.testing.assert_close(distillation.loss(x)[0], (mse_loss(*once) + mse_loss(*twice)) / 2)


# --- the teacher and the hooks


def test_hooks_go_and_the_student_knows_nothing_of_its_teacher() -> None:
    model, dense = pair()
    before = weights(model), [name for name, _ in model.named_parameters()], list(model.state_dict())
    taught = weights(dense)
    distillation = Distillation(model, dense, Modules("blocks.*"))
    distillation.loss(inputs(1)[0])
    assert hooks(model, dense) == 0
    with distillation:
        assert hooks(model) == hooks(dense) > 0
        with distillation:
            distillation.loss(inputs(1)[0])[0].backward()
        assert hooks(model, dense) == 0
    with pytest.raises(RuntimeError, match="mine"), distillation:
        raise RuntimeError("mine")
    with pytest.raises(ShapeError, match="leaves none"):
        distillation.loss({"x": torch.ones(1, 6, 16), "attention_mask": torch.zeros(1, 6)})
    assert hooks(model, dense) == 0
    assert_same(before[0], weights(model))
    assert before[1:] == ([name for name, _ in model.named_parameters()], list(model.state_dict()))
    assert_same(taught, weights(dense))
    assert all(p.grad is None and not p.requires_grad for p in dense.parameters())
    assert any(p.grad is not None for p in model.parameters())


def test_the_teacher_is_in_eval_mode_whatever_happens_to_it() -> None:
    model, dense = pair()
    model.eval()
    distillation = Distillation(model, dense.train())
    batch = inputs(1)[0]
    first = distillation.loss(batch)[0]
    dense.train()
    assert torch.equal(distillation.loss(batch)[0], first)
    assert not any(module.training for module in dense.modules())


def test_copies_and_pickles_of_a_student_are_free_of_hooks() -> None:
    model, dense = pair()
    batch = inputs(1)[0]
    with Distillation(model, dense) as distillation:
        distillation.loss(batch)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            twin(**batch)
            assert len(pickle.dumps(twin)) < 1.5 * len(pickle.dumps(dense))  # the teacher is not in it
            assert all(not tap.seen for module in twin.modules() for tap in module._forward_hooks.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_teacher_of_another_dtype(dtype: torch.dtype) -> None:
    model, dense = pair()
    batch = inputs(1)[0]
    wanted = Distillation(model.eval(), dense).loss(batch)[0]
    found = Distillation(model, dense.to(dtype)).loss(batch)[0]
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0, check_dtype=False)
    found.backward()


def test_under_autocast_gradients_flow_at_every_step() -> None:
    """Weights that autocast has cast and kept would be those of before the step."""
    model, dense = pair()
    batch = inputs(1)[0]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        distillation = Distillation(model.eval(), dense)
        before = distillation.evaluate(batch)
        for step in range(3):
            loss, _ = distillation.loss(batch)
            assert loss.dtype == torch.float32
            if not step:
                assert float(loss.detach()) == before
            else:
                assert float(loss.detach()) != before  # weights of before the step are not used
            with torch.autocast(DEVICE.type, enabled=False):
                loss.backward()  # type: ignore[no-untyped-call]
            grad = model.blocks[0].up.weight.grad
            assert grad is not None
            assert bool(grad.any())
            with torch.no_grad():
                model.blocks[0].up.weight += 0.1  # of what autocast casts alone
            model.zero_grad()
    model, dense = pair()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        report = distill(model, dense, inputs(), steps=20, lr=1e-3)
    assert report.summary["loss after"] < before


def test_gradients_add_up() -> None:
    model, dense = pair()
    x = torch.randn(8, 6, 16)
    with Distillation(model.eval(), dense) as distillation:
        distillation.loss(x)[0].backward()
        whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        for part in x.split(2):
            (distillation.loss(part)[0] / 4).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(p.grad, whole[name])


def test_wrapped_for_parallel_training_and_with_recomputed_activations() -> None:
    model, dense = pair(rerun=False)
    batch = inputs(1)[0]
    wanted, parts = Distillation(model.eval(), dense).loss(batch)
    wanted.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.rerun = None
    model.zero_grad()
    found, others = Distillation(nn.DataParallel(model), dense).loss(batch)
    found.backward()
    assert torch.equal(found, wanted)
    assert parts.keys() == others.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, grad)


# --- what is refused before training


def test_terms_that_cannot_be_meant() -> None:
    model, dense = pair()
    for wrong, words in (
        ([], "terms is empty"),
        (["logits"], r"'logits' in terms: pass twofour\.training\.Outputs or Modules"),
        (Outputs("x", "l2"), r"loss='l2': there are kl, relative, cosine, mse; or pass a function"),
        (Outputs("x", weight=0), r"weight=0 of 'x': it must be above 0"),
        (Outputs("x", weight=math.nan), r"weight=nan of 'x'"),
        (Modules([]), "Modules of no names"),
        (Modules("layers.*"), r"'layers\.\*' matches no module of the student. They are called 'blocks', 'blocks\.0'"),
    ):
        with pytest.raises(ModelError, match=words):
            Distillation(model, dense, wrong)  # type: ignore[arg-type]


def test_models_that_do_not_fit() -> None:
    model, dense = pair()
    batch = inputs(1)[0]
    with pytest.raises(ModelError, match=r"the student is a str: pass a torch\.nn\.Module"):
        Distillation("model")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"the teacher is a dict"):
        Distillation(model, {})  # type: ignore[arg-type]
    for same in (model, nn.Sequential(model)):
        with pytest.raises(
            ModelError, match=r"the teacher has the student's 'blocks\.0\.up\.weight' and would learn along"
        ):
            Distillation(model, same)
    with pytest.raises(UnsupportedError, match=r"the teacher's 'blocks\.0\.up\.weight' is on the meta device"):
        Distillation(model, copy.deepcopy(dense).to("meta"))
    with pytest.raises(ModelError, match=r"student's 'blocks\.2' has no fellow in the teacher, a Net"):
        Distillation(model, Net(blocks=2)).loss(batch)
    with pytest.raises(ModelError, match=r"student's 'blocks\.2\.up' has no fellow"):
        Distillation(model, Net(blocks=2), Modules("blocks.*.up"))
    with pytest.raises(
        ModelError, match=r"'hidden_states' is 4 tensors of the student and 3 of the teacher: 'hidden_states\.3'"
    ):
        Distillation(model, Net(blocks=2), Outputs("hidden_states")).loss(batch)
    wide = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8))
    narrow = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 8))
    with pytest.raises(ShapeError, match=r"'0': the student's tensor is \[3, 32\], the teacher's \[3, 24\]"):
        Distillation(wide, narrow, Modules("0")).loss(torch.randn(3, 16))
    Distillation(wide, narrow).loss(torch.randn(3, 16))


def test_tensors_that_are_not_there() -> None:
    model, dense = pair()
    batch = inputs(1)[0]
    for term, words in (
        (Outputs("logits"), r"the teacher returns a dict with last_hidden_state, .*without 'logits'"),
        (Outputs("hidden_states.7"), r"the teacher returns a tuple, without '7'"),
        (Outputs("ids"), r"'ids' of the teacher is a tensor of int64, no plain floating point tensor"),
        (Outputs(""), r"'output' of the teacher is a dict, no plain"),
        (Modules("unused"), r"the teacher called none of the 1 modules of 'unused', such as 'unused', on this batch"),
        (Modules(""), r"|"),
        (Outputs("pooled", lambda s, t, mask: (s - t).square()), r"the loss of 'pooled' gives \[4, 16\]: it must give"),
        (Outputs("pooled", lambda s, t, mask: 1.0), r"the loss of 'pooled' gives a float"),
        (Outputs("pooled", mask="real"), r"the batch has no 'real', the mask of 'pooled': it has x, attention_mask"),
        (Outputs("pooled", mask=lambda batch: [1]), r"the mask of 'pooled' is a list: pass mask= a function"),
        (Outputs("pooled", mask=lambda batch: batch["x"]), r"the mask of 'pooled' is numbers other than 0 and 1"),
        (Outputs("last_hidden_state", mask=lambda batch: torch.ones(4, 5)),
         r"'last_hidden_state': the mask \[4, 5\] does not say which tokens of \[4, 6, 16\] are real"),
    ):  # fmt: skip
        if words != "|":
            with pytest.raises((ModelError, ShapeError), match=words):
                Distillation(model, dense, term).loss(batch)
    Distillation(model, dense, Modules(["unused", "blocks.0"])).loss(batch)  # what is not called is left out

    class NoTensor(nn.Module):
        def forward(self, x: Tensor) -> str:
            return "x"

    model, dense = (nn.Sequential(nn.Linear(4, 4), NoTensor()) for _ in range(2))
    with pytest.raises(ModelError, match=r"'1' returns no tensor but a str"):
        Distillation(model, dense, Modules("1")).loss(torch.randn(2, 4))
    with pytest.raises(ModelError, match=r"has no blocks, and returns a str in which nothing is known"):
        Distillation(model, dense).loss(torch.randn(2, 4))


def test_losses_without_a_gradient() -> None:
    model, dense = pair(rerun=True)
    dense.rerun = None
    batch = inputs(1)[0]
    batch["x"].requires_grad_()
    with pytest.raises(ModelError, match=r"student's 'blocks\.0' runs without gradients.*use_reentrant=False"):
        Distillation(model, dense, Modules("blocks.0")).loss(batch)
    model, dense = pair()
    model.requires_grad_(False)
    with pytest.raises(
        ModelError, match=r"the loss has no gradient: no parameter of the student that is trained lies before"
    ):
        Distillation(model, dense).loss(inputs(1)[0])
    with torch.no_grad():
        Distillation(model, dense).loss(inputs(1)[0])
    with pytest.raises(ModelError, match="no batch to take the mean loss of"):
        Distillation(model, dense).evaluate([])


# --- runs


def test_a_run_recovers_and_keeps_masks_modes_and_flags() -> None:
    model, dense = pair()
    zeros = {name: value == 0 for name, value in model.named_parameters() if "blocks" in name and value.ndim == 2}
    model.train()
    model.blocks[1].eval()
    model.unused.requires_grad_(False)
    model.unused.weight.grad = torch.ones(16, 16)
    flags = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
    taught = weights(dense)
    report = distill(model, dense, inputs(), steps=60, lr=3e-3, log_every=25)
    assert report.summary["loss after"] < 0.4 * report.summary["loss before"]
    assert [row["step"] for row in report.rows] == [25, 50, 60]
    assert set(report.rows[0]) == {"step", "seconds", "lr", "loss", "blocks", "last_hidden_state"}
    assert all(row["loss"] == pytest.approx(row["blocks"] + row["last_hidden_state"]) for row in report.rows)
    assert report.rows[-1]["loss"] < report.rows[0]["loss"]
    assert report.summary["steps"] == 60
    assert report.summary["stopped by"] == "steps"
    assert "60" in report.to_table()
    assert "blocks" in report.to_html()
    for name, value in model.named_parameters():
        if name in zeros:
            assert not bool(value[zeros[name]].any())
    assert flags == ([module.training for module in model.modules()], [p.requires_grad for p in model.parameters()])
    assert hooks(model, dense) == 0
    assert masks_of(model) is None
    assert_same(taught, weights(dense))
    assert all(p.grad is None for p in model.blocks.parameters())


def test_the_first_step_is_that_of_plain_torch() -> None:
    model, dense = pair()
    reference = copy.deepcopy(model)
    batch = inputs(1)[0]
    model.blocks[0].up.weight.grad = torch.ones(32, 16)  # of before: it does not count
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    distill(
        model, dense, [batch], steps=1, optimizer=optimizer, schedule="constant", warmup=0, clip=0.01, train_mode=False
    )
    assert optimizer.param_groups[0]["lr"] == 0.1
    reference.eval()
    mine, theirs, mask = reference(**batch)["hidden_states"], dense(**batch)["hidden_states"], batch["attention_mask"]
    each = [relative_loss(s, t, mask) for s, t in list(zip(mine, theirs, strict=True))[1:]]
    (sum(each) / 3 + each[-1]).backward()  # type: ignore[union-attr]
    zeros = {name: value == 0 for name, value in reference.named_parameters() if value.ndim == 2 and "blocks" in name}
    grads = {
        name: p.grad.masked_fill(zeros.get(name, torch.tensor(False)), 0)
        for name, p in reference.named_parameters()
        if p.grad is not None
    }
    norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
    for name, p in reference.named_parameters():
        wanted = p.detach() - (0.1 * grads[name] * 0.01 / norm if name in grads else 0)
        torch.testing.assert_close(dict(model.named_parameters())[name].detach(), wanted, rtol=1e-5, atol=1e-6)


def test_accumulated_batches_count_alike() -> None:
    one, dense = pair()
    other = copy.deepcopy(one)
    x = torch.randn(8, 6, 16)
    a, b = (
        distill(
            model, dense, data, steps=3, schedule="constant", warmup=0.0, clip=None, accumulate=len(data),
            optimizer=torch.optim.SGD(model.parameters(), 0.05),
        )
        for model, data in ((one, [x]), (other, list(x.split(2))))
    )  # fmt: skip
    assert a.rows[-1]["loss"] == pytest.approx(b.rows[-1]["loss"], rel=1e-4)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_the_learning_rate_rises_and_falls() -> None:
    def rates(**settings: Any) -> list[float]:
        model, dense = pair()
        groups = [{"params": list(model.blocks.parameters()), "lr": 1e-3}, {"params": [model.unused.bias], "lr": 1e-4}]
        optimizer = torch.optim.AdamW(groups)
        before = weights(model.unused)
        report = distill(model, dense, inputs(), steps=19, optimizer=optimizer, log_every=1, **settings)
        assert all(p.requires_grad for p in model.parameters())
        assert all(p.grad is None for p in model.parameters())
        assert_same(before, weights(model.unused))
        assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-4]
        return [row["lr"] / 1e-3 for row in report.rows]

    at = [i / 20 for i in range(1, 20)]
    up = [x / 0.2 for x in at if x < 0.2]
    left = [(1 - x) / 0.8 for x in at if x >= 0.2]
    assert rates(warmup=0.2) == pytest.approx(up + left)
    assert rates(warmup=0.2, schedule="cosine") == pytest.approx(up + [0.5 - 0.5 * math.cos(math.pi * x) for x in left])
    assert rates(warmup=0.0, schedule="constant") == [1.0] * 19


def test_a_budget_of_seconds_is_kept() -> None:
    model, dense = pair()
    began = time.monotonic()
    report = distill(model, dense, inputs(), seconds=2.0, lr=1e-3, log_every=1)
    assert time.monotonic() - began < 4.0
    assert report.summary["stopped by"] == "seconds"
    assert report.summary["steps"] >= 2
    assert report.rows[-1]["lr"] < max(row["lr"] for row in report.rows)
    budget = Budget(100, 10.0, "linear", 0.1)
    assert budget.why_over(100, 0.0, 0.1) == "steps"
    assert budget.why_over(50, 9.5, 0.6) == "seconds"
    assert budget.why_over(50, 9.5, 0.4) is None
    assert budget.factor(0, 5.5) == pytest.approx(0.5)  # whatever is further on
    assert budget.factor(54, 0.0) == pytest.approx((1 - 55 / 101) / 0.9)
    with pytest.raises(TrainingError, match=r"no step was done: seconds=1e-09 ended before"):
        distill(model, dense, inputs(), seconds=1e-9)


def test_one_pass_without_a_budget_and_iterators_end() -> None:
    model, dense = pair()
    assert distill(model, dense, inputs(6), accumulate=2).summary["steps"] == 3
    report = distill(model, dense, iter(inputs(5)), steps=10)
    assert report.summary["steps"] == 5
    assert report.summary["stopped by"] == "data ended"
    assert "The data ended before the budget" in report.notes[0]
    assert distill(model, dense, inputs(1)[0], steps=3).summary["steps"] == 3  # one batch is one batch
    loader = DataLoader(TensorDataset(torch.randn(8, 6, 16)), batch_size=4)
    assert distill(model, dense, loader, steps=3).summary["steps"] == 3


def test_masks_that_are_kept_already_stay_and_compressed_models_learn() -> None:
    model, dense = pair()
    with keep_masks(model) as masks:
        report = distill(model, dense, inputs(), steps=5)
        assert masks_of(model) is masks
        assert report.summary["masks kept"] == masks.report.summary["masks kept"]
    model, dense = pair()
    twofour.compress(model, include="blocks.*", force=True)
    sparse = [module for module in model.modules() if isinstance(module, twofour.SparseLinear)]
    assert sparse
    for module in sparse:
        module.requires_grad_values()
    before = sparse[0].matrix.to_dense().clone()
    report = distill(model, dense, inputs(), steps=40, lr=3e-3)
    assert report.summary["loss after"] < 0.6 * report.summary["loss before"]
    assert report.summary["masks kept"] == "none"
    assert not torch.equal(sparse[0].matrix.to_dense(), before)
    whole = Net(seed=3)
    report = distill(whole, Net(seed=4), inputs(), steps=5, pattern=None)
    assert report.summary["masks kept"] == "none"


def test_what_a_run_refuses() -> None:
    model, dense = pair()
    data = inputs(2)
    outside = nn.Linear(2, 2)
    before = weights(model)
    cases: list[tuple[type[TwofourError], str, dict[str, Any]]] = [
        (ModelError, r"steps=0: at least 1", {"steps": 0}),
        (ModelError, r"seconds=nan: a number above 0", {"seconds": math.nan}),
        (ModelError, r"schedule='step': there are linear, cosine, constant", {"schedule": "step"}),
        (ModelError, r"warmup=1: a share of the budget", {"warmup": 1}),
        (ModelError, r"accumulate=0: at least 1", {"accumulate": 0}),
        (ModelError, r"log_every=0: at least 1", {"log_every": 0}),
        (ModelError, r"clip=0: the largest norm", {"clip": 0}),
        (ModelError, r"lr=-1: a number above 0", {"lr": -1}),
        (ModelError, r"lr=0\.1 together with an optimizer", {"lr": 0.1, "optimizer": torch.optim.SGD(model.parameters(), 1)}),
        (ModelError, r"optimizer is a str", {"optimizer": "SGD"}),
        (ModelError, r"the SGD trains no parameter of the model", {"optimizer": torch.optim.SGD(outside.parameters(), 1)}),
        (ModelError, r"the SGD trains the teacher",
         {"optimizer": torch.optim.SGD([*model.parameters(), *dense.parameters()], 1)}),
        (UnsupportedError, r"LBFGS asks for the loss many times", {"optimizer": torch.optim.LBFGS(model.parameters())}),
        (ModelError, r"save_seconds=-1: 0 or more", {"save_seconds": -1, "checkpoint": "x"}),
        (TrainingError, r"checkpoint nowhere/x would lie in a folder that is not there", {"checkpoint": "nowhere/x"}),
        (ModelError, r"no weight of the model holds 1:4", {"pattern": "1:4"}),
        (ModelError, r"'layers' matches no module", {"terms": Modules("layers")}),
    ]  # fmt: skip
    for error, words, settings in cases:
        with pytest.raises(error, match=words):
            distill(model, dense, data, **{"steps": 2, **settings})
    for wrong, words in (
        (5, "data is a int: pass an iterable of batches"),
        ("text", "data is a str"),
        ([], "data has no batch"),
        (["x"], "data gave a str: a batch is a tensor, a tuple or a mapping"),
    ):
        with pytest.raises(TwofourError, match=words):
            distill(model, dense, wrong, steps=2)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"no budget, and a list_iterator does not say how many batches"):
        distill(model, dense, iter(data))
    with pytest.raises(ModelError, match=r"the Distillation is of another student"):
        distill(model, Distillation(Net()), data, steps=2)
    with pytest.raises(ModelError, match=r"terms= together with a Distillation"):
        distill(model, Distillation(model, dense), data, steps=2, terms=Outputs("pooled"))
    with pytest.raises(ModelError, match=r"the loss of the first batch is 0.*Was the teacher copied after"):
        distill(model, copy.deepcopy(model), data, steps=2)
    with pytest.raises(ModelError, match=r"no weight of the model holds 2:4"):
        distill(Net(), dense, data, steps=2)
    frozen = copy.deepcopy(model).requires_grad_(False)
    with pytest.raises(ModelError, match=r"no parameter of the model is trained"):
        distill(frozen, dense, data, steps=2)
    assert_same(before, weights(model))
    assert masks_of(model) is None
    assert hooks(model, dense) == 0


# --- runs that fail and go on


class Poisoned(nn.Module):
    """Net with a batch norm, which gives NaN once `at` calls with gradients were made."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.net, self.norm = Net(), nn.BatchNorm1d(16)
        self.at, self.calls = at, 0

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.net(x)["last_hidden_state"]
        self.calls += torch.is_grad_enabled()
        out: Tensor = self.norm(hidden.transpose(1, 2))
        return out * (math.nan if self.calls == self.at else 1.0)


@pytest.mark.parametrize("at", [1, 4])
def test_a_loss_that_is_nan_ends_the_run_with_the_last_good_weights(at: int) -> None:
    """The weights with which the last finite loss was computed: those after one step fewer."""
    found = []
    for steps, end in ((6, at), (at - 2, -1)):
        torch.manual_seed(0)
        model = Poisoned(end)
        dense = copy.deepcopy(model)
        dense.at = -1
        twofour.prune(model, include="net.blocks.*")
        before = weights(model)
        data = [batch["x"] for batch in inputs(6)]
        settings: dict[str, Any] = {"lr": 1e-3, "warmup": 0.0, "schedule": "constant", "train_mode": True}
        if end > 0:
            with pytest.raises(
                TrainingError, match=rf"the loss of step {at} is nan \(loss\), .* nan \(output\).*batch was number {at}"
            ):
                distill(model, dense, data, steps=steps, **settings)
            assert masks_of(model) is None
            assert all(p.grad is None for p in model.parameters())
        elif steps > 0:
            distill(model, dense, data, steps=steps, **settings)
            with torch.no_grad():  # the forward of the last finite loss moved the statistics
                model.train()(data[at - 2])
        found.append(weights(model) if steps > 0 else before)
    assert_same(*found)


@pytest.mark.of_cpu
def test_gradients_and_weights_that_are_not_finite() -> None:
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad * math.inf

    class Net2(Net):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            return Steep.apply(super().forward(x)["last_hidden_state"])  # type: ignore[no-untyped-call]

    model = Net2()
    dense = copy.deepcopy(model)
    twofour.prune(model, include="blocks.*")
    before = weights(model)
    with pytest.raises(TrainingError, match=r"the norm of all gradients of step 1 is (nan|inf), its loss \d"):
        distill(model, dense, [inputs(1)[0]["x"]], steps=3, terms=Outputs(""))
    assert_same(before, weights(model))

    model, dense = pair()
    before = weights(model)
    batch = inputs(1)[0]
    with pytest.raises(TrainingError, match=r"after the last step the loss is (nan|inf)"):
        distill(model, dense, [batch], steps=1, lr=1e38, warmup=0, schedule="constant")
    assert_same(before, weights(model))
    batch["x"][0, 0, 0] = math.nan
    with pytest.raises(TrainingError, match=r"the loss of the first batch is nan before anything is trained"):
        distill(model, dense, [batch], steps=2)


class Killed(Exception):
    pass


class Killing:
    """Batches, and a kill when that many were given; `once` has one pass."""

    def __init__(self, data: Any, after: int | None = None) -> None:
        self.data, self.left = data, after

    def __iter__(self) -> Iterator[Any]:
        for batch in self.data:
            if self.left is not None:
                if not self.left:
                    raise Killed
                self.left -= 1
            yield batch


class Normed(Net):
    """With a norm whose statistics change in training."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return self.batch_norm(super().forward(x)["last_hidden_state"].transpose(1, 2))


def shuffled() -> DataLoader[Any]:
    x = torch.randn(20, 6, 16, generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(x), batch_size=4, shuffle=True)


@pytest.mark.parametrize("kill", [1, 2, 7, 10, 11])
@pytest.mark.parametrize("kind", ["loader", "iterator"])
def test_a_killed_run_goes_on_bit_for_bit(kind: str, kill: int, tmp_path: Path) -> None:
    """With dropout, statistics of batches, a loader that shuffles, gradients of two batches, over several passes."""

    def run(after: int | None, path: Path) -> tuple[dict[str, Tensor], twofour.Report]:
        torch.manual_seed(0)
        model = Normed()
        dense = copy.deepcopy(model)
        twofour.prune(model, include="blocks.*")
        data: Any = Killing(shuffled() if kind == "loader" else [x for (x,) in shuffled()] * 4, after)
        torch.manual_seed(7)
        report = distill(
            model, dense, data if kind == "loader" else iter(data), steps=8, lr=1e-3, accumulate=2, train_mode=True,
            log_every=3, checkpoint=path, save_seconds=0,
        )  # fmt: skip
        return weights(model), report

    whole, report = run(None, tmp_path / "whole.pt")
    with pytest.raises(Killed):
        run(kill, tmp_path / "killed.pt")
    assert (tmp_path / "killed.pt").exists() == (kill > 1)
    resumed, again = run(None, tmp_path / "killed.pt")
    assert_same(whole, resumed)
    same = [{key: value for key, value in row.items() if key != "seconds"} for row in report.rows]
    assert same == [{key: value for key, value in row.items() if key != "seconds"} for row in again.rows]
    assert report.summary["loss before"] == again.summary["loss before"]
    assert report.summary["loss after"] == again.summary["loss after"]
    assert bool(again.notes) == (kill > 1)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    model, dense = pair()
    other = copy.deepcopy(model)
    path = tmp_path / "run.pt"
    first = distill(model, dense, inputs(), steps=4, checkpoint=path)
    second = distill(other, dense, inputs(), steps=4, checkpoint=path)
    assert_same(weights(model), weights(other))
    assert second.rows == first.rows
    assert second.summary == first.summary
    assert "Taken up at step 4" in second.notes[0]


def test_checkpoints_of_other_runs_are_refused(tmp_path: Path) -> None:
    model, dense = pair()
    path = tmp_path / "run.pt"
    with pytest.raises(Killed):
        distill(model, dense, Killing(inputs(), 3), steps=8, checkpoint=path, save_seconds=0)
    state = path.read_bytes()
    model, dense = pair()
    before = weights(model)
    for settings, words in (
        ({"steps": 9}, r"was made with steps=8, this run with steps=9\. Give it another path, or delete it"),
        ({"lr": 1e-5}, r"was made with lr=\[0\.\d+\], this run with lr=\[1e-05\]"),
        ({"terms": Outputs("pooled")}, r"was made with terms=\['blocks', 'last_hidden_state'\]"),
        ({"optimizer": torch.optim.SGD(model.parameters(), 0.1)}, r"was made with optimizer='AdamW'"),
    ):
        with pytest.raises(ModelError, match=words):
            distill(model, dense, inputs(), **{"steps": 8, "checkpoint": path, **settings})  # type: ignore[arg-type]
    other = copy.deepcopy(dense).requires_grad_(True)
    with torch.no_grad():
        other.blocks[0].up.weight[:, :2] *= 100
    twofour.prune(other, include="blocks.*")
    with pytest.raises(ModelError, match=r"the checkpoint has other masks than the model: prune the model as it was"):
        distill(other, dense, inputs(), steps=8, checkpoint=path)
    with pytest.raises(
        TrainingError, match=r"the checkpoint was written after 2 batches of pass 1, and data ends before"
    ):
        distill(model, dense, inputs(1), steps=8, checkpoint=path)
    model, dense = pair()
    path.write_bytes(state[: len(state) // 2])
    with pytest.raises(TrainingError, match=r"run\.pt is no checkpoint of distill"):
        distill(model, dense, inputs(), steps=8, checkpoint=path)
    assert_same(before, weights(model))
    path.unlink()
    path.mkdir()
    (path / "file").touch()
    with pytest.raises(TrainingError, match=r"run\.pt is no checkpoint"):
        distill(model, dense, inputs(), steps=8, checkpoint=path)


# --- real architectures, random weights


def test_a_tiny_bert_recovers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertModel(config)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            if parameter.ndim == 2:
                parameter *= 4  # as far from the identity as trained layers are
    dense = copy.deepcopy(model)
    twofour.prune(model, include="encoder.*")
    data = []
    for _ in range(12):
        mask = (torch.arange(16) < torch.randint(6, 17, (16, 1))).long()
        data.append({"input_ids": torch.randint(0, 64, (16, 16)) * mask, "attention_mask": mask})
    distillation = Distillation(model, dense)
    held = data.pop()
    before = distillation.evaluate(held)
    assert distillation.labels == ["blocks", "last_hidden_state"]
    spoiled = {**held, "input_ids": held["input_ids"] + (1 - held["attention_mask"]) * 7}
    assert distillation.evaluate(spoiled) == pytest.approx(before, rel=1e-5)  # what stands in the padding is nothing
    distill(model, distillation, data, steps=150, lr=3e-3)
    assert distillation.evaluate(held) < 0.4 * before
    assert twofour.check(model, include="encoder.*").summary["holds"]
    hidden = Distillation(model, dense, Outputs("hidden_states"))  # asked for, without a word in the batch
    assert set(hidden.loss(held)[1]) == {"hidden_states"}
    assert hidden.loss(held)[0] > 0


def test_a_tiny_language_model_recovers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=16)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.transformer.h.parameters():
            if parameter.ndim == 2:
                parameter *= 8
    dense = copy.deepcopy(model)
    twofour.prune(model)
    data = [{"input_ids": torch.randint(0, 64, (8, 16))} for _ in range(12)]
    distillation = Distillation(model, dense)
    held = data.pop()
    before = distillation.evaluate(held)
    assert distillation.labels == ["blocks", "logits"]
    with torch.no_grad():
        kl = kl_loss(model.eval()(**held).logits, dense(**held).logits)
        assert distillation.loss(held)[1]["logits"] == kl
    distill(model, distillation, data, steps=100, lr=2e-3)
    assert distillation.evaluate(held) < 0.5 * before
    assert twofour.check(model).summary["holds"]


def test_held_out_text_and_the_dev_part_are_not_learned_from(tmp_path: Path) -> None:
    from benchmarks.training.bench_distill import corpus

    row = "main-captions\tMSRvid\t2012\t{}\t3.0\t{}\t{}\n"
    train = [row.format(i, f"A man number {i} sings.", f"A dog number {i} barks.") for i in range(60)]
    (tmp_path / "stsb-train.tsv").write_text("".join(train))
    (tmp_path / "stsb-dev.tsv").write_text(row.format(1, "a man number 7  sings", "A dog number 8 barks."))
    (tmp_path / "wikitext2-valid.txt").write_text(
        " = Title = \n This is one long sentence of it . A man number 7 sings . \n"
    )
    learn, held = corpus(tmp_path, 0)
    texts = [text for each in learn.values() for text in each]
    assert set(learn) == {"STS-B", "WikiText-2", "Python"}
    assert len(learn["STS-B"]) == 118 - 118 // 30
    assert len(held) == sum(len(each) // 29 for each in learn.values())
    assert not {"A man number 7 sings.", "A dog number 8 barks.", "A man number 7 sings ."} & {*texts, *held}
    assert not set(texts) & set(held)


def test_patterns_other_than_two_of_four_are_kept() -> None:
    model = Net()
    dense = copy.deepcopy(model)
    twofour.prune(model, "1:4", include="blocks.*")
    distill(model, dense, inputs(), steps=5, pattern="1:4")
    assert twofour.check(model, "1:4", include="blocks.*").summary["holds"]
    with pytest.raises(PatternError):
        keep_masks(model, None, "1:4", include="unused")


def test_the_learning_rate_falls_with_the_width_of_layers() -> None:
    from twofour.training.runs.distill import lr_for

    rates = [
        lr_for(nn.Sequential(*(nn.Linear(width, width) for width in widths)))
        for widths in ([64], [384], [768, 8, 3840])
    ]
    assert rates == [1e-3, 1e-3, 5e-4]
    assert lr_for(nn.ReLU()) == 1e-3
