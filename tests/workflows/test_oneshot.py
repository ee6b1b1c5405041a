"""Calibrated pruning of whole models: what each layer sees, in which order, within which memory, on which architectures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.on_device import DEVICE
from torch import Tensor, nn

import twofour
from twofour.errors import CalibrationError, ModelError, UnsupportedError
from twofour.nn import observe
from twofour.nn.survey import survey
from twofour.solvers import Hessian, Recipe, solve
from twofour.workflows.oneshot import PruneInterrupted
from twofour.workflows.replay import Replay
from twofour.workflows.spool import Spool

PATTERN = twofour.Pattern()


class Block(nn.Module):
    """A residual block with two inputs' worth of sharing: `gate` and `up` see the same tensor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, 2 * width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Stack(nn.Module):
    """Inlet, blocks, outlet; with `skip` a block also depends on the one before the last."""

    def __init__(self, width: int = 32, depth: int = 3, skip: bool = False) -> None:
        super().__init__()
        self.inlet = nn.Linear(16, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.outlet = nn.Linear(width, 8)
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.inlet(x)
        before = x
        for block in self.blocks:
            y = block(x)
            x = y + 0.1 * before if self.skip else y
            before = y
        return self.outlet(x)


def data(count: int = 4, *shape: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*(shape or (8, 16)), generator=generator) for _ in range(count)]


def inputs_of(model: nn.Module, name: str, batch: Any) -> Tensor:
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    with torch.no_grad():
        model(batch)
    hook.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])


def by_hand(model: nn.Module, batches: list[Any], recipe: Recipe, names: list[list[str]]) -> None:
    """The specification: for every group of layers a whole forward (and one of the dense model), hooks on it, `solve`."""
    modules = dict(model.named_modules())
    dense = copy.deepcopy(model)
    paired = recipe.resolved().targets == "dense"
    for group in names:
        hessian = Hessian(modules[group[0]].weight.shape[1], DEVICE, paired=paired)
        for batch in batches:
            x, wanted = inputs_of(model, group[0], batch), inputs_of(dense, group[0], batch)
            hessian.add(x, wanted if paired else None)
        for name in group:
            weight = modules[name].weight
            weight.data.copy_(solve(weight.detach(), hessian, "2:4", recipe).weight)


@pytest.mark.parametrize("skip", [False, True], ids=["chain", "skip connections over blocks"])
def test_each_layer_sees_the_pruned_ones_before_it(skip: bool) -> None:
    torch.manual_seed(0)
    model = Stack(skip=skip).double()
    batches = [batch.double() for batch in data()]
    expected, plain = copy.deepcopy(model), copy.deepcopy(model)
    order = [["inlet"]]
    for i in range(3):
        order += [[f"blocks.{i}.gate", f"blocks.{i}.up"], [f"blocks.{i}.down"]]
    by_hand(expected, batches, Recipe("sparsegpt"), [*order, ["outlet"]])
    report = twofour.prune(model, calibration=batches, method="sparsegpt")
    for (name, found), (_, wanted) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0, msg=name)
    assert any("whole model" in note for note in report.notes) == skip
    assert twofour.check(model).summary["holds"]
    # Not what layers that see the dense ones before them would get.
    independent = copy.deepcopy(plain)
    by_hand(independent, batches, Recipe("sparsegpt"), [["inlet"]])
    dense_hessian = Hessian(64, DEVICE)
    hook = plain.blocks[2].down.register_forward_pre_hook(lambda module, args: dense_hessian.add(args[0]))
    plain(batches[0])
    hook.remove()
    assert not torch.allclose(
        solve(plain.blocks[2].down.weight.detach(), dense_hessian, "2:4", Recipe("sparsegpt")).weight,
        model.blocks[2].down.weight,
    )


def test_blocks_that_are_done_do_not_run_again() -> None:
    model = Stack(depth=4)
    runs: dict[int, int] = dict.fromkeys(range(4), 0)
    for i, block in enumerate(model.blocks):
        block.norm.register_forward_pre_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    twofour.prune(model, calibration=data(3), method="wanda")
    trace = 2  # of one batch: what is called when, and whether blocks can answer from memory
    live = [runs[i] - trace for i in range(4)]
    # Of three batches: once for gate and up, once for down, once to keep the output (the last one: with the head).
    assert live == [3 * 3] * 4
    whole = Stack(depth=4, skip=True)
    runs = dict.fromkeys(range(4), 0)
    for i, block in enumerate(whole.blocks):
        block.norm.register_forward_pre_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    twofour.prune(whole, calibration=data(3), method="wanda")
    assert runs[0] > 2 * runs[3] > 0


