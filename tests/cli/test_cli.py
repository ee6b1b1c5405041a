"""The command line, from real folders and files: results, exit codes, one-line errors."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import twofour
from twofour.cli import check, compress, finetune, measure, options, prune
from twofour.workflows.timing import Timing

transformers = pytest.importorskip("transformers", reason="needs transformers (twofour[transformers])")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT as transformers saves it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "bert"
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    transformers.BertModel(config).save_pretrained(path)
    (path / "notes.txt").write_text("kept", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain safetensors file."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("files") / "weights.safetensors"
    tensors = {
        "embed_tokens.weight": torch.randn(10, 16),
        "layers.0.up.weight": torch.randn(32, 16),
        "layers.0.up.bias": torch.randn(32),
        "layers.0.norm.weight": torch.randn(16),
        "layers.0.conv.weight": torch.randn(8, 4, 3, 3),
        "lm_head.weight": torch.randn(10, 16),
        "steps": torch.tensor([3]),
    }
    save_file(tensors, path)
    return path


def test_a_folder_from_prune_to_measure(run: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    pruned, small = tmp_path / "pruned", tmp_path / "small"
    result = run("prune", folder, pruned)
    assert result.code == 0
    assert re.search(r"layers pruned +13 of 16", result.out)
    assert (pruned / "notes.txt").read_text(encoding="utf-8") == "kept"
    for written in pruned.iterdir():  # whoever may read other files of this user may read the weights
        assert written.stat().st_mode == (pruned / "notes.txt").stat().st_mode, written
    reloaded = transformers.AutoModel.from_pretrained(pruned, local_files_only=True)
    assert twofour.check(reloaded).summary["holds"]

    assert run("check", pruned).code == 0
    result = run("compress", pruned, small, "--force", "--dtype", "bfloat16", "--json")
    report = json.loads(result.out)
    before, after = (report["summary"][f"weight bytes of those compressed, {when}"] for when in ("before", "after"))
    assert after <= 0.57 * before
    assert report["summary"] == {
        "layers compressed": "13 of 16",
        "kept dense because sparse would be slower": 0,
        "weight bytes of those compressed, before": before,
        "weight bytes of those compressed, after": after,
        "weights stored compressed": 13,
        "file bytes": (small / "model.twofour.safetensors").stat().st_size,
    }
    assert sorted(path.name for path in small.iterdir()) == ["config.json", "model.twofour.safetensors", "notes.txt"]

    rows = json.loads(run("explain", small, "--json").out)["rows"]
    assert sum(row["kernel"] != "dense (torch)" for row in rows) == 13
    assert run("check", small).code == 0
    result = run(
        "measure", small, "--against", folder, "--length", 8, "--batch", "1,2", "--repeats", 2, "--dtype", "float32"
    )
    assert result.code == 0
    assert re.search(r"speedup, all batches +\d", result.out)
    assert "1x8" in result.out
    assert "2x8" in result.out


def test_a_file_from_prune_to_measure(run: Callable[..., Any], weights: Path, tmp_path: Path) -> None:
    pruned, small = tmp_path / "pruned.safetensors", tmp_path / "small.safetensors"
    report = json.loads(run("prune", weights, pruned, "--json").out)
    assert {row["layer"]: row["action"] for row in report["rows"]} == {
        "embed_tokens": "skipped",
        "layers.0.up": "pruned",
        "layers.0.conv": "pruned",
        "lm_head": "skipped",
    }
    before, after = load_file(weights), load_file(pruned)
    assert sorted(before) == sorted(after)
    assert torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert torch.equal(before["steps"], after["steps"])
    assert torch.equal(
        after["layers.0.up.weight"],
        twofour.SparseMatrix.from_dense(before["layers.0.up.weight"], prune=True).to_dense(),
    )
    assert run("compress", pruned, small, "--force").code == 0
    assert run("check", small).code == 0
    rows = {row["layer"]: row for row in json.loads(run("explain", small, "--json").out)["rows"]}
    assert rows["layers.0.up"]["kernel"] != "dense (torch)"
    timed = json.loads(run("measure", small, "--batch", "1", "--length", "4", "--json").out)
    assert timed["summary"]["layers timed"] == 1
    assert timed["notes"][:1] == ["each layer was timed alone, at 4 tokens"]
    several = json.loads(run("measure", small, "--batch", "1,8", "--length", "4", "--json").out)
    assert several["notes"][:1] == ["each layer was timed alone, at 4 and 32 tokens, in sum"]
    assert next(row for row in timed["rows"] if row["layer"] == "layers.0.up")["speedup"] > 0
    assert run("measure", small, "--text", weights).err.startswith("error: ")


def test_tables_fit_100_columns_and_pipes_get_no_progress(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "twofour", "prune", str(folder), str(tmp_path / "pruned")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert max(map(len, result.stdout.splitlines())) <= 100
    assert result.stderr == ""


def test_check_says_no_with_exit_code_1(run: Callable[..., Any], folder: Path) -> None:
    result = run("check", folder)
    assert result.code == 1
    assert result.err.startswith("no: 'encoder.layer.0.attention.self.query' is not 2:4: 256 of 256 groups")
    assert "broken" in result.out
    assert result.err.count("\n") == 1


def test_pages_are_written(run: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert run("explain", folder, "--html", page).code == 0
    assert "encoder.layer.0.attention.self.query" in page.read_text(encoding="utf-8")


def test_dry_run_writes_nothing(run: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    assert run("prune", folder, tmp_path / "pruned", "--dry-run").code == 0
    assert list(tmp_path.iterdir()) == []


def test_overwrite_replaces_and_its_absence_refuses(run: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "pruned"
    target.mkdir()
    (target / "old.txt").write_text("old", encoding="utf-8")
    (target / "config.json").write_text("{}", encoding="utf-8")
    result = run("prune", folder, target)
    assert (result.code, result.out) == (2, "")
    assert result.err == f"error: {target} is there already: name another place, or pass --overwrite.\n"
    assert run("prune", folder, target, "--overwrite").code == 0
    assert not (target / "old.txt").exists()
    assert run("prune", folder, folder, "--overwrite").err == (
        f"error: {folder} is the model itself: give the result another name.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "{tmp}/nothing"], r"nothing: no such file or folder\."),
        (["check", "{tmp}"], r"has no config.json: it is not a transformers model folder\."),
        (
            ["check", "{tmp}/text.txt"],
            r"text.txt is not a model: give a folder with config.json, or a .safetensors file\.",
        ),
        (["check", "{tmp}/bad.safetensors"], r"bad.safetensors is not a safetensors file, or is damaged: "),
        (["check", "{folder}", "-p", "2-4"], r"unknown pattern '2-4': write KEEP:GROUP"),
        (["prune", "{folder}", "{tmp}/out", "--exclude", "nope*"], r"error: --exclude 'nope\*' matches no layer"),
        (["prune", "{folder}", "{tmp}/out", "--method", "magic"], r"unknown method 'magic'"),
        (["prune", "{folder}", "{tmp}/no/such/out"], r"no/such: no such folder\. Make it first\."),
        (["prune", "{weights}", "{tmp}/out"], r"the result of a .safetensors file is one too"),
        (["prune", "{tmp}/text.txt", "{tmp}/out"], r"text.txt is not a model: give a folder with config.json"),
        (["prune", "{tmp}/nothing", "{tmp}/out"], r"nothing: no such file or folder\."),
        (["prune", "{folder}", "{tmp}/out", "--method", "wanda"], r"inputs: pass --calibration, a few hundred inputs"),
        (
            ["prune", "{folder}", "{tmp}/out", "--random-tokens", "0.2"],
            r"error: --random-tokens 0\.2 draws .* pass --calibration too, or leave this out\.",
        ),
        (
            ["compress", "{folder}", "{tmp}/out"],
            r"nothing to compress: 'encoder\S*query' is not 2:4 \(256 of 256 groups\), nor are 12 more layers\. Prune first:"
            r" twofour prune --pattern 2:4\.$",
        ),
        (
            ["compress", "{folder}", "{tmp}/out", "--weights", "int4"],
            r"error: --weights int4: it is 'int8', 'float8' or 'bfloat16'\. Leave it out",
        ),
        (["prune", "{folder}", "{tmp}/out", "--threads", "3000000000"], r"--threads 3000000000: give 1 up to 1024\."),
        (
            ["compress", "{folder}", "{tmp}/out", "--tokens", "1,x"],
            r"--tokens '1,x' is not a list of positive whole numbers",
        ),
        (["compress", "{folder}", "{tmp}/out", "--dtype", "int4"], r"unknown --dtype 'int4': it is float32"),
        (
            ["prune", "{folder}", "{tmp}/out", "--html", "{tmp}/no/page.html"],
            r"no such folder for the page\. Make it first",
        ),
        (["prune", "{folder}", "{tmp}/out", "--html", "{tmp}"], r"--html .* is a folder: name a file in it"),
        (
            ["prune", "{folder}", "{tmp}/text.txt", "--overwrite"],
            r"text.txt is a file: the result of a folder is a folder",
        ),
        (["prune", "{weights}", "{tmp}", "--overwrite"], r"is a folder: the result of a .safetensors file is a file"),
        (["prune", "{folder}", "{tmp}/out/..", "--overwrite"], r"write its name out, as in /"),
        (["measure", "{folder}", "--batch", "0"], r"--batch '0' is not a list of positive"),
        (["measure", "{folder}", "--length", "9999"], r"--length 9999 is more than the 512 positions the model has"),
        (["measure", "{folder}", "--against", "{weights}"], r"are not of one kind"),
        (["measure", "{folder}", "--against", "{tmp}/nope"], r"nope: no such file or folder\."),
        (["measure", "{tmp}/nope", "--against", "{folder}"], r"nope: no such file or folder\."),
        (["sensitivity", "{weights}"], r"is not a model folder: sensitivity runs the model\. Give a folder"),
        (["permute", "{weights}", "{tmp}/out"], r"is not a model folder: permute runs the model\. Give a folder"),
        (["measure", "{folder}", "--text", "{tmp}/text.txt"], r"has no tokenizer, so --text cannot be used"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    run: Callable[..., Any], folder: Path, weights: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "text.txt").write_text("hello", encoding="utf-8")
    (tmp_path / "bad.safetensors").write_bytes(b"\x01\x02")
    result = run(*(argument.format(tmp=tmp_path, folder=folder, weights=weights) for argument in arguments))
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert "  " not in result.err  # no indentation left of lines that were joined
    assert re.search(message, result.err)
    assert "Traceback" not in result.err
    assert not (tmp_path / "out").exists()


def test_float64_weights_are_told_what_helps_and_it_does(run: Callable[..., Any], tmp_path: Path) -> None:
    source, pruned, small = (tmp_path / f"{name}.safetensors" for name in ("wide", "pruned", "small"))
    save_file({"fc.weight": torch.randn(16, 16, dtype=torch.float64)}, source)
    assert run("prune", source, pruned).code == 0
    done = run("compress", pruned, small, "--force")
    assert done.code == 2
    assert "weights of float64 cannot be stored as N:M: the format knows float32" in done.err
    assert done.err.endswith("convert the model first, as --dtype float32 does.\n")
    assert run("compress", pruned, small, "--force", "--dtype", "float32").code == 0


def test_more_threads_than_cores_are_noted(
    run: Callable[..., Any], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    for cores, words in ((1, "1 core here"), (2, "2 cores here")):
        monkeypatch.setattr(options, "_cores", lambda cores=cores: cores)
        many = run("prune", weights, tmp_path / "out.safetensors", "--dry-run", "--threads", 3, "--json")
        assert many.code == 0
        assert many.err == f"note: --threads 3 is more than the {words}: threads wait for each other.\n"
        assert json.loads(many.out)["verb"] == "prune"
        assert run("check", weights, "--json").err.startswith("no: ")
        assert run("prune", weights, tmp_path / "out.safetensors", "--dry-run", "--threads", cores).err == ""
    assert told == [3, 1, 3, 2]


@pytest.mark.parametrize(
    ("text", "typed"),
    [
        ("include='a b' and exclude=[\"*.x\", 'y']", "--include 'a b' and --exclude '*.x' --exclude y"),
        ("lr=0.0: a number", "--lr 0.0: a number"),
        ("made with seed=0, this run with seed=1.", "made with --seed 0, this run with --seed 1."),
        (
            "made with teacher=None, this run with include=['*.h']",
            "made with no --teacher, this run with --include '*.h'",
        ),
        ("made with seconds=90.0, this run with seconds=None.", "made with --minutes 1.5, this run with no --minutes."),
        ("made with include=[], this run with dry_run=False", "made with no --include, this run with no --dry-run"),
        ("no budget: give steps= or seconds=.", "no budget: give --steps or --minutes."),
        ("pass against= to compare", "pass --against to compare"),
        ("remeasure=True times again", "--remeasure times again"),
        ("leave it out with exclude=.", "leave it out with --exclude."),
        ("twofour.prune(model, '1:4'), then", "twofour prune --pattern 1:4, then"),
        ("twofour.compress(model) makes", "twofour compress makes"),
        ("(twofour.prune(dry_run=True) says why)", "(twofour prune --dry-run says why)"),
        ("from Python, twofour.measure().", "from Python, twofour.measure()."),
        ("a file 'include=x' of backend='cpu', strict=False", "a file 'include=x' of backend='cpu', strict=False"),
    ],
)
def test_arguments_of_python_are_told_as_they_are_typed(text: str, typed: str) -> None:
    assert options.as_typed(text) == typed


def test_what_is_told_as_typed_are_options() -> None:
    """Or messages would name options that there are not."""
    taken = {
        name for module in (check, compress, finetune, measure, prune) for name in signature(module.run).parameters
    }
    assert set(options._ARGUMENTS) <= taken
    for name in ("include", "exclude", "calibration", "method", "random_tokens", "weights", "against"):
        assert name in options._ARGUMENTS


def test_reports_name_options_too(run: Callable[..., Any], folder: Path, weights: Path, tmp_path: Path) -> None:
    record = json.loads(run("prune", weights, tmp_path / "out.safetensors", "--dry-run", "--json").out)
    reasons = {row["layer"]: row.get("reason") for row in record["rows"]}
    assert reasons["lm_head"] == "output head (name it in --include to prune it)"
    quick = ("--length", 4, "--batch", 1, "--repeats", 1, "--json")
    notes = json.loads(run("measure", folder, *quick).out)["notes"]
    assert "compared with a dense copy of the same weights; pass --against to compare with the original model" in notes
    assert "no layer of the model is compressed: twofour compress makes it fast" in notes


def test_wrong_usage_has_exit_code_2(run: Callable[..., Any]) -> None:
    assert run("prune").code == 2
    assert run("fly").code == 2
    assert run("--help").code == 0


def test_damaged_folder(run: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").write_bytes(b"12345678 not a model")
    result = run("check", broken)
    assert result.code == 2
    assert re.match(r"error: .*broken cannot be loaded: ", result.err)
    assert result.err.count("\n") == 1
    (broken / "config.json").write_text("{", encoding="utf-8")
    assert "config.json is not a JSON object" in run("check", broken).err
    (broken / "config.json").write_text('{"architectures": ["NoSuchModel"]}', encoding="utf-8")
    assert re.search(r"asks for NoSuchModel, which transformers .* does not have", run("check", broken).err)


def _run_limited(arguments: list[str], limit_bytes: int) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    code = "import signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from twofour.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, preexec_fn=limit, check=False
    )


@pytest.mark.parametrize("command", ["prune", "compress"])
@pytest.mark.parametrize("source", ["folder", "weights"])
def test_a_full_disk_leaves_nothing_behind(
    command: str, source: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A file size limit makes writing fail half-way, as a full disk does."""
    given: Path = request.getfixturevalue(source)
    if command == "compress":
        given = tmp_path / f"given{given.suffix}"
        subprocess.run([sys.executable, "-m", "twofour", "prune", request.getfixturevalue(source), given], check=True)
    target = tmp_path / "target" / f"result{given.suffix}"
    target.parent.mkdir()
    extra = ["--force"] if command == "compress" else []
    result = _run_limited([command, str(given), str(target), *extra], 1500)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "cannot write" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(target.parent.iterdir()) == []


