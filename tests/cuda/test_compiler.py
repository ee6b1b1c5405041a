"""NVRTC: every kernel for every architecture, what its machine code costs, and the cache."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from twofour import UnsupportedError
from twofour.kernels import disk
from twofour.kernels.cuda import compiler, table

FILES = sorted({text.file for text in table.KERNEL_TEXTS.values()})


@pytest.fixture(autouse=True)
def _needs_nvrtc() -> None:
    reason = compiler.why_not()
    if reason is not None and sys.platform == "linux":
        pytest.fail(f"the kernels must compile here: {reason}")
    if reason is not None:
        pytest.skip(reason)


@cache
def built(file: str, architecture: str) -> tuple[bytes, str]:
    """Cubin, and what ptxas says of registers and memory."""
    text = (compiler.sources() / "cuda" / file).read_text()
    return compiler.compile_text(text, file, architecture, (*compiler.OPTIONS, "--ptxas-options=-v"))


@cache
def disassembled(file: str, architecture: str, folder: Path) -> dict[str, str]:
    """Machine code by kernel, the functions it calls behind it."""
    tool = next((path for path in map(str, _tools("cuobjdump")) if shutil.which(path)), None)
    if tool is None:
        pytest.skip("needs cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    cubin = folder / f"{file}.{architecture}.cubin"
    cubin.write_bytes(built(file, architecture)[0])
    path = str(Path(tool).parent)
    said = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True, env={"PATH": path})
    parts = re.split(r"^\s+Function : (\S+)\n", said.stdout, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _tools(name: str) -> list[Path]:
    found = shutil.which(name)
    try:
        import nvidia
    except ImportError:
        return [Path(found)] if found else []
    folders = [Path(place) for place in nvidia.__path__]
    return [Path(found)] if found else [tool for folder in folders for tool in folder.glob(f"*/bin/{name}")]


def count(sass: str, opcode: str) -> int:
    return len(re.findall(rf"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?{opcode}", sass, flags=re.M))


@pytest.mark.parametrize("architecture", compiler.ARCHITECTURES)
@pytest.mark.parametrize("file", FILES)
def test_kernels_keep_to_their_registers_and_spill_nothing(
    file: str, architecture: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cubin, said = built(file, architecture)
    assert cubin.startswith(b"\x7fELF")
    assert "warning" not in said.lower(), said
    # "Function properties for NAME", then its stack and spills; for kernels "Used N registers, .., M bytes smem" too.
    properties = re.findall(
        r"Function properties for (\S+)\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads", said
    )
    used = dict(re.findall(r"Function properties for (\S+)\n[^\n]*\n[^\n]*Used (\d+) registers", said))
    shared = dict(re.findall(r"Function properties for (\S+)\n[^\n]*\n[^\n]*?(\d+) bytes smem", said))
    texts = [text for text in table.KERNEL_TEXTS.values() if text.file == file and text.runs_on(architecture)]
    for text in texts:
        assert 0 < int(used[text.name]) <= text.most_registers, text.name
        assert int(shared.get(text.name, 0)) == text.shared_bytes, text.name
    allowed = {name for text in table.KERNEL_TEXTS.values() for name in text.spilling}
    for name, stores, loads in properties:
        if not any(each in name for each in allowed):
            assert (stores, loads) == ("0", "0"), name
    assert {text.name for text in texts} == set(used)  # and none that the architecture has no instructions for
    products = [text for text in texts if text.multiplies is not None]
    if products:  # in the same test, for to compile them takes seconds
        _skip_zeros_in_hardware(
            products, disassembled(file, architecture, tmp_path_factory.getbasetemp()), architecture
        )


def _skip_zeros_in_hardware(texts: list[table.KernelText], code: dict[str, str], architecture: str) -> None:
    """As many sparse products as the text has, no dense ones, and nothing taken apart into others: where a product of e4m3
    is, its operands are converted too."""
    for text in texts:
        assert text.multiplies is not None
        instruction, times = text.multiplies
        sass = code[text.name]
        assert count(sass, rf"{re.escape(instruction)} ") == times, text.name
        assert count(sass, r"[HIQ]MMA\S* ") == times, text.name
        converted = text.conversions if architecture != "sm_80" else 0
        # And aside once more, for warps that have parted: what compilers know of shuffles is not that these never do.
        assert converted <= count(sass, r"F2FP\.F16\.E4M3\.UNPACK_B ") <= 2 * converted, text.name
        assert count(sass, r"F2FP\S*UNPACK") == count(sass, r"F2FP\.F16\.E4M3\.UNPACK_B "), text.name
        if text.conversions:  # of 8 bytes each, a word of metadata and two words of values
            shuffles = text.conversions // 8 * 3
            assert shuffles <= count(sass, r"SHFL\.BFLY ") <= 2 * shuffles, text.name
            assert count(sass, r"HADD2\.F32 ") >= text.conversions * 2 * ("bf16" in text.name), text.name
        assert count(sass, r"LDSM\S*\.4 ") == text.matrix_loads, text.name
        assert count(sass, "LDGSTS") >= 2, text.name
        assert count(sass, r"STG\.E\S*\.64") >= 1, text.name  # four items of 2 bytes at once
        assert count(sass, r"STL|LDL") == 0, text.name
        assert count(sass, r"ATOMG\.E\.ADD\.STRONG\.GPU") == count(sass, r"MEMBAR\.\S*GPU") == 1, text.name
        assert count(sass, r"MEMBAR\.SC") == 0, text.name
        if text.file == "decode.cu":
            tiles, fragments = text.rows * text.across // 128, text.itemsize
            assert count(sass, r"LDG\.E\S*\.128") >= 2 * text.ahead * tiles * fragments, text.name
            assert len(re.findall(r"\bBAR\.SYNC\S* 0x0\b|\bBAR\.SYNC\S* RZ", _loop_of(sass))) == 0, text.name
            assert count(sass, "CCTL.E.PF2") == 2, text.name  # bias and scales
            _clusters_and_early_starts(sass, text.name, architecture)
        else:  # fragments of W for two steps of each of four tiles, and those loaded before the first stage
            assert count(sass, r"LDS\.128") >= 12, text.name
        most = 163 if "256x128" in text.name else 99  # KiB; sm_89 and sm_120 have no more than 99
        assert text.dynamic_bytes + text.shared_bytes <= most << 10, text.name


def _clusters_and_early_starts(sass: str, name: str, architecture: str) -> None:
    """Two barriers of clusters, which wait for no global memory; nothing is read or written before the kernel before ends."""
    has = architecture not in ("sm_80", "sm_89")
    for opcode, times in (("UCGABAR_ARV", 2), ("UCGABAR_WAIT", 2), ("UBLKPF", 2), ("ACQBULK", 1), ("PREEXIT", 1)):
        assert count(sass, opcode) == times * has, (name, opcode)
    if has:
        before, after = sass.split("ACQBULK")
        assert not re.search(r"\b(LDG|LDGSTS|STG|ATOMG|LD|ST)\b", before), name
        assert after.index("LDG") < after.index("PREEXIT"), name


def _loop_of(sass: str) -> str:
    """From the first product to the last one."""
    at = [found.start() for found in re.finditer(r"[HIQ]MMA", sass)]
    return sass[at[0] : at[-1]]


def test_the_table_splits_blocks_as_decode_does() -> None:
    text = (compiler.sources() / "cuda" / "decode.cu").read_text()
    found = re.findall(r"^TWOFOUR_DECODE\((decode_\w+), (\w+), ([\d, ]+)\)", text, flags=re.M)
    of_table = [each for each in table.KERNEL_TEXTS.values() if each.file == "decode.cu"]
    assert {name for name, *_ in found} == {each.name for each in of_table}
    for name, products, numbers in found:
        defines = [each.split("=")[1] for each in table.KERNEL_TEXTS[name].defines]
        assert defines == [name, products, *numbers.split(", ")]


@pytest.mark.parametrize("architecture", compiler.ARCHITECTURES)
def test_packing_moves_whole_words_and_compares_in_one_instruction(
    architecture: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    code = disassembled("pack.cu", architecture, tmp_path_factory.getbasetemp())
    code |= disassembled("pack_both.cu", architecture, tmp_path_factory.getbasetemp())
    for name in ("prune_both_bf16", "prune_both_fp16"):
        assert count(code[name], r"STG\.E\.128") == 2
        assert count(code[name], r"LDGSTS\.E\S*\.64") == 8  # the first square, and the next ones
        if architecture == "sm_90a":  # sums and maxima at once; two halves of a word at once
            assert 24 <= count(code[name], r"(VIADDMNMX|VIMNMX3?)\.U32 ") <= 40
            assert count(code[name], r"VIADDMNMX\.U32 ") >= 12
            assert count(code[name], r"VIMNMX3?\.[US]16x2 ") == 8
    for (
        name,
        loads,
        stores,
        halves,
    ) in (  # loads of whole chunks, and of groups of 2-byte items where a chunk is not whole
        ("prune_bf16", 16, 2, 24),
        ("compress_half", 16, 2, 24),
        ("take_half", 16, 2, 0),
        ("compress_int8", 4, 1, 48),
        ("prune_e4m3", 4, 1, 40),
    ):
        assert count(code[name], r"LDG\.E\S*\.64") == loads, name
        assert count(code[name], r"STG\.E\.128") == stores, name
        assert count(code[name], "BAR") == 0, name
        if architecture == "sm_90a":
            assert count(code[name], r"VIMNMX3?\.U16x2 ") == halves, name
    assert count(code["keep_both_half"], r"STG\.E\.128") == 2
    assert count(code["keep_both_half"], r"LDG\.E\S*\.64") == 2 * count(code["keep_both_half"], r"STG\.E\.64") == 8
    for name in ("quantize_bf16", "quantize_fp16"):
        assert count(code[name], r"LDG\.E\S*\.128") == 12  # to find the largest, again where there are NaN, and to pack
        assert count(code[name], "F2FP.*E4M3") == (8 if architecture != "sm_80" else 0)
    assert count(code["expand_half"], r"STG\.E\.64") == 8


def test_a_kernel_alone_is_the_one_among_all(tmp_path_factory: pytest.TempPathFactory) -> None:
    alone = compiler.compiled("decode.cu", "sm_90a", table.KERNEL_TEXTS["decode_int8_16"].defines)
    assert b"decode_int8_16" in alone
    assert b"decode_bf16_8" not in alone
    assert len(alone) < len(built("decode.cu", "sm_90a")[0]) / 4


def test_an_error_shows_its_source_line() -> None:
    with pytest.raises(UnsupportedError) as caught:
        compiler.compile_text("__global__ void f() {\n  undefined_thing();\n}\n", "broken.cu", "sm_90a")
    message = str(caught.value)
    assert re.match(r"NVRTC \d+\.\d+ cannot compile csrc/cuda/broken.cu for sm_90a:", message)
    assert "broken.cu(2)" in message
    assert "undefined_thing();" in message
    assert "newer" not in message


def test_an_unknown_architecture_is_named() -> None:
    for future in ("sm_9000", "sm_990a"):
        with pytest.raises(UnsupportedError) as caught:
            compiler.compiled("pack.cu", future)
        first, *_, last = str(caught.value).splitlines()
        assert re.match(rf"NVRTC \d+\.\d+ cannot compile csrc/cuda/pack.cu for {future}:", first)
        assert last.startswith(f"A newer NVRTC may know {future}: pip install 'twofour[cuda13]', or cuda12")


@pytest.mark.parametrize(
    ("capability", "name"),
    [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((10, 0), "sm_100a"), ((12, 0), "sm_120a")],
)
def test_architectures(capability: tuple[int, int], name: str) -> None:
    assert compiler.architecture_of(capability) == name
    assert name in compiler.ARCHITECTURES


def test_devices_before_ampere_are_refused() -> None:
    with pytest.raises(
        UnsupportedError,
        match=r"compute capability 7\.5 has no sparse tensor cores: they begin at 8\.0.*take another kernel",
    ):
        compiler.architecture_of((7, 5))


@pytest.mark.parametrize(
    ("capability", "said"),
    [
        (
            (7, 5),
            r"compute capability 7\.5 has no sparse tensor cores: they begin at 8\.0 .* take another kernel there",
        ),
        ((13, 7), r"(?s)NVRTC .* cannot compile csrc/cuda/decode.cu for sm_137a:.*A newer NVRTC may know sm_137a: pip"),
    ],
    ids=str,
)
def test_a_gpu_that_no_kernel_is_for_is_named_before_anything_is_loaded(
    capability: tuple[int, int], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(table, "_architecture", table._architecture.__wrapped__)
    monkeypatch.setattr(table.driver, "driver", lambda: pytest.fail("it was loaded"))
    with pytest.raises(UnsupportedError, match=said):
        table._loaded.__wrapped__("decode_bf16_8", torch.device("cuda", 0))


def test_what_is_compiled_is_kept_and_a_damaged_file_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiler.compiled("pack.cu", "sm_80")
    folder = disk.folder()
    assert folder is not None
    (file,) = (folder / "cubins").iterdir()
    assert file.name == f"{compiler.digest('pack.cu', 'sm_80')}.cubin"
    compile_text = compiler.compile_text
    monkeypatch.setattr(compiler, "compile_text", lambda *_: pytest.fail("it was compiled again"))
    assert compiler.compiled("pack.cu", "sm_80") == first
    monkeypatch.setattr(compiler, "compile_text", compile_text)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert compiler.compiled("pack.cu", "sm_80") == first
    assert file.read_bytes()[32:] == first
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # nothing half-written beside it


def test_the_hash_tells_sources_architectures_and_options_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {compiler.digest("pack.cu", architecture) for architecture in compiler.ARCHITECTURES}
    names.add(compiler.digest("pack.cu", "sm_80", ("-std=c++20",)))
    for folder in ("cuda", "nm"):
        shutil.copytree(compiler.sources() / folder, tmp_path / folder)
    header = tmp_path / "nm" / "halves.inl.h"
    header.write_text(header.read_text() + "// changed\n")
    monkeypatch.setattr(compiler, "sources", lambda: tmp_path)
    names.add(compiler.digest("pack.cu", "sm_80"))
    assert len(names) == len(compiler.ARCHITECTURES) + 2


def test_what_measurements_are_judged_by_changes_with_the_code_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("cuda", "nm"):
        shutil.copytree(compiler.sources() / folder, tmp_path / folder)
    monkeypatch.setattr(compiler, "sources", lambda: tmp_path)
    first = compiler.source_digest("pack_both.cu")
    assert compiler.source_digest("pack_both.cu", ("A=1",)) != first
    assert compiler.source_digest("decode.cu") != first
    monkeypatch.setattr(compiler, "version", lambda: "99.9")
    mask = tmp_path / "cuda" / "best_mask.h"
    text = mask.read_text()
    mask.write_text("// a remark\n\n" + text.replace("  ", "    "))
    (tmp_path / "cuda" / "another.h").write_text("int another;\n")
    assert compiler.source_digest("pack_both.cu") == first
    decode = compiler.source_digest("decode.cu")
    mask.write_text(text + "int more;\n")  # pack_both.cu alone includes it
    assert compiler.source_digest("pack_both.cu") != first
    assert compiler.source_digest("decode.cu") == decode
    (tmp_path / "cuda" / "device.h").write_text("int other;\n")  # included by what is included
    assert compiler.source_digest("decode.cu") != decode


def test_nothing_is_kept_where_nothing_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    for where in ("off", str(tmp_path / "file")):
        monkeypatch.setenv("TWOFOUR_CACHE", where)
        assert compiler.compiled("pack.cu", "sm_80").startswith(b"\x7fELF")


def test_without_nvrtc_the_reason_and_the_way_out_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_nvrtc", lambda: (None, "No module named 'cuda'; pip install 'twofour[cuda13]'"))
    with pytest.raises(
        UnsupportedError, match=r"cannot be compiled: No module named 'cuda'; pip install 'twofour\[cuda13\]'"
    ):
        compiler.compiled("pack.cu", "sm_80")
    assert compiler.version() is None


def test_bindings_without_their_library_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import nvrtc

    def missing() -> None:
        raise RuntimeError('Failure finding "libnvrtc.so": No such file\nLoader config: ..')

    monkeypatch.setattr(nvrtc, "nvrtcVersion", missing)
    _, reason = compiler._nvrtc.__wrapped__()
    assert reason == f'NVRTC is not found (Failure finding "libnvrtc.so": No such file); {compiler._INSTALL}'
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    _, reason = compiler._nvrtc.__wrapped__()
    assert reason.endswith(f"; {compiler._INSTALL}")
    assert "cuda.bindings" in reason


def test_an_nvrtc_that_is_too_old_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import nvrtc

    assert compiler.why_not_for((9, 0)) is None
    assert compiler.why_not_for((7, 5)) == "compute capability 7.5 has no sparse tensor cores"
    monkeypatch.setattr(nvrtc, "nvrtcGetSupportedArchs", lambda: (None, [80, 90]))
    assert re.match(r"NVRTC \d+\.\d+ does not know sm_120a, a newer one does; pip", compiler.why_not_for((12, 0)) or "")
    monkeypatch.setattr(nvrtc, "nvrtcVersion", lambda: (None, 12, 4))
    reason = "NVRTC 12.4 is too old, 12.5 is the first that knows mma.sp::ordered_metadata; pip install 'twofour[cuda13]', or"
    reason += " cuda12: torch.version.cuda says which"
    assert compiler._nvrtc.__wrapped__() == (None, reason)
    monkeypatch.setattr(compiler, "_nvrtc", compiler._nvrtc.__wrapped__)
    assert compiler.why_not() == compiler.why_not_for((9, 0)) == reason
