"""twofour finetune: from folders that transformers wrote and a text to sparse ones, killed and resumed, and what it refuses."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import twofour
from twofour.cli.finetune import CHECKPOINT
from twofour.cli.texts import Shuffled, texts
from twofour.report import plots
from twofour.training.runs.restart import Checkpoint

transformers = pytest.importorskip("transformers", reason="needs transformers (twofour[transformers])")
tokenizers = pytest.importorskip("tokenizers")

WORDS = [f"w{i}" for i in range(30)]
QUICK = ("--context", 16, "--threads", 1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def folder_of(model: nn.Module, path: Path) -> Path:
    """The model with a tokenizer of whole words."""
    model.save_pretrained(path)  # type: ignore[operator]
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")
    wrapped.save_pretrained(path)
    return path


def gpt2_config(**options: Any) -> Any:
    return transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=32, n_positions=32, bos_token_id=0, eos_token_id=0, **options
    )


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = folder_of(transformers.GPT2LMHeadModel(gpt2_config()), tmp_path_factory.mktemp("gpt2") / "gpt2")
    (path / "notes.txt").write_text("kept", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config)
    with torch.no_grad():
        for parameter in model.bert.encoder.parameters():
            if parameter.ndim == 2:
                parameter *= 4  # as far from the identity as trained layers are
    return folder_of(model, tmp_path_factory.mktemp("bert") / "bert")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines in which each word tells the next."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, 30, (120,), generator=generator).tolist()
    lines = [" ".join(WORDS[(start + 7 * i) % 30] for i in range(8 + start % 5)) for start in starts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def same(one: Path, other: Path) -> bool:
    mine, theirs = (load_file(path / "model.safetensors") for path in (one, other))
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def zeros(path: Path) -> dict[str, Tensor]:
    return {name: value == 0 for name, value in load_file(path / "model.safetensors").items() if value.ndim == 2}


def test_a_language_model_is_pruned_and_recovers(
    gpt2: Path, text: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    out, page = tmp_path / "out", tmp_path / "page.html"
    done = run("finetune", gpt2, text, "--out", out, "--steps", 40, "--lr", 3e-3, "--report", page, *QUICK)
    assert done.code == 0, done.err
    assert done.err == ""  # no bar in a pipe
    assert max(map(len, done.out.splitlines())) <= 100
    model = transformers.GPT2LMHeadModel.from_pretrained(out)
    assert twofour.check(model).summary["holds"]
    pruned = tmp_path / "pruned"
    assert run("prune", gpt2, pruned).code == 0
    assert all(bool(mask[zeros(pruned)[name]].all()) for name, mask in zeros(out).items())
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in pruned.iterdir())
    assert (out / "notes.txt").read_text(encoding="utf-8") == "kept"
    html = page.read_text(encoding="utf-8")
    assert "refresh" not in html
    assert html.count("<figure") == (3 if plots.available() else 0)  # losses, learning rate, density
    assert "validation loss dense" in html
    assert run("check", out).code == 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_report_says_what_was_learned(gpt2: Path, text: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    schedule = "dense:20%, s-ste:60%, fixed"
    done = run("finetune", gpt2, text, "-o", tmp_path / "out", "--schedule", schedule, "--steps", 60, "--lr", 3e-3,
               "--json", *QUICK)  # fmt: skip
    assert done.code == 0, done.err
    record = json.loads(done.out)
    summary, rows = record["summary"], record["rows"]
    assert summary["schedule"] == "dense:12, s-ste:36, fixed"
    assert summary["layers that hold the pattern"] == "8 of 8"
    assert summary["validation loss after"] < 0.8 * summary["validation loss before"]
    assert rows[-1]["validation_loss"] == summary["validation loss after"]
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert [row["density"] for row in rows] == [1.0] * 11 + [0.5] * 49
    assert [row["step"] for row in rows if "flip_rate" in row] == list(range(13, 48))
    assert all(row["tokens_per_second"] > 0 for row in rows)
    pieces = int(summary["samples"].split()[0])
    passes, rest = divmod(60, -(-pieces // 8))
    assert summary["tokens"] == (passes * pieces + rest * 8) * 16
    assert twofour.check(transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")).summary["holds"]


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "recover"),
        ("--schedule", "dense:2, s-ste:4, fixed", "--products", "dense"),
        ("--distill", "--method", "sr-ste", "--products", "dense"),
    ],
    ids=["recover", "moving", "distilled"],
)
def test_a_killed_run_goes_on_to_the_same_weights(
    options: tuple[str, ...],
    gpt2: Path,
    text: Path,
    tmp_path: Path,
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With dropout, over more than one pass, killed twice, once in each half."""
    monkeypatch.setattr(Checkpoint, "is_due", True)
    command = ("finetune", gpt2, text, *options, "--steps", 10, "--lr", 1e-3, "--validation", 0.2, *QUICK)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(*command, "--out", whole).code in (0, 1)
    batch = Shuffled.batch
    for after in (4, 9):
        left = [after]

        def killing(self: Shuffled, which: Any, left: list[int] = left) -> Any:
            if len(which) == 8:
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
            return batch(self, which)

        monkeypatch.setattr(Shuffled, "batch", killing)
        with pytest.raises(Killed):
            run(*command, "--out", out, "--resume")
        assert [path.name for path in out.iterdir()] == [CHECKPOINT]
    monkeypatch.setattr(Shuffled, "batch", batch)
    begun = run(*command, "--out", out)
    assert begun.code == 2
    assert "holds a run that did not end: --resume goes on with it, --overwrite begins anew" in begun.err
    other = run(*command[:-4], *QUICK, "--out", out, "--resume", "--seed", 1)
    assert other.code == 2
    assert "was made with --seed 0, this run with --seed 1." in other.err
    done = run(*command, "--out", out, "--resume")
    assert done.code in (0, 1), done.err
    assert "Taken up at step" in done.out
    assert same(whole, out)
    assert not (out / CHECKPOINT).exists()
    again = run(*command, "--out", out, "--resume")
    assert again.code == 2
    assert "is finished: there is nothing to resume" in again.err
    assert run(*command, "--out", out, "--overwrite").code in (0, 1)
    assert same(whole, out)


