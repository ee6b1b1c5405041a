"""Which results of GPUs are of the kernels as they are, and that the README shows no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarks.gpu import bars, bench_packing, readme, record

README = record.ROOT / "README.md"
Row = dict[str, Any]


def test_the_readme_shows_fresh_results_alone() -> None:
    print("\n".join(readme.states()))  # a stale result is told, and is no failure
    shown = readme.shown(README.read_text(encoding="utf-8"))
    assert shown == readme.block(), "python benchmarks/gpu/readme.py --write"


def test_results_that_are_there_can_be_judged() -> None:
    for path, result in record.results():
        assert not result.get("dry"), path
        assert result["commit"] != "unknown", path
        for row in result["rows"]:
            assert record.state(row).split(":")[0] in ("fresh", "stale"), path
        assert bars.lines(result)


def made_up(what: str, kernel: str, tokens: int | None = None, us: float = 18.0, **more: Any) -> Row:
    """A row of a kernel as it is now, of the square."""
    shape = {"out_features": 8192, "in_features": 8192, "dtype": "bf16", "processors": 132, "shared_bytes": 227 << 10}
    grid = (record._planned(kernel, {**shape, "tokens": tokens}) or [kernel, 1])[1:]
    found: Row = {
        "bench": "made up",
        "what": what,
        **shape,
        **({} if tokens is None else {"tokens": tokens}),
        "kernels": {kernel: record.source_of(kernel)},
        "grids": {kernel: grid},
        "us": {"twofour": us, "cuBLAS": 1.6 * us, "cuSPARSELt": 1.3 * us, "torch tile": 2 * us},
        "x": {"cuBLAS": 1.6, "cuSPARSELt": 1.3, "torch tile": 2.0},
        "right": {"twofour": True},
        "missing": {},
    }
    return {**found, **more}


def decode_rows(us: float = 18.0) -> list[Row]:
    names = {tokens: f"decode_bf16_{next(size for size in (8, 16, 32) if size >= tokens)}" for tokens in bars.FEW}
    return [made_up("few tokens", names[tokens], tokens, us + tokens / 10) for tokens in bars.FEW]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A made-up result below tmp_path; returns where results are."""

    def put(rows: list[Row], date: str = "2027-01-02T03:04:05+00:00", gpu: str = "NVIDIA H200", **more: Any) -> Path:
        results = tmp_path / "benchmarks" / "results"
        record.write_json(results / "h200" / f"{date[:10]}.json", {"gpu": gpu, "date": date, "rows": rows, **more})
        return results

    return put


def lines(results: Path) -> list[str]:
    return readme.block(results, results.parents[1]).splitlines()[1:-1]


def test_where_nothing_was_run_the_readme_says_so(tmp_path: Path) -> None:
    assert lines(tmp_path / "a" / "b") == ["- Pruning, packing and products: not yet run on hardware."]


def test_fresh_results_are_shown(write: Callable[..., Path]) -> None:
    results = write([*decode_rows(), made_up("compress", "compress_half", us=50.0)])
    assert lines(results)[0] == (
        "- 8192×8192, bfloat16, 1 to 32 tokens, weights from memory: **18.1 to 21.2 µs, 1.60× cuBLAS** on an NVIDIA H200"
        " ([JSON](benchmarks/results/h200/2027-01-02.json))."
    )
    assert "**50.0 µs, 1.30× cuSPARSELt**" in lines(results)[5]
    assert [line.endswith(readme.NOT_RUN + ".") for line in lines(results)] == [False, True, True, True, True, False]
    assert readme.states(results) == [f"{results}/h200/2027-01-02.json: 7 of 7 rows are fresh"]


def test_stale_results_are_told_and_not_shown(write: Callable[..., Path]) -> None:
    rows = decode_rows()
    rows[2]["kernels"] = {"decode_bf16_8": "of another day"}
    results = write([*rows, made_up("compress", "compress_half", kernels={"gone_half": "0"})])
    assert lines(results) == [
        "- Pruning, packing and products: changed since they ran on an NVIDIA H200"
        " ([JSON](benchmarks/results/h200/2027-01-02.json)); as they are now not yet run on hardware."
    ]
    assert readme.states(results)[0].endswith("5 of 7 rows are fresh")
    assert "  made up few tokens 8192 8192 bf16 4: stale: decode_bf16_8 has changed" in readme.states(results)
    assert "  made up compress 8192 8192 bf16: stale: gone_half is gone" in readme.states(results)


