"""What is kept of a run on a GPU: rows in a JSON, each with the digest of the code that its kernels were made of.

A row is fresh while that code is the repository's, and stale from its first change on. NVRTC and the architecture do not
count: the cubins of a run have digests of their own, which only tell runs apart.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]


def source_of(kernel: str) -> str | None:
    """Of a kernel of the table: its code, and what it is launched with; None for one that is not there."""
    from twofour.kernels.cuda import compiler, table

    text = table.KERNEL_TEXTS.get(kernel)
    if text is None:
        return None
    launched = f"{kernel} {text.threads} {text.dynamic_bytes} {compiler.source_digest(text.file, text.defines)}"
    return hashlib.sha256(launched.encode()).hexdigest()[:16]


def state(row: Row) -> str:
    """ "fresh", or "stale: " and why. Rows of no kernel of ours are stale: nothing says what they are of."""
    if not row.get("kernels"):
        return "stale: no kernel is named"
    for name, digest in row["kernels"].items():
        now = source_of(name)
        if now is None:
            return f"stale: {name} is gone"
        if now != digest:
            return f"stale: {name} has changed"
        grid = row.get("grids", {}).get(name)
        if name.startswith(("decode_", "gemm_")) and grid is not None and [name, *grid] != _planned(name, row):
            return f"stale: {name} is launched otherwise"
    return "fresh"


def _planned(name: str, row: Row) -> list[Any] | None:
    """The kernel, blocks, slices, and slices of a cluster if any, that this shape would be launched with on that GPU."""
    from twofour.kernels.cuda import decode, gemm

    try:
        shape, processors = (row["out_features"], row["in_features"]), row["processors"]
        if name.startswith("decode_"):
            clusters = tuple(row.get("clusters", {}).get(name, ()))
            few = decode.plan(name, *shape, processors, clusters)
            return [name, few.blocks, few.slices, *([few.slices] if few.cluster else [])]
        itemsize = 1 if row["dtype"] in ("int8", "fp8") else 2
        many = gemm.plan(*shape, row["tokens"], itemsize, processors, row["shared_bytes"])
        return [f"gemm_{row['dtype']}_{many.tile}", many.blocks, many.slices]
    except (AttributeError, KeyError, TypeError):  # of another time
        return None


def is_right(row: Row) -> bool:
    """Were the numbers of our kernel compared with float64 or with the specification in the same run, and right?"""
    return row.get("right", {}).get("twofour") is True


def results(folder: Path = RESULTS) -> list[tuple[Path, dict[str, Any]]]:
    """All results of GPUs below a folder, oldest first."""
    found = []
    for path in sorted(folder.glob("*/*.json")):
        with contextlib.suppress(ValueError):
            record = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(record, dict) and record.get("gpu") and isinstance(record.get("rows"), list):
                found.append((path, record))
    return sorted(found, key=lambda each: str(each[1].get("date", "")))


def fresh_rows(folder: Path = RESULTS) -> list[tuple[Path, Row]]:
    """Rows that are fresh and right, each with its file; of rows of the same case the newest."""
    newest: dict[tuple[Any, ...], tuple[Path, Row]] = {}
    for path, record in results(folder):
        if record.get("dry"):
            continue
        for row in record["rows"]:
            if state(row) == "fresh" and is_right(row):
                case = (record["gpu"], *(row.get(key) for key in CASE))
                newest[case] = (path, {**row, "gpu": record["gpu"]})
    return list(newest.values())


CASE = ("bench", "what", "out_features", "in_features", "dtype", "tokens")
"""What tells rows apart."""


class Part:
    """What a step has found: written after each row, so that a step that is stopped leaves what it had.

    Args:
        path: of its JSON; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._content: dict[str, Any] = {"rows": [], "facts": {}}
        self._write()

    def add(self, row: Row) -> None:
        """A row."""
        self._content["rows"].append(row)
        self._write()

    def tell(self, **facts: Any) -> None:
        """What is no measurement."""
        self._content["facts"].update(facts)
        self._write()

    def _write(self) -> None:
        if self._path is not None:
            write_json(self._path, self._content)


def read_part(path: Path) -> dict[str, Any]:
    """What a step has left, also one that was stopped."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return {"rows": found.get("rows", []), "facts": found.get("facts", {})}
    return {"rows": [], "facts": {}}


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(content, stream, indent=1)
            stream.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def launches() -> Iterator[dict[str, list[int]]]:
    """Names of the kernels of ours that are launched within, with their grids, and how many blocks are a cluster if any."""
    from twofour.kernels.cuda import table

    found: dict[str, list[int]] = {}
    originals = {name: value for name, value in vars(table).items() if name.startswith("launch") and callable(value)}

    def noting(function: Any) -> Any:
        def launch(name: str, grid: Any, *rest: Any, **named: Any) -> Any:
            found[name] = [*grid, named["cluster"]] if named.get("cluster", 1) > 1 else list(grid)
            return function(name, grid, *rest, **named)

        return launch

    for name, function in originals.items():
        setattr(table, name, noting(function))
    try:
        yield found
    finally:
        for name, function in originals.items():
            setattr(table, name, function)


def use_repository() -> None:
    """Lets scripts import `benchmarks` and `tests`."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