@pytest.mark.parametrize("batches", [2, 6], ids=["whole blocks", "parts"])
@pytest.mark.parametrize("skip", [False, True], ids=["chain", "skip connections over blocks"])
def test_dense_targets_are_what_the_dense_model_gives(skip: bool, batches: int) -> None:
    torch.manual_seed(0)
    model = Stack(skip=skip).double()
    expected, dense = copy.deepcopy(model), copy.deepcopy(model)
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    inputs = [batch.double() for batch in data(batches, 12, 16)]
    recipe = Recipe("sparsegpt", targets="dense")
    layers = [[f"blocks.{i}.{name}" for name in names] for i in range(3) for names in (("gate", "up"), ("down",))]
    by_hand(expected, inputs, recipe, [["inlet"], *layers, ["outlet"]])
    twofour.prune(model, calibration=inputs, method=recipe)
    for (name, found), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-10, rtol=0, msg=name)
        assert found.data_ptr() == places[name]  # the old weights were there for a while only
    assert twofour.check(model).summary["holds"]
    other = copy.deepcopy(dense)
    twofour.prune(other, calibration=inputs, method="sparsegpt")
    with torch.no_grad():
        lost = [sum(float((m(x) - dense(x)).square().mean()) for x in inputs) for m in (model, other)]
    assert lost[0] < lost[1]


def test_dense_targets_give_way_where_other_tokens_arrive() -> None:
    """An expert that the dense model sends other tokens to has no pairs: said, and solved for its own inputs."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.expert = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.expert(x[x[:, 0] > 0.1])

    torch.manual_seed(0)
    model, batches = Routed().double(), [batch.double() for batch in data(3, 40, 16)]
    expected = copy.deepcopy(model)
    report = twofour.prune(model, calibration=batches, method=Recipe("sparsegpt", targets="dense"))
    assert "the dense model sends it other tokens" in report.rows[1]["reason"]
    assert "reason" not in report.rows[0]
    by_hand(expected, batches, Recipe("sparsegpt"), [["first"], ["expert"]])
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-10, rtol=0)


class Counted(nn.Linear):
    """A Linear that counts how often it really runs."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return super().forward(x)


def test_parts_that_are_done_do_not_run_again() -> None:
    torch.manual_seed(0)
    model, batches = Stack(depth=2), data(6)
    expected = copy.deepcopy(model)
    for block in model.blocks:
        block.gate, block.up = copy.deepcopy(block.gate), copy.deepcopy(block.up)
        block.gate.__class__ = block.up.__class__ = Counted
    twofour.prune(model, calibration=batches, method="sparsegpt")
    trials = 1 + 1 + 1  # of one batch: what is called when, whether blocks may answer from memory, whether parts may
    for block in model.blocks:
        # The pass for both ends when `up` is called, so that gate runs in it; then each runs once with its new weight.
        assert (block.gate.runs, block.up.runs) == (trials + 6 + 6, trials + 6)
    layers = [[f"blocks.{i}.{name}" for name in names] for i in range(2) for names in (("gate", "up"), ("down",))]
    by_hand(expected, batches, Recipe("sparsegpt"), [["inlet"], *layers, ["outlet"]])
    for (name, found), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0, msg=name)


