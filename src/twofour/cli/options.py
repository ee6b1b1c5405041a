"""The options that several subcommands share, and how they print a report."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..errors import TwofourError, UnsupportedError
from ..report import Report

Model = Annotated[Path, typer.Argument(help="A folder with a transformers config.json, or a .safetensors file.")]
Folder = Annotated[Path, typer.Argument(help="A folder with a transformers config.json.")]
Output = Annotated[Path, typer.Argument(help="Where the result goes: a folder for a folder, a file for a file.")]
PatternText = Annotated[
    str, typer.Option("--pattern", "-p", help="KEEP:GROUP, as in 2:4 (keep 2 of 4), 1:4, 4:8, 2:4x4, 2:4t.")
]
Include = Annotated[
    list[str] | None,
    typer.Option("--include", help="Only layers whose name matches this wildcard; may be repeated."),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option("--exclude", help="Not the layers whose name matches this wildcard; may be repeated."),
]
Calibration = Annotated[
    str, typer.Option(help="Inputs: a text file, 'python' for Python's documentation, or a .safetensors file.")
]
Samples = Annotated[int, typer.Option(min=1, help="Lines (or pieces of running text) taken of --calibration.")]
Length = Annotated[int, typer.Option(min=1, help="Most tokens of each.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples that run at once.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the result if it is there already.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
Html = Annotated[Path | None, typer.Option("--html", help="Also write the report as one self-contained HTML page.")]


_MOST_THREADS = 1024
"""Of many more the system makes none, and ends the process."""


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _threads(count: int | None) -> int | None:
    """The option's value; told where it is more than cores: results are the same bits, and come later."""
    if count is None:
        return None
    if not 1 <= count <= _MOST_THREADS:
        raise TwofourError(f"--threads {count}: give 1 up to {_MOST_THREADS}.")
    if count > (cores := _cores()):
        here = f"{cores} core{'' if cores == 1 else 's'} here"
        typer.echo(f"note: --threads {count} is more than the {here}: threads wait for each other.", err=True)
    return count


Threads = Annotated[
    int | None,
    typer.Option("--threads", callback=_threads, help="CPU threads; default: what torch uses."),
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="Convert the weights first: float32, float16 or bfloat16; default: as they are."),
]


_ARGUMENTS = (
    *("against", "batch", "calibration", "checkpoint", "context", "dry_run", "exclude", "force", "include", "lr"),
    *("method", "pattern", "products", "random_tokens", "remeasure", "seed", "steps", "targets", "teacher", "tokens"),
    *("validation", "weights"),
)
"""Arguments of Python's verbs that are options here, under the same name with dashes."""

_VERBS = ("check", "compress", "explain", "measure", "permute", "prune", "sensitivity")
_VALUE = r"""(?:'[^']*'|"[^"]*"|\[[^\]]*\]|-?\w(?:[\w.+-]*\w)?)?"""
_ARGUMENT = re.compile(rf"(?<![\w.'\"-])({'|'.join((*_ARGUMENTS, 'seconds'))})=({_VALUE})")
_CALL = re.compile(rf"twofour\.({'|'.join(_VERBS)})\((?:model)?(?:, )?(?:'([^']*)')?(?:, )?([^()]*)\)")


def as_typed(text: str) -> str:
    """The text of an error or report, with options and subcommands in place of Python's arguments and calls.

    >>> as_typed("include='*.h' matches no layer. Try twofour.prune(model, '1:4'), or pass calibration=.")
    "--include '*.h' matches no layer. Try twofour prune --pattern 1:4, or pass --calibration."
    """
    text = text.replace("model.float()", "--dtype float32")
    return _ARGUMENT.sub(_option, _CALL.sub(_subcommand, text))


def _option(found: re.Match[str]) -> str:
    name, value = "--" + found[1].replace("_", "-"), found[2]
    if name == "--seconds":  # a person gives minutes
        name, value = "--minutes", f"{float(value) / 60:g}" if value[:1].isdigit() else value
    if value in ("", "True"):
        return name
    if value in ("None", "False", "[]"):
        return f"no {name}"
    if value.startswith("["):
        values = [part.strip(" '\"") for part in value[1:-1].split(",")]
    else:
        values = [value.strip("'\"")]
    return " ".join(f"{name} {shlex.quote(each)}" for each in values)


def _subcommand(found: re.Match[str]) -> str:
    verb, pattern, rest = found.groups()
    if not pattern and not rest and "model" not in found[0]:
        return found[0]  # twofour.measure(): Python is meant
    return " ".join(filter(None, ("twofour", verb, f"--pattern {pattern}" if pattern else "", rest.replace(", ", " "))))


def _report_as_typed(report: Report) -> Report:
    rows = tuple({**row, "reason": as_typed(row["reason"])} if row.get("reason") else row for row in report.rows)
    return replace(report, rows=rows, notes=tuple(map(as_typed, report.notes)))


def show(report: Report, json: bool, html: Path | None = None) -> None:
    """Prints the report, as a table or as JSON, and writes the page if asked."""
    report = _report_as_typed(report)
    if html is not None:
        report.to_html(html)
    width = min(100, max(60, shutil.get_terminal_size((100, 24)).columns)) if sys.stdout.isatty() else 100
    typer.echo(report.to_json() if json else report.to_table(width))


def require_page(html: Path | None) -> None:
    """Checks, before any work is done, that the page can be written."""
    if html is None:
        return
    if html.is_dir():
        raise TwofourError(f"--html {html} is a folder: name a file in it, as in {html / 'report.html'}.")
    if not html.absolute().parent.is_dir():
        raise TwofourError(f"{html.absolute().parent}: no such folder for the page. Make it first.")


def set_threads(threads: int | None) -> None:
    """Tells torch how many threads to use."""
    if threads is not None:
        torch.set_num_threads(threads)


def parse_dtype(text: str | None) -> torch.dtype | None:
    """float32, float16, bfloat16 (or fp32, fp16, bf16) -> torch.dtype; None stays None."""
    if text is None:
        return None
    known = {
        "float32": torch.float32,
        "fp32": torch.float32,
        "float16": torch.float16,
        "fp16": torch.float16,
        "bfloat16": torch.bfloat16,
        "bf16": torch.bfloat16,
    }
    if text not in known:
        raise UnsupportedError(f"unknown --dtype {text!r}: it is float32, float16 or bfloat16.")
    return known[text]


def parse_counts(text: str, option: str) -> list[int]:
    """'1,128' -> [1, 128]; TwofourError for anything but positive whole numbers."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise TwofourError(f"{option} {text!r} is not a list of positive whole numbers: write it as 1,128.")
    return counts
