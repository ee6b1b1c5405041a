"""Fine-tuning: losses, masks that stay and move, what is held out, the page on the way, and runs that are killed."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import twofour
from twofour import ModelError, TrainingError, TwofourError
from twofour.report.live import LivePage
from twofour.training import Distillation, Outputs, finetune, keep_masks, masks_of, move_masks
from twofour.training.runs.supervised import Supervised


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Net(nn.Module):
    """Gives its own loss for batches with labels, as models of transformers do."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.dropout, self.down = nn.Linear(16, 48), nn.Dropout(0.1), nn.Linear(48, 16)
        self.norm = nn.BatchNorm1d(16)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.out(self.norm(x + self.down(self.dropout(F.gelu(self.up(x))))))
        found = {"logits": logits}
        if labels is not None:
            found["loss"] = F.cross_entropy(logits, labels)
        return found


def pruned(seed: int = 0) -> Net:
    model = Net(seed)
    twofour.prune(model, include="*")
    return model


def batches(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        x = torch.randn(32, 16, generator=generator)
        found.append({"x": x, "labels": x[:, :4].argmax(1)})
    return found


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# ---- what is learned -----------------------------------------------------------------------------------------------


def test_the_models_own_loss_with_masks_that_stay() -> None:
    model = pruned()
    zeros = {name: value == 0 for name, value in model.named_parameters() if value.ndim == 2}
    held = batches(3, seed=1)
    report = finetune(model, batches(20), steps=60, lr=0.01, validation=held, validate_every=25)
    assert report.verb == "finetune"
    assert report.summary["masks kept"] == "3 of 3"
    assert report.summary["validation loss after"] < 0.9 * report.summary["validation loss before"]
    assert report.summary["validation loss after"] == Supervised(model).evaluate(held)
    assert report.summary["validation loss before"] == Supervised(pruned()).evaluate(held)
    assert [row["step"] for row in report.rows if "validation_loss" in row] == [25, 50, 60]
    assert all(row["density"] == 0.5 and "flip_rate" not in row for row in report.rows)
    assert report.summary["tokens"] == 60 * 32
    assert all(
        bool((parameter[zeros[name]] == 0).all()) for name, parameter in model.named_parameters() if name in zeros
    )
    assert masks_of(model) is None
    assert model.training  # as it was


def test_a_loss_of_ones_own_and_the_first_step_of_plain_torch() -> None:
    model, reference = pruned(), pruned().train()
    zeros = {name: value == 0 for name, value in reference.named_parameters() if value.ndim == 2}
    seen = []

    def loss(module: nn.Module, batch: Any) -> Tensor:
        seen.append((module.training, torch.is_grad_enabled()))
        return F.cross_entropy(module(batch["x"])["logits"], batch["labels"], label_smoothing=0.1)

    data = batches(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.manual_seed(3)
    finetune(model, data, loss=loss, steps=1, optimizer=optimizer, lr_schedule="constant", warmup=0, clip=None)
    assert seen == [(False, False), (True, True), (False, False)]
    torch.manual_seed(3)
    loss(reference, data[0]).backward()
    for name, parameter in reference.named_parameters():
        assert parameter.grad is not None
        grad = parameter.grad.masked_fill(zeros.get(name, torch.tensor(False)), 0)
        torch.testing.assert_close(dict(model.named_parameters())[name].detach(), (parameter - 0.1 * grad).detach())


@pytest.mark.parametrize("schedule", ["s-ste", "dense:20%, sr-ste:60%, fixed", "fst:30, s-ste"])
def test_masks_that_move_are_there_at_the_end(schedule: str) -> None:
    model, held = Net(), batches(3, seed=1)
    report = finetune(
        model, batches(20), schedule=schedule, steps=60, lr=0.01, validation=held, validate_every=20, exclude="out"
    )
    twofour.check(model, include=["up", "down"])
    assert bool(model.out.weight.all())
    assert type(model.up) is nn.Linear
    assert report.summary["validation loss after"] == pytest.approx(Supervised(model).evaluate(held), rel=1e-6)
    assert report.summary["phase"] == schedule.split(", ")[-1].split(":")[0]
    by_magnitude = Net()
    twofour.prune(by_magnitude, include=["up", "down"])
    assert report.summary["validation loss before"] == Supervised(by_magnitude).evaluate(held)
    flips = [row["step"] for row in report.rows if "flip_rate" in row]
    assert flips
    if schedule.startswith("dense"):
        assert (min(flips), max(flips)) == (13, 47)
        assert [row["density"] for row in report.rows] == [1.0] * 11 + [0.5] * 49


def test_looking_at_what_is_held_out_changes_nothing() -> None:
    found = []
    for held in (None, batches(2, seed=1)):
        model = Net()
        torch.manual_seed(1)
        finetune(
            model, batches(5), schedule="s-ste", products="dense", steps=8, lr=0.01, validation=held, validate_every=2
        )
        found.append(weights(model))
    assert_same(*found)


def test_a_teacher_with_masks_that_stay_and_move() -> None:
    dense = Net()
    data = [batch["x"] for batch in batches(10)]
    model = pruned()
    report = finetune(model, data, teacher=dense, terms=Outputs("logits"), steps=40, lr=3e-3, validation=data[:2])
    assert report.summary["validation loss after"] < 0.7 * report.summary["validation loss before"]
    assert "logits" in report.rows[0]
    model = Net()
    distillation = Distillation(model, copy.deepcopy(dense), Outputs("logits"))
    report = finetune(model, data, teacher=distillation, schedule="dense:2, s-ste", steps=20, lr=1e-3)
    assert report.summary["loss before"] == 0  # dense still
    assert report.summary["loss after"] > 0
    assert twofour.check(model, include=["up", "down"]).summary["holds"]


def test_masks_that_are_kept_already_stay_and_nothing_need_be_masked() -> None:
    model = pruned()
    with keep_masks(model, include="up") as masks:
        finetune(model, batches(4), steps=4, lr=0.01)
        assert masks_of(model) is masks
    assert bool(model.down.weight.all())
    model = Net()
    report = finetune(model, batches(4), pattern=None, steps=4)
    assert report.summary["masks kept"] == "none"
    assert "density" not in report.rows[0]


def test_what_is_refused() -> None:
    model, dense = pruned(), Net()
    before = weights(model)
    data = batches(2)
    own: Callable[..., Tensor] = lambda module, batch: module(**batch)["loss"]  # noqa: E731
    cases: list[tuple[type[TwofourError], str, dict[str, Any]]] = [
        (ModelError, r"loss= together with a teacher", {"loss": own, "teacher": dense}),
        (ModelError, r"terms= without a teacher", {"terms": Outputs("logits")}),
        (ModelError, r"a schedule without a pattern", {"schedule": "s-ste", "pattern": None}),
        (ModelError, r"include= and exclude= are for moving masks", {"include": "up"}),
        (ModelError, r"loss is a int: pass a function", {"loss": 5}),
        (ModelError, r"validate_every=0: at least 1", {"validate_every": 0, "validation": data}),
        (ModelError, r"inputs is empty", {"validation": []}),
        (TwofourError, r"'magic' is no rule", {"schedule": "magic"}),
        (TwofourError, r"has shares: say of how many steps", {"schedule": "s-ste:9%, fixed", "steps": None, "seconds": 9}),
        (ModelError, r"the loss is a tensor of \[32, 4\]: it must be one", {"loss": lambda m, b: m(**b)["logits"]}),
        (ModelError, r"the loss is a float", {"loss": lambda m, b: 0.5}),
        (ModelError, r"no weight of the model holds 1:4", {"pattern": "1:4"}),
        (ModelError, r"the loss of the first batch is 0", {"teacher": copy.deepcopy(model), "terms": Outputs("logits", "mse")}),
        (ModelError, r"lr=0: a number above 0", {"lr": 0}),
        (ModelError, r"schedule='step': there are linear", {"lr_schedule": "step"}),
    ]  # fmt: skip
    for error, words, options in cases:
        with pytest.raises(error, match=words):
            finetune(model, data, **{"steps": 2, **options})
        assert masks_of(model) is None
        assert type(model.up) is nn.Linear
    with pytest.raises(ModelError, match=r"the Net returned no loss for this batch: give it batches with labels"):
        finetune(model, [{"x": batch["x"]} for batch in data], steps=2)
    with pytest.raises(ModelError, match=r"the loss has no gradient: no parameter that is trained"):
        finetune(pruned(), data, loss=lambda m, b: m(**b)["loss"].detach(), steps=2)
    with pytest.raises(TrainingError, match=r"data has no batch"):
        finetune(model, [], steps=2)
    other = Net()
    with move_masks(other), pytest.raises(ModelError, match="kept or moved already"):
        finetune(other, data, schedule="s-ste", steps=2)
    with pytest.raises(ModelError, match=r"a list is not a model: pass a torch\.nn\.Module"):
        finetune([], data, steps=2)  # type: ignore[arg-type]
    assert_same(before, weights(model))


def test_a_loss_that_is_nan_ends_a_run_of_moving_masks_with_the_last_good_weights() -> None:
    def losing(at: int) -> Callable[..., Tensor]:
        calls = [0]

        def loss(module: nn.Module, batch: Any) -> Tensor:
            calls[0] += torch.is_grad_enabled()
            found: Tensor = module(**batch)["loss"]
            return found * (math.nan if calls[0] == at else 1.0)

        return loss

    model, other = Net(), Net()
    settings: dict[str, Any] = {"schedule": "s-ste", "lr": 0.01, "lr_schedule": "constant", "warmup": 0.0}
    torch.manual_seed(0)
    with pytest.raises(TrainingError, match=r"the loss of step 4 is nan"):
        finetune(model, batches(6), loss=losing(4), steps=6, **settings)
    torch.manual_seed(0)
    with pytest.raises(TrainingError, match=r"the loss of step 3 is nan"):
        finetune(other, batches(6), loss=losing(3), steps=6, **settings)
    assert type(model.up) is nn.Linear  # let go of, with the weights that learn
    assert bool(model.up.weight.all())
    assert not torch.equal(model.up.weight, other.up.weight)
    assert all(value.isfinite().all() for value in weights(model).values())


# ---- runs that go on ------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


class Killing:
    """Batches, and a kill when that many were given."""

    def __init__(self, data: Any, after: int | None = None, by: type[BaseException] = Killed) -> None:
        self.data, self.left, self.by = data, after, by

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(len(self.data)).tolist()
        for i in order:
            if self.left is not None:
                if not self.left:
                    raise self.by
                self.left -= 1
            yield self.data[i]


SCHEDULES = [None, "dense:3, s-ste:6, fixed", "fst:9, sr-ste:3, fixed"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kill", [1, 3, 10, 19])
def test_a_killed_run_goes_on_bit_for_bit(schedule: str | None, kill: int, tmp_path: Path) -> None:
    """With dropout, statistics of batches, random order, gradients of two batches; FST's masks are older than its weights."""

    def run(after: int | None, path: Path) -> tuple[dict[str, Tensor], twofour.Report]:
        model = Net() if schedule else pruned()
        torch.manual_seed(7)
        report = finetune(
            model, Killing(batches(5), after), schedule=schedule, products="dense", steps=14, lr=0.01, accumulate=2,
            log_every=4, validation=batches(2, seed=1), validate_every=3, checkpoint=path, save_seconds=0,
            settings={"text": "a"},
        )  # fmt: skip
        return weights(model), report

    whole, report = run(None, tmp_path / "whole.pt")
    with pytest.raises(Killed):
        run(kill, tmp_path / "killed.pt")
    resumed, again = run(None, tmp_path / "killed.pt")
    assert_same(whole, resumed)
    timed = ("seconds", "tokens_per_second")
    assert [[(key, row[key]) for key in row if key not in timed] for row in report.rows] == [
        [(key, row[key]) for key in row if key not in timed] for row in again.rows
    ]
    summaries = [{key: value for key, value in each.summary.items() if key != "seconds"} for each in (report, again)]
    assert summaries[0] == summaries[1]
    third, _ = run(None, tmp_path / "killed.pt")  # a finished run is not run again
    assert_same(whole, third)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_checkpoints_of_other_runs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    options: dict[str, Any] = {"steps": 8, "checkpoint": path, "save_seconds": 0, "lr": 0.01}
    with pytest.raises(Killed):
        finetune(Net(), Killing(batches(8), 3), schedule="s-ste", settings={"text": "a"}, **options)
    for changed, words in (
        ({"schedule": "fst"}, r"was made with masks='s-ste', this run with masks='fst'"),
        ({"settings": {"text": "b"}}, r"was made with text='a', this run with text='b'"),
        ({"pattern": "1:4"}, r"was made with pattern='2:4', this run with pattern='1:4'"),
        ({"train_mode": False}, r"was made with train_mode=True"),
        ({"steps": 9}, r"was made with steps=8, this run with steps=9"),
    ):
        with pytest.raises(ModelError, match=words):
            finetune(Net(), batches(8), **{"schedule": "s-ste", "settings": {"text": "a"}, **options, **changed})
    run = {**options, "checkpoint": tmp_path / "of_other_things.pt", "schedule": "s-ste"}
    with pytest.raises(Killed):
        finetune(Net(), Killing(batches(8), 3), **{**run, "settings": {"model": 3735928559}})
    for changed, words in (
        ({"model": 305419896}, r"of_other_things\.pt was made with another model\. Give it another path"),
        ({"model": None}, r"was made with model=3735928559, this run with model=None"),
    ):
        with pytest.raises(ModelError, match=words):
            finetune(Net(), batches(8), **{**run, "settings": changed})
    with pytest.raises(ModelError, match=r"was made with verb='finetune', this run with verb='distill'"):
        twofour.training.distill(pruned(), Net(), [batch["x"] for batch in batches(2)], steps=8, checkpoint=path)
    path.write_bytes(b"no")
    with pytest.raises(TrainingError, match=r"run\.pt is no checkpoint of finetune"):
        finetune(Net(), batches(8), schedule="s-ste", settings={"text": "a"}, **options)


# ---- the page -------------------------------------------------------------------------------------------------------


def test_the_page_grows_and_stands_still_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    seen: list[str] = []
    init = LivePage.__init__
    monkeypatch.setattr(LivePage, "__init__", lambda self, path: init(self, path, every=0.0))

    def data() -> Iterator[Any]:
        for batch in batches(8):
            seen.append(path.read_text(encoding="utf-8") if path.exists() else "")
            yield batch

    report = finetune(Net(), data(), schedule="s-ste", steps=6, log_every=2, validation=batches(1), page=path)
    assert seen[0] == seen[1] == ""  # rows are of two steps
    assert seen[3].count('http-equiv="refresh" content="1"') == 1
    assert "Still running" in seen[3]
    last = path.read_text(encoding="utf-8")
    assert "refresh" not in last
    assert "Still running" not in last
    assert report.summary["stopped by"] == "steps"
    assert [found.name for found in tmp_path.iterdir()] == ["page.html"]


def test_the_page_of_a_run_that_failed_stands_still_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    with pytest.raises(Killed):
        finetune(pruned(), Killing(batches(8), 4), steps=6, log_every=1, page=path)
    html = path.read_text(encoding="utf-8")
    assert "refresh" not in html
    assert "Killed" in html


def facts(html: str) -> dict[str, str]:
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html))


def test_the_page_of_an_interrupted_run_says_so_and_of_which_step_it_knows_the_loss(tmp_path: Path) -> None:
    path, held = tmp_path / "page.html", {"validation": batches(1), "validate_every": 2}
    with pytest.raises(KeyboardInterrupt):
        finetune(pruned(), Killing(batches(8), 5, KeyboardInterrupt), steps=6, log_every=1, page=path, **held)
    html = path.read_text(encoding="utf-8")
    found = facts(html)
    assert "refresh" not in html
    assert "KeyboardInterrupt" not in html
    assert found["stopped by"] == "interrupted"
    assert found["steps"] == "5"
    assert float(found["validation loss at step 4"]) > 0
    assert "validation loss after" not in found
    report = finetune(pruned(), batches(8), steps=6, log_every=1, page=path, **held)
    assert (
        facts(path.read_text(encoding="utf-8"))["validation loss after"] == f"{report.rows[-1]['validation_loss']:.4g}"
    )


def test_the_page_of_a_run_that_goes_on_has_no_result_yet(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    with pytest.raises(KeyboardInterrupt):
        finetune(pruned(), Killing(batches(8), 3, KeyboardInterrupt), steps=6, log_every=1, page=path)
    found = facts(path.read_text(encoding="utf-8"))
    assert float(found["loss before"]) > 0
    assert "loss after" not in found
    assert "None" not in found.values()


def test_a_page_that_cannot_be_written_for_a_while_stops_nothing_but_the_end(tmp_path: Path) -> None:
    place = tmp_path / "folder"
    page = LivePage(place / "page.html", every=0.0)

    def report() -> twofour.Report:
        return twofour.Report("finetune", (), ())

    page.show(report)
    with pytest.raises(TwofourError, match=r"cannot write .*page\.html"):
        page.show(report, running=False)
    place.mkdir()
    page.show(report)
    assert "could not be written for some time" in (place / "page.html").read_text(encoding="utf-8")


def test_a_last_page_that_cannot_be_written_costs_no_training(tmp_path: Path) -> None:
    model = Net()
    report = finetune(model, batches(2), schedule="s-ste", steps=2, page=tmp_path / "none" / "page.html")
    assert "cannot write" in report.notes[-1]
    assert twofour.check(model, include=["up", "down"]).summary["holds"]


def test_pages_are_not_made_more_often_than_asked(tmp_path: Path) -> None:
    page = LivePage(tmp_path / "page.html", every=1000.0)
    made = []

    def report() -> twofour.Report:
        made.append(1)
        return twofour.Report("finetune", (), ())

    for _ in range(3):
        page.show(report)
    assert len(made) == 1
    page.show(report, running=False)
    assert len(made) == 2
