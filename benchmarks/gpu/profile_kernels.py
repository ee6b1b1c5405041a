"""What Nsight Compute counts of kernels that bars are about: where their time goes, once it has been measured.

    python benchmarks/gpu/profile_kernels.py build/gpu/profile

Writes profile.txt (the sections of each kernel) and profile.csv.gz (each instruction: how often, what it waited for). The
step ends as skipped (exit status 77) where ncu is not here or may not count; the clocks of the GPU are left as they are.
"""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.sanitize import SKIPPED

SECONDS = 30
SHAPE = (8192, 8192)
TOKENS = (1, 32)
MANY_TOKENS = 4096
KERNELS = "^(decode|gemm|prune|prune_both|keep_both|compress|quantize)_"
SHOWN = ("Duration", "DRAM Throughput", "L2 Hit Rate", "Registers Per Thread", "Issue Slots Busy", "Achieved Occupancy")


def launch_all() -> None:
    """Each of them once."""
    import torch
    from benchmarks.gpu import cases

    from twofour.kernels.cuda import packing, products

    device = torch.device("cuda", torch.cuda.current_device())
    weight = cases.normal(SHAPE, torch.bfloat16, device)
    packed, (narrow, scales) = packing.prune(weight), packing.quantize(weight)
    packing.prune_both(weight)
    packing.keep_both(weight, packing.mask_both(weight), check=False)
    dense = packing.expand(packed)
    packing.compress(dense, check=False)
    packing.prune(weight.to(torch.float8_e4m3fn))
    for tokens in TOKENS:
        x = cases.normal((tokens, SHAPE[1]), torch.bfloat16, device)
        products.linear(x, packed, kernels="decode")
        products.linear(x, narrow, row_scale=scales, kernels="decode")
    products.linear(cases.normal((MANY_TOKENS, SHAPE[1]), torch.bfloat16, device), packed, kernels="gemm")
    torch.cuda.synchronize()


def ncu(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Ends with the output of ncu.

    Raises:
        subprocess.TimeoutExpired: not within SECONDS.
    """
    return subprocess.run(["ncu", *arguments], capture_output=True, text=True, timeout=SECONDS, check=False)


def summary(text: str) -> str:
    """A line for each kernel, of the sections that ncu prints."""
    lines = []
    for part in re.split(r"\n  (?=\w+ \(\d+, \d+, \d+\)x\()", text)[1:]:
        found = [re.search(rf"^ +{name} +(\S+) +([\d.,]+)$", part, re.MULTILINE) for name in SHOWN]
        said = [f"{name} {each[2]} {each[1]}" for name, each in zip(SHOWN, found, strict=True) if each]
        lines.append(f"{part.split()[0]:24} {', '.join(said)}")
    return "\n".join(lines)


def main(out: Path) -> int:
    """0 where there is a profile."""
    if shutil.which("ncu") is None:
        print("ncu is not here")
        return SKIPPED
    out.mkdir(parents=True, exist_ok=True)
    report = out / "profile.ncu-rep"
    this = [sys.executable, str(Path(__file__).resolve()), "--launch"]
    options = ["--clock-control", "none", "--set", "full", "--force-overwrite", "--export", str(report)]
    try:
        done = ncu(*options, "--kernel-name", f"regex:{KERNELS}", *this)
        if not report.is_file():
            print(f"{done.stdout[-2000:]}{done.stderr[-2000:]}\nncu counted nothing")
            return SKIPPED
        text = ncu("--import", str(report), "--page", "details").stdout
        (out / "profile.txt").write_text(text, encoding="utf-8")
        with gzip.open(out / "profile.csv.gz", "wt", encoding="utf-8") as stream:
            stream.write(ncu("--import", str(report), "--page", "source", "--csv").stdout)
    except subprocess.TimeoutExpired:
        print(f"ncu was not done after {SECONDS} s")
        return SKIPPED
    report.unlink()
    print(summary(text))
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "--launch":
        launch_all()
    else:
        sys.exit(main(Path(sys.argv[1]).resolve()))
