"""Everything that needs a GPU, in one command and in under nine minutes: make gpu.

    python benchmarks/gpu/run.py [--out FOLDER] [--only STEP]
    python benchmarks/gpu/run.py --dry-run               # all of it on a CPU, tiny, with stand-ins for kernels

Each step is a process with a time limit of its own. What it has found is in the result before the next begins, also where
it failed or was stopped: the others go on. The exit status is 1 where a step failed, was stopped or never began.
The result is benchmarks/results/<gpu>/<date>.json; of a dry run it stays in build/gpu-dry.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import record

HERE = Path(__file__).resolve().parent
ALL_SECONDS = 535.0
SKIPPED = 77
GRACE_SECONDS = 3.0
WORKERS = 6
LOG_LINES = 25
SUITES = [
    f"tests/{room}" for room in ("kernels", "nn", "format", "masks", "interop", "solvers", "workflows", "training")
]
"""Tests of the CPU that run on any device; what cannot is marked of_cpu."""
OUTCOMES = "PASSED|FAILED|ERROR|SKIPPED"
FAILED = ("failed", "stopped", "not begun")
CUT_OFF = "cut off"  # by the end of all, with nothing wrong until then
CLOCKS = "clocks.sm,clocks.mem,temperature.gpu,power.draw,utilization.gpu,clocks_event_reasons.active"
OF_DRIVER = "name,driver_version,clocks.max.sm,clocks.max.mem,power.limit,memory.total,persistence_mode"


@dataclass(frozen=True)
class Step:
    """A process.

    Args:
        limit: seconds; then it is stopped.
        environment: of its own, besides that of all.
        writes: rows and findings, by --json.
        takes_rest: has all time that is left, not its limit alone.
        folder: of files besides, which are copied too.
    """

    name: str
    command: Sequence[str]
    limit: float
    environment: Mapping[str, str] = field(default_factory=dict)
    writes: bool = True
    takes_rest: bool = False
    folder: Path | None = None


def steps(dry: bool, python: str = sys.executable) -> list[Step]:
    """All of them, in the order in which they run."""

    def script(name: str, limit: float, *arguments: str, writes: bool = True) -> Step:
        command = [python, str(HERE / f"{name}.py"), *arguments]
        return Step(name, command + (["--device", "cpu", *tiny] if dry and writes else []), limit, {}, writes)

    tiny = ["--smallest"]
    pytest = [python, "-m", "pytest", "-v", "--tb=short", "-W", "default", "-p", "no:cacheprovider"]
    pytest += [] if dry else ["-n", str(WORKERS)]
    few_threads = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # of each of several processes
    on_gpu = {"TWOFOUR_GPU_TESTS": "emulated" if dry else "required", **few_threads}
    smallest = ["-k", "smallest"] if dry else []
    own = ["tests/gpu", "--ignore=tests/gpu/test_vendor.py", *smallest]
    gpu_tests = Step("tests", [*pytest, *own], 70, on_gpu, writes=False)
    vendor = Step("vendor", [*pytest, "tests/gpu/test_vendor.py"], 30, on_gpu, writes=False)
    suites = Step(
        "suites",
        [*pytest, "--continue-on-collection-errors", *SUITES, *(["-k", "layout"] if dry else [])],
        15,
        {"TWOFOUR_TEST_DEVICE": "cpu" if dry else "cuda", **few_threads},
        writes=False,
        takes_rest=True,
    )
    profile = record.ROOT / "build" / "gpu-profile"
    return [
        script("install", 80, str(site_of(dry)), writes=False),
        script("machine", 25),
        gpu_tests,
        script("bench_packing", 45),
        script("bench_decode", 57),
        script("tune", 58),
        replace(script("profile_kernels", 35, str(profile), writes=False), folder=profile),
        script("bench_matmul", 50),
        script("find_ranking", 10),
        script("sanitize", 60, writes=False),
        vendor,
        suites,
    ]


def site_of(dry: bool) -> Path:
    """Where twofour is installed."""
    return record.ROOT / "build" / ("gpu-site-dry" if dry else "gpu-site")


@dataclass
class Run:
    """A run and its result so far.

    Args:
        work: folder of logs and parts.
        results: below it the result is kept by the name of the GPU; None keeps it in `work` alone.
        out: a folder that gets copies.
        dry: no GPU is there; the result says so.
    """

    work: Path
    results: Path | None
    out: Path | None = None
    dry: bool = False
    commit: str = "unknown"
    record: dict[str, Any] = field(default_factory=dict)

    def go(self, todo: Sequence[Step], seconds: float = ALL_SECONDS) -> int:
        """Runs the steps; 0 where none failed."""
        end = time.monotonic() + seconds
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        self.record = {
            "date": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
            "commit": self.commit,
            "command": "make gpu" + (" (dry)" if self.dry else ""),
            **({"dry": True} if self.dry else {}),
            "driver": nvidia_smi(OF_DRIVER),
            "steps": [{"name": each.name, "state": "not begun"} for each in todo],
            "findings": {},
            "rows": [],
        }
        self._save()
        for place, step in enumerate(todo):
            left = end - time.monotonic()
            if left > 1:
                self.record["steps"][place] = self._step(step, left if step.takes_rest else min(step.limit, left))
                self._save()
        print(self.table())
        return int(any(each["state"] in FAILED for each in self.record["steps"]))

    def environment(self) -> dict[str, str]:
        """Of every step: where twofour is, and where compiled kernels are kept."""
        path = os.pathsep.join(filter(None, [str(site_of(self.dry)), os.environ.get("PYTHONPATH", "")]))
        cache = str(self.work / "cache")
        return {"PYTHONPATH": path, "TWOFOUR_CACHE": cache, "TYPER_STANDARD_TRACEBACK": "1"}

    def table(self) -> str:
        """A line for each step."""
        lines = [
            f"{each['name']:14} {each['state']:10} {each.get('seconds', 0):6.1f} s  {each.get('detail', '')}"
            for each in self.record["steps"]
        ]
        return "\n".join(["", *lines, f"result: {self.path()}"])

    def path(self) -> Path:
        """Where the result lies: by the GPU's name as soon as that is known."""
        if self.results is None or "gpu" not in self.record:
            return self.work / "result.json"
        gpu = re.sub(r"[^a-z0-9]+", "-", self.record["gpu"].lower().removeprefix("nvidia ")).strip("-")
        return self.results / gpu / (re.sub(r"\D", "", self.record["date"][:16]) + ".json")

    def _step(self, step: Step, limit: float) -> dict[str, Any]:
        part, log = self.work / f"{step.name}.json", self.work / f"{step.name}.log"
        command = [*step.command, *(["--json", str(part)] if step.writes else [])]
        before, start = nvidia_smi(CLOCKS), time.monotonic()
        print(f"== {step.name} (at most {limit:.0f} s)", flush=True)
        status = run(command, log, limit, {**self.environment(), **step.environment})
        seconds = time.monotonic() - start
        text = _text(log)
        if step.folder is not None and step.folder.is_dir() and self.out is not None:
            shutil.copytree(step.folder, self.out, dirs_exist_ok=True)
        state = {None: "stopped", 0: "passed", SKIPPED: "skipped"}.get(status, "failed")
        if state == "stopped" and step.takes_rest and not re.search(r"\b(FAILED|ERROR)\b", text):
            state = CUT_OFF
        print("\n".join(text.rstrip().splitlines()[-LOG_LINES:]), flush=True)
        if step.writes:
            found = record.read_part(part)
            self.record["rows"] += found["rows"]
            if step.name == "machine":
                self.record = {**found["facts"], **self.record}
            else:
                self.record["findings"].update(found["facts"])
        return {
            "name": step.name,
            "state": state,
            "seconds": round(seconds, 1),
            "limit": limit,
            "detail": detail(text, state),
            "before": before,
            "after": nvidia_smi(CLOCKS),
        }

    def _save(self) -> None:
        path = self.path()
        record.write_json(path, self.record)
        if self.out is not None:
            record.write_json(self.out / "result.json", self.record)
            logs = [f"==== {each.name}\n{_text(each)}" for each in sorted(self.work.glob("*.log"))]
            (self.out / "log.txt").write_text("\n".join(logs), encoding="utf-8")


