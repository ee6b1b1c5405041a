"""Files: whole or absent, mapped, the same bytes each time, and every malformed one refused by its fault."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from twofour import FormatError, SparseMatrix, UnsupportedError
from twofour.errors import TwofourError
from twofour.format import file as storage
from twofour.format.pack import VALUE_DTYPES
from twofour.pattern import Pattern
from twofour.testing import assert_same_bits, hostile_tensor, random_mask, strategies

GOLDEN = Path(__file__).parents[1] / "golden" / "version_1.safetensors"


def matrix_of(
    pattern: str = "2:4", dtype: torch.dtype = torch.bfloat16, shape: tuple[int, int] = (4, 16)
) -> SparseMatrix:
    rows = Pattern.parse(pattern).rows
    mask = random_mask((shape[0] // rows, shape[1]), pattern).repeat_interleave(rows, dim=0)
    return SparseMatrix.from_dense(hostile_tensor(shape, dtype), pattern, mask=mask)


def assert_same_matrix(found: SparseMatrix, expected: SparseMatrix) -> None:
    assert (found.pattern, found.shape, found.dtype) == (expected.pattern, expected.shape, expected.dtype)
    assert_same_bits(found.values, expected.values)
    assert_same_bits(found.metadata, expected.metadata)


# --- what is written comes back


def test_everything_comes_back(tmp_path: Path) -> None:
    matrices = {
        "b.weight": matrix_of(),
        "a.weight": matrix_of("4:8", torch.int8),
        "c": matrix_of("2:4x4", torch.float8_e4m3fn),
    }
    tensors = {
        "b.bias": torch.tensor([1.5, -0.0, float("nan")]),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 3),
        "mask": torch.tensor([True, False]),
        "wide": torch.tensor([1 + 2j, -1j]),
    }
    path = tmp_path / "model.safetensors"
    storage.write(
        path,
        matrices,
        tensors,
        extra={"format": "pt", "author": "Åsa"},
        notes={"b.weight": {"backend": "cpu", "speed": 1.5, "why": None, "tags": ["ä", {}]}},
        aliases={"tied": "a.weight", "also": "b.bias"},
    )
    contents = storage.read(path)
    assert list(contents.matrices) == sorted(matrices)
    for name, matrix in matrices.items():
        assert_same_matrix(contents.matrices[name], matrix)
    assert list(contents.tensors) == sorted(tensors)
    for name, tensor in tensors.items():
        assert_same_bits(
            torch.view_as_real(contents.tensors[name]) if tensor.is_complex() else contents.tensors[name],
            torch.view_as_real(tensor) if tensor.is_complex() else tensor,
        )
    assert contents.notes == {
        "a.weight": {},
        "b.weight": {"backend": "cpu", "speed": 1.5, "why": None, "tags": ["ä", {}]},
        "c": {},
    }
    assert contents.aliases == {"tied": "a.weight", "also": "b.bias"}
    assert contents.extra == {"format": "pt", "author": "Åsa"}


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_save_load_save_gives_the_same_bytes(tmp_path: Path, data: st.DataObject) -> None:
    names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).map(lambda text: f"m.{text}")
    matrices = data.draw(st.dictionaries(names, strategies.matrices(), max_size=3))
    tensors = data.draw(st.dictionaries(names.map(lambda name: f"t{name}"), strategies.weights(Pattern()), max_size=2))
    extra = data.draw(st.dictionaries(names, st.text(st.characters(codec="utf-8"), max_size=5), max_size=3))
    first, second = tmp_path / "first", tmp_path / "second"
    storage.write(first, matrices, tensors, extra=extra)
    contents = storage.read(first)
    for name, matrix in matrices.items():
        assert_same_matrix(contents.matrices[name], matrix)
    for name, tensor in tensors.items():
        assert_same_bits(contents.tensors[name], tensor)
    shuffled = dict(reversed(contents.matrices.items()))
    storage.write(
        second,
        shuffled,
        dict(reversed(contents.tensors.items())),
        extra=dict(reversed(contents.extra.items())),
        notes=contents.notes,
    )
    assert second.read_bytes() == first.read_bytes()


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("shape", [(4, 16), (0, 8), (4, 0), (1, 4)])
def test_one_matrix(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    matrix = matrix_of("2:4", dtype, shape)
    storage.save_matrices(tmp_path / "one", matrix)
    loaded = storage.load_matrices(tmp_path / "one")
    assert list(loaded) == ["weight"]
    assert_same_matrix(loaded["weight"], matrix)


def test_many_matrices_and_str_paths(tmp_path: Path) -> None:
    storage.save_matrices(str(tmp_path / "many"), {"b": matrix_of(), "a": matrix_of("1:4")})
    assert list(storage.load_matrices(str(tmp_path / "many"))) == ["a", "b"]
    storage.save_matrices(tmp_path / "none", {})
    assert storage.load_matrices(tmp_path / "none") == {}


def test_any_safetensors_reader_reads_the_parts(tmp_path: Path) -> None:
    matrix = matrix_of()
    storage.write(tmp_path / "m", {"w": matrix}, {"bias": torch.ones(3)})
    plain = load_file(tmp_path / "m")
    assert sorted(plain) == ["bias", "w.metadata", "w.values"]
    assert_same_bits(plain["w.values"], matrix.values)
    with safe_open(tmp_path / "m", framework="pt") as opened:
        index = json.loads(opened.metadata()["twofour"])
    assert index == {"version": 1, "matrices": {"w": {"pattern": "2:4", "shape": [4, 16]}}, "aliases": {}}


def test_views_and_shared_storage_are_written_once_per_name(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    weight = torch.nn.Parameter(torch.randn(2, 2))
    views = {
        "base": base,
        "again": base,
        "column": base[:, 1],
        "turned": base.T,
        "spread": base[0, :1].expand(5),
        "negative": torch.view_as_complex(base.view(4, 3, 2)).conj().imag,
        "grad": weight,
    }
    storage.write(tmp_path / "v", {}, views)
    loaded = storage.read(tmp_path / "v").tensors
    for name, view in views.items():
        assert_same_bits(loaded[name], view.detach().resolve_neg())
    assert views["negative"].is_neg()


@pytest.mark.parametrize("dtype", storage._DTYPE_NAMES, ids=str)
def test_dense_tensors_of_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=torch.float32).to(dtype)
    storage.write(tmp_path / "d", {}, {"t": tensor})
    loaded = storage.read(tmp_path / "d").tensors["t"]
    assert (loaded.dtype, loaded.shape) == (dtype, tensor.shape)
    assert loaded.view(torch.uint8).tolist() == tensor.view(torch.uint8).tolist()


def test_conjugate_and_negated_views_are_written_as_they_read(tmp_path: Path) -> None:
    numbers = torch.tensor([1 + 2j, -3j])
    storage.write(tmp_path / "v", {}, {"conjugate": numbers.conj(), "negated": torch._neg_view(torch.ones(2))})
    loaded = storage.read(tmp_path / "v").tensors
    assert loaded["conjugate"].tolist() == [1 - 2j, 3j]
    assert loaded["negated"].tolist() == [-1, -1]


def test_every_tensor_is_aligned_to_its_elements(tmp_path: Path) -> None:
    storage.write(
        tmp_path / "a", {"w": matrix_of("2:4", torch.int8, (3, 4))}, {"x": torch.ones(3), "y": torch.ones(1).half()}
    )
    raw = (tmp_path / "a").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    assert (8 + size) % 64 == 0
    contents = storage.read(tmp_path / "a")
    assert contents.tensors["x"].data_ptr() % 4 == 0
    header = json.loads(raw[8 : 8 + size])
    starts = {name: entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
    assert sorted(starts, key=lambda name: (starts[name], name)) == ["x", "y", "w.metadata", "w.values"]


# --- mapped


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_tensors_are_mapped_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mapped.safetensors"
    storage.write(path, {"w": matrix_of("2:4", torch.float32, (64, 4096))}, {"x": torch.ones(4096)})
    contents = storage.read(path)
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            ranges.append(tuple(int(end, 16) for end in line.split()[0].split("-")))
    assert ranges
    for tensor in (contents.matrices["w"].values, contents.matrices["w"].metadata, contents.tensors["x"]):
        assert any(low <= tensor.data_ptr() < high for low, high in ranges)


def test_changing_a_loaded_tensor_changes_no_file(tmp_path: Path) -> None:
    path = tmp_path / "m"
    storage.write(path, {}, {"x": torch.ones(1000)})
    before = path.read_bytes()
    storage.read(path).tensors["x"].zero_()
    assert path.read_bytes() == before


def test_a_mapped_file_can_be_replaced_by_its_own_contents(tmp_path: Path) -> None:
    path = tmp_path / "m"
    matrix = matrix_of("2:4", torch.float32, (64, 1024))
    storage.write(path, {"w": matrix})
    contents = storage.read(path)
    before = path.read_bytes()
    storage.write(path, contents.matrices)
    assert path.read_bytes() == before
    assert_same_matrix(contents.matrices["w"], matrix)
    path.unlink()
    assert_same_matrix(contents.matrices["w"], matrix)


def test_reading_to_the_meta_device_is_possible(tmp_path: Path) -> None:
    storage.write(tmp_path / "m", {"w": matrix_of()}, {"x": torch.ones(2)})
    contents = storage.read(tmp_path / "m", device="meta")
    assert contents.matrices["w"].device.type == contents.tensors["x"].device.type == "meta"


# --- whole or absent


def only(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt(), RuntimeError("boom")]
)
@pytest.mark.parametrize("where", ["_bytes", "fsync", "replace"])
def test_an_error_on_the_way_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, where: str
) -> None:
    path = tmp_path / "model.safetensors"
    storage.write(path, {"w": matrix_of()})
    before = path.read_bytes()
    if where == "_bytes":
        rest = iter([memoryview(b"\0" * 8)])

        def fail(*_: Any) -> memoryview:
            for part in rest:
                return part
            raise error

        monkeypatch.setattr(storage, "_bytes", fail)
    else:

        def fail_in_os(*_: Any) -> None:
            raise error

        monkeypatch.setattr(storage.os, where, fail_in_os)
    expected = TwofourError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        storage.write(path, {"w": matrix_of("1:4")})
    if isinstance(error, OSError):
        assert str(caught.value) == f"cannot write '{path}': No space left on device. Nothing was changed."
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert only(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_folders_that_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number), "somewhere")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(
        TwofourError, match=rf"^cannot write '{tmp_path}/m': {os.strerror(number)}\. Nothing was changed\.$"
    ):
        storage.write(tmp_path / "m", {})


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(TwofourError, match=r"cannot write '.*/no/m': No such file or directory") as caught:
        storage.write(tmp_path / "no" / "m", {})
    assert isinstance(caught.value.__cause__, OSError)


def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(
            TwofourError, match=rf"cannot write '.*{name}': it is not a regular file\. Nothing was changed\."
        ):
            storage.write(tmp_path / name, {})
    assert only(tmp_path) == ["folder", "pipe"]


def test_a_link_is_followed_and_permissions_stay(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    storage.write(target, {})
    target.chmod(0o640)
    link.symlink_to(target)
    storage.write(link, {"w": matrix_of()})
    assert link.is_symlink()
    assert list(storage.load_matrices(target)) == ["w"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_new_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").write_bytes(b"")
    storage.write(tmp_path / "m", {})
    assert (tmp_path / "m").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_the_data_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noting_fsync(descriptor: int) -> None:
        steps.append(
            "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else f"file of {os.fstat(descriptor).st_size} bytes"
        )
        fsync(descriptor)

    def noting_replace(source: str, target: str) -> None:
        steps.append("rename")
        assert os.path.dirname(source) == os.path.dirname(target)
        replace(source, target)

    monkeypatch.setattr(storage.os, "fsync", noting_fsync)
    monkeypatch.setattr(storage.os, "replace", noting_replace)
    storage.write(tmp_path / "m", {"w": matrix_of()})
    assert steps == [f"file of {(tmp_path / 'm').stat().st_size} bytes", "rename", "folder"]


KILLED = """
import os, signal, sys, torch
from twofour.format import file

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

