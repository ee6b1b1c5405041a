"""Records: plain JSON from what callers put into them, and numbers for people."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from twofour.report import Column, Report
from twofour.report.record import format_bytes


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(1.5), 1.5),
        (np.int64(7), 7),
        (np.bool_(True), True),
        (np.float32("nan"), None),
        (torch.tensor(2.5), 2.5),
        (torch.tensor(3), 3),
        (torch.tensor([1, 2]), [1, 2]),
        (np.array([0.5, float("inf")]), [0.5, None]),
        (b"gelu \xff", "gelu \\xff"),
        (np.longdouble(1), "1.0"),
        (torch.float32, "torch.float32"),
    ],
)
def test_numbers_stay_numbers_and_bytes_become_text(value: object, expected: object) -> None:
    record = json.loads(Report("x", (), ({"value": value},)).to_json())
    assert record["rows"][0]["value"] == expected
    assert type(record["rows"][0]["value"]) is type(expected)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_499, "999 kB"),
        (999_999, "1 MB"),
        (1_234_567, "1.23 MB"),
        (999_999_999, "1 GB"),
        (5e12, "5000 GB"),
    ],
)
def test_bytes_take_the_unit_that_needs_three_digits(count: float, text: str) -> None:
    assert format_bytes(count) == text


def test_names_in_a_narrow_table_keep_what_tells_layers_apart() -> None:
    names = [
        f"{side}.layer.{i}.attention.self.{part}"
        for side in ("encoder", "decoder")
        for i in (1, 11)
        for part in ("query", "key")
    ]
    columns = (Column("layer", "layer"), Column("kernel", "kernel"), Column("error", "rounding", "error"))
    for kernel in ("cpu", "cpu avx512vnni int8 and so on"):
        rows = tuple({"layer": name, "kernel": kernel, "error": 0.005877578920576993} for name in names)
        for width in (100, 64):
            text = Report("t", columns, rows).to_table(width)
            lines = text.splitlines()[1:]
            assert max(map(len, lines)) <= width
            assert len(lines) == len(names), text  # none is folded
            shown = [line.split()[0] for line in lines]
            assert len(set(shown)) == len(names)
            assert all(f".{1 if '.1.' in name else 11}." in short for name, short in zip(names, shown, strict=True))
            assert all(line.endswith("5.9e-03") for line in lines)
