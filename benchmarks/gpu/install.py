"""Puts twofour where the steps after this find it: with its C++ if there is a compiler, without it if not. Downloads nothing.

python benchmarks/gpu/install.py build/gpu-site
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import run
from benchmarks.gpu.record import ROOT

NATIVE_SECONDS = 60
"""The rest of the step's time is for an installation without C++."""
MOST_SAID = 4000
QUESTION = "import importlib.util as u; s = u.find_spec('twofour'); print(s.origin if s and s.origin else '')"


def editable() -> bool:
    """Is this repository's twofour in the environment already?"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", QUESTION], capture_output=True, text=True, env=environment, cwd="/", check=False
    )
    return done.stdout.strip() == str(ROOT / "src" / "twofour" / "__init__.py")


def install(target: Path, native: bool) -> bool:
    """True where pip succeeds."""
    shutil.rmtree(target, ignore_errors=True)
    environment = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    if not native:
        environment["TWOFOUR_NO_NATIVE"] = "1"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-build-isolation", "--no-deps"]
    command += ["--disable-pip-version-check", "--target", str(target), str(ROOT)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        status = run.run(command, log, NATIVE_SECONDS, environment)
        print(log.read_text(encoding="utf-8", errors="replace")[-MOST_SAID:])
    return status == 0


def main(target: Path) -> int:
    """0 where twofour can be imported afterwards."""
    if editable():
        shutil.rmtree(target, ignore_errors=True)  # an older copy could hide it
        print("this repository's twofour is in the environment already")
        return 0
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler and not os.environ.get("TWOFOUR_NO_NATIVE") and install(target, native=True):
        print(f"installed into {target}, built with {compiler}")
        return 0
    if install(target, native=False):
        print(f"installed into {target} without C++")
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
