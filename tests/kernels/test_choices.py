"""Kept measurements: found again, never in the way."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
import torch

from twofour.kernels import LinearSpec, choices, cpu, disk
from twofour.kernels.choices import Measured, Store, bucket, key
from twofour.pattern import Pattern

US = {"dense": 3.0, "onednn": 2.0, "sparse": 1.0}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TWOFOUR_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


def keep(name: str = "a", us: dict[str, float] | None = None) -> Store:
    store = Store.open()
    store.add(name, Measured.now(us or US))
    store.save()
    return store


def test_what_is_kept_is_found(folder: Path) -> None:
    assert keep().notes == []
    found = Store.open().get("a")
    assert found is not None
    assert found.us == US
    assert Store.open().get("b") is None
    record = json.loads(next(folder.glob("choices-*.json")).read_text())
    assert record["machine"]["torch"] == torch.__version__
    assert not list(folder.glob(".*.tmp"))


def test_writers_keep_what_others_wrote(folder: Path) -> None:
    first, second = Store.open(), Store.open()
    first.add("a", Measured.now(US))
    second.add("b", Measured.now(US))
    first.save()
    second.save()
    assert set(Store.open().entries) == {"a", "b"}


def _write_some(start: int) -> None:
    for index in range(start, start + 10):
        keep(str(index))


def test_processes_lose_nothing(folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write_some, args=(start,)) for start in (0, 10)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert set(Store.open().entries) == {str(index) for index in range(20)}


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (b"", "cannot be read (it is not JSON)"),
        (b"\xff\xfe", "cannot be read (it is not JSON)"),
        (b"[" * 100_000, "cannot be read (it is not JSON)"),
        (b"[]", "is damaged, or of another version"),
        (b'{"version": 2, "entries": {}}', "is damaged, or of another version"),
        (b'{"version": 1, "entries": []}', "is damaged, or of another version"),
        (b'{"version": 1, "entries": {"a": 1}}', "is damaged in parts"),
        (b'{"version": 1, "entries": {"a": {"date": "x", "us": {"dense": 1}}}}', "is damaged in parts"),
        (b'{"version": 1, "entries": {"a": {"date": "x", "us": {"dense": NaN, "sparse": 1}}}}', "is damaged in parts"),
        (b'{"version": 1, "entries": {"a": {"date": "x", "us": {"dense": -1, "sparse": 1}}}}', "is damaged in parts"),
        (b'{"version": 1, "entries": {"a": {"date": "x", "us": {"dense": true, "sparse": 1}}}}', "is damaged in parts"),
    ],
)
def test_damage_is_a_note_and_is_mended(folder: Path, content: bytes, note: str) -> None:
    file = choices.path()
    assert file is not None
    folder.mkdir()
    file.write_bytes(content)
    store = Store.open()
    assert store.entries == {}
    assert store.notes == [f"{file} {note}: its choices are measured again"]
    keep()
    assert Store.open().notes == []
    assert set(Store.open().entries) == {"a"}


def test_what_cannot_be_written_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("TWOFOUR_CACHE", str(blocked))
    store = keep()
    assert store.notes[-1].startswith(f"choices cannot be kept in {blocked}/choices-")
    folder = tmp_path / "folder"
    monkeypatch.setenv("TWOFOUR_CACHE", str(folder))
    file = choices.path()
    assert file is not None
    file.mkdir(parents=True)
    assert "cannot be read" in Store.open().notes[0]
    assert "choices cannot be kept" in keep().notes[-1]
    assert [path.name for path in folder.iterdir() if path.suffix == ".tmp"] == []


def test_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TWOFOUR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert disk.folder() == tmp_path / "twofour"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the XDG specification: to be ignored
    monkeypatch.setenv("HOME", str(tmp_path))
    assert disk.folder() == tmp_path / ".cache/twofour"
    for off in ("off", "OFF", ""):
        monkeypatch.setenv("TWOFOUR_CACHE", off)
        assert disk.folder() is None
        assert keep().notes == []
        assert Store.open().entries == {}
        assert choices.clear() == 0


def test_clearing_removes_every_file_of_choices_and_nothing_else(folder: Path) -> None:
    keep()
    (folder / "choices-0123.json").write_text("{}")
    (folder / "mine.json").write_text("{}")
    assert choices.clear() == 2
    assert [path.name for path in folder.iterdir()] == ["mine.json"]


def test_another_build_has_another_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = choices.path()
    monkeypatch.setattr(choices, "machine", lambda: {"torch": "another"})
    assert choices.path() != before


def test_the_machine_is_told_apart_by_its_instruction_set(native: None) -> None:
    assert choices.machine()["instruction set"] == cpu.isa()
    assert len(choices.machine()["native module"]) == 16


def test_buckets_are_close_and_stand_for_themselves() -> None:
    for tokens in range(1, 5000):
        standing = bucket(tokens)
        assert abs(standing - tokens) <= tokens / 16
        assert bucket(standing) == standing
    assert len({bucket(tokens) for tokens in range(1, 2**15)}) < 32 + 10 * 8 + 2


def test_keys_tell_apart_what_matters_and_are_found_by_shape(folder: Path) -> None:
    spec = LinearSpec(8, 4, Pattern(), torch.float32, torch.device("cpu"))
    other = LinearSpec(8, 4, Pattern.parse("2:4x4"), torch.float32, torch.device("cpu"))
    arguments = [
        (spec, "cpu", True, 1, 2),
        (spec, "cpu", True, 12, 2),
        (spec, "cpu", True, 1, 1),
        (spec, "cpu", False, 1, 2),
        (spec, "reference", True, 1, 2),
        (other, "cpu", True, 1, 2),
    ]
    names = [key(*each) for each in arguments]
    assert len(set(names)) == len(names)
    store = Store.open()
    for name in names:
        store.add(name, Measured.now(US))
    assert sorted(store.known(spec, "cpu", True, 2)) == [1, 12]
