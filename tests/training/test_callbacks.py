"""Masks inside the trainers of others: transformers' and Lightning's."""

from __future__ import annotations

import copy
import importlib
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import twofour
from twofour import ModelError, TrainingError, TwofourError, UnsupportedError
from twofour.training import masks_of
from twofour.training.masks.projected import Projected

transformers = pytest.importorskip("transformers", reason="needs transformers (twofour[transformers])")

from twofour.training import lightning_callback, transformers_callback  # noqa: E402
from twofour.training.transformers_callback import FILE, MasksCallback  # noqa: E402

needs_accelerate = pytest.mark.skipif(
    not transformers.utils.is_accelerate_available(), reason="transformers' Trainer needs accelerate"
)

SCHEDULES = [None, "dense:2, s-ste:4, fixed", "fst"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def gpt2(pruned: bool = True, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    if pruned:
        twofour.prune(model)
    return model


def data(count: int = 40) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 32, (count, 12), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def is_free(model: nn.Module) -> bool:
    """No masks, and layers that are what they were."""
    return masks_of(model) is None and not any(isinstance(module, Projected) for module in model.modules())


class Killed(Exception):
    pass


# ---- transformers: the real trainer ---------------------------------------------------------------------------------


class Kill(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Killed


def trainer_for(model: nn.Module, folder: Path, *callbacks: Any, **options: Any) -> Any:
    settings = {
        "output_dir": str(folder),
        "max_steps": 9,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 3,
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **options,
    }
    args = transformers.TrainingArguments(**settings)
    return transformers.Trainer(model, args, train_dataset=data(), eval_dataset=data(8), callbacks=list(callbacks))


@pytest.mark.of_cpu
@needs_accelerate
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer_trains_sparse_and_resumes_bit_for_bit(schedule: str | None, accumulate: int, tmp_path: Path) -> None:
    def train(folder: Path, *more: Any, resume: Any = None, fresh: bool = True) -> tuple[Any, Any]:
        callback = MasksCallback(schedule=schedule, products="dense")
        model = gpt2(pruned=schedule is None, seed=0 if resume is None else 1)
        if resume is not None and schedule is None:
            model.load_state_dict(gpt2().state_dict())
        trainer = trainer_for(model, folder, callback, *more, gradient_accumulation_steps=accumulate)
        trainer.train(resume_from_checkpoint=resume)
        return model, trainer

    whole, trainer = train(tmp_path / "whole")
    assert is_free(whole)
    assert twofour.check(whole).summary["holds"]
    if schedule is None:
        before = gpt2()
        kept = dict(whole.named_parameters())
        assert all(
            not bool(kept[name][value == 0].any()) for name, value in before.named_parameters() if value.ndim == 2
        )
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["density"] for row in logs] == [0.5] * 3
    moving = {None: [], "fst": [3, 6, 9]}.get(schedule, [3])
    assert [row["step"] for row in logs if "flip_rate" in row] == ([] if schedule == "fst" else moving)
    trainer.save_model(str(tmp_path / "saved"))
    saved = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "saved")
    assert twofour.check(saved).summary["holds"]
    assert_same(weights(whole), weights(saved))

    with pytest.raises(Killed):
        train(tmp_path / "killed", Kill(5))
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert (tmp_path / "killed" / "checkpoint-4" / FILE).is_file()
    resumed, _ = train(tmp_path / "killed", resume=True)
    assert_same(weights(whole), weights(resumed))


@needs_accelerate
@pytest.mark.parametrize("schedule", [None, "s-ste"])
def test_trainer_loads_the_best_model_with_its_masks(schedule: str | None, tmp_path: Path) -> None:
    callback = MasksCallback(schedule=schedule, products="dense")
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 1}
    model = gpt2(pruned=schedule is None)
    trainer = trainer_for(model, tmp_path, callback, **options)
    trainer.train()
    assert is_free(model)
    assert twofour.check(model).summary["holds"]
    best = trainer.state.best_metric
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)


@needs_accelerate
def test_trainer_in_bfloat16_with_evaluation_and_epochs(tmp_path: Path) -> None:
    model = gpt2(pruned=False)
    trainer = trainer_for(
        model, tmp_path, MasksCallback(schedule="dense:25%, sr-ste:50%, fixed"), bf16=True, max_steps=-1,
        num_train_epochs=2, eval_strategy="epoch", save_strategy="epoch", torch_compile=False,
    )  # fmt: skip
    trainer.train()
    assert twofour.check(model).summary["holds"]
    assert trainer.state.global_step == 20


