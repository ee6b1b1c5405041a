"""What the benchmarks on GPUs share: inputs, our kernels and what stands for them on a CPU, rivals, errors, rows."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from benchmarks.gpu import record, timing
from torch import Tensor

from twofour import SparseMatrix
from twofour.errors import UnsupportedError
from twofour.kernels import reference, vendor
from twofour.kernels.cuda import arguments, decode, layout, packing, prepared, products, resources, table
from twofour.masks import nm_mask
from twofour.testing import tolerances

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
Device = Annotated[str, typer.Option(help="cuda; cpu checks the script alone, with stand-ins for kernels.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write rows here, after each.")]
Smallest = Annotated[bool, typer.Option("--smallest", help="Tiny cases.")]
CHECKED_TOKENS = 64
BANDWIDTH = 4.8e12
"""Bytes per second of the memory of an H200, by its datasheet: what floors are given for."""


def chosen_device(name: str) -> torch.device:
    """The device, or an end of the script with the reason why there is none."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: torch.cuda.is_available() is False. --device cpu checks the script alone.")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """N(0, 1); for int8 N(0, 32), rounded."""
    generator = torch.Generator(device).manual_seed(seed)
    found = torch.randn(shape, generator=generator, device=device)
    if dtype == torch.int8:
        return (found * 32).round().clamp(-127, 127).to(dtype)
    return found.to(dtype)


def pruned(weight: Tensor) -> Tensor:
    """2:4 by magnitude, dense."""
    mask = nm_mask(weight.float().abs(), "2:4")
    return (
        weight.masked_fill(~mask, 0)
        if weight.dtype != torch.float8_e4m3fn
        else (weight.float() * mask).to(DTYPES["fp8"])
    )


# ---- our kernels, and what stands for them on a CPU ------------------------------------------------------------------


def _packed(dense: Tensor, mask: Tensor) -> packing.PackedMatrix:
    """The specification, in plain torch, on any device."""
    matrix = SparseMatrix.from_dense(dense, "2:4", mask=mask)
    rows, columns = matrix.shape
    return packing.PackedMatrix(*layout.pack(matrix.values, matrix.metadata, rows, columns), (rows, columns))


def specified_both(weight: Tensor) -> tuple[packing.PackedMatrix, packing.PackedMatrix]:
    """What `prune_both` must give."""
    mask = nm_mask(weight.float().abs(), "2:4t")
    return _packed(weight, mask), _packed(weight.T.contiguous(), mask.T.contiguous())


def specified(weight: Tensor) -> packing.PackedMatrix:
    """What `prune`, and `compress` of a pruned matrix, must give."""
    return _packed(weight, nm_mask(weight.float().abs(), "2:4"))


def specified_quantized(weight: Tensor) -> tuple[packing.PackedMatrix, Tensor]:
    """What `quantize` must give."""
    q, scales = reference.quantize_rows_e4m3(weight)
    return _packed(q, nm_mask(weight.float().abs(), "2:4")), scales


def has_kernels(tensor: Tensor) -> bool:
    """Do our kernels run where it lies?"""
    return tensor.is_cuda


def prune_both(weight: Tensor) -> Any:
    """Our kernel, or its stand-in on a CPU; so below."""
    return packing.prune_both(weight) if has_kernels(weight) else specified_both(weight)


def prune(weight: Tensor) -> Any:
    return packing.prune(weight) if has_kernels(weight) else specified(weight)


def mask_both(weight: Tensor) -> Tensor:
    return packing.mask_both(weight) if has_kernels(weight) else nm_mask(weight.abs(), "2:4t")


def keep_both(weight: Tensor, mask: Tensor) -> Any:
    """Without the check, which waits for the GPU."""
    return packing.keep_both(weight, mask, check=False) if has_kernels(weight) else specified_both(weight)


def quantize(weight: Tensor) -> tuple[packing.PackedMatrix, Tensor]:
    return packing.quantize(weight) if has_kernels(weight) else specified_quantized(weight)


