"""The benchmarks for GPUs with kernels on the emulated GPU of tests/cuda, and their clock on a GPU that is made up."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu import bench_decode, bench_packing, cases, find_ranking, record, smallest, timing, tune

from tests.gpu.conftest import emulate
from tests.kernels.fake_nvidia import FakeNvidia
from twofour import UnsupportedError
from twofour.kernels import vendor
from twofour.kernels.cuda import compiler, table
from twofour.kernels.vendor import torch_operations

Run = Callable[[Callable[..., None]], list[dict[str, Any]]]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch)
    monkeypatch.setattr(cases, "has_kernels", lambda _: True)


@pytest.fixture
def run(tmp_path: Path, emulated: None) -> Run:
    """The rows of a benchmark."""

    def rows(main: Callable[..., None]) -> list[dict[str, Any]]:
        main(device="cpu", json_path=tmp_path / "rows.json", smallest=True)
        found = json.loads((tmp_path / "rows.json").read_text())["rows"]
        assert isinstance(found, list)
        return found

    return rows


def test_rows_name_the_kernels_that_ran_and_are_fresh(run: Run) -> None:
    rows = run(bench_packing.main)
    ran = {"prune_both_bf16", "keep_both_half", "quantize_bf16", "prune_e4m3", "compress_fp8", "take_half"}
    assert {name for row in rows for name in row["kernels"]} >= ran
    for row in rows:
        assert record.state(row) == "fresh", row
        assert record.is_right(row)


def test_what_a_kernel_refuses_is_missing_and_no_failure(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = table.launch

    def refusing(name: str, *rest: Any, **how: Any) -> None:
        if name == "prune_e4m3":
            raise UnsupportedError("float8_e4m3fn is not for this GPU.")
        launch(name, *rest, **how)

    monkeypatch.setattr(table, "launch", refusing)
    (row,) = (row for row in run(bench_packing.main) if (row["what"], row["dtype"]) == ("prune", "fp8"))
    assert "twofour" not in row["us"]
    assert not record.is_right(row)
    assert "no twofour: float8_e4m3fn is not for this GPU." in capsys.readouterr().out


def test_few_tokens_are_fresh_where_the_plan_is_that_of_the_shape(run: Run) -> None:
    rows = run(bench_decode.main)
    ran = {"decode_bf16_8", "decode_e4m3_bf16_8", "decode_fp16_32", "decode_int8_32"}
    assert {name for row in rows for name in row["kernels"]} == ran
    assert any("torch._scaled_mm" in {*row["us"], *row["missing"]} for row in rows)
    *rows, layer = rows
    assert layer["what"] == "layer"  # of the CPU here: a layer asks where its weight is
    assert layer["host_us"].keys() == {"twofour", "nn.Linear"}
    for row in rows:
        assert row["errors"]["twofour"]["of_bound"] <= 1
        assert len(row["grids"]) == 1
        row["processors"] = 2  # as the emulated GPU says
        assert record.state(row) == "fresh", row


@pytest.mark.parametrize(
    ("main", "kernel", "place"), [(bench_packing.main, "compress_int8", 4), (bench_decode.main, "decode_fp16", 17)]
)
def test_one_wrong_number_is_told_and_ends_the_benchmark_as_failed(
    main: Callable[..., None], kernel: str, place: int, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    launch = table.launch

    def faulty(name: str, grid: Sequence[int], device: torch.device, *arguments: int, **how: Any) -> None:
        launch(name, grid, device, *arguments, **how)
        if name.startswith(kernel):
            ctypes.memset(arguments[place], 0x3F, 2)  # the first of what it has written

    monkeypatch.setattr(table, "launch", faulty)
    with pytest.raises(SystemExit, match=f"1 of \\d+ rows failed\n.*{kernel.split('_')[1]}.*: twofour is wrong"):
        run(main)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    wrong = [row for row in rows if row["right"].get("twofour") is False]
    assert [row["dtype"] for row in wrong] == [kernel.split("_")[1]]
    assert len(rows) > 2
    assert not record.is_right(wrong[0])


def test_a_kernel_that_raises_is_no_missing_rival_and_stops_its_row_alone(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    launch = table.launch

    def broken(name: str, *rest: Any, **how: Any) -> None:
        if name == "prune_both_bf16":
            raise RuntimeError("too many resources requested for launch\nand more")
        launch(name, *rest, **how)

    monkeypatch.setattr(table, "launch", broken)
    with pytest.raises(
        SystemExit, match=r"1 of 13 rows failed\nprune both .* bf16: RuntimeError: too many resources .* launch$"
    ):
        run(bench_packing.main)
    found = json.loads((tmp_path / "rows.json").read_text())
    assert len(found["rows"]) == 12
    assert len(found["facts"]["failed in packing"]) == 1


FAULT = "CUDA error: an illegal instruction was encountered\nCompile with `TORCH_USE_CUDA_DSA`"


def test_a_fault_that_takes_the_gpu_ends_the_benchmark_at_once(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def tile(*arguments: Any, **named: Any) -> None:
        ran.append(1)
        if len(ran) == 2:
            raise RuntimeError(FAULT)
        raise RuntimeError("not for CPUs")

    ran: list[int] = []
    monkeypatch.setattr(torch, "_sparse_semi_structured_tile", tile)
    with pytest.raises(SystemExit) as ended:
        run(bench_packing.main)
    head, failed, unmeasured = str(ended.value).splitlines()
    assert head == "1 of 13 rows failed"
    fault = "RuntimeError: torch tile, CUTLASS: CUDA error: an illegal instruction was encountered"
    assert failed == f"prune both (64, 128) bf16: {fault}"
    assert unmeasured == "12 rows remain unmeasured: nothing runs on the GPU after that"
    assert len(ran) == 2
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found == {"rows": [], "facts": {"failed in packing": [failed, unmeasured]}}


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        (FAULT, True),
        ("CUDA error: an illegal memory access was encountered", True),
        ("prune_bf16 failed: unspecified launch failure (CUDA error 719).", True),
        ("CUDA error: device-side assert triggered", True),
        ("CUDA error: misaligned address", True),
        ("CUDA error: invalid configuration argument", False),
        ("CUDA out of memory. Tried to allocate 20 MiB.", False),
        ("", False),
    ],
)
def test_faults_that_take_the_gpu_are_told_from_others(message: str, lost: bool) -> None:
    assert cases.lost_gpu(RuntimeError(message)) is lost


def test_the_last_row_leaves_nothing_unmeasured(tmp_path: Path) -> None:
    def fault() -> record.Row:
        raise RuntimeError(FAULT)

    with pytest.raises(SystemExit) as ended:
        cases.measure_all("made up", tmp_path / "rows.json", [("one", fault)])
    assert str(ended.value).splitlines()[1:] == [
        "one: RuntimeError: CUDA error: an illegal instruction was encountered"
    ]


def test_a_product_that_faults_is_missing_with_the_reason_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia = FakeNvidia(cusparselt=800)
    monkeypatch.setattr(torch_operations, "installed", nvidia.operations)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", nvidia.sparse_mm)
    weight = cases.pruned(torch.randn(32, 64))
    found, missing = {}, dict[str, str]()
    for dtype in (torch.float16, torch.bfloat16):
        x, compressed = torch.randn(3, 64).to(dtype), nvidia.compress(weight.to(dtype))
        for search in (False, True):
            name = f"{dtype}, {search}"

            def made(x: torch.Tensor = x, compressed: torch.Tensor = compressed, search: bool = search) -> Any:
                found = cases.cslt_searched(x, compressed) if search else {}
                return [cases.cslt_linear(x, compressed, 32, found)]

            found |= cases.tried(name, made, missing)
    reason = vendor.cusparselt_why_not(torch.float16, torch.device("cuda"))
    assert reason is not None
    assert reason.startswith("0.8.0 faults in float16 on 9.0")
    assert missing["torch.float16, False"] == missing["torch.float16, True"] == reason
    assert list(found) == ["torch.bfloat16, False"]  # a search is of the library itself, which is not here
    assert "faults" not in missing["torch.bfloat16, True"]
    assert not nvidia.dead


def test_the_cases_for_sanitizers_run_every_kernel(emulated: None) -> None:
    ran = smallest.run_all(torch.device("cpu"))
    assert ran >= {name for name, text in table.KERNEL_TEXTS.items() if text.file != "gemm.cu"}


@pytest.mark.parametrize("fault", smallest.PLANTED)
def test_planted_faults_compile(fault: str) -> None:
    reason = compiler.why_not()
    if reason is not None:
        pytest.skip(reason)
    cubin, said = compiler.compile_text(smallest.PLANTED[fault], "planted.cu", "sm_90a")
    assert b"planted" in cubin
    assert said == ""


def test_other_splits_are_timed_beside_that_of_the_table(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = compiler.why_not()
    if reason is not None:
        pytest.skip(reason)
    own = table.split_of("bf16", 8)
    broken = table.Split(4, 1, 3, 0)
    monkeypatch.setattr(tune, "SPLITS", {("bf16", 8): (own, broken)})
    emulated_launch, ran = table.launch, list[str]()

    def launch(name: str, *rest: Any, **how: Any) -> None:
        ran.append(name)
        emulated_launch("decode_bf16_8" if name.startswith("decode_bf16_8_") else name, *rest, **how)

    monkeypatch.setattr(table, "launch", launch)
    few, many = run(tune.main)
    name = "decode_bf16_8_4_1_3_4_1"
    assert name in ran
    assert name not in table.KERNEL_TEXTS
    assert few["us"].keys() == {"twofour", "early", "1 slices", "2 slices", "4 slices", name}
    assert all(few["right"].values())
    assert few["missing"].keys() == {"decode_bf16_8_4_1_3_0_1", "2 slices, cluster", "4 slices, cluster"}
    monkeypatch.setattr(table, "most_clusters", lambda *_: (66, 32, 16))  # as on Hopper
    few, _ = run(tune.main)
    assert few["us"].keys() >= {"2 slices, cluster", "4 slices, cluster"}
    assert few["clusters"] == {"decode_bf16_8": [66, 32, 16]}
    assert all(few["right"].values())
    assert {"128x64", "128x128", "twofour"} <= many["us"].keys()


def test_ranking_by_value_is_told_from_ranking_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(64, 64).bfloat16()

    def tile(w: torch.Tensor, algorithm: str, use_cutlass: bool) -> tuple[torch.Tensor]:
        groups = w.reshape(-1, 4)
        keys = groups.abs() if algorithm else groups
        kept = groups.gather(1, keys.float().topk(2).indices)
        return (torch.cat([kept.flatten(), torch.full((2048,), -9.0).bfloat16()]),)  # metadata behind the values

    monkeypatch.setattr(torch, "_sparse_semi_structured_tile", tile)
    assert find_ranking.finding(weight, "", False)["ranks"] == "signed values"
    assert find_ranking.finding(weight, "largest_abs_values_greedy", False)["ranks"] == "magnitudes"


class Gpu:
    """Work waits in a queue while Python goes on; Python's time stands still but for what calls cost."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.busy_until = 0.0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = max(gpu.host, gpu.busy_until)

            def query(self) -> bool:
                return gpu.host >= self.at

            def synchronize(self) -> None:
                gpu.host = max(gpu.host, self.at)

            def elapsed_time(self, other: Event) -> float:
                return (other.at - self.at) * 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(
            torch.cuda, "_sleep", lambda cycles: self.work(cycles / timing.CYCLES_OF_SECOND), raising=False
        )
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: self.wait())
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.host)

    def work(self, seconds: float, python: float = 0.0) -> None:
        self.host += python
        self.busy_until = max(self.busy_until, self.host) + seconds

    def wait(self) -> None:
        self.host = max(self.host, self.busy_until)


