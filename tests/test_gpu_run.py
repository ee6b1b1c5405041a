"""`make gpu` without a GPU: the whole of it on a CPU, tiny; and what is left of it when steps fail, hang or are killed."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks.gpu import install, profile_kernels, record, run

ROW = "from benchmarks.gpu.record import Part\nimport sys\nfrom pathlib import Path\npart = Part(Path(sys.argv[-1]))\n"
ADD = "part.add({'what': WHAT})\n"


def step(name: str, code: str, limit: float = 20, *, writes: bool = True) -> run.Step:
    """A process that has `part` and runs `code`."""
    return run.Step(name, [sys.executable, "-c", (ROW if writes else "") + code], limit, {}, writes)


def row(what: str) -> str:
    return ADD.replace("WHAT", repr(what))


@pytest.fixture
def this(tmp_path: Path) -> run.Run:
    return run.Run(tmp_path / "work", tmp_path / "results", tmp_path / "out", dry=True, commit="abc")


def saved(this: run.Run) -> dict[str, Any]:
    found = json.loads(this.path().read_text())
    assert isinstance(found, dict)
    return found


def states(this: run.Run) -> dict[str, str]:
    return {each["name"]: each["state"] for each in saved(this)["steps"]}


def test_all_steps_end_in_time_by_their_limits() -> None:
    assert sum(each.limit for each in run.steps(dry=False)) <= run.ALL_SECONDS < 540  # nine minutes
    assert [each.name for each in run.steps(dry=False)] == [each.name for each in run.steps(dry=True)]


def test_the_whole_on_a_cpu(tmp_path: Path) -> None:
    names = ["install", "machine", "tests", "bench_packing", "bench_decode", "tune", "bench_matmul", "find_ranking"]
    names += ["sanitize"]
    command = [sys.executable, str(run.HERE / "run.py"), "--dry-run", "--out", str(tmp_path / "out"), "--work"]
    command += [str(tmp_path / "work"), *(f"--only={name}" for name in names)]
    # Several processes at once would wait for each other's threads.
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "work" / "result.json").read_text())
    assert {each["name"]: each["state"] for each in found["steps"]} == {
        **dict.fromkeys(names, "passed"),
        "sanitize": "skipped",
    }
    assert found["dry"] is True
    assert found["gpu"] == "cpu"
    assert {each["bench"] for each in found["rows"]} == {"packing", "decode", "tune", "matmul"}
    for each in found["rows"]:
        assert record.is_right(each), each
        assert each["us"]["twofour"] > 0
        assert record.state(each) == "stale: no kernel is named"
    assert "torch tile" in found["rows"][0]["missing"]
    assert set(next(iter(found["cubins"].values()))) == {"source", "digest", "cubin", "seconds"}
    assert "passed" in next(each for each in found["steps"] if each["name"] == "tests")["detail"]
    assert "not measured" in done.stdout
    assert json.loads((tmp_path / "out" / "result.json").read_text())["rows"] == found["rows"]
    assert "==== bench_decode.log" in (tmp_path / "out" / "log.txt").read_text()


def test_a_step_that_is_stopped_leaves_its_rows_and_the_next_begins(this: run.Run) -> None:
    hang = row("before") + "import time\ntime.sleep(60)\n"
    assert (
        this.go([step("machine", "part.tell(gpu='NVIDIA H200')"), step("hangs", hang, 2), step("after", row("after"))])
        == 1
    )
    assert this.path().parent.name == "h200"
    assert states(this) == {"machine": "passed", "hangs": "stopped", "after": "passed"}
    assert [each["what"] for each in saved(this)["rows"]] == ["before", "after"]
    assert saved(this)["gpu"] == "NVIDIA H200"
    assert "stopped after 2 s" in saved(this)["steps"][1]["detail"]


def test_a_step_that_ignores_signals_and_its_children_are_stopped_too(
    this: run.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "GRACE_SECONDS", 0.5)
    mark = tmp_path / "still-here"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    code = "import signal, subprocess, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    code += f"subprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(60)\n"
    start = time.monotonic()
    assert this.go([step("deaf", code, 1)]) == 1
    assert time.monotonic() - start < 10
    time.sleep(max(0.0, 4.5 - (time.monotonic() - start)))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("code", "state", "status"),
    [
        ("", "passed", 0),
        ("sys.exit(77)", "skipped", 0),
        ("sys.exit(1)", "failed", 1),
        ("raise ValueError('a reason')", "failed", 1),
        ("import os; os.kill(os.getpid(), 9)", "failed", 1),
    ],
)
def test_the_exit_status_tells_of_every_failure(this: run.Run, code: str, state: str, status: int) -> None:
    assert this.go([step("first", row("kept") + code), step("last", row("last"))]) == status
    assert states(this) == {"first": state, "last": "passed"}
    assert [each["what"] for each in saved(this)["rows"]] == ["kept", "last"]


def test_steps_that_time_did_not_suffice_for_are_told(this: run.Run) -> None:
    assert this.go([step("slow", "import time; time.sleep(30)"), step("never", row("never"))], seconds=2) == 1
    assert states(this) == {"slow": "stopped", "never": "not begun"}


@pytest.mark.parametrize(
    ("log", "state", "status"),
    [("tests/a.py::b PASSED [ 1%]", "cut off", 0), ("[gw0] [ 3%] FAILED tests/a.py::b", "stopped", 1)],
)
def test_the_step_that_takes_the_rest_may_be_cut_off_while_nothing_failed(
    this: run.Run, log: str, state: str, status: int
) -> None:
    code = f"import time; print({log!r}, flush=True); time.sleep(60)"
    last = run.Step("suites", [sys.executable, "-c", code], 0.1, writes=False, takes_rest=True)
    assert this.go([step("first", row("first")), last], seconds=4) == status
    assert states(this) == {"first": "passed", "suites": state}


def test_what_was_saved_survives_the_end_of_all(tmp_path: Path) -> None:
    """SIGKILL in the middle of the second step: no time to clean up."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom benchmarks.gpu import run\nfrom tests.test_gpu_run import row, step\n"
        "this = run.Run(Path(sys.argv[1]), None, dry=True)\n"
        "sys.exit(this.go([step('first', row('first')), step('second', row('second') + 'import time; time.sleep(60)')]))"
    )
    work = tmp_path / "work"
    process = subprocess.Popen([sys.executable, "-c", code, str(work)], cwd=record.ROOT, stdout=subprocess.DEVNULL)
    try:
        _wait_for(lambda: [each["what"] for each in record.read_part(work / "second.json")["rows"]] == ["second"])
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    found = json.loads((work / "result.json").read_text())
    assert [each["what"] for each in found["rows"]] == ["first"]
    assert [each["state"] for each in found["steps"]] == ["passed", "not begun"]


