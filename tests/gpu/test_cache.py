"""Kernels are compiled once for the architecture of the device, and then come from disk."""

from __future__ import annotations

import pytest
import torch

from twofour.kernels import disk
from twofour.kernels.cuda import compiler, packing, table


def cubin_of(name: str, architecture: str) -> str:
    """The file that it is kept in."""
    text = table.KERNEL_TEXTS[name]
    options = (*compiler.OPTIONS, *(f"-D{each}" for each in text.defines))
    return f"{compiler.digest(text.file, architecture, options)}.cubin"


def test_kernels_come_from_disk_the_second_time(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("TWOFOUR_CACHE", str(tmp_path))
    table._loaded.cache_clear()
    weight = torch.randn(64, 64, device=gpu).bfloat16()
    first = packing.prune(weight)
    architecture = compiler.architecture_of(torch.cuda.get_device_capability(gpu))
    folder = disk.folder()
    assert folder is not None
    assert [path.name for path in (folder / "cubins").iterdir()] == [cubin_of("prune_bf16", architecture)]
    table._loaded.cache_clear()
    monkeypatch.setattr(compiler, "compile_text", lambda *_: pytest.fail("it was compiled again"))
    again = packing.prune(weight)
    assert torch.equal(again.values, first.values)
    assert torch.equal(again.metadata, first.metadata)


def test_every_kernel_is_compiled_and_loaded_for_this_device(gpu: torch.device) -> None:
    for name in table.KERNEL_TEXTS:
        if table.why_not(name, gpu) is None:
            assert table._loaded(name, gpu) != 0