def test_an_unreadable_file(run: Callable[..., Any], weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the refusal is made up."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("twofour.cli.models.safe_open", refuse)
    result = run("check", weights)
    assert result.code == 2
    assert result.err == f"error: {weights} cannot be read: Permission denied.\n"


def test_info_names_the_kernels(run: Callable[..., Any]) -> None:
    report = json.loads(run("info", "--json").out)
    assert {row["dtype"] for row in report["rows"]} == {"float32", "bfloat16", "float16"}
    assert report["summary"]["native kernels"]


def test_info_says_so_without_native_kernels() -> None:
    code = "import sys; sys.modules['twofour._native'] = None; from twofour.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code, "info"], capture_output=True, text=True, check=True)
    assert "no: this build of twofour has no native kernels" in result.stdout


def test_overwrite_never_takes_the_source_or_what_is_no_model(
    run: Callable[..., Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer = tmp_path / "outer"
    source = outer / "model"
    shutil.copytree(folder, source)
    (source / "sub").mkdir()
    monkeypatch.chdir(outer)
    for target in (outer, source / "sub" / "out", Path("."), Path("..")):
        result = run("prune", source, target, "--overwrite")
        assert result.code == 2
        assert "lie inside each other: put the result elsewhere" in result.err
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work", encoding="utf-8")
    result = run("prune", source, precious, "--overwrite")
    assert "holds other things than a model" in result.err
    assert (precious / "thesis.txt").exists()
    assert (source / "model.safetensors").exists()


def test_pruning_a_compressed_model_writes_a_dense_one(
    run: Callable[..., Any], folder: Path, weights: Path, tmp_path: Path
) -> None:
    for source, suffix in ((folder, ""), (weights, ".safetensors")):
        pruned, small, again = (tmp_path / f"{name}{suffix}" for name in ("pruned", "small", "again"))
        assert run("prune", source, pruned).code == 0
        assert run("compress", pruned, small, "--force").code == 0
        assert run("prune", small, again).code == 0
        assert run("check", again).code == 0
    before, after = load_file(tmp_path / "pruned.safetensors"), load_file(tmp_path / "again.safetensors")
    assert sorted(before) == sorted(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_missing_weights_are_not_made_up(run: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["encoder.layer.0.output.dense.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    result = run("check", broken)
    assert result.code == 2
    assert "lacks weights that BertModel needs: encoder.layer.0.output.dense.weight" in result.err


def test_integer_tensors_beside_a_weight_survive(run: Callable[..., Any], tmp_path: Path) -> None:
    source, target = tmp_path / "source.safetensors", tmp_path / "target.safetensors"
    tensors = {"fc.mask": torch.ones(8, dtype=torch.bool), "fc.weight": torch.randn(8, 8), "fc.a": torch.tensor([3])}
    save_file(tensors, source)
    assert run("prune", source, target).code == 0
    assert sorted(load_file(target)) == sorted(tensors)


def test_layers_of_a_bare_file_whose_kind_is_unclear_are_left(run: Callable[..., Any], tmp_path: Path) -> None:
    source, target = tmp_path / "source.safetensors", tmp_path / "target.safetensors"
    tensors = {
        "fc.weight": torch.randn(8, 8),
        "shared.weight": torch.randn(8, 8),
        "h.0.attn.c_attn.weight": torch.randn(8, 24),
        "experts.weight": torch.randn(2, 8, 8),
        "quantized.weight": torch.ones(8, 8, dtype=torch.int8),
        "quantized.bias": torch.ones(8, dtype=torch.int32),
        "h.0.mlp.c_proj.weight": torch.randn(32, 8),
        "h.0.mlp.c_fc.weight": torch.randn(8, 32),
        "decoder.relative_attention_bias.weight": torch.randn(32, 8),
        "transformer.wte.weight": torch.randn(8, 8),
    }
    save_file(tensors, source)
    rows = {row["layer"]: row for row in json.loads(run("prune", source, target, "--json").out)["rows"]}
    assert {name: row["action"] for name, row in rows.items()} == {
        "fc": "pruned",
        "shared": "skipped",
        "h.0.attn.c_attn": "skipped",
        "experts": "skipped",
        "quantized": "skipped",
        "h.0.mlp.c_proj": "skipped",
        "h.0.mlp.c_fc": "skipped",
        "decoder.relative_attention_bias": "skipped",
        "transformer.wte": "skipped",
    }
    assert rows["experts"]["reason"] == "UnknownLayer is not a Linear or convolution"
    assert rows["quantized"]["reason"] == "weight is int8, not floating point"
    after = load_file(target)
    assert sorted(after) == sorted(tensors)
    assert all(torch.equal(after[name], tensors[name]) for name in tensors if name != "fc.weight")


def test_a_compressed_file_with_shared_weights_is_written_dense_under_every_name(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.a = torch.nn.Linear(16, 16, bias=False)
    model.b = model.a
    model.norm = model.norm_too = torch.nn.LayerNorm(4)
    twofour.prune(model)
    weight = model.a.weight.detach().clone()
    twofour.save(model, tmp_path / "small.safetensors")
    assert run("prune", tmp_path / "small.safetensors", tmp_path / "dense.safetensors").code == 0
    after = load_file(tmp_path / "dense.safetensors")
    assert sorted(after) == ["a.weight", "b.weight", "norm.bias", "norm.weight", "norm_too.bias", "norm_too.weight"]
    assert torch.equal(after["a.weight"], weight)
    assert torch.equal(after["b.weight"], weight)


def test_a_replacement_that_fails_half_way_restores_the_old_folder(
    run: Callable[..., Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text("old", encoding="utf-8")
    replace = os.replace

    def fail_for_the_new(old: Path, new: Path) -> None:
        if str(old).endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        replace(old, new)

    monkeypatch.setattr("twofour.cli.models.os.replace", fail_for_the_new)
    result = run("prune", folder, target, "--overwrite")
    assert result.code == 2
    assert "cannot write" in result.err
    assert (target / "config.json").read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_weights_of_another_size_are_named(run: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["pooler.dense.weight"] = torch.zeros(8, 8)
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    result = run("check", broken)
    assert result.code == 2
    assert "pooler.dense.weight is [8, 8], BertModel needs [32, 32]" in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("LlamaForCausalLM", {"hidden_size": 16, "num_attention_heads": 2, "tie_word_embeddings": True}),
        ("T5ForConditionalGeneration", {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2}),
        ("BertForMaskedLM", {"hidden_size": 16, "num_attention_heads": 2}),
    ],
)
def test_tied_weights_are_not_missing(
    run: Callable[..., Any], tmp_path: Path, architecture: str, config: dict[str, object]
) -> None:
    builder = getattr(transformers, architecture)
    sizes = {"vocab_size": 50, "intermediate_size": 32, "num_hidden_layers": 1, **config}
    builder(builder.config_class(**sizes)).save_pretrained(tmp_path / "model")
    assert run("prune", tmp_path / "model", tmp_path / "pruned").code == 0
    assert run("compress", tmp_path / "pruned", tmp_path / "small", "--force").code == 0
    assert run("prune", tmp_path / "small", tmp_path / "again").code == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "again"))
    assert sorted(before) == sorted(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ["fc.training", "_modules", "training.weight"])
def test_names_that_torch_keeps_for_itself(run: Callable[..., Any], tmp_path: Path, name: str) -> None:
    source = tmp_path / "source.safetensors"
    save_file({"fc.weight": torch.randn(8, 8), name: torch.ones(2, dtype=torch.int32)}, source)
    result = run("prune", source, tmp_path / "target.safetensors")
    assert result.code == 2
    assert result.err == f"error: the file has a tensor '{name}', a name that torch keeps for itself: rename it.\n"


@pytest.mark.parametrize("compressed", [False, True])
def test_a_tensor_lost_on_the_way_is_an_error(
    run: Callable[..., Any], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressed: bool
) -> None:
    source, target = weights, tmp_path / "target.safetensors"
    if compressed:
        source = tmp_path / "small.safetensors"
        twofour.save(torch.nn.Sequential(torch.nn.Linear(8, 8)), source)

    def lossy(model: torch.nn.Module) -> int:
        next(module for module in model.modules() if module._parameters)._parameters.clear()
        return 0

    monkeypatch.setattr("twofour.cli.models.to_dense_modules", lossy)
    result = run("prune", source, target)
    assert result.code == 2
    assert "has tensors whose names twofour cannot write back: " in result.err
    assert not target.exists()


def test_reports_say_that_kinds_of_a_bare_file_are_a_guess(
    run: Callable[..., Any], folder: Path, weights: Path, tmp_path: Path
) -> None:
    guess = "layer kinds of a bare file are guessed from names and shapes"
    assert guess in run("prune", weights, tmp_path / "pruned.safetensors").out
    assert guess in run("check", weights).out
    assert guess in run("explain", weights).out
    assert guess not in run("explain", folder).out


_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "model", "is", "sparse", "##ly", "fast"]


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """A small BERT with a WordPiece tokenizer."""
    torch.manual_seed(0)
    path = tmp_path / "text"
    config = transformers.BertConfig(
        vocab_size=len(_WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config).save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(_WORDS), encoding="utf-8")
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizerFast"}', encoding="utf-8")
    return path


def _seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """The batches that the verb is given from here on."""
    batches: list[dict[str, torch.Tensor]] = []

    def measure(model: torch.nn.Module, inputs: list[dict[str, torch.Tensor]], **options: object) -> object:
        batches.extend(inputs)
        return twofour.measure(model, inputs, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("twofour.cli.measure.measure", measure)
    return batches


def test_measure_reads_text_with_the_models_tokenizer(
    run: Callable[..., Any], text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the model\n\nis sparsely fast\n", encoding="utf-8")
    assert run("prune", text_folder, tmp_path / "pruned").code == 0
    assert run("compress", tmp_path / "pruned", tmp_path / "small", "--force").code == 0
    batches = _seen(monkeypatch)
    options = ["--length", 4, "--batch", "1,3", "--repeats", 2]
    result = run("measure", tmp_path / "small", *options, "--text", text)
    assert result.code == 0, result.err
    assert result.err == ""
    assert batches[0]["input_ids"].tolist() == [[5, 6, 7, 8]]
    assert batches[1]["input_ids"].tolist() == [[5, 6, 7, 8], [9, 10, 5, 6], [7, 8, 9, 10]]
    assert "3x4" in result.out
    batches.clear()
    assert run("measure", tmp_path / "small", *options).code == 0
    assert batches[1]["input_ids"].shape == (3, 4)
    text.write_text("\n", encoding="utf-8")
    assert "the text is empty" in run("measure", tmp_path / "small", *options, "--text", text).err
    text.write_bytes(b"\xff\xfe")
    assert "is not a UTF-8 text file" in run("measure", tmp_path / "small", *options, "--text", text).err


def test_measure_refuses_a_tokenizer_of_another_model(
    run: Callable[..., Any], text_folder: Path, tmp_path: Path
) -> None:
    (text_folder / "vocab.txt").write_text("\n".join([*_WORDS, "new"]), encoding="utf-8")
    (tmp_path / "text.txt").write_text("new", encoding="utf-8")
    result = run("measure", text_folder, "--length", 2, "--text", tmp_path / "text.txt")
    assert result.code == 2
    assert f"its tokenizer gives id {len(_WORDS)}, its model has {len(_WORDS)} words" in result.err


def test_measure_gives_a_vision_model_pixels(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    assert run("prune", tmp_path / "vit", tmp_path / "pruned").code == 0
    assert run("compress", tmp_path / "pruned", tmp_path / "small", "--force", "--dtype", "bfloat16").code == 0
    batches = _seen(monkeypatch)
    result = run("measure", tmp_path / "small", "--batch", "2", "--repeats", 2)
    assert result.code == 0, result.err
    assert batches[0]["pixel_values"].shape == (2, 3, 16, 16)
    assert batches[0]["pixel_values"].dtype == torch.bfloat16
    (tmp_path / "text.txt").write_text("hello", encoding="utf-8")
    assert "leave out --text" in run("measure", tmp_path / "small", "--text", tmp_path / "text.txt").err


def test_timings_are_kept_shown_and_forgotten(
    run: Callable[..., Any],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    require_onednn: Callable[[torch.dtype], None],
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("TWOFOUR_CACHE", str(cache))
    calls: list[int] = []

    def paired(rivals: dict[str, Callable[[], object]], **_: object) -> dict[str, Timing]:
        calls.append(1)
        us = {"dense": 9.0, "onednn": 2.0, "packed": 3.0, "sparse": 6.0}
        return {name: Timing(us[name], us[name], us[name], 15) for name in rivals}

    monkeypatch.setattr("twofour.workflows.comparison.paired", paired)
    require_onednn(torch.float32)
    run("prune", folder, tmp_path / "pruned")
    assert run("compress", tmp_path / "pruned", tmp_path / "small", "--tokens", "1,8").code == 0
    timed = len(calls)
    assert timed > 0
    result = run("compress", tmp_path / "pruned", tmp_path / "again", "--tokens", "1,8")
    assert len(calls) == timed
    assert f"{timed} of {timed} timings were made before" in " ".join(result.out.split())
    run("compress", tmp_path / "pruned", tmp_path / "anew", "--tokens", "1,8", "--remeasure")
    assert len(calls) == 2 * timed

    report = json.loads(run("info", "--json").out)
    assert report["summary"]["timings kept"] == timed
    assert Path(report["summary"]["timings kept in"]).parent == cache
    explained = json.loads(run("explain", tmp_path / "small", "--kernels", "--json").out)
    timed_rows = [row for row in explained["rows"] if row.get("us")]
    assert {row["kernel"] for row in timed_rows if row["chosen"]} == {"onednn (dense)"}
    assert {"1": 9.0, "8": 9.0} in [row["us"] for row in timed_rows if row["kernel"] == "dense (torch)"]

    cleared = json.loads(run("info", "--clear-cache", "--json").out)
    assert cleared["summary"]["timings kept"] == 0
    assert cleared["notes"] == ["1 files of kept timings were removed"]
    monkeypatch.setenv("TWOFOUR_CACHE", "off")
    assert json.loads(run("info", "--json").out)["summary"]["timings kept in"] == "nowhere (TWOFOUR_CACHE=off)"