def test_another_plan_of_the_launch_makes_a_result_stale() -> None:
    row = made_up("few tokens", "decode_bf16_8", 1)
    assert record.state(row) == "fresh"
    assert record.state({**row, "grids": {"decode_bf16_8": [64, 5]}}) == "stale: decode_bf16_8 is launched otherwise"
    assert record.state({**row, "processors": None}) == "stale: decode_bf16_8 is launched otherwise"
    assert record.state({**row, "kernels": {}}) == "stale: no kernel is named"
    name = "decode_bf16_32"
    row = made_up("few tokens", name, 32, clusters={name: [66, 32, 16]})
    assert record.state({**row, "grids": {name: [32, 4, 4]}}) == "fresh"
    assert record.state({**row, "grids": {name: [32, 4]}}) == f"stale: {name} is launched otherwise"  # but no cluster


def test_results_that_are_wrong_dry_or_in_part_are_not_shown(write: Callable[..., Path]) -> None:
    wrong = [made_up("compress", "compress_half", right={"twofour": False})]
    for rows, more in ((wrong, {}), (decode_rows(), {"dry": True}), (decode_rows()[:-1], {})):
        results = write(rows, **more)
        assert readme.states(results)[0].endswith(f"{len(rows)} of {len(rows)} rows are fresh")
        assert all(line.endswith(": not yet run on hardware.") for line in lines(results))


def test_the_newest_of_the_fresh_results_is_shown(write: Callable[..., Path]) -> None:
    write([made_up("compress", "compress_half", us=60.0)], "2027-01-01T00:00:00+00:00")
    write([made_up("compress", "compress_half", us=50.0)], "2027-01-03T00:00:00+00:00")
    stale = [made_up("compress", "compress_half", us=40.0, kernels={"compress_half": "0"})]
    results = write(stale, "2027-01-05T00:00:00+00:00")
    assert "**50.0 µs" in lines(results)[5]
    assert "2027-01-03.json" in lines(results)[5]


def test_a_readme_that_shows_what_is_stale_is_found(write: Callable[..., Path]) -> None:
    results = write(decode_rows())
    shown = readme.block(results, results.parents[1])
    text = f"before\n{shown}\nafter"
    assert readme.shown(text) == shown
    rows = decode_rows()
    rows[0]["kernels"] = {"decode_bf16_8": "of another day"}
    write(rows)
    assert readme.shown(text) != readme.block(results, results.parents[1])
    with pytest.raises(ValueError, match="substring not found"):
        readme.shown("no marks")


def test_the_source_digest_of_a_kernel_holds_its_code_and_its_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from twofour.kernels.cuda import compiler, table

    first = {name: record.source_of(name) for name in table.KERNEL_TEXTS}
    assert len(set(first.values())) == len(first)
    assert record.source_of("nothing") is None
    monkeypatch.setattr(compiler, "version", lambda: "99.9")
    assert record.source_of("compress_half") == first["compress_half"]
    text = table.KERNEL_TEXTS["compress_half"]
    monkeypatch.setitem(table.KERNEL_TEXTS, "compress_half", dataclasses.replace(text, dynamic_bytes=64))
    assert record.source_of("compress_half") != first["compress_half"]


def test_bars_are_met_missed_not_measured_or_wrong(tmp_path: Path) -> None:
    def said(rows: list[Row]) -> list[str]:
        return [line[:12].strip() for line in bars.lines({"rows": rows})]

    none = said([])
    assert set(none) == {"not measured"}
    met = said(decode_rows(15.0))
    assert met[:2] == ["met", "met"]
    assert met[2:] == none[2:]
    assert said(decode_rows(19.0))[0] == "MISSED"
    assert said(decode_rows()[:-1])[0] == "not measured"
    rows = decode_rows(15.0)
    rows[1]["right"] = {"twofour": False}
    assert said(rows)[:2] == ["MISSED", "MISSED"]
    rows = decode_rows(15.0)
    rows[0]["kernels"] = {"decode_bf16_8": "of another day"}
    assert "(1 of 6 rows stale)" in bars.lines({"rows": rows})[0]
    both = made_up("prune both", "prune_both_bf16", us=70.0)
    both["x"]["torch tile, CUTLASS"] = 1.2  # the faster of two rivals counts
    assert [line for line in bars.lines({"rows": [both]}) if "both ways" in line][1].startswith("MISSED")
    assert {each.rivals for each in bars.BARS if each.what == "prune both"} == {tuple(bench_packing.TILES)}
    both["x"] |= {"torch tile, CUTLASS": 1.9, "torch tile, magnitudes, CUTLASS": 1.3}  # and of four
    assert [line for line in bars.lines({"rows": [both]}) if "both ways" in line][1].startswith("MISSED")
    both["x"]["torch tile, magnitudes, CUTLASS"] = 1.5
    assert [line for line in bars.lines({"rows": [both]}) if "both ways" in line][1].startswith("met")


def test_a_damaged_file_among_results_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200" / "half.json").write_text('{"gpu": ')
    (tmp_path / "h200" / "cpu.json").write_text(json.dumps({"rows": []}))
    assert record.results(tmp_path) == []
    assert record.read_part(tmp_path / "h200" / "half.json") == {"rows": [], "facts": {}}