def _wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_outcomes_are_counted_also_where_pytest_was_stopped() -> None:
    one = "tests/gpu/test_a.py::test_x[a b] PASSED [ 1%]\ntests/gpu/test_a.py::test_y FAILED [ 2%]\ntests/gpu/test_a.py::z "
    many = "[gw0] [  3%] PASSED tests/gpu/test_a.py::test_x \n[gw11] [100%] SKIPPED tests/gpu/test_a.py::test_FAILED \n"
    assert run.detail(one, "stopped") == "1 passed, 1 failed"
    assert run.detail(many, "passed") == "1 passed, 1 skipped"
    assert run.detail("one\nthe reason\n\n", "failed") == "the reason"


def test_an_unknown_step_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--only", "nothing"])
    assert "no step nothing: they are install, machine" in capsys.readouterr().err


WRITE = "echo ========= Invalid __global__ write of size 4 bytes"
RACE = "echo ========= Error: Race reported between Write access and Read access"


def tool(folder: Path, code: str) -> dict[str, str]:
    """An environment whose compute-sanitizer is a script."""
    folder.mkdir()
    file = folder / "compute-sanitizer"
    file.write_text(f"#!/bin/sh\n{code}\n")
    file.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ('case "$*" in *planted*) exit 86;; esac; echo 23 kernels ran', 0, "racecheck: nothing found; 23 kernels ran"),
        ("exit 86", 1, "memcheck failed"),
        ('case "$*" in *planted*) exit 86;; *race*) exit 1;; esac', 1, "racecheck did not get to the end"),
        (f'case "$*" in *planted*) {WRITE}; {RACE}; exit 1;; esac; echo 23 kernels ran', 0, "memcheck: nothing found"),
        (f'case "$*" in *planted*) ;; *memcheck*) {WRITE}; exit 1;; esac', 1, "memcheck failed"),
        ("echo Device not supported; exit 1", 77, "memcheck does not find a planted fault here: Device not supported"),
    ],
)
def test_a_sanitizer_is_believed_only_where_it_finds_a_planted_fault(
    code: str, status: int, said: str, tmp_path: Path
) -> None:
    command = [sys.executable, str(run.HERE / "sanitize.py")]
    environment = tool(tmp_path / "bin", code)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == status, done.stdout
    assert said in done.stdout


