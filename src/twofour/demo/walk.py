"""The whole way, measured: prune -> compress -> save -> load -> speed, bytes, answers -> page."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import TwofourError, UnsupportedError
from ..format import SparseMatrix
from ..kernels import KERNELS
from ..nn import SparseLinear, onednn
from ..report import Column, Report, environment, plots
from ..report.record import format_value, write_text
from ..workflows import compress, explain, load, prune, save
from ..workflows.timing import paired
from . import model, page, search, size, speed, text, words
from .findings import Findings, Row
from .noise import Quiet

Say = Callable[[str], None]


@dataclass(frozen=True)
class Extent:
    """How much a run measures."""

    timed: tuple[torch.dtype, ...]
    batches: tuple[int, ...]
    sentences: int
    corpus: int
    queries: int
    calibration: int
    repeats: int
    budget_s: float
    sweep_tokens: tuple[int, ...]
    layer_repeats: int
    patience_s: float


FULL = Extent(
    timed=(torch.float32, torch.bfloat16),
    batches=(1, 8, 64),
    sentences=64,
    corpus=600,
    queries=200,
    calibration=768,
    repeats=21,
    budget_s=4.0,
    sweep_tokens=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    layer_repeats=11,
    patience_s=12.0,
)
QUICK = Extent(
    timed=(torch.float32,),
    batches=(1, 8),
    sentences=8,
    corpus=60,
    queries=20,
    calibration=64,
    repeats=5,
    budget_s=0.5,
    sweep_tokens=(1, 16, 256),
    layer_repeats=5,
    patience_s=1.0,
)
DTYPES = (torch.float32, torch.bfloat16)
LATEST_S = 120.0
"""Speed is not measured for a further dtype when this much time is spent: the machine is too slow or too busy."""
_SLOW = 4.0
"""A dtype whose dense Linears take this many times as long as in float32 has no fast dense path: nothing to compare."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo leaves behind.

    Args:
        report: a row per dtype and batch size, the summary, and every finding as a sentence.
        html_path: the page, one file that opens without a network.
        json_path: every number behind it.
    """

    report: Report
    html_path: Path
    json_path: Path


def run(folder: Path, *, quick: bool = False, threads: int | None = None, progress: Say = print) -> DemoResult:
    """Prunes, compresses, saves, loads and measures all-MiniLM-L6-v2, and writes `index.html` and `result.json`.

    Nothing is fetched: the model and the text are on the machine already. Two compressed files,
    `minilm-float32.safetensors` and `minilm-bfloat16.safetensors`, stay in the folder.

    Args:
        folder: made if it is missing.
        quick: fewer sentences, queries and rounds, and speed in float32 only.
        threads: torch's threads during the run; None leaves them.
        progress: called with each finished section as text.
    Raises:
        UnsupportedError: the extra `demo` is not installed.
        TwofourError: the folder cannot be written, or the reloaded model does not give the same bits.
    Cost: about two minutes on two cores, 20 seconds with `quick`.
    """
    model.model_folder()
    plots.require()
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TwofourError(f"cannot make the folder {folder}: {error.strerror or error}.") from error
    extent = QUICK if quick else FULL
    findings = Findings(facts={"quick": quick})
    start = time.perf_counter()
    with _threads(threads):
        machine = environment()
        progress(f"{model.NAME} on {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}\n")
        _measure(extent, findings, folder, progress)
    for note in findings.notes:
        progress(f"note: {note}\n")
    findings.facts["seconds"] = round(time.perf_counter() - start, 1)
    report = _report(findings, machine)
    html_path, json_path = folder / "index.html", folder / "result.json"
    write_text(html_path, page.render(findings, machine))
    record = {**json.loads(report.to_json()), **findings.to_dict()}
    write_text(json_path, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    progress(f"{findings.facts['seconds']:.0f} seconds in all")
    return DemoResult(report, html_path, json_path)


def _measure(extent: Extent, findings: Findings, folder: Path, say: Say) -> None:
    chosen = text.sentences(extent.sentences)
    texts = {batch: _for_batch(chosen, batch) for batch in extent.batches}
    task = text.search_task(extent.corpus, extent.queries)
    quiet = Quiet(extent.patience_s)
    findings.facts.update(sentences=len(chosen), corpus=len(task.corpus), queries=len(task.queries))
    reference: torch.Tensor | None = None
    weights: dict[str, torch.Tensor] | None = None
    start = time.perf_counter()
    for dtype in DTYPES:
        name = _name(dtype)
        say(f"== {name} ==\n")
        dense, work = model.fresh(dtype), model.fresh(dtype)
        timed = dtype in extent.timed and _has_fast_dense(dtype, dense, findings)
        spent = time.perf_counter() - start
        if timed and spent > LATEST_S:
            findings.notes.append(
                f"{name}: bytes and answers only, because the run had taken {spent:.0f} seconds before."
            )
            timed = False
        if weights is None:
            weights = _prune(work, extent, findings, say)
        else:
            work.load_state_dict(weights)  # rounded to its dtype; zeros stay zeros
        expected = model.encode(work, chosen, 32)
        batches = [model.features(work, chosen[:batch]) for batch in extent.batches]
        compressed = compress(  # timed here and now, as everything on the page
            work,
            batches if timed else None,
            force=not timed,
            remeasure=True,
            include=model.ENCODER,
            progress=False,
        )
        _note_kernels(work, name, timed, findings)
        if timed:
            findings.timed.append(name)
            say("\n".join(words.kernels(findings)[-1:]) + "\n")
        else:
            say(f"compressed {compressed.summary['layers compressed']} layers, without timing\n")
        _check(work, dense, dtype, chosen, expected, folder, findings, say)
        if timed:
            _time(dense, work, dtype, texts, extent, quiet, findings, say)
        answers = {"dense": search.answers(dense, task), "sparse": search.answers(work, task)}
        if reference is None:
            reference = answers["dense"]
        for kind, answer in answers.items():
            findings.search.append(
                {
                    "dtype": name,
                    "model": f"{kind} {name}",
                    "kept": search.kept_share(reference, answer),
                    "first": search.same_first(reference, answer),
                    "found": search.found_share(answer, task),
                }
            )
        said = [line for line in words.search(findings) if name in line.split(" keeps ")[0]]
        say("\n".join(said) + "\n")
    findings.facts.update(measurements=quiet.measurements, disturbed=quiet.disturbed)
    if quiet.disturbed:
        findings.notes.append(words.disturbed(quiet.measurements, quiet.disturbed))


def _prune(work: Any, extent: Extent, findings: Findings, say: Say) -> dict[str, torch.Tensor]:
    """Prunes `work` in place with calibration; the weights it then has."""
    texts = sorted(text.calibration(extent.corpus, extent.calibration), key=len)
    began = time.perf_counter()
    batches = [model.features(work, texts[first : first + 64]) for first in range(0, len(texts), 64)]
    report = prune(work, "2:4", calibration=batches, include=model.ENCODER, progress=False)
    done = report.where(action="pruned")
    kept, masked, error = (
        sum(row[key] for row in done) / len(done) for key in ("kept_magnitude", "error_masked", "error")
    )
    seconds = time.perf_counter() - began
    findings.prune.append(
        {
            "layers": len(done),
            "kept_magnitude": kept,
            "error_masked": masked,
            "error": error,
            "texts": len(texts),
            "seconds": round(seconds, 1),
        }
    )
    say(
        f"pruned {len(done)} layers to 2:4 on {len(texts)} texts in {seconds:.0f} s: {format_value(error, 'share')} of the"
        f" squared outputs lost, {format_value(masked, 'share')} before the kept weights were solved for anew\n"
    )
    return {tensor_name: tensor.clone() for tensor_name, tensor in work.state_dict().items()}


def _check(
    work: Any,
    dense: Any,
    dtype: torch.dtype,
    texts: list[str],
    expected: torch.Tensor,
    folder: Path,
    findings: Findings,
    say: Say,
) -> None:
    """Saves, loads, compares bits; notes bytes on disk and in memory."""
    name = _name(dtype)
    path = folder / f"minilm-{name}.safetensors"
    save(work, path)
    reloaded = model.fresh(dtype)
    load(reloaded, path)
    before, after = model.encode(work, texts, 32), model.encode(reloaded, texts, 32)
    if not torch.equal(before, after):
        worst = float((before.double() - after.double()).abs().max())
        raise TwofourError(
            f"the model reloaded from {path} differs from the one that was saved by {worst:.1e}: the file or a kernel"
            " is broken. Please report it."
        )
    error = float((before.double() - expected.double()).abs().max())
    findings.checks += [
        {"dtype": name, "what": "saved, loaded into a new model, same outputs", "outcome": "bit for bit"},
        {
            "dtype": name,
            "what": "largest difference of an output from the same pruned weights run dense",
            "outcome": format_value(error, "error"),
            "value": error,
        },
    ]
    with tempfile.TemporaryDirectory() as scratch:
        save(dense, Path(scratch) / "dense.safetensors")
        disk_dense = size.file_bytes(Path(scratch) / "dense.safetensors")
    disk, memory, memory_dense = size.file_bytes(path), size.memory_bytes(reloaded), size.memory_bytes(dense)
    for what, sparse_bytes, dense_bytes in (
        ("encoder Linears in the file", disk["encoder"], disk_dense["encoder"]),
        ("encoder Linears in memory", memory["encoder"], memory_dense["encoder"]),
        ("whole file", disk["file"], disk_dense["file"]),
        ("whole model in memory", memory["model"], memory_dense["model"]),
    ):
        share = sparse_bytes / dense_bytes
        findings.size.append(
            {"dtype": name, "what": what, "dense": dense_bytes, "sparse": sparse_bytes, "share": share}
        )
    rows = [row for row in findings.size if row["dtype"] == name]
    say(_table(page.SIZE_COLUMNS, rows))
    say("saved, loaded into a new model: the same outputs bit for bit\n")


def _time(
    dense: Any,
    work: Any,
    dtype: torch.dtype,
    texts: Mapping[int, list[str]],
    extent: Extent,
    quiet: Quiet,
    findings: Findings,
    say: Say,
) -> None:
    name = _name(dtype)
    encoders = {"torch": dense}
    missing = onednn.why_not(dtype)
    if missing is None:
        encoders["onednn"] = model.fresh(dtype)
        onednn.prepack(encoders["onednn"], list(model.encoder_linears(dense)))
    else:
        findings.notes.append(f"{name}: compared with torch as it comes only, because {missing}.")
    encoders["sparse"] = work
    rows = speed.throughput(encoders, texts, quiet, repeats=extent.repeats, budget_s=extent.budget_s)
    findings.speed += [{"dtype": name, **row} for row in rows]
    findings.facts["tokens"] = round(rows[-1]["tokens"] / min(rows[-1]["batch"], rows[-1]["texts"]))
    shown = [row for row in page.speed_rows(findings) if row["dtype"] == name]
    say("sentences per second\n" + _table(page.SPEED_COLUMNS, shown))

    sparse = _as_sparse(work)
    kernel = next(iter(sparse.values())).choice.kernel.backend
    if kernel == "reference":
        reason = next(iter(sparse.values())).choice.reason
        findings.notes.append(f"{name}: layers were not timed one by one, because there is no fast kernel ({reason}).")
        return
    with_onednn = missing is None
    largest = int(rows[-1]["tokens"])
    options: Row = {"repeats": extent.layer_repeats, "with_onednn": with_onednn}
    per_layer = speed.layers(dense, sparse, largest, quiet, **options)
    findings.layers += [{"dtype": name, **row} for row in per_layer]
    swept = speed.sweep(dense, sparse, extent.sweep_tokens, quiet, **options)
    findings.sweep += [{"dtype": name, **row} for row in swept]
    say("".join(f"{line}\n" for line in words.layers(findings) if line.startswith(name)))


def _as_sparse(work: Any) -> dict[str, SparseLinear]:
    """Every encoder layer compressed, also those that run dense in the model: the page shows what they would be."""
    found = {}
    for name, module in model.encoder_linears(work).items():
        if isinstance(module, SparseLinear):
            module = SparseLinear(module.matrix, module.bias) if KERNELS[module.backend].dense else module
        else:
            assert isinstance(module, torch.nn.Linear)
            module = SparseLinear(SparseMatrix.from_dense(module.weight, "2:4"), module.bias)
        found[name] = module
    return found


def _note_kernels(work: Any, name: str, timed: bool, findings: Findings) -> None:
    encoder = set(model.encoder_linears(work))
    for row in explain(work).rows:
        if row["layer"] in encoder and timed:
            layer = work.get_submodule(row["layer"])
            sparse = isinstance(layer, SparseLinear) and not KERNELS[layer.backend].dense
            short = model.short_name(row["layer"])
            findings.kernels.append(
                {
                    "dtype": name,
                    "layer": short,
                    "shape": row["shape"],
                    "kernel": row["kernel"],
                    "sparse": sparse,
                    "reason": row.get("reason") or None,
                }
            )


def _has_fast_dense(dtype: torch.dtype, dense: Any, findings: Findings) -> bool:
    """False, with a note, where torch has no fast dense path for the dtype on this machine: no honest rival."""
    if dtype == torch.float32:
        return True
    linear = next(iter(model.encoder_linears(dense).values()))
    assert isinstance(linear, torch.nn.Linear)
    plain = torch.nn.Linear(linear.in_features, linear.out_features)
    x = torch.randn(256, linear.in_features)
    with torch.inference_mode():
        found = paired({"plain": lambda: plain(x), "short": lambda: linear(x.to(dtype))}, repeats=7)
    ratio = found["short"].median_us / found["plain"].median_us
    if ratio < _SLOW:
        return True
    findings.notes.append(
        f"{_name(dtype)}: bytes only. torch's dense Linear takes {ratio:.0f} times as long as in float32 on this"
        " machine, so there is no dense rival worth beating."
    )
    return False


def _report(findings: Findings, machine: Mapping[str, Any]) -> Report:
    summary: Row = {}
    for row in findings.size:
        if row["what"] == "encoder Linears in the file":
            summary[f"pruned layers on disk, {row['dtype']}"] = format_value(row["share"], "share")
    for row in findings.speed:
        summary[f"speed, {row['dtype']}, batch {row['batch']}"] = round(row["against_best"], 3)
    for row in findings.search:
        if row["model"].startswith("sparse"):
            summary[f"search answers kept, {row['dtype']}"] = format_value(row["kept"], "share")
    summary["reloaded outputs"] = "bit for bit the same"
    summary["seconds"] = findings.facts["seconds"]
    notes = [
        *words.balance(findings),
        *words.kernels(findings),
        *map(words.speed, findings.speed),
        *words.layers(findings),
        *map(words.size, findings.size),
        *words.search(findings),
        *findings.notes,
    ]
    return Report("demo", page.SPEED_COLUMNS, tuple(page.speed_rows(findings)), summary, tuple(notes), machine)


def _for_batch(sentences: list[str], batch: int) -> list[str]:
    """As many sentences as give whole batches in little time, always with the same mix of lengths."""
    wanted = {1: 16, 8: 32}.get(batch, batch)
    return text.evenly(sentences, min(len(sentences), wanted))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _table(columns: tuple[Column, ...], rows: list[Row]) -> str:
    return Report("demo", columns, tuple(rows)).to_table(120) + "\n"


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    if count is None:
        yield
        return
    if count < 1:
        raise UnsupportedError(f"threads={count}: at least one thread must run.")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
