"""compute-sanitizer over the smallest cases: memory (memcheck) and shared memory between threads (racecheck).

    python benchmarks/gpu/sanitize.py

Each tool must first find a planted fault; where it cannot, its silence would say nothing, and the step ends as skipped
(exit status 77, the reason on the last line). What a tool finds in the kernels counts in any case. A fault can also end the
process before the tool does, with a status of its own: then the words of the tool tell.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SKIPPED = 77
FOUND = 86
TOO_LONG = 124
SECONDS = 55
FAULT = re.compile(r"Invalid __\w+__ (read|write)|Race reported|(ERROR|RACECHECK) SUMMARY: [1-9]")
TOOLS = {"memcheck": ("bounds", ["--report-api-errors", "no"]), "racecheck": ("race", [])}


def run(tool: str, options: list[str], *arguments: str) -> tuple[int, str]:
    """Exit status and output of the smallest cases under a tool; TOO_LONG where it was stopped."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "10", *options]
    command += [sys.executable, str(HERE / "smallest.py"), *arguments]
    # Every tensor its own allocation, so that what lies behind it is nobody's.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        said = b"".join(part for part in (error.stdout, error.stderr) if part)  # bytes, also where text was asked for
        return TOO_LONG, f"{said.decode(errors='replace')}\nnot ended after {error.timeout:.0f} s"
    return done.returncode, done.stdout + done.stderr


def main() -> int:
    """0 clean, 1 a finding, 77 no tool that works."""
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not here")
        return SKIPPED
    with ThreadPoolExecutor() as pool:  # most of the time goes into starting
        planted = {
            tool: pool.submit(run, tool, options, "--planted", fault) for tool, (fault, options) in TOOLS.items()
        }
        real = {tool: pool.submit(run, tool, options) for tool, (_, options) in TOOLS.items()}
    worked, failed, blind = [], [], []
    for tool in TOOLS:
        status, said = real[tool].result()
        saw, reason = planted[tool].result()
        if _is_finding(status, said):
            failed.append(f"{tool} failed")
        elif not _is_finding(saw, reason):
            blind.append(f"{tool} does not find a planted fault here: {_last(reason)}")
            continue
        elif status == 0:
            worked.append(f"{tool}: nothing found; {_line(said, 'kernels ran')}")
            continue
        elif status == TOO_LONG:
            blind.append(f"{tool} found nothing, but was {_last(said)}")
            continue
        else:
            failed.append(f"{tool} did not get to the end")
        print(f"{said[:4000]}\n[..]\n{said[-2000:]}" if len(said) > 6000 else said)
    print("\n".join([*worked, *blind, *failed]))
    return 1 if failed else SKIPPED if blind else 0


def _is_finding(status: int, said: str) -> bool:
    return status == FOUND or FAULT.search(said) is not None


def _last(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it says nothing")[:160]


def _line(text: str, part: str) -> str:
    return next((line.strip() for line in text.splitlines() if part in line), "")


if __name__ == "__main__":
    sys.exit(main())