def compress(matrix: Tensor, check: bool = False) -> Any:
    return packing.compress(matrix, check=check) if has_kernels(matrix) else specified(matrix)


def take(matrix: Tensor, packed: packing.PackedMatrix) -> Tensor:
    return packing.take(matrix, packed) if has_kernels(matrix) else packed.values


def expand(packed: packing.PackedMatrix) -> Tensor:
    if has_kernels(packed.values):
        return packing.expand(packed)
    rows, columns = packed.shape
    return SparseMatrix(
        *layout.unpack(packed.values, packed.metadata, rows, columns), _PATTERN, packed.shape
    ).to_dense()


def few_tokens(x: Tensor, packed: packing.PackedMatrix, row_scale: Tensor | None = None) -> Tensor:
    """y of our kernel for few tokens."""
    if has_kernels(x):
        return products.linear(x, packed, row_scale=row_scale, kernels="decode")
    y = x.float() @ expand(packed).float().T
    y = y if row_scale is None else y * row_scale
    return y.to(torch.bfloat16 if x.dtype == torch.int8 else x.dtype)


def few_tokens_early(x: Tensor, packed: packing.PackedMatrix, row_scale: Tensor | None = None) -> Callable[[], Tensor]:
    """A call of it that begins while the kernel before it ends, where the GPU can."""
    if not has_kernels(x):
        return partial(few_tokens, x, packed, row_scale)
    if x.is_cuda and not table.knows_clusters(x.device):
        raise Missing("kernels start early from capability 9.0 on")
    given = arguments.check(x, packed, None, row_scale, None, "none", None, None)
    return partial(prepared.Product(given, decode.launches(given, early=True)).run, given)


_PATTERN = SparseMatrix.from_dense(torch.zeros(1, 4)).pattern


# ---- rivals ----------------------------------------------------------------------------------------------------------


class Missing(Exception):
    """A rival that is not here, and why."""


def tried(
    name: str, make: Callable[[], Sequence[timing.Call]], missing: dict[str, str]
) -> dict[str, Sequence[timing.Call]]:
    """The calls of a rival after one trial of each; nothing, and the reason in `missing`, where it cannot run.

    Ours may refuse what they have no kernel for; whatever else goes wrong with them is raised, and so is a fault of anyone's
    that takes the GPU from the process.
    """
    try:
        calls = make()
        for call in calls:
            call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except (Missing, RuntimeError, NotImplementedError, TypeError, AttributeError, ValueError) as error:
        if lost_gpu(error):
            raise RuntimeError(f"{name}: {error}") from error
        if name.startswith("twofour") and not isinstance(error, UnsupportedError):
            raise
        missing[name] = _first_line(error)
        return {}
    return {name: calls}


def cusparselt_version() -> int | None:
    """As 800, of the library that torch has loaded."""
    if not torch.cuda.is_available() or not torch.backends.cusparselt.is_available():
        return None
    version: int = torch._C._cusparselt.getVersionInt()
    return version


def cslt_compressed(matrix: Tensor) -> Tensor:
    """A 2:4 matrix in cuSPARSELt's layout."""
    if not matrix.is_cuda:
        raise Missing("cuSPARSELt needs a GPU")
    return torch._cslt_compress(matrix)


def cslt_linear(x: Tensor, compressed: Tensor, features: int, found: Mapping[str, int]) -> timing.Call:
    """x @ W.T by cuSPARSELt, W first and its result transposed, as torch calls it; tokens padded to what it takes.

    Args:
        found: what a search says, or nothing.
    """
    _require_cslt(x)
    tokens, padded, out = len(x), _padded(x), _cslt_out(x)

    def run() -> Tensor:
        y = torch._cslt_sparse_mm(compressed, padded.t(), out_dtype=out, transpose_result=True, **found)
        y = y if tuple(y.shape) == (len(padded), features) else y.t()
        return y[:tokens]

    return run


