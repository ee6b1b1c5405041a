"""Checks that run in several processes at once, started once for many of them: torch takes seconds to start.

A module of checks ends with `main(CHECKS)`; a test asks `run` for what each of them said. No ports are fixed: processes meet
by way of a file.
"""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

PATIENCE = 100.0
"""Seconds until processes that wait for each other are ended."""

Check = Callable[[Path], None]


def run(module: str, processes: int, checks: Sequence[str], folder: Path) -> dict[str, str | None]:
    """Check -> None where it passed in every process, or else what went wrong, with the traceback of the process that failed.

    Args:
        module: name of the module whose `main` runs the checks, one after the other, until one of them fails.
        folder: theirs, to leave files in for each other.
    """
    root = Path(__file__).parents[2]
    logs = [folder / f"{processes}-processes.{rank}.log" for rank in range(processes)]
    meeting = Path(tempfile.mkdtemp(dir=folder)) / "store"
    started: list[subprocess.Popen[bytes]] = []
    ends: list[int | None] = []
    try:
        for rank, log in enumerate(logs):
            environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", module, str(meeting), str(folder), *checks]
            with log.open("wb") as file:
                started.append(
                    subprocess.Popen(command, cwd=root, env=environment, stdout=file, stderr=subprocess.STDOUT)
                )
        _wait(started)
        ends = [process.poll() for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    said = [log.read_text(errors="replace") for log in logs]
    found: dict[str, str | None] = {}
    first = None
    for check in checks:
        if first is not None:
            found[check] = f"it did not run, for '{first}' failed before"
        elif all(f"passed: {check}\n" in text for text in said):
            found[check] = None
        else:
            first = check
            found[check] = "\n".join((*_told(said, check), f"exit states, None where it was still running: {ends}"))
    return found


def main(checks: Mapping[str, Check]) -> None:
    """Runs the checks that the command line names, in one of the processes."""
    meeting, folder, *names = sys.argv[1:]
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    faulthandler.dump_traceback_later(PATIENCE - 5, exit=True)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes)
    warnings.simplefilter("error")
    for name in names:
        torch.manual_seed(0)
        start = time.monotonic()
        try:
            checks[name](Path(folder))
        except BaseException:
            traceback.print_exc()
            print(f"failed: {name}", flush=True)
            os._exit(1)  # the others may be waiting for this process, and it for them
        print(f"{time.monotonic() - start:.1f} s", f"passed: {name}", sep="\n", flush=True)
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # models keep gloo's threads, one of which now and then asks a Python that is gone, and aborts


def _told(said: Sequence[str], check: str) -> list[str]:
    """What the processes in which a check failed have said; or all, where they ended otherwise."""
    told = [f"process {i} of {len(said)}:\n{text}" for i, text in enumerate(said)]
    return [text for text in told if f"failed: {check}\n" in text] or told


def _wait(started: Sequence[subprocess.Popen[bytes]]) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        codes = [process.poll() for process in started]
        if None not in codes:
            return
        if any(codes):  # the others wait for it in vain; but they may be about to say why
            end = min(end, time.monotonic() + 3)
        time.sleep(0.02)