# ---- transformers: its handler of callbacks, in the order of the trainer --------------------------------------------


class Calling:
    """What `transformers.Trainer` calls, and when, around a loop of one's own; its state and its handler are transformers'."""

    def __init__(self, model: nn.Module, folder: Path, callback: Any, **options: Any) -> None:
        self.model, self.folder = model, folder
        self.optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
        self.handler = transformers.trainer_callback.CallbackHandler([callback], model, None, self.optimizer, None)
        self.state = transformers.TrainerState(max_steps=9)
        self.control = transformers.TrainerControl()
        self.args = types.SimpleNamespace(
            output_dir=str(folder), load_best_model_at_end=False, resume_from_checkpoint=None, should_save=True
        )
        vars(self.args).update(options)

    def train(self, resume: Path | None = None, kill: int | None = None) -> None:
        if resume is not None:
            state = torch.load(resume / "rest.pt", weights_only=True)
            self.model.load_state_dict(torch.load(resume / "model.pt", weights_only=True))
            self.state.global_step = state["step"]
            self.optimizer.load_state_dict(state["optimizer"])
        self.model.zero_grad()
        self.event("on_train_begin")
        samples = data()
        while self.state.global_step < self.state.max_steps:
            ids = torch.stack([row["input_ids"] for row in samples[4 * self.state.global_step :][:4]])
            torch.manual_seed(self.state.global_step)  # of dropout
            self.model.train()
            self.model(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.model.zero_grad()
            self.state.global_step += 1
            self.event("on_step_end")
            if self.state.global_step % 3 == 0:
                logs = {"loss": 1.0}
                self.state.log_history.append({**logs, "step": self.state.global_step})
                self.event("on_log", logs=logs)
            if self.state.global_step == kill:
                raise Killed
            if self.state.global_step % 2 == 0:
                checkpoint = self.folder / f"checkpoint-{self.state.global_step}"
                checkpoint.mkdir(parents=True)
                torch.save(self.model.state_dict(), checkpoint / "model.pt")
                rest = {"step": self.state.global_step, "optimizer": self.optimizer.state_dict()}
                torch.save(rest, checkpoint / "rest.pt")
                self.event("on_save")
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self.model.load_state_dict(
                torch.load(Path(self.state.best_model_checkpoint) / "model.pt", weights_only=True)
            )
        self.event("on_train_end")

    def event(self, name: str, **more: Any) -> None:
        getattr(self.handler, name)(self.args, self.state, self.control, **more)


@pytest.mark.parametrize("schedule", [*SCHEDULES, "s-ste:2, fixed"])
def test_calls_train_sparse_and_resume_bit_for_bit(schedule: str | None, tmp_path: Path) -> None:
    whole = gpt2(pruned=schedule is None)
    calling = Calling(whole, tmp_path / "whole", MasksCallback(schedule=schedule, products="dense"))
    calling.train()
    assert is_free(whole)
    assert twofour.check(whole).summary["holds"]
    assert [row["density"] for row in calling.state.log_history] == [0.5] * 3
    flips = [row["step"] for row in calling.state.log_history if "flip_rate" in row]
    assert flips == ([3] if schedule and schedule.startswith("dense") else [])

    for kill in (5, 7):
        folder = tmp_path / f"killed-{kill}"
        with pytest.raises(Killed):
            Calling(gpt2(pruned=schedule is None), folder, MasksCallback(schedule=schedule, products="dense")).train(
                kill=kill
            )
        checkpoint = folder / f"checkpoint-{kill - 1}"
        assert sorted(path.name for path in checkpoint.iterdir()) == ["model.pt", "rest.pt", FILE]
        resumed = gpt2(pruned=schedule is None, seed=1)
        Calling(resumed, folder, MasksCallback(schedule=schedule, products="dense")).train(resume=checkpoint)
        assert_same(weights(whole), weights(resumed))


def test_a_kept_weight_that_is_zero_by_chance_still_learns_after_a_resume(tmp_path: Path) -> None:
    """Zeros of a checkpoint do not say which of them were kept: its file of masks does."""
    model = gpt2()
    layer = model.transformer.h[0].mlp.c_fc.weight
    row = int((layer[:4, 0] != 0).nonzero()[-1])  # not the place that would be taken first

    class Chance(MasksCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                kwargs["model"].transformer.h[0].mlp.c_fc.weight.data[row, 0] = 0

    with pytest.raises(Killed):
        Calling(model, tmp_path, Chance()).train(kill=5)
    resumed = gpt2(seed=1)
    resumed.load_state_dict(torch.load(tmp_path / "checkpoint-4" / "model.pt", weights_only=True))
    callback = MasksCallback()
    calling = Calling(resumed, tmp_path, callback)
    calling.state.max_steps = 5
    calling.train(resume=tmp_path / "checkpoint-4")
    assert resumed.transformer.h[0].mlp.c_fc.weight[row, 0] != 0


@pytest.mark.of_cpu
def test_the_best_checkpoint_brings_its_masks(tmp_path: Path) -> None:
    model = gpt2(pruned=False)
    calling = Calling(model, tmp_path, MasksCallback(schedule="fst"), load_best_model_at_end=True)
    calling.state.best_model_checkpoint = str(tmp_path / "checkpoint-4")
    calling.train()
    assert twofour.check(model).summary["holds"]
    best = torch.load(tmp_path / "checkpoint-4" / FILE, weights_only=True)["masks"]["masks"]
    learned = torch.load(tmp_path / "checkpoint-4" / "model.pt", weights_only=True)
    name = "transformer.h.0.mlp.c_fc"
    weight = learned[f"{name}.weight"]
    mask = torch.stack([best[name] >> bit & 1 for bit in range(8)], 1).flatten().bool().view(weight.shape)
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight, torch.where(mask, weight, 0.0))


def test_what_the_callback_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TwofourError, match="'magic' is no rule"):
        MasksCallback(schedule="magic")
    with pytest.raises(TwofourError, match="cannot read|pattern"):
        MasksCallback("two of four")
    with pytest.raises(ModelError, match=r"no weight of the model holds 2:4"):
        Calling(gpt2(pruned=False), tmp_path, MasksCallback()).train()
    with pytest.raises(
        ModelError, match=r"load_best_model_at_end with 2 phases: the best weights may be of an earlier"
    ):
        Calling(gpt2(), tmp_path, MasksCallback(schedule="fst:2, fixed"), load_best_model_at_end=True).train()
    other = Calling(gpt2(), tmp_path, MasksCallback())
    other.handler.optimizer = torch.optim.SGD(nn.Linear(4, 4).parameters(), 0.1)
    with pytest.raises(ModelError, match=r"the SGD trains none of the 4 masked weights"):
        other.train()
    assert is_free(other.model)

    with pytest.raises(Killed):
        Calling(gpt2(), tmp_path / "fixed", MasksCallback()).train(kill=5)
    checkpoint = tmp_path / "fixed" / "checkpoint-4"
    with pytest.raises(ModelError, match=r"the checkpoint has fixed masks, this run moving ones: give it no schedule"):
        Calling(gpt2(), tmp_path / "fixed", MasksCallback(schedule="fst")).train(resume=checkpoint)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(checkpoint, elsewhere)
    with pytest.raises(
        TrainingError, match=r"there is no .*none.checkpoint-4.twofour_masks\.pt, so the masks cannot go"
    ):
        Calling(gpt2(), tmp_path / "none", MasksCallback()).train(resume=elsewhere)
    named = Calling(gpt2(), tmp_path / "named", MasksCallback(resume_from=elsewhere))
    named.train(resume=elsewhere)
    assert named.state.global_step == 9
    stated = Calling(gpt2(), tmp_path / "stated", MasksCallback(), resume_from_checkpoint=str(elsewhere))
    stated.train(resume=elsewhere)
    with pytest.raises(TrainingError, match=r"belong to other weights than the model has"):
        Calling(gpt2(), tmp_path, MasksCallback(resume_from=tmp_path / "named" / "checkpoint-6")).train(
            resume=elsewhere
        )
    (elsewhere / FILE).write_bytes(b"no")
    with pytest.raises(TrainingError, match=r"twofour_masks\.pt holds no masks \(\w+\): resume from another"):
        Calling(gpt2(), tmp_path, MasksCallback(resume_from=elsewhere)).train(resume=elsewhere)
    shutil.rmtree(checkpoint)
    lost = Calling(gpt2(), tmp_path / "lost", MasksCallback())
    monkeypatch.setattr(torch, "save", lambda *_: None)
    with pytest.raises(TwofourError, match=r"cannot write the checkpoint .*twofour_masks\.pt"):
        lost.train()


