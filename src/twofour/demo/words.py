"""Sentences made from the numbers. No result is written down anywhere else: a loss is said as plainly as a gain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..report.html import Tone
from ..report.record import format_bytes, format_value
from .findings import Findings
from .speed import Row

NOTICEABLE = 1.03
"""Ratios between 1/1.03 and 1.03 are called equal: repeated runs differ by as much."""

BITS = {"float32": 32, "bfloat16": 16}


def side(ratio: float) -> int:
    """1 for faster than dense, -1 for slower, 0 for equal. Decided on the ratio as it is shown, with two digits."""
    shown = round(ratio, 2)
    return 1 if shown >= NOTICEABLE else -1 if shown <= round(1 / NOTICEABLE, 2) else 0


def verdict(ratio: float) -> str:
    """A speed ratio in words: 'faster, 1.25x', 'slower, 0.80x', 'no faster, 1.01x'."""
    return f"{('no faster', 'faster', 'slower')[side(ratio)]}, {format_value(ratio, 'ratio')}"


def tone(ratio: float) -> Tone:
    """The colour of a speed ratio."""
    tones: tuple[Tone, Tone, Tone] = ("plain", "good", "bad")
    return tones[side(ratio)]


def balance(findings: Findings) -> list[str]:
    """Where the sparse model wins, where it loses, where it is all the same: at most three sentences."""
    said = []
    for which, sentence in (
        (1, "Faster than the best dense path: {}."),
        (0, "No faster and no slower: {}."),
        (-1, "Slower: {}."),
    ):
        rows = [row for row in findings.speed if side(row["against_best"]) == which]
        if rows:
            said.append(sentence.format("; ".join(map(_case, rows))))
            if which == -1 and undisturbed(rows):
                said[-1] += " Keep the model dense there."
    return said


def disturbed(measurements: int, count: int) -> str:
    """How far the numbers can be trusted when other programs were running."""
    return (
        f"Other programs took processor time during {count} of {measurements} measurements, also when these were"
        " repeated. The layers concerned are left out of the plots; repeat the run on a quiet machine."
    )


def speed(row: Row) -> str:
    """One sentence about one batch size."""
    batch = "one sentence at a time" if row["batch"] == 1 else f"{row['batch']} sentences at a time"
    best = row["best_dense"].replace("dense, ", "")
    rates = f"{rate(row['sparse'])} sentences a second against {rate(best_dense(row))}"
    text = f"{row['dtype']}, {batch}: {rates} of the best dense path ({best}) – {verdict(row['against_best'])}."
    if row["best_dense"] != "dense, torch":
        text += f" Against torch as it comes: {verdict(row['against_torch'])}."
    if row["disturbed"]:
        text += " Other programs were running: do not rely on it."
    return text


def kernels(findings: Findings) -> list[str]:
    """Which layers run sparse, and why the others do not; one sentence for each dtype that was timed."""
    said = []
    for dtype in findings.timed:
        rows = [row for row in findings.kernels if row["dtype"] == dtype]
        sparse = [row for row in rows if row["sparse"]]
        names = ", ".join(sorted({str(row["kernel"]) for row in sparse}))
        text = f"{dtype}: {len(sparse)} of {len(rows)} encoder layers run on a sparse kernel"
        text += f" ({names})" if names else ""
        text += f"; {len(rows) - len(sparse)} stay dense" if len(sparse) < len(rows) else ""
        reasons = Counter(str(row["reason"]) for row in rows if row["reason"] and not row["sparse"])
        if len(reasons) == 1 and sum(reasons.values()) == len(rows) - len(sparse):
            text += f" because {next(iter(reasons))}"
        elif reasons:
            text += ": " + "; ".join(f"{count} because {reason}" for reason, count in reasons.items())
        if not sparse:
            text += ". What is called sparse below is the pruned model run dense by torch"
        said.append(text + ".")
    return said


def layers(findings: Findings) -> list[str]:
    """How many layers win and lose against the best dense kernel."""
    said = []
    for dtype in findings.timed:
        rows = undisturbed([row for row in findings.layers if row["dtype"] == dtype])
        if not rows:
            continue
        wins = sum(side(row["against_best"]) == 1 for row in rows)
        losses = sum(side(row["against_best"]) == -1 for row in rows)
        low, high = min(row["against_best"] for row in rows), max(row["against_best"] for row in rows)
        parts = [f"{wins} faster", f"{losses} slower", f"{len(rows) - wins - losses} equal"]
        said.append(
            f"{dtype}, {rows[0]['tokens']:,} tokens: of {len(rows)} layers against the best dense kernel"
            f" {', '.join(part for part in parts if not part.startswith('0 '))}; from {low:.2f}x to {high:.2f}x."
        )
    return said


def size(row: Row) -> str:
    """One sentence about one line of bytes."""
    share = format_value(row["share"], "share")
    dense, sparse = format_bytes(row["dense"]), format_bytes(row["sparse"])
    less = "" if row["sparse"] < row["dense"] else ", which is no gain"
    return f"{row['what']}, {BITS.get(row['dtype'], '?')} bits: {sparse} instead of {dense}, {share}{less}."


def search(findings: Findings) -> list[str]:
    """What pruning did to the answers."""
    said = []
    by_name = {row["model"]: row for row in findings.search}
    dense = by_name.get("dense float32")
    for row in findings.search:
        if row is dense or dense is None:
            continue
        points = 100 * (row["found"] - dense["found"])
        change = f"{abs(points):.1f} points {'more' if points > 0 else 'less'}" if abs(points) >= 0.05 else "as many"
        said.append(
            f"{_cap(row['model'])} keeps {10 * row['kept']:.1f} of the 10 best answers of the dense float32 model, and"
            f" the same first answer for {format_value(row['first'], 'share')} of the queries; the query's own"
            f" paragraph is among its 10 for {format_value(row['found'], 'share')} ({change})."
        )
    return said


def headline(findings: Findings) -> str:
    """The result in one or two sentences."""
    parts = []
    if findings.speed:
        doubt = "" if undisturbed(findings.speed) == findings.speed else ", while other programs were running"
        ratios = sorted(float(row["against_best"]) for row in findings.speed)
        span = " to ".join(dict.fromkeys(format_value(ratio, "ratio") for ratio in (ratios[0], ratios[-1])))
        parts.append(f"Sentences per second against the fastest dense path of the same run: {span}{doubt}.")
    disk = findings.size_row("bfloat16", "encoder Linears in the file") or (findings.size[0] if findings.size else None)
    if disk is not None:
        parts.append(
            f"The pruned layers take {format_value(disk['share'], 'share')} of their bytes at"
            f" {BITS.get(disk['dtype'], '?')} bits."
        )
    kept = [row for row in findings.search if row["model"].startswith("sparse")]
    if kept:
        parts.append(f"Of ten search answers {10 * kept[0]['kept']:.1f} stay, without retraining.")
    return " ".join(parts)


def undisturbed(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other program disturbed."""
    return [row for row in rows if not row["disturbed"]]


def best_dense(row: Row) -> float:
    """Sentences per second of the faster dense rival."""
    return float(max(row["torch"], row.get("onednn", 0.0)))


def rate(value: float) -> str:
    """Sentences per second as shown."""
    return f"{value:,.0f}" if value >= 20 else f"{value:.1f}"


def _case(row: Row) -> str:
    doubt = ", disturbed" if row["disturbed"] else ""
    return f"{row['dtype']} at batch {row['batch']} ({format_value(row['against_best'], 'ratio')}{doubt})"


def _cap(text: str) -> str:
    return text[:1].upper() + text[1:]
