"""twofour finetune"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import torch
import typer
from torch import nn

from ..errors import ModelError, TwofourError
from ..nn.swap import to_dense_modules
from ..pattern import Pattern
from ..report import Report
from ..training import Schedule, finetune
from ..training.masks.products import Wanted
from ..training.masks.schedule import RULES
from ..training.runs.restart import digest
from ..training.runs.supervised import Supervised
from ..workflows import check, prune
from ..workflows.check import CheckFailed
from . import models
from .inputs import is_causal
from .interrupted import telling
from .options import Exclude, Folder, Include, Json, Overwrite, PatternText, Threads, require_page, set_threads, show
from .texts import Texts, texts

NAME = "finetune"

CHECKPOINT = "finetune.pt"
"""In the folder of the result, until that is there."""

RECOVER = "recover"
_ROWS_SHOWN = 20

_DEVICES: dict[str, Callable[[], bool]] = {
    "cpu": lambda: True,
    "cuda": torch.cuda.is_available,
    "mps": torch.backends.mps.is_available,
}
"""Kinds of device that a model can be trained on, and whether there is one here."""


def run(
    model: Folder,
    text: Annotated[Path, typer.Argument(help="A UTF-8 text file to learn from; its end is held out.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the result goes: a new folder.")],
    pattern: PatternText = "2:4",
    method: Annotated[
        str,
        typer.Option(
            help="recover: prune by magnitude, if the model is not pruned yet, and train what is left; zeros stay. Or"
            " sr-ste, fst, s-ste: start dense, and let the masks move while the model trains."
        ),
    ] = RECOVER,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="Phases of moving masks, with steps or shares of --steps, as in 'dense:10%, s-ste:80%, fixed': dense at"
            " first, then masks that move, then those that are found stay."
        ),
    ] = None,
    distill: Annotated[
        bool,
        typer.Option(
            "--distill",
            help="Learn what the dense MODEL gives for the text, not the text. Models that do not predict the next word, such"
            " as encoders, always learn so.",
        ),
    ] = False,
    teacher: Annotated[
        Path | None,
        typer.Option(help="The dense model to learn from, for a MODEL that is pruned already; a folder."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps. Default: once through the text.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Time, above 0; of --steps and --minutes, what comes first.")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="The highest learning rate, of AdamW. Default: 5e-5; with a teacher 1e-3, of which large models want less."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pieces or lines of text per step.")] = 8,
    context: Annotated[int, typer.Option(min=2, help="Tokens of each piece; of lines at most.")] = 128,
    validation: Annotated[
        float, typer.Option(min=0, max=0.5, help="Share of the text that is held out to judge by; 0: none.")
    ] = 0.05,
    products: Annotated[
        str,
        typer.Option(
            help="How layers multiply while masks move: auto (by sparse kernels where those are measured to be faster),"
            " sparse, or dense: the same bits in every run."
        ),
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of the order of the text and of dropout.")] = 0,
    include: Include = None,
    exclude: Exclude = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on where a killed run with this --out was; begin anew where there was none."),
    ] = False,
    overwrite: Overwrite = False,
    device: Annotated[str, typer.Option(help="Where to train, as in cuda.")] = "cpu",
    threads: Threads = None,
    json: Json = False,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report", "--html", help="Also write the report as one HTML page, rewritten every few seconds on the way."
        ),
    ] = None,
) -> None:
    """Train a model sparse, on a text: what pruning cost comes back, and the zeros stay.

    Language models learn the text, or with --distill what their dense self says of it; encoders always the latter. Weights
    are float32 while they learn and are written as they came. The loss of the held-out text is taken before and after; exit
    code 1: it is worse than that of the model as it was pruned. The result is dense with zeros: compress comes next.

    A checkpoint is written into --out every minute, and at Ctrl-C: the same command with --resume goes on there, after a kill
    too, and on a CPU with --steps ends with the same weights, bit for bit (with --schedule: and --products dense).

    Example: twofour finetune gpt2 book.txt --out gpt2-2of4 --distill --minutes 60 --report page.html

    Example: twofour finetune gpt2 book.txt --out gpt2-2of4 --schedule "dense:10%, s-ste:80%, fixed" --steps 5000
    """
    parsed = Pattern.parse(pattern)
    phases = _phases(method, schedule, steps, minutes)
    if products not in get_args(Wanted):
        raise TwofourError(f"unknown --products {products!r}: it is {', '.join(get_args(Wanted))}.")
    if minutes is not None and not (minutes > 0 and math.isfinite(minutes)):
        raise TwofourError(f"--minutes {minutes:g}: a time above 0, as in 10 or 0.5.")
    _require_page(report, out)
    target = _device(device)
    models.require_folder(model, "finetune runs the model")
    if teacher is not None:
        models.require_folder(teacher, "finetune runs the teacher")
    _claim(model, out, resume, overwrite)
    set_threads(threads)
    loaded = models.open_model(model)
    to_dense_modules(loaded)
    dtypes = _to_float32(loaded)
    distills = distill or teacher is not None or not is_causal(loaded)
    if not distill and teacher is None:
        _require_head(model, loaded)
    found = texts(model, loaded, text, context, batch, validation, labels=not distills)
    pruned = _is_pruned(loaded, parsed, include, exclude)
    dense: nn.Module | None = None
    if teacher is not None:
        dense = models.open_model(teacher).float()
    elif distills:
        if pruned:
            raise ModelError(
                f"{model} is pruned already, so what it was dense is not here: name the dense model with --teacher."
            )
        dense = copy.deepcopy(loaded)
    before = Supervised(loaded).evaluate(found.validation) if found.validation and not distills and not pruned else None
    settings = {
        "model": digest(loaded),
        "teacher": None if teacher is None else digest(dense),  # type: ignore[arg-type]
        "text": hashlib.sha256(text.read_bytes()).hexdigest()[:16],
        "batch": batch,
        "context": context,
        "validation": validation,
        "seed": seed,
        "include": include,
        "exclude": exclude,
    }
    if phases is None and not pruned:
        prune(loaded, parsed, include=include, exclude=exclude)
    loaded.to(target)
    if dense is not None:
        dense.to(target)
    out.mkdir(exist_ok=True)
    if not resume:
        (out / CHECKPOINT).unlink(missing_ok=True)
    torch.manual_seed(seed)
    try:
        with telling(lambda: _kept(out)):
            done = finetune(
                loaded,
                found.train,
                schedule=phases,
                pattern=parsed,
                include=include if phases is not None else None,
                exclude=exclude if phases is not None else None,
                products=cast(Wanted, products),
                teacher=dense,
                validation=found.validation or None,
                steps=steps,
                seconds=None if minutes is None else 60 * minutes,
                lr=lr,
                checkpoint=out / CHECKPOINT,
                settings=settings,
                page=report,
            )
    except BaseException:
        with suppress(OSError):
            out.rmdir()  # if it is empty: no checkpoint was written
        raise
    loaded.to("cpu")
    _to(loaded, dtypes)
    models.write_dense(loaded, model, out, overwrite=True)
    done = _with_facts(done, found, before, _holding(loaded, parsed, include, exclude))
    if report is not None:
        done.to_html(report)
    show(done if json else _shortened(done), json)
    _require_gain(done)


def _kept(out: Path) -> str:
    if (out / CHECKPOINT).exists():
        return f"{out} has a checkpoint: the same command with --resume goes on there."
    return "before the first step was kept, so nothing was written."


def _phases(method: str, schedule: str | None, steps: int | None, minutes: float | None) -> str | None:
    """The schedule of moving masks; None for masks that stay."""
    rules = [rule for rule in RULES if rule not in ("dense", "fixed")]
    if method not in (RECOVER, *rules):
        raise TwofourError(f"unknown --method {method!r}: it is {RECOVER}, {', '.join(rules)}.")
    if method != RECOVER and schedule is not None:
        raise TwofourError(f"--method {method} together with --schedule, which says more: give one of the two.")
    text = schedule if schedule is not None else None if method == RECOVER else method
    if text is None:
        return None
    if "%" in text and steps is None and minutes is not None:
        raise TwofourError(f"--schedule '{text}' has shares of the steps, and --minutes has none: give --steps too.")
    if Schedule.parse(text, steps=steps or 1000).phases[-1].rule == "dense":
        raise TwofourError(f"--schedule '{text}' ends dense, and so would the model: let it end fixed, or with a rule.")
    return text


def _require_page(page: Path | None, out: Path) -> None:
    require_page(page)
    if page is not None and out.resolve() in page.resolve().parents:
        raise TwofourError(f"--report {page} lies in {out}, which is replaced as a whole at the end: put it elsewhere.")


def _device(text: str) -> torch.device:
    why = ""
    try:
        device = torch.device(text)
        if device.type in _DEVICES:
            torch.empty(1, device=device)
            return device
    except (RuntimeError, AssertionError) as error:
        if text.partition(":")[0] in _DEVICES:
            why = f" ({str(error).splitlines()[0]})"
    here = " or ".join(kind for kind, is_here in _DEVICES.items() if is_here())
    raise TwofourError(f"--device {text} cannot be used here{why}: give {here}.")


def _claim(model: Path, out: Path, resume: bool, overwrite: bool) -> None:
    """Checks, before any work is done, that the result and the checkpoint can go to `out`."""
    models.require_apart(model, out)
    if not out.exists():
        return
    if not out.is_dir():
        raise TwofourError(f"{out} is a file: the result is a folder. Give it another name.")
    names = {path.name for path in out.iterdir() if not (path.name.startswith(".") and path.name.endswith(".tmp"))}
    finished, begun = "config.json" in names, CHECKPOINT in names
    if not finished and names - {CHECKPOINT}:
        raise TwofourError(
            f"{out} holds other things than a model or its checkpoint, such as {min(names - {CHECKPOINT})}: give the result"
            " another name."
        )
    if begun and not resume and not overwrite:
        raise TwofourError(f"{out} holds a run that did not end: --resume goes on with it, --overwrite begins anew.")
    if finished and not begun and resume and not overwrite:
        raise TwofourError(f"{out} is finished: there is nothing to resume. --overwrite begins anew.")
    if finished and not begun and not overwrite:
        raise TwofourError(f"{out} is there already: name another place, or pass --overwrite.")


def _require_head(folder: Path, model: nn.Module) -> None:
    """Refuses a decoder whose head was left out, or is another: it says nothing of the next word."""
    import transformers

    kind: Any = type(model.config)
    causal: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if is_causal(model) or kind not in causal or kind in transformers.MODEL_FOR_MASKED_LM_MAPPING:
        return
    whole = causal[kind]
    whole = whole[0] if isinstance(whole, tuple) else whole
    raise ModelError(
        f"{folder} is a {type(model).__name__}, without the head that predicts words: give a {whole.__name__}, or let it learn"
        " from its dense self with --distill."
    )


def _is_pruned(model: nn.Module, pattern: Pattern, include: list[str] | None, exclude: list[str] | None) -> bool:
    """True where a layer holds the pattern, and not as one of zeros."""
    rows = _checked(model, pattern, include, exclude).rows
    return any(row["action"] == "holds" and row["density"] > 0 for row in rows)


def _holding(model: nn.Module, pattern: Pattern, include: list[str] | None, exclude: list[str] | None) -> str:
    rows = [row for row in _checked(model, pattern, include, exclude).rows if row["action"] != "skipped"]
    return f"{sum(row['action'] == 'holds' for row in rows)} of {len(rows)}"


def _checked(model: nn.Module, pattern: Pattern, include: list[str] | None, exclude: list[str] | None) -> Report:
    try:
        return check(model, pattern, include=include, exclude=exclude)
    except CheckFailed as failure:
        return failure.report


def _to_float32(model: nn.Module) -> dict[str, torch.dtype]:
    """Makes all numbers float32, and tells what they were."""
    dtypes = {name: value.dtype for name, value in model.state_dict().items() if value.is_floating_point()}
    model.float()
    return dtypes


def _to(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """The way back; zeros stay zero."""
    if len(set(dtypes.values())) == 1:
        model.to(next(iter(dtypes.values())))
        return
    for name, value in model.state_dict(keep_vars=True).items():
        if name in dtypes:
            value.data = value.data.to(dtypes[name])


def _with_facts(report: Report, found: Texts, dense: float | None, holding: str) -> Report:
    summary: dict[str, Any] = dict(report.summary)
    if dense is not None:
        summary["validation loss dense"] = dense
    summary["samples"] = f"{found.samples:,} to learn from, {found.held:,} held out"
    summary["layers that hold the pattern"] = holding
    notes = list(report.notes)
    if not found.validation:
        notes.append("No text was held out, so nothing says whether the model became better: --validation 0.05.")
    return replace(report, summary=summary, notes=tuple(notes))


def _shortened(report: Report) -> Report:
    """With every n-th row, and the last."""
    every = -(-len(report.rows) // _ROWS_SHOWN)
    if every < 2:
        return report
    rows = (*report.rows[every - 1 : -1 : every], report.rows[-1])
    note = f"One of {every} rows is shown; --json and --report have more."
    return replace(report, rows=rows, notes=(*report.notes, note))


def _require_gain(report: Report) -> None:
    """Exit code 1 where the held-out text is told worse than by the model as it was pruned."""
    before, after = (report.summary.get(f"validation loss {when}") for when in ("before", "after"))
    if before is None or after is None or after <= before:
        return
    what = "is not finite" if not math.isfinite(after) else f"is {after:.4g}, and was {before:.4g} before"
    typer.echo(f"no: the loss of the held-out text {what}. Try a smaller --lr, or more text.", err=True)
    raise typer.Exit(1)
