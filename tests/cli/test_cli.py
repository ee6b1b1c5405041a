"""The command line, from real folders and files: results, exit codes, one-line errors."""

from __future__ import annotations

import errno
import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import twofour
from twofour import cli

transformers = pytest.importorskip("transformers", reason="needs transformers (twofour[transformers])")


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """run("check", folder) -> exit code and what was printed, in this process."""

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["twofour", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capsys.readouterr()
        code = exit_.value.code
        return Result(code if isinstance(code, int) else 0 if code is None else 1, out, err)

    return call


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


def test_a_folder_from_prune_to_measure(run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
    pruned, small = tmp_path / "pruned", tmp_path / "small"
    result = run("prune", folder, pruned)
    assert result.code == 0
    assert re.search(r"layers pruned +13 of 16", result.out)
    assert (pruned / "notes.txt").read_text(encoding="utf-8") == "kept"
    reloaded = transformers.AutoModel.from_pretrained(pruned, local_files_only=True)
    assert twofour.check(reloaded).summary["holds"]

    assert run("check", pruned).code == 0
    result = run("compress", pruned, small, "--force", "--dtype", "bfloat16", "--json")
    report = json.loads(result.out)
    assert report["summary"]["compressed weights"] == 13
    assert report["summary"]["their bytes stored"] <= 0.57 * report["summary"]["their bytes dense"]
    assert sorted(path.name for path in small.iterdir()) == ["config.json", "model.twofour.safetensors", "notes.txt"]

    rows = json.loads(run("explain", small, "--json").out)["rows"]
    assert sum(row["kernel"] != "dense (torch)" for row in rows) == 13
    assert run("check", small).code == 0
    result = run(
        "measure", small, "--against", folder, "--length", 8, "--batch", "1,2", "--repeats", 2, "--dtype", "float32"
    )
    assert result.code == 0
    assert re.search(r"speedup +\d", result.out)
    assert "1x8" in result.out
    assert "2x8" in result.out


def test_a_file_from_prune_to_measure(run: Callable[..., Result], weights: Path, tmp_path: Path) -> None:
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
    assert next(row for row in timed["rows"] if row["layer"] == "layers.0.up")["speedup"] > 0
    assert run("measure", small, "--text", weights).err.startswith("error: ")


def test_tables_fit_100_columns_and_pipes_get_no_progress(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "twofour", "prune", str(folder), str(tmp_path / "pruned")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert max(map(len, result.stdout.splitlines())) <= 100
    assert result.stderr == ""


def test_check_says_no_with_exit_code_1(run: Callable[..., Result], folder: Path) -> None:
    result = run("check", folder)
    assert result.code == 1
    assert result.err.startswith("no: 'encoder.layer.0.attention.self.query' is not 2:4: 256 of 256 groups")
    assert "broken" in result.out
    assert result.err.count("\n") == 1


def test_pages_are_written(run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert run("explain", folder, "--html", page).code == 0
    assert "encoder.layer.0.attention.self.query" in page.read_text(encoding="utf-8")


def test_dry_run_writes_nothing(run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
    assert run("prune", folder, tmp_path / "pruned", "--dry-run").code == 0
    assert list(tmp_path.iterdir()) == []


def test_overwrite_replaces_and_its_absence_refuses(run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
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
        (["prune", "{folder}", "{tmp}/out", "--exclude", "nope*"], r"exclude='nope\*' matches no layer"),
        (["prune", "{folder}", "{tmp}/out", "--method", "magic"], r"unknown method 'magic'"),
        (["prune", "{folder}", "{tmp}/no/such/out"], r"no/such: no such folder\. Make it first\."),
        (["prune", "{weights}", "{tmp}/out"], r"the result of a .safetensors file is one too"),
        (["compress", "{folder}", "{tmp}/out"], r"no layer holds 2:4, so there is nothing to compress"),
        (
            ["compress", "{folder}", "{tmp}/out", "--tokens", "1,x"],
            r"--tokens '1,x' is not a list of positive whole numbers",
        ),
        (["compress", "{folder}", "{tmp}/out", "--dtype", "int4"], r"unknown --dtype 'int4': it is float32"),
        (
            ["prune", "{folder}", "{tmp}/out", "--html", "{tmp}/no/page.html"],
            r"no such folder for the page\. Make it first",
        ),
        (["measure", "{folder}", "--batch", "0"], r"--batch '0' is not a list of positive"),
        (["measure", "{folder}", "--length", "9999"], r"--length 9999 is more than the 512 positions the model has"),
        (["measure", "{folder}", "--against", "{weights}"], r"are not of one kind"),
        (["measure", "{folder}", "--text", "{tmp}/text.txt"], r"has no tokenizer, so --text cannot be used"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    run: Callable[..., Result], folder: Path, weights: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "text.txt").write_text("hello", encoding="utf-8")
    (tmp_path / "bad.safetensors").write_bytes(b"\x01\x02")
    result = run(*(argument.format(tmp=tmp_path, folder=folder, weights=weights) for argument in arguments))
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert re.search(message, result.err)
    assert "Traceback" not in result.err
    assert not (tmp_path / "out").exists()


def test_wrong_usage_has_exit_code_2(run: Callable[..., Result]) -> None:
    assert run("prune").code == 2
    assert run("fly").code == 2
    assert run("--help").code == 0


def test_damaged_folder(run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
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


def test_an_unreadable_file(run: Callable[..., Result], weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the refusal is made up."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("twofour.cli.models.safe_open", refuse)
    result = run("check", weights)
    assert result.code == 2
    assert result.err == f"error: {weights} cannot be read: Permission denied.\n"


def test_info_names_the_kernels(run: Callable[..., Result]) -> None:
    report = json.loads(run("info", "--json").out)
    assert {row["dtype"] for row in report["rows"]} == {"float32", "bfloat16", "float16"}
    assert report["summary"]["native kernels"]


def test_info_says_so_without_native_kernels() -> None:
    code = "import sys; sys.modules['twofour._native'] = None; from twofour.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code, "info"], capture_output=True, text=True, check=True)
    assert "no: this build of twofour has no native kernels" in result.stdout


def test_overwrite_never_takes_the_source_or_what_is_no_model(
    run: Callable[..., Result], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    run: Callable[..., Result], folder: Path, weights: Path, tmp_path: Path
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


def test_missing_weights_are_not_made_up(run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["encoder.layer.0.output.dense.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    result = run("check", broken)
    assert result.code == 2
    assert "lacks weights that BertModel needs: encoder.layer.0.output.dense.weight" in result.err


def test_integer_tensors_beside_a_weight_survive(run: Callable[..., Result], tmp_path: Path) -> None:
    source, target = tmp_path / "source.safetensors", tmp_path / "target.safetensors"
    tensors = {"fc.mask": torch.ones(8, dtype=torch.bool), "fc.weight": torch.randn(8, 8), "fc.a": torch.tensor([3])}
    save_file(tensors, source)
    assert run("prune", source, target).code == 0
    assert sorted(load_file(target)) == sorted(tensors)


def test_layers_of_a_bare_file_whose_kind_is_unclear_are_left(run: Callable[..., Result], tmp_path: Path) -> None:
    source, target = tmp_path / "source.safetensors", tmp_path / "target.safetensors"
    tensors = {
        "fc.weight": torch.randn(8, 8),
        "shared.weight": torch.randn(8, 8),
        "h.0.attn.c_attn.weight": torch.randn(8, 24),
        "experts.weight": torch.randn(2, 8, 8),
        "quantized.weight": torch.ones(8, 8, dtype=torch.int8),
    }
    save_file(tensors, source)
    rows = {row["layer"]: row for row in json.loads(run("prune", source, target, "--json").out)["rows"]}
    assert {name: row["action"] for name, row in rows.items()} == {
        "fc": "pruned",
        "shared": "skipped",
        "h.0.attn.c_attn": "skipped",
        "experts": "skipped",
        "quantized": "skipped",
    }
    assert rows["experts"]["reason"] == "UnknownLayer is not a Linear or convolution"
    assert rows["quantized"]["reason"] == "weight is int8, not floating point"
    after = load_file(target)
    assert sorted(after) == sorted(tensors)
    assert all(torch.equal(after[name], tensors[name]) for name in tensors if name != "fc.weight")