class Halving(nn.Module):
    """Holds a Linear, and halves its input in place: what comes later depends on more than its output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        x.mul_(0.5)
        return y


class WithHalving(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = Halving(width)
        self.second = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        return self.first(x) + self.second(torch.relu(x))


def test_a_part_with_side_effects_runs_every_time() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[WithHalving(16) for _ in range(3)]).double()
    expected, batches = copy.deepcopy(model), [batch.double() for batch in data(5)]
    twofour.prune(model, calibration=batches, method="sparsegpt")
    order = [[f"{i}.{name}"] for i in range(3) for name in ("first.inner", "second")]
    by_hand(expected, batches, Recipe("sparsegpt"), order)
    for (name, found), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0, msg=name)


def test_a_forward_that_was_set_on_a_module_comes_back() -> None:
    torch.manual_seed(0)
    model = Stack()
    plain, set_on = copy.deepcopy(model), {}
    for block in model.blocks:
        for module in (block, block.gate):
            inner = module.forward
            set_on[module] = module.forward = lambda *args, inner=inner: inner(*args)  # type: ignore[method-assign]
    for pruned in (model, plain):
        twofour.prune(pruned, calibration=data(5), method="sparsegpt")
    assert all(module.forward is forward for module, forward in set_on.items())
    for found, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found, wanted)


class OftenCalled(nn.Module):
    """Calls `inner` a second time where the inputs are large: before `outer`, or after it, when passes for it have ended."""

    def __init__(self, width: int, after: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        again = bool(x.abs().max() > 50)
        if again and not self.after:
            y = y - self.inner(x + 1)
        z = x + self.outer(y)
        return z - self.inner(z) if again and self.after else z


@pytest.mark.parametrize("after", [False, True])
def test_a_part_that_some_batches_call_twice_answers_once(after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batches = nn.Sequential(*[OftenCalled(16, after) for _ in range(3)]), data(5)
    batches[3] *= 100
    whole = copy.deepcopy(model)
    twofour.prune(model, calibration=batches, method="sparsegpt")
    monkeypatch.setattr("twofour.workflows.replay._FEWEST_FOR_PARTS", 100)
    twofour.prune(whole, calibration=batches, method="sparsegpt")
    for found, wanted in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, wanted)


def test_a_model_that_never_runs_the_same_way_cannot_have_its_dense_self_beside_it() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.b(self.a(x)) if self.calls % 2 else self.a(self.b(x))

    model = Fickle()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match=r"in another order each time .* pass method=Recipe\(targets='pruned'\)"):
        twofour.prune(model, calibration=data(1))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("limit", [None, 0, 3000])
def test_memory_limit_moves_activations_to_a_file(limit: int | None) -> None:
    torch.manual_seed(0)
    model, batches = Stack(), data(6)
    expected = copy.deepcopy(model)
    twofour.prune(expected, calibration=batches, method="sparsegpt")
    twofour.prune(model, calibration=batches, method="sparsegpt", memory_limit=limit)
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, wanted)


def test_spool_gives_back_what_it_got() -> None:
    spool = Spool(limit=100)
    outputs = {
        i: (torch.arange(i * 7.0), {"cache": torch.full((3, i), i, dtype=torch.bfloat16)}, None, "x") for i in range(9)
    }
    for key, output in outputs.items():
        spool.put(key, output)
        assert spool.bytes_in_memory <= 100
    for key, output in outputs.items():
        tensor, mapping, nothing, text = spool.get(key)
        assert torch.equal(tensor, output[0])
        assert torch.equal(mapping["cache"], output[1]["cache"])
        assert (nothing, text) == (None, "x")
        tensor.fill_(-1)  # a copy: what is kept stays
    assert torch.equal(spool.get(3)[0], outputs[3][0])
    spool.drop(3)
    with pytest.raises(KeyError):
        spool.get(3)
    spool.close()
    assert spool.bytes_in_memory == 0


def test_padding_does_not_count() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(16, 16)

        def forward(self, inputs: Tensor, attention_mask: Tensor) -> Tensor:
            return self.first(inputs)

    torch.manual_seed(0)
    model = Tagger()
    x = torch.randn(4, 6, 16)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6, [1, 1, 0, 0, 0, 0], [1] * 5 + [0]])
    loud = x.masked_fill(mask[..., None] == 0, float("nan"))  # NaN in padding must not be seen either
    expected = copy.deepcopy(model)
    twofour.prune(expected, calibration=(x, torch.ones_like(mask)), method="sparsegpt")
    twofour.prune(model, calibration={"inputs": loud, "attention_mask": mask}, method="sparsegpt")
    hessian = Hessian(16, DEVICE)
    hessian.add(x[mask.bool()])
    torch.manual_seed(0)
    wanted = solve(Tagger().first.weight.detach(), hessian, "2:4", Recipe("sparsegpt"))
    assert torch.equal(model.first.weight, wanted.weight)
    assert not torch.equal(model.first.weight, expected.first.weight)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(8, 6, 3, padding=1),
        lambda: nn.Conv2d(8, 6, (2, 3), stride=(1, 2), padding=(0, 2), dilation=(2, 1)),
        lambda: nn.Conv2d(8, 6, 3, padding="same", padding_mode="reflect"),
        lambda: nn.Conv1d(8, 6, 4, stride=2),
        lambda: nn.Conv3d(4, 6, 2, padding=1, padding_mode="circular"),
    ],
)
def test_convolutions_are_products_of_patches(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    conv = make()
    x = torch.randn(3, conv.in_channels, *[7, 9, 6][: len(conv.kernel_size)])
    rows = torch.cat(list(observe.tokens(conv, x)))
    matrix = observe.as_matrix(conv, conv.weight.detach())
    expected = conv(x).movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(rows @ matrix.T + conv.bias, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(observe.from_matrix(conv, matrix, conv.weight.shape), conv.weight)
    model = nn.Sequential(conv)
    report = twofour.prune(model, calibration=x, method="sparsegpt")
    assert twofour.check(model).summary["holds"]  # along input channels, at each place of the kernel
    (row,) = report.rows
    assert row["error"] < row["error_masked"]


def test_packed_attention_is_seen_whole() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(6, 10, 32)
    dense = copy.deepcopy(model).eval()
    magnitude = copy.deepcopy(model).eval()
    twofour.prune(magnitude)
    report = twofour.prune(model.eval(), calibration=x)
    assert len(report.where(action="pruned")) == 8
    assert all(row["tokens"] == 60 for row in report.rows)
    assert twofour.check(model).summary["holds"]
    with torch.no_grad():
        error = (model(x) - dense(x)).square().mean()
        assert error < 0.5 * (magnitude(x) - dense(x)).square().mean()


def test_input_of_an_output_projection_is_what_attention_gives() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    model = nn.ModuleDict({"a": attention})
    model.forward = lambda q, k: attention(q, k, k)[0]  # type: ignore[method-assign]
    q, k = torch.randn(2, 3, 16), torch.randn(2, 5, 16)
    layers = [layer for layer in survey(model, PATTERN) if layer.skip is None]
    replay = Replay(model, layers, [(q, k)])
    seen: dict[str, list[Tensor]] = {}
    for group in replay.groups:
        replay.run(group, lambda x, real, name=group.layers[0].name: seen.setdefault(name, []).append(x))
    assert [tuple(x.shape) for x in seen["a.in_proj_weight"]] == [(2, 3, 16), (2, 5, 16)]
    (inside,) = seen["a.out_proj"]
    with torch.no_grad():
        torch.testing.assert_close(attention.out_proj(inside), attention(q, k, k)[0])


def test_a_layer_that_is_called_twice_sees_both_inputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(torch.relu(self.shared(x)))

    report = twofour.prune(Twice(), calibration=data(3), method="wanda")
    assert report.rows[0]["tokens"] == 2 * 3 * 8


def test_tied_weights_are_pruned_once() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    report = twofour.prune(model, calibration=data(), method="sparsegpt")
    assert report.rows[1]["reason"] == "shares its weight with '0'"
    assert twofour.check(model).summary["holds"]


def test_layers_that_no_input_reaches_are_left_and_named() -> None:
    model = Stack()
    model.spare = nn.Linear(16, 16)
    before = model.spare.weight.clone()
    report = twofour.prune(model, calibration=data(), method="wanda")
    (row,) = [row for row in report.rows if row["layer"] == "spare"]
    assert row["action"] == "skipped"
    assert row["reason"] == "no calibration input reaches it (method='magnitude' needs none)"
    assert torch.equal(model.spare.weight, before)
    with pytest.raises(CalibrationError, match=r"no calibration input reaches any of the 1 layers, 'spare'"):
        twofour.prune(model, calibration=data(), include="spare")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_solved_wide_and_written_back(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Stack().to(dtype)
    report = twofour.prune(model, calibration=[batch.to(dtype) for batch in data(8)])
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert twofour.check(model).summary["holds"]
    assert all(row["error"] < row["error_masked"] for row in report.where(action="pruned"))


def test_float8_weights() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(16, 8, bias=False)
            self.inner.weight = nn.Parameter(self.inner.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
            self.inner.forward = lambda x: x @ self.inner.weight.float().T  # type: ignore[method-assign]

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    torch.manual_seed(0)
    model = Small()
    report = twofour.prune(model, calibration=data(4))
    assert model.inner.weight.dtype == torch.float8_e4m3fn
    assert bool(torch.isfinite(model.inner.weight.float()).all())
    assert twofour.check(model).summary["holds"]
    assert report.rows[0]["error"] < report.rows[0]["error_masked"]


def test_dry_run_changes_nothing_and_reports_all() -> None:
    model = Stack()
    before = copy.deepcopy(model.state_dict())
    report = twofour.prune(model, calibration=data(), dry_run=True)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all("error" in row for row in report.where(action="pruned"))
    assert "dry run: nothing was changed" in report.notes


def test_training_flags_and_configurations_come_back() -> None:
    model = Stack().train()
    model.blocks[1].eval()
    twofour.prune(model, calibration=data(), method="wanda")
    assert model.training
    assert not model.blocks[1].training
    assert "forward" not in vars(model.blocks[0])
    assert not model.blocks[0].gate._forward_pre_hooks


class Faulty(Stack):
    """Fails when it has been called often enough."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        self.calls -= 1
        if self.calls < 0:
            raise RuntimeError("out of luck")
        return super().forward(x)