def _text(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


def run(command: Sequence[str], log: Path, limit: float, environment: Mapping[str, str]) -> int | None:
    """Exit status of a process and its children, None where they had to be stopped."""
    every = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, cwd=record.ROOT, env=every, preexec_fn=_alone
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            _stop(process, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
            stream.write(f"\nstopped after {limit:.0f} s\n")
            return None
        finally:
            _stop(process, signal.SIGKILL)
            process.wait()


def _alone() -> None:
    """A group of its own, which ends when this process does."""
    os.setpgid(0, 0)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, of Linux


def _stop(process: subprocess.Popen[Any], by: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, by)


def detail(log: str, state: str) -> str:
    """What a log says in a few words: pytest's outcomes also where it was stopped, else the last line."""
    # "[gw0] [ 3%] PASSED tests/..." of several processes, "tests/... PASSED [ 3%]" of one
    found = re.findall(rf"^(?:\[gw\d+\] \[ *\d+%\] ({OUTCOMES}) |tests/\S+::.* ({OUTCOMES})\b)", log, re.MULTILINE)
    words = [first or second for first, second in found]
    if words:
        return ", ".join(f"{words.count(word)} {word.lower()}" for word in OUTCOMES.split("|") if word in words)
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1][:120] if lines and state != "passed" else ""


def nvidia_smi(query: str) -> str | None:
    """The answer as one line, None where there is no GPU."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def commit() -> str:
    """The commit, with "+" where files differ from it; "unknown" where there is no repository."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+"]
    with contextlib.suppress(OSError):
        done = subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    return "unknown"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all steps, or those asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, tiny, with stand-ins")
    parser.add_argument("--only", action="append", default=[], help="a step; repeat it for several")
    parser.add_argument("--seconds", type=float, default=ALL_SECONDS, help="for all steps together")
    parser.add_argument("--out", type=Path, help="a folder for copies of the result and the logs")
    parser.add_argument("--work", type=Path, help="a folder for logs; default build/gpu")
    parser.add_argument("--commit", help="what the result says it was made at; default what git says")
    options = parser.parse_args(arguments)
    todo = steps(options.dry_run)
    unknown = set(options.only) - {each.name for each in todo}
    if unknown:
        parser.error(f"no step {', '.join(sorted(unknown))}: they are {', '.join(each.name for each in todo)}")
    todo = [each for each in todo if not options.only or each.name in options.only]
    work = options.work or record.ROOT / "build" / ("gpu-dry" if options.dry_run else "gpu")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    this = Run(
        work.resolve(),
        None if options.dry_run else record.RESULTS,
        options.out,
        options.dry_run,
        options.commit or commit(),
    )
    status = this.go(todo, options.seconds)
    with contextlib.suppress(OSError):
        run([sys.executable, str(HERE / "bars.py"), str(this.path())], work / "bars.log", 20, this.environment())
        print((work / "bars.log").read_text(encoding="utf-8"))
    return status


if __name__ == "__main__":
    sys.exit(main())
