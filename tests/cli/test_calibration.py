"""twofour prune --calibration: texts and tensors from files, on a folder that transformers wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import twofour
from twofour.cli import models
from twofour.cli import prune as cli_prune
from twofour.cli.inputs import calibration_batches

transformers = pytest.importorskip("transformers", reason="needs transformers (twofour[transformers])")
tokenizers = pytest.importorskip("tokenizers")

WORDS = [f"w{i}" for i in range(40)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    lines = [
        " ".join(WORDS[i] for i in torch.randint(0, 40, (int(n),), generator=generator))
        for n in torch.randint(2, 14, (60,), generator=generator)
    ]
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return path


def folder_of(model: nn.Module, path: Path) -> Path:
    """The model with a tokenizer of whole words."""
    model.save_pretrained(path)  # type: ignore[operator]
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")
    wrapped.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=42, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=16,
    )  # fmt: skip
    return folder_of(transformers.BertModel(config), tmp_path_factory.mktemp("bert") / "bert")


def test_text_prunes_better_than_magnitude(bert: Path, text: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    done = run("prune", bert, tmp_path / "one", "--calibration", text, "--json", "--threads", "1")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert record["summary"]["method"] == "admm"
    pruned = [row for row in record["rows"] if row["action"] == "pruned"]
    assert len(pruned) == 13  # the pooler too: the model calls it
    assert all(row["error"] < row["error_masked"] for row in pruned)
    model = transformers.BertModel.from_pretrained(tmp_path / "one")
    assert twofour.check(model).summary["holds"]
    again = run("prune", bert, tmp_path / "two", "--calibration", text, "--checkpoint", tmp_path / "kept")
    assert again.code == 0
    assert "mean output error" in again.out
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    resumed = run("prune", bert, tmp_path / "three", "--calibration", text, "--checkpoint", tmp_path / "kept")
    assert "from the checkpoint" in resumed.out


@pytest.mark.parametrize("keeps", [False, True])
def test_ctrl_c_says_what_is_kept(
    keeps: bool, bert: Path, text: Path, tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "write_dense", lambda *_: pytest.fail("it was written"))
    monkeypatch.setattr(cli_prune, "prune", interrupted)
    kept = tmp_path / "kept"
    options = ("--checkpoint", kept) if keeps else ()
    stopped = run("prune", bert, tmp_path / "one", "--calibration", text, *options)
    assert stopped.code == 130
    ways = {
        True: f"interrupted: {kept} keeps the layers that are finished: the same command goes on behind them.",
        False: "interrupted: nothing was written; with --checkpoint FOLDER, finished layers are kept for the next run.",
    }
    assert stopped.err.strip() == ways[keeps]
    monkeypatch.setattr(models, "open_model", interrupted)
    assert run("check", bert)[0::2] == (130, "interrupted.\n")


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_lines_are_padded_and_the_padding_is_masked(bert: Path, text: Path) -> None:
    model = transformers.BertModel.from_pretrained(bert)
    batches = calibration_batches(bert, model, str(text), samples=30, length=8, size=7)
    assert [len(batch["input_ids"]) for batch in batches] == [7, 7, 7, 7, 2]
    for batch in batches:
        assert torch.equal(batch["input_ids"] != 0, batch["attention_mask"].bool())
        assert batch["input_ids"].shape[1] <= 8


def test_targets(bert: Path, text: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    weights = {}
    for targets in ("dense", "pruned"):
        done = run("prune", bert, tmp_path / targets, "--calibration", text, "--targets", targets, "--threads", "1")
        assert done.code == 0, done.err
        weights[targets] = load_file(tmp_path / targets / "model.safetensors")
    last = "encoder.layer.1.output.dense.weight"
    assert not torch.equal(weights["dense"][last], weights["pruned"][last])
    done = run("prune", bert, tmp_path / "bad", "--targets", "dense")
    assert done.code == 2
    assert "--targets dense is about the outputs on --calibration: name that too" in done.err
    done = run("prune", bert, tmp_path / "bad", "--calibration", text, "--targets", "dense", "--method", "wanda")
    assert done.code == 2
    assert "method 'wanda' keeps weights as they are" in done.err
    assert not (tmp_path / "bad").exists()


def test_decoders_get_running_text(text: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=42, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    folder = folder_of(transformers.GPT2LMHeadModel(config), tmp_path / "gpt2")
    model = transformers.GPT2LMHeadModel.from_pretrained(folder)
    batches = calibration_batches(folder, model, str(text), samples=5, length=99, size=2)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 16), (2, 16), (1, 16)]
    done = run("prune", folder, tmp_path / "out", "--calibration", text, "--method", "sparsegpt", "--length", "16")
    assert done.code == 0, done.err
    short = tmp_path / "short.txt"
    short.write_text("w1 w2", encoding="utf-8")
    done = run("prune", folder, tmp_path / "other", "--calibration", short)
    assert (done.code, "the text has 2 tokens, less than one piece of 16" in done.err) == (2, True)
    assert not (tmp_path / "other").exists()


def test_tensors_by_name(bert: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    ids = torch.randint(0, 42, (12, 9))
    save_file({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, tmp_path / "in.safetensors")
    done = run(
        "prune", bert, tmp_path / "out", "--calibration", tmp_path / "in.safetensors", "--method", "wanda", "--json"
    )
    assert done.code == 0, done.err
    assert json.loads(done.out)["rows"][-1]["tokens"] == 12  # the pooler sees one token of each
    save_file({"input_ids": ids, "attention_mask": torch.ones(3, 9)}, tmp_path / "bad.safetensors")
    done = run("prune", bert, tmp_path / "bad", "--calibration", tmp_path / "bad.safetensors")
    assert done.code == 2
    assert "every tensor needs the same first axis, samples; it has" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--calibration", "nowhere.txt"], "--calibration nowhere.txt: no such file. Name a text file, or 'python'"),
        (
            ["--method", "sparsegpt"],
            "method 'sparsegpt' measures what each layer does to inputs: pass --calibration, a few",
        ),
        (["--calibration", "python", "--method", "obc"], "unknown method 'obc'"),
    ],
)
def test_wrong_use_is_one_line(
    bert: Path, tmp_path: Path, run: Callable[..., Any], arguments: list[str], message: str
) -> None:
    done = run("prune", bert, tmp_path / "out", *arguments)
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "out").exists()


def test_a_file_has_no_model_to_run(tmp_path: Path, text: Path, run: Callable[..., Any]) -> None:
    save_file({"a.weight": torch.randn(8, 8)}, tmp_path / "a.safetensors")
    done = run("prune", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--calibration", text)
    assert done.code == 2
    assert "a.safetensors is not a model folder: --calibration runs the model. Give a folder" in done.err


def test_sensitivity(bert: Path, text: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    page = tmp_path / "page.html"
    done = run("sensitivity", bert, "-p", "2:4", "-p", "1:4", "--calibration", text, "--samples", "20", "--html", page)
    assert done.code == 0, done.err
    assert "lose most as 2:4" in done.out
    assert page.is_file()
    done = run("sensitivity", tmp_path / "missing.safetensors")
    assert (done.code, "no such file or folder" in done.err) == (2, True)


def test_permute(bert: Path, text: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    done = run("permute", bert, tmp_path / "out", "--calibration", text, "--samples", "20", "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert record["summary"]["kept after"] > record["summary"]["kept before"]
    before, after = (transformers.BertModel.from_pretrained(path).eval() for path in (bert, tmp_path / "out"))
    ids = torch.randint(0, 42, (3, 9))
    with torch.no_grad():
        torch.testing.assert_close(before(ids)[0], after(ids)[0], atol=1e-5, rtol=1e-4)
    names = [name for name, weight in before.state_dict().items() if not torch.equal(weight, after.state_dict()[name])]
    assert names