def test_a_training_that_an_error_has_ended_is_let_go_of_or_begun_anew(tmp_path: Path) -> None:
    model = gpt2(pruned=False)
    callback = MasksCallback(schedule="s-ste")
    with pytest.raises(Killed):
        Calling(model, tmp_path / "one", callback).train(kill=3)
    assert not is_free(model)
    Calling(model, tmp_path / "two", callback).train()
    assert is_free(model)
    assert twofour.check(model).summary["holds"]
    model = gpt2()
    with pytest.raises(Killed):
        Calling(model, tmp_path / "three", callback := MasksCallback()).train(kill=3)
    assert masks_of(model) is not None
    callback.remove()
    assert is_free(model)


def test_without_transformers_the_callback_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_callback, "TrainerCallback", object)
    with pytest.raises(UnsupportedError, match=r"needs transformers: pip install 'twofour\[transformers\]'"):
        MasksCallback()


# ---- Lightning ------------------------------------------------------------------------------------------------------


class Module(nn.Module):
    """What the callback asks of a LightningModule."""

    def __init__(self, pruned: bool, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
        if pruned:
            twofour.prune(self, include="*")
        self.logged: list[dict[str, float]] = []

    def log_dict(self, figures: dict[str, float]) -> None:
        self.logged.append(figures)

    def loss(self, step: int) -> Tensor:
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
        return nn.functional.cross_entropy(self.model(x), x[:, :4].argmax(1))


class Fitting:
    """What Lightning's trainer calls, and when: states of callbacks before optimizers, both before `on_train_start`."""

    def __init__(self, module: Module, callback: Any) -> None:
        self.module, self.callback = module, callback
        self.optimizers = [torch.optim.AdamW(module.parameters(), 0.01, weight_decay=0.1)]
        self.estimated_stepping_batches: float = 10
        self.log_every_n_steps = 3
        self.global_step = 0

    def checkpoint(self) -> dict[str, Any]:
        return {
            "state_dict": weights(self.module),
            "step": self.global_step,
            "optimizer": copy.deepcopy(self.optimizers[0].state_dict()),
            "callback": self.callback.state_dict(),
        }

    def fit(self, resume: dict[str, Any] | None = None, kill: int | None = None, save: int | None = None) -> Any:
        saved = None
        if resume is not None:
            self.module.load_state_dict(resume["state_dict"])
            if resume["callback"]:
                self.callback.load_state_dict(resume["callback"])
            self.global_step = resume["step"]
            self.optimizers[0].load_state_dict(resume["optimizer"])
        try:
            self.callback.on_train_start(self, self.module)
            while self.global_step < 10:
                self.optimizers[0].zero_grad()
                self.module.loss(self.global_step).backward()
                self.optimizers[0].step()
                self.global_step += 1
                self.callback.on_train_batch_end(self, self.module, None, None, self.global_step - 1)
                if self.global_step == save:
                    saved = self.checkpoint()
                if self.global_step == kill:
                    raise Killed
            self.callback.on_train_end(self, self.module)
        except BaseException as error:
            self.callback.on_exception(self, self.module, error)
            raise
        return saved


@pytest.fixture
def callback_class() -> Iterator[Any]:
    """Lightning's callback, on the base class of Lightning where that is installed, else on one that does as much."""
    try:
        import lightning.pytorch.callbacks  # noqa: F401
    except ImportError:
        base = types.ModuleType("lightning.pytorch.callbacks")
        base.Callback = type("Callback", (), {})  # type: ignore[attr-defined]
        names = ("lightning", "lightning.pytorch", "lightning.pytorch.callbacks")
        for name in names:
            sys.modules[name] = base
        yield importlib.reload(lightning_callback).MasksCallback
        for name in names:
            del sys.modules[name]
        importlib.reload(lightning_callback)
    else:
        yield lightning_callback.MasksCallback


LIGHTNING_SCHEDULES = [None, "dense:20%, s-ste:40%, fixed", "fst"]


@pytest.mark.parametrize("schedule", LIGHTNING_SCHEDULES)
@pytest.mark.parametrize("save", [1, 4, 7])
def test_lightning_trains_sparse_and_resumes_bit_for_bit(
    schedule: str | None, save: int, callback_class: Any, tmp_path: Path
) -> None:
    whole = Module(pruned=schedule is None)
    checkpoint = Fitting(whole, callback_class(schedule=schedule, products="dense")).fit(save=save)
    assert is_free(whole)
    assert twofour.check(whole, include="*" if schedule is None else ["model.0", "model.2"]).summary["holds"]
    assert [figures["density"] for figures in whole.logged] == [0.5] * 3
    torch.save(checkpoint, tmp_path / "run.ckpt")
    resumed = Module(pruned=schedule is None, seed=1)
    again = torch.load(tmp_path / "run.ckpt", weights_only=True)
    Fitting(resumed, callback_class(schedule=schedule, products="dense")).fit(resume=again)
    assert_same(weights(whole), weights(resumed))


def test_lightning_lets_go_on_an_exception_and_what_is_saved_then_goes_on(callback_class: Any) -> None:
    whole = Module(pruned=False)
    Fitting(whole, callback_class(schedule="s-ste", products="dense")).fit()
    module = Module(pruned=False)
    fitting = Fitting(module, callback_class(schedule="s-ste", products="dense"))
    with pytest.raises(Killed):
        fitting.fit(kill=4)
    assert is_free(module)
    assert bool(module.model[0].weight.all())  # what learned, whole
    resumed = Module(pruned=False, seed=1)
    Fitting(resumed, callback_class(schedule="s-ste", products="dense")).fit(resume=fitting.checkpoint())
    assert_same(weights(whole), weights(resumed))


def test_lightning_with_several_optimizers_and_a_checkpoint_of_the_end(callback_class: Any) -> None:
    module = Module(pruned=True)
    fitting = Fitting(module, callback_class())
    fitting.optimizers.append(torch.optim.SGD(nn.Linear(4, 4).parameters(), 0.1))
    fitting.fit()
    with pytest.raises(TrainingError, match=r"written after its masks were finished, and they cannot go on moving"):
        Fitting(Module(pruned=True), callback_class()).fit(resume=fitting.checkpoint())
    lonely = Fitting(Module(pruned=True), callback_class())
    lonely.optimizers = fitting.optimizers[1:]
    with pytest.raises(ModelError, match=r"the SGD trains none of the 3 masked weights"):
        lonely.fit()
    endless = Fitting(Module(pruned=False), callback_class(schedule="s-ste:50%, fixed"))
    endless.estimated_stepping_batches = float("inf")
    with pytest.raises(TwofourError, match=r"has shares: say of how many steps"):
        endless.fit()


def test_without_lightning_the_callback_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning_callback, "Callback", object)
    with pytest.raises(UnsupportedError, match=r"needs lightning: pip install 'twofour\[lightning\]'"):
        lightning_callback.MasksCallback()