def test_times_are_those_of_the_gpu_whatever_python_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, order = Gpu(monkeypatch), list[str]()

    def call(name: str, seconds: float, python: float, waits: bool = False) -> timing.Call:
        def run() -> None:
            order.append(name)
            gpu.work(seconds, python)
            if waits:
                gpu.wait()

        return run

    kernels = {
        "ours": [call(f"ours {copy}", 20e-6, 60e-6) for copy in range(3)],
        "rival": [call("rival", 30e-6, 5e-6)],
        "waiting": [call("waiting", 30e-6, 5e-6, waits=True)],
    }
    found = timing.in_turns(kernels, torch.device("cuda"), rounds=5, calls=4)
    assert found["ours"].median == pytest.approx(20)
    assert found["rival"].median == pytest.approx(30)
    assert found["ours"].host_us == pytest.approx([60] * 5)
    assert (found["ours"].waited, found["rival"].waited, found["waiting"].waited) == (0, 0, 5)
    assert timing.ratios_to("ours", found)["rival"] == pytest.approx(1.5)
    assert order[:9] == [*(f"ours {i}" for i in (0, 1, 2, 0)), *["rival"] * 4, "waiting"]
    assert order[12:16] == [f"ours {i}" for i in (1, 2, 0, 1)]  # the next copy each time, in turns