def test_a_model_that_fails_at_once_is_not_changed() -> None:
    model = Faulty(0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match="the model fails on the calibration inputs: RuntimeError: out of luck"):
        twofour.prune(model, calibration=data())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_model_that_fails_half_way_keeps_what_is_done_and_says_so() -> None:
    torch.manual_seed(0)
    model = Faulty(14)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PruneInterrupted, match=r"stopped after \d of 11 layers, .*RuntimeError: out of luck") as caught:
        twofour.prune(model, calibration=data(), method="sparsegpt")
    report = caught.value.report
    pruned = {row["layer"] for row in report.where(action="pruned")}
    assert pruned
    assert len(report.where(action="not done")) == 11 - len(pruned) - len(report.where(action="skipped"))
    for name, weight in model.state_dict().items():
        layer = name.removesuffix(".weight")
        assert torch.equal(weight, before[name]) == (layer not in pruned), name
    assert "forward" not in vars(model.blocks[0])


@pytest.mark.parametrize("targets", ["pruned", "dense"])
def test_a_killed_run_goes_on_where_it_was(targets: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    recipe = Recipe("sparsegpt", targets=targets)
    whole = Faulty(10**6)
    half, again = copy.deepcopy(whole), copy.deepcopy(whole)
    twofour.prune(whole, calibration=data(), method=recipe)
    half.calls = 14 if targets == "pruned" else 40
    folder = tmp_path / "run"
    with pytest.raises(PruneInterrupted):
        twofour.prune(half, calibration=data(), method=recipe, checkpoint=folder)
    files = sorted(folder.glob("*.safetensors"))
    assert files
    files[-1].write_bytes(files[-1].read_bytes()[:50])  # cut off: done again
    report = twofour.prune(again, calibration=data(), method=recipe, checkpoint=folder)
    assert len([row for row in report.rows if row.get("reason") == "from the checkpoint"]) == len(files) - 1
    for found, wanted in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, wanted)
    other = copy.deepcopy(whole)
    with pytest.raises(ModelError, match=r"is of another run: other weights\. Name another folder"):
        twofour.prune(other, calibration=data(), method=recipe, checkpoint=folder)
    with pytest.raises(ModelError, match=r"is of another run: other inputs, recipe"):
        twofour.prune(copy.deepcopy(half).__class__(10**6), calibration=data(seed=1), method="wanda", checkpoint=folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.jpg").write_text("x")
    with pytest.raises(ModelError, match="holds other files: name an empty folder"):
        twofour.prune(other, calibration=data(), checkpoint=tmp_path / "full")


@pytest.mark.of_cpu
def test_bad_calibration_is_said_before_anything_changes() -> None:
    model = Stack()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match="calibration is empty: pass at least one batch"):
        twofour.prune(model, calibration=[])
    with pytest.raises(CalibrationError, match="calibration holds a int"):
        twofour.prune(model, calibration=[3])
    with pytest.raises(CalibrationError, match=r"the inputs of 'inlet': 2 of 8 tokens hold NaN or infinities"):
        twofour.prune(model, calibration=torch.ones(8, 16).index_fill(0, torch.tensor([2, 3]), float("nan")))
    with pytest.raises(CalibrationError, match=r"It got \[8, 16\] float64 on cpu; the weights are float32 on cpu"):
        twofour.prune(model, calibration=torch.ones(8, 16, dtype=torch.float64))
    with pytest.raises(UnsupportedError, match=r"method 'sparsegpt' measures .* pass calibration="):
        twofour.prune(model, method="sparsegpt")
    with pytest.raises(UnsupportedError, match="method is a int"):
        twofour.prune(model, method=3)  # type: ignore[arg-type]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_fewer_tokens_than_inputs_is_no_failure() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    report = twofour.prune(model, calibration=torch.randn(3, 64), method=Recipe("sparsegpt", damping=0.0))
    assert report.rows[0]["damping"] > 0
    assert report.rows[0]["reason"].startswith("damping 0.0001: 3 tokens for 64 inputs")
    assert twofour.check(model).summary["holds"]