def test_without_a_compiler_it_is_installed_without_cpp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(install, "editable", lambda: False)
    monkeypatch.setattr(install, "install", lambda target, native: asked.append(native) or not native)
    monkeypatch.delenv("TWOFOUR_NO_NATIVE", raising=False)
    monkeypatch.setenv("CXX", "/nonexistent")
    assert install.main(tmp_path) == 0
    assert asked == [False]
    monkeypatch.setenv("CXX", sys.executable)  # anything that is there; the build fails
    assert install.main(tmp_path) == 0
    assert asked == [False, True, False]
    monkeypatch.setattr(install, "editable", lambda: True)
    (tmp_path / "twofour").mkdir()
    assert install.main(tmp_path) == 0
    assert not tmp_path.exists()  # an older copy could hide what is there
    assert "without C++" in capsys.readouterr().out


def test_files_of_a_step_are_copied_beside_the_result(this: run.Run, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    code = f"import pathlib; p = pathlib.Path({str(folder)!r}); p.mkdir(); (p / 'some.txt').write_text('counted')"
    assert this.go([replace(step("counts", code, writes=False), folder=folder)]) == 0
    assert (tmp_path / "out" / "some.txt").read_text() == "counted"


SECTIONS = """Report
  decode_bf16_8 (64, 4, 1)x(256, 1, 1), Context 1
    Duration          us    27.94
    DRAM Throughput    %    57.84
"""
NCU = """#!/bin/sh
case "$*" in
  *--export*) for each; do [ "$last" = --export ] && echo report > "$each"; last=$each; done ;;
  *details*) cat "$(dirname "$0")/sections" ;;
  *source*) echo '"Address","Source"' ;;
esac
"""


def test_what_nsight_compute_counts_is_kept_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = tmp_path / "bin" / "ncu"
    tool.parent.mkdir()
    (tool.parent / "sections").write_text(SECTIONS)
    tool.write_text(NCU)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    assert profile_kernels.main(tmp_path / "profile") == 0
    assert capsys.readouterr().out.split() == (
        ["decode_bf16_8", "Duration", "27.94", "us,", "DRAM", "Throughput", "57.84", "%"]
    )
    assert "Context 1" in (tmp_path / "profile" / "profile.txt").read_text()
    assert gzip.decompress((tmp_path / "profile" / "profile.csv.gz").read_bytes()) == b'"Address","Source"\n'
    tool.write_text("#!/bin/sh\necho no counters here\n")
    assert profile_kernels.main(tmp_path / "profile") == run.SKIPPED
    assert "no counters here\n\nncu counted nothing" in capsys.readouterr().out
    monkeypatch.setenv("PATH", str(tmp_path))
    assert profile_kernels.main(tmp_path / "profile") == run.SKIPPED