path, where = sys.argv[1:]
if where == "middle":
    parts = file._bytes
    file._bytes = lambda tensor: parts(tensor) if tensor.dtype == torch.float64 else die()
else:
    setattr(os, where, die)
file.write(path, {}, {"a": torch.ones(100_000, dtype=torch.float64), "b": torch.ones(100_000)})
"""


def test_kill_9_leaves_the_old_file_whole(tmp_path: Path) -> None:
    runs = []
    for where in ("middle", "replace"):
        folder = tmp_path / where
        folder.mkdir()
        storage.write(folder / "m", {"w": matrix_of()})
        runs.append(subprocess.Popen([sys.executable, "-c", KILLED, str(folder / "m"), where]))
    assert [run.wait(120) for run in runs] == [-signal.SIGKILL, -signal.SIGKILL]
    for where in ("middle", "replace"):
        left = [entry for entry in (tmp_path / where).iterdir() if entry.name != "m"]
        assert [bool(re.fullmatch(r"\.twofour-[0-9a-f]{16}\.tmp", entry.name)) for entry in left] == [True]
        assert left[0].stat().st_size >= (1_200_000 if where == "replace" else 800_000)  # it was being written
        assert_same_matrix(storage.load_matrices(tmp_path / where / "m")["w"], matrix_of())


# --- what `write` refuses


def give(matrices: Any = None, tensors: Any = None, **rest: Any) -> tuple[Any, Any, Any]:
    return matrices or {}, tensors or {}, rest


W = matrix_of()
X = torch.ones(2)


@pytest.mark.parametrize(
    ("given_contents", "error", "message"),
    [
        (give({"w": W}, {"w": X}), FormatError, "the name 'w' is used twice, by matrix 'w' and by tensor 'w'"),
        (give({"w": W}, {"w.values": X}), FormatError, "'w.values' is used twice, by the values of 'w' and by tensor"),
        (give({"w": W, "w.metadata": W}), FormatError, "'w.metadata' is used twice"),
        (give({}, {"__metadata__": X}), FormatError, "'__metadata__' is used twice, by the header"),
        (give({}, {"": X}), FormatError, "'' cannot be a name"),
        (give({}, {3: X}), FormatError, "3 cannot be a name: names are texts"),
        (give({"w": W}, aliases={"w": "w"}), FormatError, "'w' is used twice, by matrix 'w' and by alias 'w'"),
        (give({"w": W}, aliases={"v": "x"}), FormatError, "alias 'v' stands for 'x', which is not stored here"),
        (give({"w": W}, aliases={"u": "w", "v": "u"}), FormatError, "alias 'v' stands for 'u', which is not stored"),
        (give({"w": W}, notes={"v": {}}), FormatError, "notes are given for 'v', which is not among the matrices"),
        (
            give({"w": W}, notes={"w": {"shape": 1}}),
            FormatError,
            "notes of 'w' use the key 'shape', which the file uses",
        ),
        (give({"w": W}, notes={"w": {"a": X}}), FormatError, "notes cannot be written as JSON: .*Tensor"),
        (give({"w": W}, notes={"w": {"a": float("nan")}}), FormatError, "notes cannot be written as JSON"),
        (give(extra={"twofour": "1"}), FormatError, "extra uses the key 'twofour', which holds the index"),
        (give(extra={"a": 1}), FormatError, r"extra\['a'\] is 1: safetensors holds texts only"),
        (give({}, {"\ud800": X}), FormatError, "a name or a text is not valid Unicode"),
        (give({}, {"x": X.to("meta")}), UnsupportedError, "'x' is on the meta device: it has no numbers"),
        (give({"w": W.to("meta")}), UnsupportedError, "'w.values' is on the meta device"),
        (give({}, {"x": X.to_sparse()}), UnsupportedError, "'x' has layout torch.sparse_coo"),
        (
            give({}, {"x": X.to(torch.complex128)}),
            UnsupportedError,
            "'x' is torch.complex128, which safetensors cannot hold",
        ),
    ],
)
def test_contents_that_cannot_be_written(
    tmp_path: Path, given_contents: tuple[Any, Any, Any], error: type[Exception], message: str
) -> None:
    matrices, tensors, rest = given_contents
    with pytest.raises(error, match=message):
        storage.write(tmp_path / "m", matrices, tensors, **rest)
    assert only(tmp_path) == []


def test_big_endian_machines_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.sys, "byteorder", "big")
    with pytest.raises(UnsupportedError, match="little-endian"):
        storage.write(tmp_path / "m", {})


# --- what `read` refuses


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path / "no", "no such file"),
        (tmp_path, "it is a folder"),
        (tmp_path / "pipe", "it is not a regular file"),
    ):
        with pytest.raises(
            TwofourError, match=rf"^cannot read '{path}': {reason}\. Give the path of a \.safetensors file\.$"
        ):
            storage.read(path)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / "m").write_bytes(b"")
    monkeypatch.setattr(storage, "safe_open", refuse)
    with pytest.raises(TwofourError, match=r"^cannot read '.*/m': Permission denied\.$"):
        storage.read(tmp_path / "m")


def whole_file(tmp_path: Path) -> bytes:
    storage.write(tmp_path / "whole", {"w": matrix_of()})
    return (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:5],
        lambda raw: raw[:40],
        lambda raw: raw[:-1],
        lambda raw: raw + b"\0",
        lambda raw: b"\xff" * 200,
        lambda raw: b"PK\x03\x04" + raw,
        lambda raw: raw.replace(b'{"__metadata__"', b'{{__metadata__"'),
        lambda raw: raw.replace(b'"dtype":"BF16"', b'"dtype":"XX16"'),
        lambda raw: raw.replace(b'"shape":[4,8]', b'"shape":[4,9]'),
        lambda raw: raw.replace(b'"shape":[4,8]', b'"shape":[4,-8]').replace(b" ", b"", 1),
    ],
)
def test_what_is_no_safetensors_file(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    raw = whole_file(tmp_path)
    (tmp_path / "m").write_bytes(damage(raw))
    with pytest.raises(FormatError, match=r"m' is not a safetensors file, or is truncated: .+\. Fetch it again"):
        storage.read(tmp_path / "m")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    raw = whole_file(tmp_path)
    for length in range(0, len(raw), 7):
        (tmp_path / "m").write_bytes(raw[:length])
        with pytest.raises(FormatError, match="truncated"):
            storage.read(tmp_path / "m")


def test_files_of_others(tmp_path: Path) -> None:
    message = r"other': was not written by twofour: .* For a dense file use safetensors.torch.load_file\.$"
    for metadata in (None, {"format": "pt"}):
        save_file({"w": torch.ones(2)}, tmp_path / "other", metadata=metadata)
        with pytest.raises(FormatError, match=message):
            storage.read(tmp_path / "other")


ENTRY: dict[str, Any] = {"pattern": "2:4", "shape": [2, 8]}
INDEX: dict[str, Any] = {"version": 1, "matrices": {"w": ENTRY}, "aliases": {}}
TENSORS = {"w.values": torch.ones(2, 4), "w.metadata": torch.full((2, 1), 0x44, dtype=torch.uint8)}


def write_raw(path: Path, index: Any, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path, metadata={"twofour": index if isinstance(index, str) else json.dumps(index)})


def entry(**changes: Any) -> dict[str, Any]:
    return INDEX | {"matrices": {"w": ENTRY | changes}}


def without(key: str, record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != key}


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("", "the 'twofour' entry is not JSON"),
        ("{", "the 'twofour' entry is not JSON"),
        ("[" * 100_000, "the 'twofour' entry is not JSON"),
        ('{"version": NaN}', "the 'twofour' entry is not JSON .NaN is not a JSON number"),
        ("1" * 5000, "the 'twofour' entry is not JSON"),
        ([], r"the 'twofour' entry is \[\], not an object"),
        ("null", "the 'twofour' entry is null, not an object"),
        (without("version", INDEX), "the version is null, not a whole number from 1"),
        (INDEX | {"version": "1"}, 'the version is "1", not a whole number'),
        (INDEX | {"version": True}, "the version is true, not a whole number"),
        (INDEX | {"version": 1.0}, "the version is 1.0, not a whole number"),
        (INDEX | {"version": 0}, "the version is 0, not a whole number from 1"),
        (without("matrices", INDEX), "'matrices' is null, not an object"),
        (INDEX | {"matrices": ["w" * 99]}, r"'matrices' is \[\"w{55}\.\.\., not an object"),
        (INDEX | {"aliases": []}, r"'aliases' is \[\], not an object of names"),
        (INDEX | {"aliases": {"v": 1}}, "'aliases' is .*, not an object of names"),
        (INDEX | {"aliases": {"v": "x"}}, "alias 'v' stands for 'x', which is not stored"),
        (INDEX | {"aliases": {"w.values": "w"}}, "the name 'w.values' is used twice"),
        (INDEX | {"matrices": {"w": "2:4"}}, "matrix 'w': its entry is \"2:4\", not an object"),
        (INDEX | {"matrices": {"w": without("pattern", ENTRY)}}, "matrix 'w': unknown pattern None"),
        (entry(pattern="2-4"), "matrix 'w': unknown pattern '2-4': write KEEP:GROUP"),
        (entry(pattern="4:4"), "matrix 'w': keep=4 of group=4"),
        (entry(pattern=["2:4"]), "matrix 'w': unknown pattern"),
        (
            INDEX | {"matrices": {"w": without("shape", ENTRY)}},
            r"matrix 'w': shape is null, not \[out_features, in_features\]",
        ),
        (entry(shape=[2]), r"matrix 'w': shape is \[2\], not"),
        (entry(shape=[2, 8, 1]), r"matrix 'w': shape is \[2, 8, 1\], not"),
        (entry(shape="2x8"), "matrix 'w': shape is \"2x8\", not"),
        (entry(shape=[True, 8]), r"matrix 'w': shape is \[true, 8\], not"),
        (entry(shape=[2.0, 8]), r"matrix 'w': shape is \[2.0, 8\], not"),
        (entry(shape=[-2, 8]), r"matrix 'w': shape is \[-2, 8\]: each number must be from 0 to 2147483647"),
        (entry(shape=[2, 2**80]), r"matrix 'w': shape is \[2, \d+\]: each number must be from 0"),
        (entry(shape=[2, 9]), r"matrix 'w': shape is \[2, 9\]: in_features 9 is not a multiple of 4"),
        (
            entry(shape=[2**31 - 1, 2**31 - 4]),
            r"matrix 'w': values of a 2:4 matrix .* must be \[2147483647, 1073741822\], not \[2, 4\]",
        ),
        (entry(shape=[2, 12]), r"matrix 'w': values of a 2:4 matrix \[2, 12\] must be \[2, 6\], not \[2, 4\]"),
        (entry(pattern="4:8"), r"matrix 'w': a?.*metadata has a bitmask without exactly 4 bits: row 0, group 0"),
        (INDEX | {"matrices": {"v": ENTRY}}, "matrix 'v': the tensor 'v.values' is missing"),
    ],
)
def test_indices_that_are_wrong(tmp_path: Path, index: Any, message: str) -> None:
    path = tmp_path / "m"
    write_raw(path, index, TENSORS)
    with pytest.raises(FormatError, match=f"^'{path}': {message}.*") as caught:
        storage.read(path)
    assert "damaged or was not written by twofour" in str(caught.value)


def with_byte(value: int) -> torch.Tensor:
    metadata = TENSORS["w.metadata"].clone()
    metadata[1, 0] = value
    return metadata


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w.values": None}, "the tensor 'w.values' is missing"),
        ({"w.metadata": None}, "the tensor 'w.metadata' is missing"),
        ({"w.values": torch.ones(4, 2)}, r"values of a 2:4 matrix \[2, 8\] must be \[2, 4\], not \[4, 2\]"),
        ({"w.values": torch.ones(8)}, r"values of a 2:4 matrix \[2, 8\] must be \[2, 4\], not \[8\]"),
        (
            {"w.metadata": torch.zeros(2, 2, dtype=torch.uint8)},
            r"metadata of a 2:4 matrix .* must be \[2, 1\], not \[2, 2\]",
        ),
        (
            {"w.values": torch.ones(2, 4).double()},
            "values are F64: they must be F32 or F16 or BF16 or I8 or F8_E4M3 or F8_E5M2",
        ),
        ({"w.metadata": torch.full((2, 1), 0x44, dtype=torch.int8)}, "metadata are I8: they must be U8"),
        ({"w.metadata": with_byte(0x45)}, r"metadata has indices that repeat or descend: row 1, group 0 \(code 0x5\)"),
        ({"w.metadata": with_byte(0x14)}, r"metadata has indices that repeat or descend: row 1, group 1 \(code 0x1\)"),
        ({"w": torch.ones(1)}, "the name 'w' is used twice, by matrix 'w' and by tensor 'w'"),
    ],
)
def test_tensors_that_are_wrong(tmp_path: Path, changes: dict[str, torch.Tensor | None], message: str) -> None:
    path = tmp_path / "m"
    tensors = {name: tensor for name, tensor in (TENSORS | changes).items() if tensor is not None}
    write_raw(path, INDEX, tensors)
    with pytest.raises(FormatError, match=message) as caught:
        storage.read(path)
    assert str(caught.value).startswith(f"'{path}': ")
    assert str(caught.value).endswith("fetch it again, or save the model again.")


def test_bits_after_the_last_group(tmp_path: Path) -> None:
    write_raw(tmp_path / "m", entry(shape=[2, 4]), {"w.values": torch.ones(2, 2), "w.metadata": TENSORS["w.metadata"]})
    with pytest.raises(FormatError, match="matrix 'w': metadata has bits set after the last group of a row"):
        storage.read(tmp_path / "m")


def test_newer_versions_ask_for_an_upgrade(tmp_path: Path) -> None:
    write_raw(tmp_path / "m", {"version": 2, "anything": "else"}, TENSORS)
    with pytest.raises(
        FormatError, match=r"m': has version 2 of the format, this twofour reads up to 1\. Upgrade: pip install"
    ) as caught:
        storage.read(tmp_path / "m")
    assert "damaged" not in str(caught.value)


def test_unknown_notes_are_kept_and_unclaimed_tensors_are_dense(tmp_path: Path) -> None:
    index = entry(future={"a": [1]}) | {"later": 1}
    write_raw(
        tmp_path / "m", without("aliases", index), TENSORS | {"v.values": torch.ones(2), "v.metadata": torch.ones(3)}
    )
    contents = storage.read(tmp_path / "m")
    assert contents.notes == {"w": {"future": {"a": [1]}}}
    assert sorted(contents.tensors) == ["v.metadata", "v.values"]


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_one_wrong_byte_is_refused_or_harmless(tmp_path: Path, place: float, byte: int) -> None:
    raw = bytearray(whole_file(tmp_path))
    raw[int(place * len(raw))] = byte
    (tmp_path / "m").write_bytes(bytes(raw))
    try:
        contents = storage.read(tmp_path / "m")
    except FormatError:
        return
    for matrix in contents.matrices.values():
        assert bool((matrix.mask().unflatten(-1, (-1, matrix.pattern.group)).sum(-1) == matrix.pattern.keep).all())


# --- golden


def golden_contents() -> storage.Contents:
    """What tests/golden/version_1.safetensors holds, written out."""
    nan_payload = torch.tensor([[0x3F80, -0x8000, 0x7FC1, 0, 0x0001, 0, 0, -0x4000]], dtype=torch.int16).view(
        torch.bfloat16
    )
    every_code = torch.tensor([[1.0, 2, 0, 0, 3, 0, 4, 0, -5, 0, 0, 6, 0, 7, -8, 0, 0, 9, 0, 10, 0, 0, 11, -12]])
    mask = torch.tensor([[True, True, False, False, True, False, False, True]])
    numbers = torch.arange(-20, 20, dtype=torch.int8).view(5, 8)
    eighths = torch.tensor([[0.0, -0.125, 0, 0, 448, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 2**-9, 0]])
    return storage.Contents(
        matrices={
            "bf16": SparseMatrix.from_dense(nan_payload, "2:4", mask=mask),
            "codes": SparseMatrix.from_dense(every_code.bfloat16(), "2:4"),
            "fp8": SparseMatrix.from_dense(eighths.to(torch.float8_e4m3fn), "1:4"),
            "layer.weight": SparseMatrix.from_dense(numbers, "4:8", mask=random_golden_mask()),
        },
        tensors={"layer.bias": torch.tensor([1.5, -0.0, float("inf")]), "step": torch.tensor(7)},
        notes={"bf16": {"backend": "cpu"}, "codes": {}, "fp8": {}, "layer.weight": {}},
        aliases={"tied.weight": "layer.weight"},
        extra={"format": "pt"},
    )


def random_golden_mask() -> torch.Tensor:
    """4, 3, 2, 1 and 0 places in rows of 8."""
    rows = [0b01011010, 0b10000011, 0b00100100, 0b00000001, 0b00000000]
    return torch.tensor([[bool(row >> column & 1) for column in range(8)] for row in rows])


def test_the_golden_file_reads_as_it_always_did() -> None:
    found, expected = storage.read(GOLDEN), golden_contents()
    assert list(found.matrices) == list(expected.matrices)
    for name, matrix in expected.matrices.items():
        assert_same_matrix(found.matrices[name], matrix)
    assert list(found.tensors) == list(expected.tensors)
    for name, tensor in expected.tensors.items():
        assert_same_bits(found.tensors[name], tensor)
    assert (found.notes, found.aliases, found.extra) == (expected.notes, expected.aliases, expected.extra)


def test_the_golden_bytes_are_those_that_are_written_now(tmp_path: Path) -> None:
    golden = golden_contents()
    storage.write(
        tmp_path / "now",
        golden.matrices,
        golden.tensors,
        extra=golden.extra,
        notes=golden.notes,
        aliases=golden.aliases,
    )
    assert (tmp_path / "now").read_bytes() == GOLDEN.read_bytes()


def test_the_golden_numbers_written_out() -> None:
    found = storage.read(GOLDEN)
    assert found.matrices["codes"].metadata.tolist() == [[0x84, 0x9C, 0xED]]
    assert found.matrices["bf16"].to_dense().view(torch.int16).tolist() == [[0x3F80, -0x8000, 0, 0, 1, 0, 0, -0x4000]]
    assert found.matrices["fp8"].metadata.tolist() == [[0b11_11_00_01, 0b10]]
    assert found.matrices["fp8"].values.float().tolist() == [[-0.125, 448, 0, 1, 2**-9]]
    assert found.matrices["layer.weight"].metadata.tolist() == [[0x5A], [0x93], [0x74], [0x71], [0xF0]]
    assert found.matrices["layer.weight"].values.tolist()[0] == [-19, -17, -16, -14]