@pytest.fixture
def press(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """press(5, 7): Ctrl-C while the batches of steps 5 and 7 are made, whatever handles it here otherwise."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    batch = Shuffled.batch

    def at(*steps: int) -> None:
        made = itertools.count()

        def pressing(self: Shuffled, which: Any) -> Any:
            if len(which) == 8 and next(made) in steps:
                signal.raise_signal(signal.SIGINT)
            return batch(self, which)

        monkeypatch.setattr(Shuffled, "batch", pressing)

    yield at
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_saves_says_so_and_the_run_goes_on_to_the_same_weights(
    gpt2: Path, text: Path, tmp_path: Path, run: Callable[..., Any], press: Callable[..., None]
) -> None:
    command = ("finetune", gpt2, text, "--steps", 10, "--lr", 1e-3, *QUICK)
    whole, out, page = tmp_path / "whole", tmp_path / "out", tmp_path / "page.html"
    assert run(*command, "--out", whole).code in (0, 1)
    press(4)
    stopped = run(*command, "--out", out, "--report", page)
    assert stopped.code == 130
    assert "saving after this step; Ctrl-C once more ends without it" in stopped.err
    assert f"interrupted: {out} has a checkpoint: the same command with --resume goes on there." in stopped.err
    assert "Traceback" not in stopped.err
    assert [path.name for path in out.iterdir()] == [CHECKPOINT]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    press()
    done = run(*command, "--out", out, "--resume")
    assert done.code in (0, 1), done.err
    assert "Taken up at step 5 from the checkpoint" in " ".join(done.out.split())
    assert same(whole, out)


def test_ctrl_c_twice_ends_at_once(
    gpt2: Path, text: Path, tmp_path: Path, run: Callable[..., Any], press: Callable[..., None]
) -> None:
    command = ("finetune", gpt2, text, "--steps", 10, "--lr", 1e-3, *QUICK)
    press(4, 5)
    stopped = run(*command, "--out", tmp_path / "out")
    assert stopped.code == 130
    assert "interrupted: before the first step was kept" in stopped.err
    assert not (tmp_path / "out").exists()


def test_encoders_learn_from_their_dense_selves(
    bert: Path, text: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    pruned = tmp_path / "pruned"
    assert run("prune", bert, pruned).code == 0
    done = run("finetune", bert, text, "--out", tmp_path / "one", "--steps", 30, "--lr", 3e-3, "--json", *QUICK)
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert {"blocks", "logits"} <= record["rows"][0].keys()
    assert record["summary"]["validation loss after"] < 0.8 * record["summary"]["validation loss before"]
    assert "validation loss dense" not in record["summary"]
    other = run(
        "finetune", pruned, text, "--out", tmp_path / "two", "--steps", 30, "--lr", 3e-3, "--teacher", bert, *QUICK
    )
    assert other.code == 0, other.err
    assert same(tmp_path / "one", tmp_path / "two")
    assert twofour.check(transformers.BertForMaskedLM.from_pretrained(tmp_path / "two")).summary["holds"]
    lost = run("finetune", pruned, text, "--out", tmp_path / "three", *QUICK)
    assert lost.code == 2
    assert "is pruned already, so what it was dense is not here: name the dense model with --teacher" in lost.err
    assert not (tmp_path / "three").exists()


def test_weights_come_back_in_their_dtype_and_compressed_models_dense(
    text: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    llama = folder_of(transformers.LlamaForCausalLM(config), tmp_path / "llama")
    small, out = tmp_path / "small", tmp_path / "out"
    assert run("prune", llama, tmp_path / "pruned", "--dtype", "bfloat16").code == 0
    assert run("compress", tmp_path / "pruned", small, "--force").code == 0
    done = run("finetune", small, text, "--out", out, "--steps", 3, "--lr", 1e-3, "--json", *QUICK)
    assert done.code == 0, done.err
    assert "validation loss dense" not in json.loads(done.out)["summary"]  # it was never here
    weights = load_file(out / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    before = load_file(tmp_path / "pruned" / "model.safetensors")
    assert any(not torch.equal(weights[name], before[name]) for name in weights)
    assert run("check", out).code == 0


def test_worse_than_pruned_is_exit_code_1(gpt2: Path, text: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    done = run("finetune", gpt2, text, "--out", tmp_path / "out", "--steps", 4, "--lr", 0.5, *QUICK)
    assert done.code == 1
    assert "no: the loss of the held-out text is" in done.err
    assert "Try a smaller --lr" in done.err
    assert run("check", tmp_path / "out").code == 0  # it is there all the same
    blind = run(
        "finetune", gpt2, text, "--out", tmp_path / "blind", "--steps", 4, "--lr", 0.5, "--validation", 0, *QUICK
    )
    assert blind.code == 0
    assert "No text was held out" in blind.out


def test_minutes_are_a_budget_and_a_text_is_one_by_default(
    gpt2: Path, text: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    done = run("finetune", gpt2, text, "--out", tmp_path / "one", "--minutes", 0.02, "--json", *QUICK)
    assert json.loads(done.out)["summary"]["stopped by"] == "seconds"
    done = run("finetune", gpt2, text, "--out", tmp_path / "two", "--json", *QUICK)
    summary = json.loads(done.out)["summary"]
    pieces = int(summary["samples"].split()[0])
    assert summary["steps"] == -(-pieces // 8)
    assert summary["tokens"] == pieces * 16


def test_what_is_refused(
    gpt2: Path, bert: Path, text: Path, tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "twofour.cli.finetune._DEVICES", {"cpu": lambda: True, "cuda": lambda: True, "mps": lambda: False}
    )
    weights = tmp_path / "weights.safetensors"
    shutil.copy(gpt2 / "model.safetensors", weights)
    empty, short, latin = (tmp_path / name for name in ("empty.txt", "short.txt", "latin.txt"))
    empty.write_text(" \n\n", encoding="utf-8")
    short.write_text("w1 w2 w3 w4", encoding="utf-8")
    latin.write_bytes(b"caf\xe9")
    torch.manual_seed(0)
    headless = folder_of(transformers.GPT2Model(gpt2_config()), tmp_path / "headless")
    dumb = tmp_path / "dumb"
    shutil.copytree(gpt2, dumb, ignore=shutil.ignore_patterns("token*", "special*"))
    strange, file = tmp_path / "strange", tmp_path / "file"
    strange.mkdir()
    (strange / "thesis.tex").touch()
    file.touch()
    there = tmp_path / "there"
    shutil.copytree(gpt2, there)
    out = tmp_path / "out"
    cases: list[tuple[str, tuple[object, ...]]] = [
        ("nowhere: no such file or folder", (tmp_path / "nowhere", text, "--out", out)),
        ("nowhere.txt: no such text file", (gpt2, tmp_path / "nowhere.txt", "--out", out)),
        ("empty.txt is empty: there is nothing to learn from", (gpt2, empty, "--out", out)),
        ("nowhere: no such file or folder", (gpt2, text, "--teacher", tmp_path / "nowhere", "--out", out)),
        ("weights.safetensors is not a model folder: finetune runs the model. Give a folder", (weights, text, "--out", out)),
        ("weights.safetensors is not a model folder: finetune runs the teacher. Give a folder",
         (gpt2, text, "--teacher", weights, "--out", out)),
        ("short.txt has 0 pieces of 32 tokens, and one to learn from and one to hold out are needed: give more text, or"
         " --context 2 or less.", (gpt2, short, "--out", out, "--context", 32)),
        ("short.txt has 1 piece of 4 tokens, and one to learn from and one to hold out are needed: give more text, or"
         " --context 2 or less, or --validation 0, which holds none out.", (gpt2, short, "--out", out, "--context", 4)),
        ("short.txt has 1 line, and one to learn from and one to hold out are needed: give more text, or --validation 0,"
         " which holds none out.", (bert, short, "--out", out)),
        ("short.txt has 0 pieces of 16 tokens, and one to learn from is needed: give more text, or --context 4 or less.",
         (gpt2, short, "--out", out, "--validation", 0)),
        ("latin.txt is not a UTF-8 text file", (gpt2, latin, "--out", out)),
        ("--context 64 is more than the 32 positions", (gpt2, text, "--out", out, "--context", 64)),
        ("without the head that predicts words: give a GPT2LMHeadModel, or let it learn from its dense self with --distill",
         (headless, text, "--out", out)),
        ("dumb has no tokenizer, so a text cannot be its input", (dumb, text, "--out", out)),
        ("'magic' is no rule of sparse training", (gpt2, text, "--out", out, "--schedule", "magic")),
        ("unknown --method 'magic': it is recover, sr-ste, fst, s-ste", (gpt2, text, "--out", out, "--method", "magic")),
        ("--method fst together with --schedule", (gpt2, text, "--out", out, "--method", "fst", "--schedule", "fst")),
        ("has shares of the steps, and --minutes has none", (gpt2, text, "--out", out, "--schedule", "fst:9%, fixed",
                                                             "--minutes", 1)),
        ("ends dense, and so would the model", (gpt2, text, "--out", out, "--schedule", "fst:9, dense")),
        ("thesis.tex: give the result another name", (gpt2, text, "--out", strange)),
        ("file is a file: the result is a folder", (gpt2, text, "--out", file)),
        ("there is there already: name another place, or pass --overwrite", (gpt2, text, "--out", there)),
        ("is the model itself", (gpt2, text, "--out", gpt2)),
        ("lie inside each other", (gpt2, text, "--out", gpt2 / "out")),
        ("no such folder. Make it first", (gpt2, text, "--out", tmp_path / "a" / "b")),
        ("which is replaced as a whole at the end", (gpt2, text, "--out", there, "--report", there / "page.html")),
        ("--device strange cannot be used here: give cpu or cuda.", (gpt2, text, "--out", out, "--device", "strange")),
        ("--device tpu cannot be used here: give cpu or cuda.", (gpt2, text, "--out", out, "--device", "tpu")),
        ("--device meta cannot be used here: give cpu or cuda.", (gpt2, text, "--out", out, "--device", "meta")),
        ("--device cuda:99 cannot be used here (", (gpt2, text, "--out", out, "--device", "cuda:99")),
        ("--minutes 0: a time above 0", (gpt2, text, "--out", out, "--minutes", 0)),
        ("--minutes -1: a time above 0", (gpt2, text, "--out", out, "--minutes", -1)),
        ("--minutes inf: a time above 0", (gpt2, text, "--out", out, "--minutes", "inf")),
        ("unknown --products 'magic': it is auto, sparse, dense", (gpt2, text, "--out", out, "--products", "magic")),
        ("error: --lr 0.0: a number above 0", (gpt2, text, "--out", out, "--lr", 0)),
        ("2:5", (gpt2, text, "--out", out, "--pattern", "2:5:3")),
    ]  # fmt: skip
    for words, arguments in cases:
        context = () if "--context" in arguments else ("--context", 16)
        done = run("finetune", *arguments, *context)
        assert done.code == 2, (words, done)
        assert words in done.err, done.err
        assert not out.exists()


def test_a_headless_decoder_learns_from_its_dense_self(text: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    headless = folder_of(transformers.GPT2Model(gpt2_config()), tmp_path / "headless")
    done = run("finetune", headless, text, "--out", tmp_path / "out", "--distill", "--steps", 20, "--lr", 1e-3, *QUICK)
    assert done.code == 0, done.err


def test_the_end_of_a_text_is_held_out_and_shuffling_follows_torch(gpt2: Path, bert: Path, text: Path) -> None:
    model = transformers.GPT2LMHeadModel.from_pretrained(gpt2)
    found = texts(gpt2, model, text, 16, 4, 0.1, labels=True)
    total = found.samples + found.held
    assert found.held == round(total / 10)
    ids = [id for line in text.read_text().split() for id in [2 + WORDS.index(line)]]
    last = torch.tensor(ids[(total - found.held) * 16 : total * 16]).view(-1, 16)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in found.validation]), last)
    assert all(torch.equal(batch["labels"], batch["input_ids"]) for batch in found.validation)
    passes = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        passes.append(torch.cat([batch["input_ids"] for batch in found.train]))
    assert len(passes[0]) == found.samples
    assert torch.equal(passes[0], passes[1])
    assert not torch.equal(passes[0], passes[2])
    assert sorted(passes[0].tolist()) == sorted(passes[2].tolist())
    lines = texts(bert, transformers.BertForMaskedLM.from_pretrained(bert), text, 10, 4, 0.1, labels=False)
    assert (lines.samples, lines.held) == (108, 12)
    batch = next(iter(lines.train))
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert batch["attention_mask"].sum(1).max() <= 10
