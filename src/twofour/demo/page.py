"""Findings -> the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..report import Column, plots
from ..report.html import Block, Facts, Folded, Notes, Paragraph, Plot, Section, Table, Tile, Tiles, page
from ..report.record import format_bytes, format_value
from . import words
from .findings import Findings, Row
from .model import NAME
from .speed import NAMES

SPEED_COLUMNS = (
    Column("dtype", "dtype"),
    Column("batch", "batch", "count"),
    Column("torch", "dense, torch", "count"),
    Column("onednn", "dense, oneDNN", "count"),
    Column("sparse", "2:4 sparse", "count"),
    Column("spread", "quartiles", "text"),
    Column("against_torch", "against torch", "ratio"),
    Column("against_best", "against best dense", "ratio"),
    Column("others", "other programs", "text"),
)
SIZE_COLUMNS = (
    Column("what", "what"),
    Column("dtype", "dtype"),
    Column("dense", "dense", "bytes"),
    Column("sparse", "2:4", "bytes"),
    Column("share", "share", "share"),
)
SEARCH_COLUMNS = (
    Column("model", "model"),
    Column("kept", "answers kept", "share"),
    Column("first", "same first answer", "share"),
    Column("found", "own paragraph found", "share"),
)
LAYER_COLUMNS = (
    Column("layer", "layer"),
    Column("dtype", "dtype"),
    Column("shape", "shape"),
    Column("kernel", "kernel"),
    Column("torch_us", "torch µs", "us"),
    Column("onednn_us", "oneDNN µs", "us"),
    Column("sparse_us", "sparse µs", "us"),
    Column("against_best", "against best dense", "ratio"),
)
KERNEL_COLUMNS = (
    Column("layer", "layer"),
    Column("dtype", "dtype"),
    Column("shape", "shape"),
    Column("kernel", "kernel in the model"),
    Column("reason", "why not a faster one"),
)
CHECK_COLUMNS = (Column("dtype", "dtype"), Column("what", "what"), Column("outcome", "outcome"))
_BYTE_SERIES = ("dense", "2:4 sparse")
_BYTE_COLOURS = (plots.BLUE, plots.VERMILION)


def render(findings: Findings, environment: Mapping[str, Any]) -> str:
    """The page of a run: numbers first, then speed, layers, bytes, answers, checks, and how it was measured."""
    parts: list[tuple[str, Callable[[Findings], list[Block]]]] = [
        ("At a glance", _glance),
        ("Sentences per second", _speed),
        ("Layer by layer", _layers),
        ("Bytes", _bytes),
        ("Search answers kept", _search),
        ("Checks", _checks),
        ("How this was measured", _method),
    ]
    sections = [Section(heading, tuple(blocks)) for heading, make in parts if (blocks := make(findings))]
    sections.append(Section("Machine and versions", (Facts(environment),)))
    footer = f"Made by twofour {environment.get('twofour', '')} on {environment.get('date', '')}."
    return page(f"{NAME} with half of its weights", words.headline(findings), sections, footer=footer)


def speed_rows(findings: Findings) -> list[Row]:
    """The rows of `findings.speed`, rates rounded as they are shown."""
    rows = []
    for row in findings.speed:
        shown = {key: row.get(key) for key in ("dtype", "batch", "against_torch", "against_best")}
        for key in NAMES:
            if key in row:
                shown[key] = round(row[key]) if row[key] >= 20 else round(row[key], 1)
        shown["others"] = "disturbed" if row["disturbed"] else None
        shown["spread"] = f"{words.rate(row['sparse_low'])} to {words.rate(row['sparse_high'])}"
        rows.append(shown)
    return rows


def _glance(findings: Findings) -> list[Block]:
    tiles: list[Tile] = []
    if findings.speed:
        largest = max(row["batch"] for row in findings.speed)
        for row in findings.speed:
            if row["batch"] != largest:
                continue
            doubt = "; other programs were running" if row["disturbed"] else ""
            tiles.append(
                Tile(
                    f"speed, {row['dtype']}, batch {row['batch']}",
                    format_value(row["against_best"], "ratio"),
                    f"{words.rate(row['sparse'])} sentences/s; the best dense path {words.rate(words.best_dense(row))}{doubt}",
                    "plain" if doubt else words.tone(row["against_best"]),
                )
            )
    disk = findings.size_row("bfloat16", "encoder Linears in the file")
    if disk is not None:
        detail = f"of the dense bytes on disk: {format_bytes(disk['sparse'])} for {format_bytes(disk['dense'])}"
        tiles.append(Tile("pruned layers, 16 bits", format_value(disk["share"], "share"), detail))
    sparse = next((row for row in findings.search if row["model"].startswith("sparse")), None)
    if sparse is not None:
        tiles.append(
            Tile(
                "search answers kept",
                format_value(sparse["kept"], "share"),
                f"of the dense top 10, {findings.facts.get('queries', 0)} queries, no retraining",
            )
        )
    blocks: list[Block] = [Tiles(tuple(tiles))] if tiles else []
    blocks.append(Notes((*words.balance(findings), *words.kernels(findings), *findings.notes)))
    return blocks


def _speed(findings: Findings) -> list[Block]:
    blocks: list[Block] = []
    for dtype in findings.timed:
        rows = [row for row in findings.speed if row["dtype"] == dtype]
        if not rows:
            continue
        values = {str(row["batch"]): {NAMES[key]: row[key] for key in NAMES if key in row} for row in rows}
        spread = {
            str(row["batch"]): {NAMES[key]: (row[f"{key}_low"], row[f"{key}_high"]) for key in NAMES if key in row}
            for row in rows
        }
        said = "; ".join(
            f"batch {row['batch']}: " + ", ".join(f"{NAMES[key]} {words.rate(row[key])}" for key in NAMES if key in row)
            for row in rows
        )
        counts = [row["rounds"] for row in rows]
        svg = plots.grouped_bars(
            values,
            spread=spread,
            group_title="sentences in a batch",
            value_title="sentences per second",
            label=words.rate,
        )
        rounds = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
        caption = f"{dtype}. Medians of {rounds} rounds in turns; thin lines join the quartiles. Higher is better."
        blocks.append(Plot(svg, f"Sentences per second, {dtype}: {said}.", caption))
    if not blocks:
        return []
    caption = "Sentences per second, median; quartiles of the sparse model; the ratios compare medians of one run."
    blocks.append(
        Table(SPEED_COLUMNS, tuple(speed_rows(findings)), caption, signal="against_best", even=words.NOTICEABLE)
    )
    blocks.append(Folded("The same in words", (Notes(tuple(map(words.speed, findings.speed))),)))
    return blocks


def _layers(findings: Findings) -> list[Block]:
    blocks: list[Block] = []
    if findings.sweep or findings.layers:
        blocks.append(
            Paragraph(
                "Each Linear alone, its weights warm in the cache, against the faster of the two dense kernels. The"
                " dashed lines are what 2:4 can gain at best: half of the products where arithmetic decides, the bytes"
                " of the weights where reading them decides."
            )
        )
    for dtype in findings.timed:
        rows = words.undisturbed([row for row in findings.sweep if row["dtype"] == dtype])
        if len({row["tokens"] for row in rows}) > 1:
            lines: dict[str, list[tuple[float, float]]] = {}
            for row in rows:
                lines.setdefault(f"{row['shape']}", []).append((row["tokens"], row["against_best"]))
            ideals = {"half the products": plots.COMPUTE_BOUND, "fewer bytes": plots.BYTE_BOUND[dtype]}
            ends = "; ".join(
                f"{shape} from {points[0][1]:.2f}x at {points[0][0]:g} tokens"
                f" to {points[-1][1]:.2f}x at {points[-1][0]:g}"
                for shape, points in lines.items()
            )
            svg = plots.ratio_lines(lines, y_title="speed against best dense", ideals=ideals)
            caption = f"{dtype}. One line for each shape (outputs x inputs)."
            blocks.append(Plot(svg, f"Speed against the best dense kernel by tokens, {dtype}: {ends}.", caption))
    for dtype in findings.timed:
        rows = [row for row in findings.layers if row["dtype"] == dtype]
        quiet = {row["layer"] for row in words.undisturbed(rows)}
        if 2 * len(quiet) > len(rows):
            ratios = {str(row["layer"]): float(row["against_best"]) if row["layer"] in quiet else None for row in rows}
            said = ", ".join(f"{name} {format_value(ratio, 'ratio')}" for name, ratio in ratios.items())
            svg = plots.ratio_bars(ratios, x_title="speed against best dense")
            caption = (
                f"{dtype}, {rows[0]['tokens']:,} tokens: all {len(rows)} layers; grey bars are not faster than dense."
            )
            blocks.append(Plot(svg, f"Speed of each layer, {dtype}: {said}.", caption))
    if findings.layers:
        blocks.append(Notes(tuple(words.layers(findings))))
    folded: list[Block] = []
    if findings.layers:
        rows = findings.layers
        folded.append(
            Table(
                LAYER_COLUMNS,
                tuple(rows),
                f"Microseconds at {rows[0]['tokens']:,} tokens",
                signal="against_best",
                even=words.NOTICEABLE,
            )
        )
    if findings.kernels:
        folded.append(Table(KERNEL_COLUMNS, tuple(findings.kernels), "The kernel that runs each layer in the model"))
    if folded:
        blocks.append(Folded("Every layer: times, kernel, reason", tuple(folded)))
    return blocks


def _bytes(findings: Findings) -> list[Block]:
    blocks: list[Block] = []
    for dtype in dict.fromkeys(row["dtype"] for row in findings.size):
        rows = [row for row in findings.size if row["dtype"] == dtype]
        values = {
            row["what"]: {name: float(row[key]) for name, key in zip(_BYTE_SERIES, ("dense", "sparse"), strict=True)}
            for row in rows
        }
        svg = plots.grouped_bars(values, horizontal=True, label=format_bytes, colours=_BYTE_COLOURS)
        said = " ".join(words.size(row) for row in rows)
        blocks.append(Plot(svg, f"Bytes, {dtype}: {said}", f"{dtype}. Shorter is better."))
    if blocks:
        blocks.append(Table(SIZE_COLUMNS, tuple(findings.size), "Bytes, dense and 2:4"))
        blocks.append(
            Paragraph(
                "A file holds the kept half of each group of four and four bits that say where it sits. The rest of the"
                " model, mostly the table of word vectors, is not pruned, so the whole shrinks less."
            )
        )
    return blocks


def _search(findings: Findings) -> list[Block]:
    if not findings.search:
        return []
    values = {
        row["model"]: {"answers kept": 100 * row["kept"], "own paragraph found": 100 * row["found"]}
        for row in findings.search
    }
    svg = plots.grouped_bars(
        values,
        value_title="% of the answers, or of the queries",
        label=lambda value: f"{value:.0f} %",
        colours=(plots.VERMILION, plots.GREEN),
        horizontal=True,
    )
    said = words.search(findings)
    facts = findings.facts
    texts = sum(row.get("texts", 0) for row in findings.prune)
    return [
        Paragraph(
            f"{facts.get('queries', 0)} sentences look for their own paragraph among {facts.get('corpus', 0)}; each was"
            " taken out of it before. The ten nearest paragraphs count, and those of the dense float32 model are the"
            f" reference. Pruned in one step on {texts} other texts of the same kind,"
            " without labels and without training."
        ),
        Plot(svg, "Search answers: " + " ".join(said), "Higher is better; dense float32 is the reference."),
        Notes(tuple(said)),
        Table(SEARCH_COLUMNS, tuple(findings.search), "Search answers against the dense float32 model"),
    ]


def _checks(findings: Findings) -> list[Block]:
    if not findings.checks:
        return []
    return [Table(CHECK_COLUMNS, tuple(findings.checks), "What was verified in this run")]


def _method(findings: Findings) -> list[Block]:
    facts = findings.facts
    texts = [
        f"The model is {NAME}, from its package, and the text is the language reference that comes with Python:"
        f" {facts.get('sentences', 0)} sentences for the speed, evenly chosen, about {facts.get('tokens', 0)} tokens"
        " each with padding. Tokenizing counts: a text goes in, a vector comes out.",
        "The dense rivals run the original weights: torch as it comes (torch.nn.functional.linear), and oneDNN with"
        " weights packed beforehand, the fastest dense Linear that torch has on a CPU. All models take turns in one"
        " process.",
        "twofour.compress compares with torch as it comes when it decides whether a layer runs sparse; this page"
        " compares with the better of the two.",
    ]
    if facts.get("quick"):
        texts.append("This was a quick run: fewer sentences, queries and rounds, so the numbers move more.")
    return [Paragraph(text) for text in texts]