def cslt_searched(x: Tensor, compressed: Tensor) -> dict[str, int]:
    """What cuSPARSELt finds best for this shape: it measures its algorithms and split-K, which takes a second."""
    _require_cslt(x)
    mm_search: Callable[..., Sequence[int]] = torch._C._cusparselt.mm_search  # type: ignore[attr-defined]
    found = mm_search(compressed, _padded(x).t(), None, None, _cslt_out(x), True)
    return {"alg_id": int(found[0]), "split_k": int(found[1]), "split_k_mode": int(found[2])}


def _require_cslt(x: Tensor) -> None:
    """A fault of cuSPARSELt would end the benchmark: what the library's table refuses is not called here either."""
    reason = vendor.cusparselt_why_not(x.dtype, x.device)
    if reason is not None:
        raise Missing(reason)


def _padded(x: Tensor) -> Tensor:
    multiple = 16 if x.dtype.itemsize == 1 else 8
    padded = x.new_zeros(-(-len(x) // multiple) * multiple, x.shape[1])
    padded[: len(x)] = x
    return padded


def _cslt_out(x: Tensor) -> torch.dtype | None:
    return torch.bfloat16 if x.dtype == torch.int8 else None


def scaled_linear(x: Tensor, weight: Tensor, row_scale: Tensor) -> timing.Call:
    """x @ (weight * row_scale).T by torch._scaled_mm, inputs made e4m3 with a scale for each token beforehand.

    Args:
        weight: float8_e4m3fn.
    """
    q, scales = reference.quantize_rows_e4m3(x)
    given = {"scale_a": scales[:, None], "scale_b": row_scale[None], "out_dtype": x.dtype}

    def run() -> Tensor:
        return torch._scaled_mm(q, weight.t(), **given)

    return run


# ---- errors ----------------------------------------------------------------------------------------------------------


class Exact:
    """x @ W.T in float64, for some tokens where there are many."""

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        self._tokens = torch.randperm(len(x), generator=generator)[:CHECKED_TOKENS].to(x.device)
        x64, w64 = x[self._tokens].double(), weight.double()
        self._y = x64 @ w64.T
        # Integers are summed without an error.
        unit = 0.0 if x.dtype == torch.int8 else torch.finfo(torch.float32).eps / 2
        self._sums = (weight.shape[1] + 1) * unit * (x64.abs() @ w64.abs().T)

    def error(self, y: Tensor) -> dict[str, float]:
        """‖y - y64‖ / ‖y64‖, and the largest part of the bound that `twofour.testing` allows to one output: more than 1
        is wrong."""
        out = torch.finfo(y.dtype)
        allowed = out.eps / 2 * self._y.abs() + (1 + out.eps / 2) * self._sums + out.smallest_normal
        error = (y[self._tokens].double() - self._y).abs()
        of_bound = float((error / allowed).max())
        return {"relative": float(error.norm() / self._y.norm()), "of_bound": of_bound if of_bound == of_bound else 9e9}


def same_packed(found: Iterable[packing.PackedMatrix], wanted: Iterable[packing.PackedMatrix]) -> bool:
    """Bit for bit."""
    for own, other in zip(found, wanted, strict=True):
        try:
            tolerances.assert_same_bits(own.values, other.values)
            tolerances.assert_same_bits(own.metadata, other.metadata)
        except AssertionError:
            return False
    return True


# ---- rows ------------------------------------------------------------------------------------------------------------


def measured(
    kernels: Mapping[str, Sequence[timing.Call]],
    device: torch.device,
    *,
    rounds: int,
    calls: int,
    nbytes: int | None = None,
    **case: Any,
) -> record.Row:
    """A row: times of all kernels in turns, ours first by the name "twofour", and which kernels of ours ran.

    Args:
        nbytes: least bytes that ours must move.
        case: what tells the row apart, and what else is known of it.
    """
    grids: dict[str, list[int]] = {}
    if "twofour" in kernels:
        with record.launches() as grids:
            kernels["twofour"][0]()
    times = timing.in_turns(kernels, device, rounds=rounds, calls=calls)
    now = clocks(device)
    row: record.Row = {
        **case,
        "rounds": rounds,
        "calls": calls,
        "copies": {name: len(copies) for name, copies in kernels.items()},
        "processors": resources.processors(device),
        "shared_bytes": resources.shared_bytes(device),
        "kernels": {name: record.source_of(name) for name in grids},
        "grids": grids,
        "clusters": {name: table.most_clusters(name, device) for name in grids if name.startswith("decode_")},
        "us": {name: each.median for name, each in times.items()},
        "quartiles_us": {name: each.quartiles for name, each in times.items()},
        "host_us": {name: sorted(each.host_us)[len(each.host_us) // 2] for name, each in times.items()},
        **({"clocks": now} if now else {}),
        "waited": {name: each.waited for name, each in times.items() if each.waited},
    }
    if "twofour" in times:
        row["x"] = timing.ratios_to("twofour", times)
        if nbytes is not None:
            seconds = times["twofour"].median / 1e6
            row["gigabytes_per_second"] = nbytes / seconds / 1e9
            row["floor_us"] = nbytes / BANDWIDTH * 1e6
    return row


def measure_all(bench: str, path: Path | None, todo: Sequence[tuple[str, Callable[[], record.Row]]]) -> None:
    """Rows one by one, each kept and printed before the next; those that raise are told, and the others go on, unless the
    process has lost its GPU.

    Raises:
        SystemExit: some raised, or a result of ours is wrong.
    """
    part, failed, unmeasured = record.Part(path), list[str](), list[str]()
    for done, (name, measure) in enumerate(todo, 1):
        try:
            row = measure()
        except Exception as error:
            traceback.print_exc()
            failed.append(f"{name}: {type(error).__name__}: {_first_line(error)}")
            if lost_gpu(error) and done < len(todo):
                unmeasured = [f"{len(todo) - done} rows remain unmeasured: nothing runs on the GPU after that"]
            part.tell(**{f"failed in {bench}": failed + unmeasured})
            if lost_gpu(error):
                break
            continue
        part.add(row)
        print(line_of(row), flush=True)
        failed += [
            f"{name}: {each} is wrong"
            for each, right in row["right"].items()
            if each.startswith("twofour") and not right
        ]
    if failed:
        raise SystemExit("\n".join([f"{len(failed)} of {len(todo)} rows failed", *failed, *unmeasured]))


_LOST = (
    "illegal instruction",
    "illegal memory access",
    "misaligned address",
    "unspecified launch failure",
    "device-side assert",
)


def lost_gpu(error: Exception) -> bool:
    """Is it a fault after which every call of the process fails? A refusal is none, though it may speak of one."""
    return not isinstance(error, (Missing, UnsupportedError)) and any(each in str(error) for each in _LOST)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def clocks(device: torch.device) -> dict[str, float]:
    """Of the GPU at work just now; empty where nothing tells them."""
    found: dict[str, float] = {}
    with contextlib.suppress(Exception):  # torch asks by way of nvidia-ml-py, which has errors of its own
        if device.type == "cuda":
            found["sm_mhz"] = torch.cuda.clock_rate(device)
            found["watts"] = torch.cuda.power_draw(device) / 1e3
            found["celsius"] = torch.cuda.temperature(device)
    return found


def line_of(row: record.Row) -> str:
    """A row for people."""
    tokens = f" {row['tokens']:5} tokens" if "tokens" in row else ""
    times = "  ".join(f"{name} {us:.1f}" for name, us in row.get("us", {}).items())
    ratios = "  ".join(f"{ratio:.2f} x {name}" for name, ratio in row.get("x", {}).items())
    wrong = (
        ""
        if all(row.get("right", {}).values())
        else "  WRONG: " + ", ".join(n for n, r in row["right"].items() if not r)
    )
    missing = "".join(f"  no {name}: {why[:60]}" for name, why in row.get("missing", {}).items())
    shape = f"{row['out_features']}x{row['in_features']}"
    return f"{row['what']:16} {shape:12} {row['dtype']:5}{tokens}  us: {times} | {ratios}{wrong}{missing}"
