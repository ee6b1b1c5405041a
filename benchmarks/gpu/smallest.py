"""Every kernel once, on the smallest matrices that have all their edges: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python benchmarks/gpu/smallest.py
    compute-sanitizer --tool racecheck python benchmarks/gpu/smallest.py --planted race

With `--planted` one faulty kernel runs instead, which the tool must notice.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Annotated
from unittest import mock

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import cases

from twofour import Pattern, SparseMatrix, kernels
from twofour.kernels import KERNELS, LinearSpec, reference
from twofour.kernels.cuda import (
    arguments,
    compiler,
    driver,
    gemm,
    layout,
    packing,
    products,
    resources,
    table,
    tiles,
)
from twofour.kernels.cuda import tokens as inputs
from twofour.masks import nm_mask

SHAPE = (72, 100)
WIDE = (132, 1604)
"""Columns that several blocks share."""
LINEAR = (256, 512)
TOKENS = {"bf16": (1, 9, 17, 33), "fp16": (1, 9, 17, 33), "int8": (1, 9, 17, 33)}
PLANTED = {
    "bounds": 'extern "C" __global__ void planted(int* to, long long count) { to[count + threadIdx.x] = 1; }',
    "race": """extern "C" __global__ void planted(int* to, long long count) {
  __shared__ int cells[128];
  cells[threadIdx.x] = threadIdx.x;
  to[threadIdx.x] = cells[(threadIdx.x + 33) % 128];
}""",
}


def run_planted(fault: str) -> None:
    """One block of a kernel that writes behind its memory, or reads what another warp may not have written yet."""
    memory = torch.zeros(128, dtype=torch.int32, device="cuda")
    architecture = compiler.architecture_of(torch.cuda.get_device_capability())
    cubin, _ = compiler.compile_text(PLANTED[fault], "planted.cu", architecture)
    kernel = driver.driver().kernel(cubin, hashlib.sha256(cubin).digest(), "planted")
    stream = torch.cuda.current_stream().cuda_stream
    driver.driver().launch(kernel, (1,), 128, (memory.data_ptr(), memory.numel()), stream)
    torch.cuda.synchronize()


def run_all(device: torch.device) -> set[str]:
    """Names of the kernels that ran; their results are right. All else happens on the CPU, where no tool slows it."""
    from benchmarks.gpu import record

    with record.launches() as launched:
        for name, dtype in cases.DTYPES.items():
            weight = cases.normal(SHAPE, dtype, torch.device("cpu"))
            wanted, there = cases.specified(weight), weight.to(device)
            held = packing.PackedMatrix(wanted.values.to(device), wanted.metadata.to(device), SHAPE)
            if dtype.itemsize == 2:
                assert cases.same_packed(packing.prune_both(there), cases.specified_both(weight)), name
                mask = nm_mask(weight.float().abs(), "2:4t")
                assert cases.same_packed(packing.keep_both(there, mask.to(device)), cases.specified_both(weight)), name
                run_quantizers(weight, device)
            assert cases.same_packed([packing.prune(there)], [wanted]), name
            sparse = cases.pruned(weight)
            assert cases.same_packed([packing.compress(sparse.to(device))], [wanted]), name
            assert torch.equal(packing.take(there, held).cpu().view(torch.uint8), wanted.values.view(torch.uint8)), name
            assert torch.equal(packing.expand(held).cpu().float(), sparse.float()), name
            for count in TOKENS.get(name, ()):
                weight = cases.pruned(cases.normal(WIDE, dtype, torch.device("cpu")))
                x = cases.normal((count, WIDE[1]), dtype, torch.device("cpu"), count)
                y = products.linear(x.to(device), packing.compress(weight.to(device)), kernels="decode")
                found = cases.Exact(x, weight).error(y.cpu())
                assert found["of_bound"] <= 1, (name, count, found)
        run_scaled(device)
        run_tiles(device)
        run_table(device)
    return set(launched)


def run_scaled(device: torch.device) -> None:
    """Few tokens by e4m3 weights with a scale for each row."""
    for dtype in arguments.NAMES_OF_E4M3:
        if dtype.itemsize == 1 and table.why_not("decode_e4m3_8", device) is not None:
            continue
        wide = torch.bfloat16 if dtype.itemsize == 1 else dtype
        packed, scales = cases.specified_quantized(cases.normal(WIDE, wide, torch.device("cpu")))
        rows, columns = WIDE
        values, metadata = layout.unpack(packed.values, packed.metadata, rows, columns)
        weight = SparseMatrix(values, metadata, Pattern(2, 4), WIDE).to_dense().double() * scales.double()[:, None]
        there = packing.PackedMatrix(packed.values.to(device), packed.metadata.to(device), WIDE)
        for count in TOKENS["bf16"]:
            x = cases.normal((count, columns), dtype, torch.device("cpu"), count)
            y = products.linear(x.to(device), there, row_scale=scales.to(device), kernels="decode")
            found = cases.Exact(x, weight).error(y.cpu())
            assert found["of_bound"] <= 1, (dtype, count, found)


def run_tiles(device: torch.device) -> None:
    """Every tile of the kernels for many tokens that the device has room for, with and without slices."""
    tokens = 70
    for name, dtype in cases.DTYPES.items():
        if dtype not in arguments.NAMES:
            continue
        weight = cases.pruned(cases.normal(SHAPE, dtype, torch.device("cpu")))
        x = cases.normal((tokens, SHAPE[1]), dtype, torch.device("cpu"))
        exact, packed = cases.Exact(x, weight), packing.compress(weight.to(device))
        stages = -(-SHAPE[1] * dtype.itemsize // tiles.STAGE_BYTES)
        for tile, size in tiles.TILES.items():
            if size.stages * size.stage_bytes(dtype.itemsize) > resources.shared_bytes(device):
                continue
            blocks = -(-SHAPE[0] // size.rows) * -(-tokens // size.tokens)
            for slices in {1, stages}:
                share = gemm.Plan(tile, blocks, slices, -(-stages // slices))
                with mock.patch.object(gemm, "plan", lambda *_, share=share: share):
                    found = exact.error(products.linear(x.to(device), packed, kernels="gemm").cpu())
                assert found["of_bound"] <= 1, (name, tile, slices, found)


def run_quantizers(weight: torch.Tensor, device: torch.device) -> None:
    """Of weights and of inputs, to 8 bits; and masks alone."""
    packed, scales = packing.quantize(weight.to(device))
    q, wanted = reference.quantize_rows_e4m3(weight)
    mask = nm_mask(weight.float().abs(), "2:4")
    matrix = SparseMatrix.from_dense(q, "2:4", mask=mask)
    held = packing.PackedMatrix(*layout.pack(matrix.values, matrix.metadata, *matrix.shape), matrix.shape)
    assert cases.same_packed([packed], [held])
    assert torch.equal(scales.cpu(), wanted)
    e5m2 = weight.to(torch.float8_e5m2)
    assert torch.equal(
        packing.expand(packing.prune(e5m2.to(device))).cpu().float(), e5m2.float() * nm_mask(e5m2.float().abs(), "2:4")
    )
    for x in (weight, weight.float()):
        assert torch.equal(packing.mask_both(x.to(device)).cpu(), nm_mask(x.float().abs(), "2:4t"))
        found = inputs.quantize(x.to(device))
        assert all(torch.equal(own.cpu(), each) for own, each in zip(found, reference.quantize_tokens(x), strict=True))


def run_table(device: torch.device) -> None:
    """Our kernels, as layers reach them. NVIDIA's are not ours to check, and their search takes long."""
    for name in ("bf16", "fp16"):
        weight = cases.pruned(cases.normal(LINEAR, cases.DTYPES[name], torch.device("cpu")))
        matrix = SparseMatrix.from_dense(weight.to(device))
        if KERNELS["cuda"].why_not(LinearSpec.of(matrix)) is not None:  # emulated
            return
        for count in (1, 40, 200):
            x = cases.normal((count, LINEAR[1]), weight.dtype, torch.device("cpu"), count)
            y = kernels.linear(x.to(device), matrix, backend="cuda")
            found = cases.Exact(x, weight).error(y.cpu())
            assert found["of_bound"] <= 1, (name, count, found)


def main(planted: Annotated[str, typer.Option(help="bounds or race.")] = "") -> None:
    """Runs them."""
    device = cases.chosen_device("cuda")
    if planted:
        run_planted(planted)
        return
    left = sorted(set(table.KERNEL_TEXTS) - run_all(device))
    print(f"{len(table.KERNEL_TEXTS) - len(left)} kernels ran" + (f"; not {', '.join(left)}" if left else ""))


if __name__ == "__main__":
    typer.run(main)