@pytest.mark.filterwarnings("ignore")  # its own, of versions to come
def test_lightning_itself(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch", reason="needs lightning (twofour[lightning])")

    class Real(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.inner = Module(pruned=False)

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return nn.functional.cross_entropy(self.inner.model(batch), batch[:, :4].argmax(1))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), 0.01)

    def fit(path: Path, steps: int, resume: Path | None = None) -> tuple[Any, Any]:
        module = Real()  # four batches: a run that goes on begins with a new epoch
        loader = torch.utils.data.DataLoader(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)), 4)  # type: ignore[arg-type, var-annotated]
        trainer = lightning.Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=path, callbacks=[lightning_callback.MasksCallback(schedule="s-ste:5, fixed", products="dense"), *(
                [lightning.callbacks.ModelCheckpoint(path, every_n_train_steps=4, save_top_k=-1)] if resume is None else [
                lightning.callbacks.ModelCheckpoint(path / "more")])],
        )  # fmt: skip
        trainer.fit(module, loader, ckpt_path=None if resume is None else str(resume))
        return module, trainer

    whole, _ = fit(tmp_path, 8)
    assert twofour.check(whole, include=["inner.model.0", "inner.model.2"]).summary["holds"]
    first = next(path for path in tmp_path.iterdir() if "step=4" in path.name)
    resumed, _ = fit(tmp_path, 8, first)
    assert_same(weights(whole), weights(resumed))
